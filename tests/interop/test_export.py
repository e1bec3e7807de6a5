"""Exported folders: loaded by transformers, and imported again."""

import errno
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from antransformer.bounds import norms
from antransformer.cli import main
from antransformer.comparison.summary import summary
from antransformer.data import Tokenizer, byte_tokenizer, train_bpe
from antransformer.errors import CheckpointError, ConfigError, MachineError
from antransformer.inference import generate
from antransformer.interop.export import export
from antransformer.interop.import_hf import exported_name, import_folder
from antransformer.interop.model_card import card
from antransformer.models import ModelConfig
from antransformer.models.registry import BUILT_IN
from antransformer.results.comparison import ChosenSettings, Results, Run, Variant
from antransformer.training import run_folder as runs
from antransformer.training.checkpointing import checkpoint
from antransformer.training.metrics import read_metrics
from helpers.exported import SIZES, make_run
from helpers.messages import mentions
from helpers.small import SMALL_OPTIONS, Watch

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
END = 256


def exported(folder, architecture="angpt", tokenizer=None, model=(), **options):
    """Return the model of a run and the folder that it is exported to."""
    ours = make_run(folder / "run", architecture, tokenizer, **dict(model))
    export(*runs.open_checkpoint(folder / "run"), folder / "hf", **options)
    return ours, folder / "hf"


@pytest.fixture(scope="module", params=BUILT_IN)
def pair(request, tmp_path_factory):
    """Our model, and the exported model loaded by transformers."""
    ours, folder = exported(tmp_path_factory.mktemp("pair"), request.param)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert not theirs.training
    return ours, theirs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of an exported anGPT."""
    return exported(tmp_path_factory.mktemp("angpt"))[1]


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def some_tokens(batch=2, length=48, seed=0):
    return torch.randint(0, 257, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(prompts):
    longest = max(map(len, prompts))
    ids = torch.tensor([[END] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def rows(page):
    """Rows of the tables in a Markdown page."""
    return [line for line in page.splitlines() if line.startswith("|") and line.strip("|- ")]


def has_row(page, *parts):
    return any(mentions(row, *parts) for row in rows(page))


def continued(model, inputs, **options):
    """New tokens of greedy generation."""
    inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    settings = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": None, "pad_token_id": END, **options}
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()


# The model


@torch.no_grad()
def test_transformers_computes_the_same_function(pair):
    ours, theirs = pair
    tokens = some_tokens()
    assert type(theirs).__name__ == "AntransformerForCausalLM" and theirs.dtype == torch.float32
    output = theirs(tokens, labels=tokens)
    torch.testing.assert_close(output.logits, ours(tokens), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, ours.loss(tokens[:, :-1], tokens[:, 1:]))
    weights = theirs.state_dict()
    assert {name: value.shape for name, value in weights.items()} == {
        exported_name(name, weights): value.shape for name, value in ours.state_dict().items()
    }


@torch.no_grad()
def test_exported_ngpt_uses_the_absolute_value_of_alpha(tmp_path):
    ours = make_run(tmp_path / "run", "ngpt")
    for name, value in ours.named_parameters():
        if name.endswith("residual.alpha.value"):
            value.abs_()[::2].neg_()
    checkpoint.save(tmp_path / "run" / runs.CHECKPOINTS, 30, ours, torch.optim.Adam(ours.parameters()), {}, keep=1)
    export(*runs.open_checkpoint(tmp_path / "run"), tmp_path / "hf")
    theirs = load(tmp_path / "hf")
    negative = theirs(some_tokens()).logits
    torch.testing.assert_close(negative, ours(some_tokens()), rtol=1e-5, atol=1e-5)
    for name, value in theirs.named_parameters():
        if name.endswith("residual.alpha.value"):
            assert value.min() < 0
            value.abs_()
    assert torch.equal(theirs(some_tokens()).logits, negative)


def test_gradients_and_bounds_are_equal(pair):
    ours, theirs = pair
    tokens = some_tokens()
    ours.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    theirs(tokens, labels=tokens).loss.backward()
    parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        copied = parameters[exported_name(name, parameters)]
        gradient = copied.grad
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5 * parameter.grad.abs().max().item())
        parameter.grad = copied.grad = None
    listed = [
        [(exported_name(bound.name, parameters), bound.axis, bound.strict) for bound in model.bounds()]
        for model in pair
    ]
    assert listed[0] == listed[1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_generation_is_equal_for_single_prompts_and_in_a_padded_batch(pair, attention):
    ours, theirs = pair
    steps = list(generate(ours, PROMPTS, max_new_tokens=25, temperature=0))
    expected = [[step[row] for step in steps] for row in range(len(PROMPTS))]
    assert len({tuple(tokens) for tokens in expected}) == 3
    theirs.set_attn_implementation(attention)
    assert continued(theirs, padded(PROMPTS)) == expected
    assert [continued(theirs, torch.tensor([prompt]))[0] for prompt in PROMPTS] == expected
    assert continued(theirs, padded(PROMPTS), use_cache=False) == expected
    assert continued(theirs, padded(PROMPTS), cache_implementation="static") == expected
    theirs.set_attn_implementation("sdpa")


@torch.no_grad()
def test_a_cache_may_be_filled_in_chunks(pair):
    theirs, tokens = pair[1], some_tokens(length=20)
    logits, cache, parts = theirs(tokens).logits, None, []
    for chunk in tokens.split([7, 1, 12], dim=1):
        output = theirs(chunk, cache=cache, use_cache=True)
        cache = output[-1]  # by position, since transformers 5.24 renamed it
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), logits, rtol=1e-5, atol=1e-6 * logits.abs().max().item())
    assert len(theirs(tokens, use_cache=False)) == 1
    assert torch.equal(
        theirs(tokens[:, :1], past_key_values=theirs(tokens)[-1]).logits,
        theirs(tokens[:, :1], cache=theirs(tokens)[-1]).logits,
    )
    torch.testing.assert_close(theirs(tokens, logits_to_keep=2).logits, logits[:, -2:])
    embedded = theirs.get_input_embeddings()(tokens)
    torch.testing.assert_close(theirs(inputs_embeds=embedded).logits, logits)
    with pytest.raises(ValueError, match="inputs_embeds"):
        theirs(tokens, inputs_embeds=embedded)


@torch.no_grad()
def test_hidden_states_and_attentions_are_returned(folder):
    theirs, tokens = load(folder, attn_implementation="eager"), some_tokens(length=10)
    output = theirs(tokens, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 10, 64)] * 4
    torch.testing.assert_close(theirs.logits(output.hidden_states[-1]), output.logits)
    for weights in output.attentions:
        assert weights.shape == (2, 4, 10, 10) and torch.all(weights.triu(1) == 0)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 10))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_has_the_error_of_our_own_model(tmp_path, name):
    ours, folder = exported(tmp_path, dtype=name)
    dtype = getattr(torch, name)
    theirs, tokens = load(folder), some_tokens()
    assert json.loads((folder / "config.json").read_text())["dtype"] == name
    with torch.no_grad():
        exact, logits = load(folder, dtype=torch.float32)(tokens).logits, theirs(tokens).logits
        assert theirs.dtype == logits.dtype == dtype
        # The two implementations round in different places, so only the sizes of their errors can be compared.
        theirs_error, ours_error = (
            float((rounded.float() - exact).norm() / exact.norm()) for rounded in (logits, ours.to(dtype)(tokens))
        )
        assert theirs_error < 1.5 * ours_error < 10 * torch.finfo(dtype).eps


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # renamed by transformers
def test_gradient_checkpointing_changes_no_gradient(pair):
    theirs, tokens = pair[1].train(), some_tokens()
    gradients = []
    for prepare in (theirs.gradient_checkpointing_disable, theirs.gradient_checkpointing_enable):
        prepare()
        theirs(tokens, labels=tokens).loss.backward()
        gradients.append([parameter.grad for parameter in theirs.parameters()])
        theirs.zero_grad()
    theirs.eval().gradient_checkpointing_disable()
    assert all(torch.equal(*pairs) for pairs in zip(*gradients, strict=True))


@pytest.mark.parametrize("architecture", BUILT_IN)
def test_a_model_from_a_configuration_is_initialized_correctly(architecture):
    from antransformer.interop.modeling_antransformer import AntransformerConfig, AntransformerForCausalLM

    torch.manual_seed(0)
    options = ModelConfig(architecture=architecture, **SIZES).mapping()
    model = AntransformerForCausalLM(AntransformerConfig(**options))
    tokens = some_tokens(batch=8)
    assert 5.5 < model(tokens, labels=tokens).loss < 6.2  # log 257 = 5.55
    rows = torch.cat([weight.detach().norm(dim=1) for weight in model.parameters() if weight.ndim == 2])
    assert rows.mean().item() == pytest.approx(1, abs=0.05)


# Pipelines and Trainer


def test_a_pipeline_generates_text(folder):
    pipe = transformers.pipeline("text-generation", model=str(folder))
    prompts = ["to be", "not to be, that is", "ä"]
    options = {"max_new_tokens": 8, "do_sample": False}
    single = [pipe(prompt, **options)[0]["generated_text"] for prompt in prompts]
    assert all(text.startswith(prompt) for text, prompt in zip(single, prompts, strict=True))
    batched = pipe(prompts, batch_size=3, **options)
    assert [texts[0]["generated_text"] for texts in batched] == single


def test_a_model_saved_by_transformers_is_identical_and_complete(folder, tmp_path):
    first = load(folder)
    first.save_pretrained(tmp_path / "again")
    second = load(tmp_path / "again")
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert second.config.to_dict() | {"_name_or_path": 0} == first.config.to_dict() | {"_name_or_path": 0}
    for name in ("modeling_antransformer.py", "configuration_antransformer.py", "config.json"):
        assert (tmp_path / "again" / name).read_text() == (folder / name).read_text()


class Sequences(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        tokens = some_tokens(1, 24, seed=index)[0] % 20
        return {"input_ids": tokens, "labels": tokens}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("architecture", ["angpt", "ngpt"])
def test_trainer_keeps_the_bounds_after_bind(tmp_path, architecture):
    pytest.importorskip("accelerate")
    model = load(exported(tmp_path, architecture)[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    watch = Watch(model, optimizer)
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        gradient_checkpointing=True,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=Sequences(), optimizers=(optimizer, None))
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 16 and losses[-1] < losses[0] - 1
    assert watch.steps == 16 and len(watch.bounds) == len(model.bounds()) == 2 + 5 * SIZES["layers"]
    assert torch.cat([norms(bound).flatten() for bound in model.bounds()]).mean() > 0.9


# The folder


def test_the_folder_has_the_files_and_fields_of_transformers(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["AntransformerForCausalLM"] and config["dtype"] == "float32"
    assert config["auto_map"] == {
        "AutoConfig": "configuration_antransformer.AntransformerConfig",
        "AutoModel": "modeling_antransformer.AntransformerModel",
        "AutoModelForCausalLM": "modeling_antransformer.AntransformerForCausalLM",
    }
    assert not config["tie_word_embeddings"]
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16}
    sizes |= {"intermediate_size": 256, "max_position_embeddings": 48, "vocab_size": 257}
    assert sizes.items() <= config.items() and config["format_version"] == 2
    loaded = transformers.AutoConfig.from_pretrained(folder)
    assert (loaded.width, loaded.layers, loaded.heads, loaded.context) == (64, 3, 4, 48)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == generation["bos_token_id"] == END
    assert generation["pad_token_id"] == config["pad_token_id"] == 0xFF
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1  # equal permissions
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_large_weights_are_split_into_several_files(tmp_path):
    ours, folder = exported(tmp_path, max_shard_size="200KB")
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(files) > 2 and (folder / "model.safetensors.index.json").is_file()
    with torch.no_grad():
        torch.testing.assert_close(load(folder)(some_tokens()).logits, ours(some_tokens()), rtol=1e-5, atol=1e-5)
    import_folder(folder, tmp_path / "back")
    back = checkpoint.restore(runs.open_checkpoint(tmp_path / "back")[0], torch.device("cpu"))
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in back.state_dict().items())


def test_ids_outside_the_tokenizer_are_not_generated(tmp_path):
    folder = exported(tmp_path, model={"vocab_size": 300})[1]
    model = load(folder)
    with torch.no_grad():
        model.lm_head.weight[257:] = model.lm_head.weight[10] * 50
    assert max(continued(model, torch.tensor([[1, 2]]))[0]) < 257


def test_the_card_describes_the_training(tmp_path):
    ours, folder = exported(tmp_path, summary="anGPT won.")
    text = (folder / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "transformers"
    assert mentions(text, f"{ours.parameter_count():,}", "anGPT won.") and "antransformer.bind(" in text
    for parts in (
        ("2505.22014",),  # the paper of the architecture
        ("64", "3", "4", "16", "48"),
        ("data/mine",),
        ("3,840", "20", "192"),
        ("0.012", "0.017", "0.024", "1%", "9,600"),
        ("2.7500",),
        ("2.8750", "4.2500"),
    ):
        assert has_row(text, *parts), parts
    assert not has_row(text, "10%")  # no warm-up
    export(*runs.open_checkpoint(tmp_path / "run"), tmp_path / "again")
    again = (tmp_path / "again/README.md").read_text()
    assert again.count("\n## ") == text.count("\n## ") - 1 and "anGPT won." not in again
    plain = (exported(tmp_path / "gpt+", "gpt+")[1] / "README.md").read_text()
    assert "antransformer.bind" not in plain and has_row(plain, "10%", "1%", "9,600")


def test_the_card_of_a_run_in_an_experiment_has_its_summary(tmp_path):
    runs_of = {"gpt+": (3.0, 3.2), "angpt": (2.0, 2.1)}
    variants = tuple(
        Variant(
            name,
            {},
            1000,
            (),
            tuple(Run(9_600, seed, loss, loss, 1.0, name) for seed, loss in enumerate(losses, 1)),
            (ChosenSettings(9_600, 0, {"lr": 0.01}),),
        )
        for name, losses in runs_of.items()
    )
    results = Results("compare", {}, (9_600,), (1, 2), variants)
    make_run(tmp_path / "runs/angpt")
    words = ["export", "--checkpoint", str(tmp_path / "runs/angpt"), "--out"]
    (tmp_path / "results.json").write_text("somebody else's")
    assert main([*words, str(tmp_path / "before")]) == 0
    results.save(tmp_path)
    (tmp_path / "report.html").touch()
    for name in ("loss-tokens.png", "alpha-angpt.png"):
        (tmp_path / name).write_bytes(name.encode())
    assert main([*words, str(tmp_path / "after")]) == 0
    before, text = ((tmp_path / name / "README.md").read_text() for name in ("before", "after"))
    assert text.count("\n## ") == before.count("\n## ") + 1
    assert mentions(text, summary(results), "GPT+") and not mentions(before, "GPT+")
    assert "![loss-tokens](loss-tokens.png)" in text and ".png" not in text.replace("loss-tokens.png", "")
    assert (tmp_path / "after/loss-tokens.png").read_bytes() == b"loss-tokens.png"


def test_the_card_has_only_the_scores_of_its_step(tmp_path):
    make_run(tmp_path / "run")
    part = {"task": "blimp_part", "metric": "acc", "value": 0.25, "stderr": None, "items": 8}
    group = {**part, "task": "blimp", "value": 0.5, "stderr": 0.125, "items": 1000}
    infinite = {**part, "task": "book.txt", "value": None}
    results = [{"name": "blimp", "scores": [group, part]}, {"name": "book.txt", "scores": [infinite]}]
    file = tmp_path / "run/evaluation.json"
    file.write_text(json.dumps({"step": 20, "results": results}))
    opened, tokenizer = runs.open_checkpoint(tmp_path / "run")
    text = card(opened, tokenizer, "name", "native", "float32", "checked")
    assert "| blimp | acc | 0.5000 ± 0.1250 | 1,000 |" in text
    assert "blimp_part" not in text and "book.txt" not in text
    file.write_text(file.read_text().replace("20", "10"))
    other = card(opened, tokenizer, "name", "native", "float32", "checked")
    assert "blimp" not in other and other.count("\n## ") == text.count("\n## ") - 1
    for content in ("{", "[]", '{"step": 20}'):
        file.write_text(content)
        with pytest.raises(CheckpointError, match=r"run/evaluation\.json"):
            card(opened, tokenizer, "name", "native", "float32", "checked")


# The tokenizer

TEXTS = [
    "",
    "to be or not to be",
    " naïve 日本 🎉!\r\n\t x's 'm .\x00",
    "a <|endoftext|> b",
    "e\u0301 \u00e9 \ufffd \u200d\U0001f469",
    "trailing  ",
    "\xff \u0178 <|antransformer_pad|>",
]


def with_affixes():
    """Tokenizer whose post-processor adds a token before every text, as in many published files."""
    from tokenizers import processors

    tokenizer = train_bpe(TEXTS * 3, 270)
    tokenizer._library.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.end_of_text)]
    )
    return tokenizer


@pytest.fixture(scope="module", params=[byte_tokenizer, lambda: train_bpe(TEXTS * 3, 270), with_affixes])
def tokenizers(request, tmp_path_factory):
    """Our tokenizer, and the exported one loaded by transformers."""
    ours = request.param()
    folder = exported(tmp_path_factory.mktemp("tokenizer"), tokenizer=ours, model={"vocab_size": 270})[1]
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


def test_the_tokenizer_has_our_ids_and_round_trips(tokenizers):
    ours, theirs = tokenizers
    for text in TEXTS:
        assert theirs(text).input_ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == theirs.bos_token_id == ours.end_of_text != theirs.pad_token_id
    assert theirs.decode([ours.end_of_text, *ours.encode("x")], skip_special_tokens=True) == "x"
    batch = theirs(["a", "bcd"], padding=True, return_tensors="pt")
    assert batch.attention_mask[0].tolist() == sorted(batch.attention_mask[0].tolist())  # padded on the left
    assert theirs.model_max_length == 48


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_survives_the_byte_tokenizer(bytes_of_transformers, text):
    ids = bytes_of_transformers(text).input_ids
    assert ids == list(text.encode()) and bytes_of_transformers.decode(ids) == text


@pytest.fixture(scope="module")
def bytes_of_transformers(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


# Loading with and without this package

WITHOUT_PACKAGE = """
import os, sys
sys.modules["antransformer"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch
folder, out = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("loaded without the package, and without trust")
print("\\nTRUSTED")  # after the prompt that asks whether to trust the code
os.chdir(os.path.dirname(folder))
with open(folder + "/README.md") as card:
    exec(card.read().split("```python")[1].split("```")[0])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("to be", return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=None)[0].tolist()
model.save_pretrained(out)
again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
assert not any(name.startswith("antransformer") and sys.modules[name] for name in sys.modules)
print(ids)
"""


def python(code, *arguments, **environment):
    """Run code in a new offline Python process and return its output."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_folder_loads_without_this_package(tmp_path):
    ours, folder = exported(tmp_path)
    printed = python(WITHOUT_PACKAGE, folder, tmp_path / "again", HF_HOME=str(tmp_path / "home"))
    [expected] = [[step[0] for step in generate(ours, [[*b"to be"]], max_new_tokens=20, temperature=0)]]
    after = printed.partition("TRUSTED\n")[2]
    assert json.loads(after.splitlines()[-1]) == [*b"to be", *expected]
    assert "Once" in after and "y/N" not in after  # the code in the card ran without a question


@pytest.mark.parametrize(
    "imports",
    [
        "from transformers import AutoModelForCausalLM\nimport antransformer",
        # Qwen3 imports the Auto classes while it is loaded.
        "import antransformer\nassert 'transformers' not in sys.modules\n"
        "from transformers import Qwen3ForCausalLM, AutoModelForCausalLM",
    ],
)
def test_models_are_registered_in_any_order_of_imports(folder, imports):
    code = f"import sys\n{imports}\nprint(AutoModelForCausalLM.from_pretrained(sys.argv[1]).config.architecture)"
    assert python(code, folder) == "angpt\n"


def test_an_outdated_transformers_can_still_be_imported(tmp_path):
    (tmp_path / "transformers.py").write_text("class AutoConfig: pass\n")
    code = "import antransformer, transformers\nprint(transformers.__file__)"
    assert python(code, PYTHONPATH=str(tmp_path)) == f"{tmp_path / 'transformers.py'}\n"


# Import and the command line


def test_an_imported_run_is_equal_to_the_exported_one(tmp_path):
    for architecture in BUILT_IN:
        ours, folder = exported(tmp_path / architecture, architecture)
        import_folder(folder, tmp_path / architecture / "back")
        opened, tokenizer = runs.open_checkpoint(tmp_path / architecture / "back")
        assert opened.step == 0 and opened.model == ours.config
        assert tokenizer.vocabulary() == byte_tokenizer().vocabulary()
        back = checkpoint.restore(opened, torch.device("cpu")).state_dict()
        assert all(torch.equal(value, back[name]) for name, value in ours.state_dict().items())


def test_export_import_and_training_from_it(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = ["--batch-tokens=256", "--tokens=5120", "--eval-tokens=1024", "--log-every=1"]
    assert main(["train", "--data", str(corpus), "--out", "runs/first", *quick, *SMALL_OPTIONS]) == 0
    assert main(["export", "--checkpoint", "runs/first", "--out", "hf", "--dtype", "bfloat16"]) == 0
    assert mentions(capsys.readouterr().out, "hf", "angpt", "20", "bfloat16")
    model = load(tmp_path / "hf")  # as a user would save a fine-tuned model
    model.save_pretrained(tmp_path / "hf2")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "hf2")
    assert main(["import", "hf2", "--out", "runs/back"]) == 0
    assert mentions(capsys.readouterr().out, "--checkpoint runs/back", "--init runs/back")
    assert main(["generate", "--checkpoint", "runs/back", "--prompt", "to", "--max-new-tokens", "5"]) == 0
    assert main(["diagnose", "--checkpoint", "runs/back", "--data", str(corpus), "--tokens", "1K"]) == 0
    capsys.readouterr()
    train = ["train", "--init", "runs/back", "--data", str(corpus), "--out", "runs/second", *quick]
    assert main([*train, "--lr", "1e-3"]) == 0
    assert mentions(capsys.readouterr().out, "runs/back/checkpoints/step-00000000")
    lines = [read_metrics(tmp_path / "runs" / name / "metrics.jsonl") for name in ("first", "second")]
    assert lines[1][-1]["val_loss"] < lines[0][-1]["val_loss"]
    assert main(["train", "--out", "runs/second", "--resume"]) == 0  # --init is not read again
    assert "runs/back" not in capsys.readouterr().out
    assert read_metrics(tmp_path / "runs/second/metrics.jsonl") == lines[1]
    pages = []
    for name, out in (("back", "hf3"), ("second", "hf4")):
        assert main(["export", "--checkpoint", f"runs/{name}", "--out", out]) == 0
        pages.append((tmp_path / out / "README.md").read_text())
    imported, trained = pages
    assert has_row(trained, "runs/back") and has_row(trained, str(corpus)) and has_row(trained, "5,120", "20", "256")
    assert not has_row(imported, "runs/back") and not has_row(imported, str(corpus))
    assert len(rows(imported)) < len(rows(trained)) - 5  # the training settings are unknown


def wrong(arguments, capsys):
    """Run a verb, which must exit with status 2, and return its one-line error."""
    assert main([str(word) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("antransformer: error: ") and error.count("\n") == 1
    return error


def test_wrong_exports_are_refused(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "run")
    words = ["export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "hf"]
    assert mentions(wrong([*words, "--max-shard-size", "big"], capsys), "max-shard-size", "big", "5GB")
    assert mentions(wrong([*words, "--dtype", "int8"], capsys), "--dtype", "int8", "bfloat16")
    assert mentions(wrong(["export", "--checkpoint", "nowhere", *words[3:]], capsys), "nowhere")
    file = tmp_path / "run/config.yaml"
    (tmp_path / "loop").symlink_to("loop")
    for taken in (tmp_path / "run", file, tmp_path / "loop"):
        assert mentions(wrong([*words[:4], taken], capsys), str(taken), "--out")
    reason = os.strerror(errno.ENOTDIR)
    assert mentions(wrong([*words[:4], file / "hf"], capsys), str(file / "hf"), reason, "--out")
    make_run(tmp_path / "ablated", ablation="no-lerp")
    ablated = ["export", "--checkpoint", tmp_path / "ablated", *words[3:]]
    assert mentions(wrong(ablated, capsys), str(tmp_path / "ablated"), "no-lerp")
    state = next((tmp_path / "run/checkpoints").iterdir()) / "state.json"
    content = state.read_text()
    state.write_text(content.replace('"version": 2', '"version": 9'))
    assert mentions(wrong(words, capsys), str(state.parent), 9, checkpoint.VERSION)
    state.write_text(content)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        assert mentions(wrong(words, capsys), "transformers", "antransformer[hf]")
        patch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))  # too old for the Auto classes
        assert mentions(wrong(words, capsys), "transformers", "--upgrade", "antransformer[hf]")
    with pytest.raises(ConfigError, match="int8"):
        export(*runs.open_checkpoint(tmp_path / "run"), tmp_path / "hf", dtype="int8")
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob(".partial*"))


def test_the_current_folder_can_be_exported_to(tmp_path, monkeypatch):
    make_run(tmp_path / "run")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(*runs.open_checkpoint(tmp_path / "run"), Path())
    assert (tmp_path / "here/config.json").is_file() and "# here\n" in (tmp_path / "here/README.md").read_text()


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    reason = os.strerror(errno.ENOSPC)

    def full(*_arguments, **_options):
        raise SafetensorError(reason)

    make_run(tmp_path / "run")
    monkeypatch.setattr("antransformer.interop.export.transformers_tokenizer", full)
    with pytest.raises(MachineError) as error:
        export(*runs.open_checkpoint(tmp_path / "run"), tmp_path / "hf")
    assert mentions(str(error.value), str(tmp_path / "hf"), reason)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_broken_folders_are_not_imported(folder, tmp_path, capsys):
    words = ["import", tmp_path / "hf", "--out", tmp_path / "run"]

    def error_after(name, change):
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "hf")
        file = tmp_path / "hf" / name
        text = None if name.endswith(".safetensors") else change(file.read_text())
        file.unlink()
        if text is not None:
            file.write_text(text)
        return wrong(words, capsys)

    source = str(tmp_path / "hf")
    assert mentions(wrong(words, capsys), source, "config.json", os.strerror(errno.ENOENT))
    for content in ('{"width": 6', "[]"):
        assert mentions(error_after("config.json", lambda _, content=content: content), f"{source}/config.json", "JSON")
    other = error_after(
        "config.json", lambda text: text.replace('"model_type": "antransformer"', '"model_type": "gpt2"')
    )
    assert mentions(other, source, "'gpt2'", "'antransformer'")
    missing = error_after("config.json", lambda text: text.replace('"hidden_size"', '"hidden"'))
    assert mentions(missing, f"{source}/config.json", "hidden_size")
    spelled = error_after("config.json", lambda text: text.replace(": 64", ': "64"'))
    assert mentions(spelled, f"{source}/config.json", "hidden_size", "'64'")
    later = error_after("config.json", lambda text: text.replace('"format_version": 2', '"format_version": 3'))
    assert mentions(later, f"{source}/config.json", "format_version", 3, 2)
    quantized = error_after("config.json", lambda text: text.replace("{", '{"quantization_config": {}, ', 1))
    assert mentions(quantized, source, "quantized")
    other_shape = error_after("config.json", lambda text: text.replace(": 64", ": 128"))
    assert mentions(other_shape, source)
    for name in ("model.safetensors", "tokenizer.json"):
        assert mentions(error_after(name, lambda text: "{}"), f"{source}/{name}")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes").touch()
    shutil.rmtree(tmp_path / "hf")
    shutil.copytree(folder, tmp_path / "hf")
    assert mentions(wrong(words, capsys), str(tmp_path / "run"), "--out")


def test_weights_of_another_shape_or_tokenizer_are_refused_as_init(folder, corpus, tmp_path, capsys):
    import_folder(folder, tmp_path / "back")
    train = ["train", "--init", tmp_path / "back", "--data", corpus, "--out", tmp_path / "new"]
    back = str(tmp_path / "back")
    assert mentions(wrong([*train, "--model.width=128"], capsys), back, "model.width", "64", "128")
    assert mentions(wrong([*train, "--architecture=gpt+"], capsys), back, "model.architecture", "angpt", "gpt+")
    assert mentions(wrong(["train", "--init", tmp_path / "nowhere"], capsys), str(tmp_path / "nowhere"))
    assert mentions(wrong(["train", "--resume", "--out", back], capsys), f"--init {back}")
    (tmp_path / "text").mkdir()
    for number in range(12):
        (tmp_path / f"text/{number}.txt").write_text(f"document {number}: to be or not to be. " * 40)
    prepare = ["prepare", tmp_path / "text", "--out", tmp_path / "bpe", "--bpe-vocab-size=257", "--val-fraction=0.4"]
    assert main([str(word) for word in prepare]) == 0
    capsys.readouterr()
    other = wrong([*train[:3], "--data", tmp_path / "bpe", *train[5:], "--batch-tokens=192", "--tokens=1K"], capsys)
    assert mentions(other, str(tmp_path / "bpe"), f"--tokenizer {back}")
    assert Tokenizer.load(tmp_path / "bpe").vocab_size == 257 and not (tmp_path / "new").exists()
