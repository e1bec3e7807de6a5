"""Exported folders: loaded by transformers, with and without this package, and the command line."""

import copy
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

from antransformer.bounds import norms
from antransformer.data import Dataset
from antransformer.errors import ConfigError, MachineError
from antransformer.inference import generate
from antransformer.interop import verification
from antransformer.interop.export import export
from antransformer.interop.import_hf import exported_name, import_folder
from antransformer.models import ModelConfig
from antransformer.models.registry import BUILT_IN
from antransformer.training import run_folder as runs
from antransformer.training.checkpointing import checkpoint
from helpers.commands import refused
from helpers.exported import SIZES, exported, load, make_run, some_tokens
from helpers.messages import mentions
from helpers.small import Watch

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
END = 256


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


def padded(prompts):
    longest = max(map(len, prompts))
    ids = torch.tensor([[END] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def losses_of_padded_and_single_prompts(model):
    """Mean loss of the prompts of two tokens or more, and their logits: padded on the left, and one by one."""
    batch, prompts = padded(PROMPTS), [torch.tensor([prompt]) for prompt in PROMPTS]
    real = batch["attention_mask"].cumsum(-1)
    output = model(**batch, labels=batch["input_ids"].masked_fill(real < 2, -100))  # no prediction from padding
    yield output.loss, output.logits[real > 0]
    losses = [model(row, labels=row).loss * (row.shape[1] - 1) for row in prompts if row.shape[1] > 1]
    yield sum(losses) / int((real > 1).sum()), torch.cat([model(row).logits[0] for row in prompts])


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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_the_left_changes_no_logit_and_no_gradient(pair, attention):
    _, theirs = pair
    theirs.set_attn_implementation(attention)
    logits, gradients = [], []
    for loss, real in losses_of_padded_and_single_prompts(theirs):
        loss.backward()
        logits.append(real)
        gradients.append([parameter.grad for parameter in theirs.parameters()])
        theirs.zero_grad()
    theirs.set_attn_implementation("sdpa")
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    for batch, single in zip(*gradients, strict=True):
        torch.testing.assert_close(batch, single, rtol=1e-4, atol=1e-5 * single.abs().max().item())


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_a_padded_batch_continues_from_a_cache_without_positions(pair, static):
    _, theirs = pair
    ids, mask = padded(PROMPTS).values()
    expected = torch.stack([theirs(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])
    cache = transformers.StaticCache(config=theirs.config, max_cache_len=12) if static else transformers.DynamicCache()
    theirs(ids[:, :-1], mask[:, :-1], past_key_values=cache, use_cache=True)
    # A static cache may have a mask of its own size, which hides nothing that is not yet there.
    mask = torch.cat([mask, mask.new_zeros(len(mask), 12 - mask.shape[1])], 1) if static else mask
    logits = theirs(ids[:, -1:], mask, past_key_values=cache, use_cache=True).logits[:, 0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["angpt", "ngpt"])
def test_a_padded_batch_in_bfloat16_has_the_logits_of_single_prompts_and_finite_gradients(tmp_path, architecture):
    theirs = load(exported(tmp_path, architecture, dtype="bfloat16")[1])
    (loss, batch), (_, single) = losses_of_padded_and_single_prompts(theirs)
    torch.testing.assert_close(batch, single, rtol=0.05, atol=0.05)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in theirs.parameters())


@torch.no_grad()
def test_a_step_with_a_static_cache_compiles_without_positions(pair):
    _, theirs = pair
    tokens = some_tokens()
    expected = theirs(tokens).logits[:, -1:]
    cache = transformers.StaticCache(config=theirs.config, max_cache_len=tokens.shape[1])
    theirs(tokens[:, :-1], past_key_values=cache)
    step = torch.compile(theirs, backend="eager", fullgraph=True)
    torch.testing.assert_close(step(tokens[:, -1:], past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")  # renamed by transformers
def test_other_ways_of_generation(pair):
    theirs, tokens = pair[1], torch.tensor([[*b"to be, to be, to"]])
    greedy = continued(theirs, tokens)
    assert continued(theirs, tokens, prompt_lookup_num_tokens=3, eos_token_id=257) == greedy  # of no token
    assert continued(theirs, tokens, assistant_model=copy.deepcopy(theirs)) == greedy
    embeddings = {"inputs_embeds": theirs.get_input_embeddings()(tokens), "input_ids": tokens}
    assert continued(theirs, embeddings) == greedy
    first = theirs.generate(
        tokens, max_new_tokens=9, do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_scores=True
    )
    scores = torch.stack(first.scores, dim=1)
    torch.testing.assert_close(scores, theirs(first.sequences).logits[:, -10:-1], rtol=1e-4, atol=1e-4)
    rest = {"input_ids": first.sequences, "past_key_values": first[-1]}
    assert continued(theirs, rest, max_new_tokens=16) == [greedy[0][9:]]
    beams = continued(theirs, tokens, num_beams=4, num_return_sequences=4)
    chosen = torch.tensor([*greedy, *beams])
    logits = theirs(torch.cat([tokens.expand(5, -1), chosen], dim=1)).logits[:, -26:-1]
    likelihoods = logits.log_softmax(-1).gather(-1, chosen.unsqueeze(-1)).sum((1, 2)).tolist()
    assert likelihoods[1:] == sorted(likelihoods[1:], reverse=True) and likelihoods[1] >= likelihoods[0] - 1e-4
    torch.manual_seed(0)
    assert len({tuple(line) for line in continued(theirs, tokens.expand(4, -1), do_sample=True, top_k=20)}) == 4


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
    own = ModelConfig(architecture=architecture, **SIZES).mapping()
    own.pop("init_std", None)  # None in a configuration is 1 / sqrt(width), the default
    config = AntransformerConfig(architecture=architecture, **SIZES)
    assert all(getattr(config, name) == value for name, value in own.items() if hasattr(config, name))
    assert all(getattr(config, name) is None for name in ("alpha_init", "s_scale", "gate_scale") if name not in own)
    model = AntransformerForCausalLM(config)
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


# Loading with and without this package

WITHOUT_PACKAGE = """
import os, sys
sys.modules["antransformer"] = None
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
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
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
torch.testing.assert_close(model.logits(base(**inputs).last_hidden_state), model(**inputs).logits)
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


# The command line


def test_wrong_exports_are_refused(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "run")
    words = ["export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "hf"]
    assert mentions(refused([*words, "--max-shard-size", "big"], capsys), "max_shard_size", "big", "5GB")
    assert mentions(refused([*words, "--dtype", "int8"], capsys), "--dtype", "int8", "bfloat16")
    assert mentions(refused(["export", "--checkpoint", "nowhere", *words[3:]], capsys), "nowhere")
    file = tmp_path / "run/config.yaml"
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    for taken in (tmp_path / "run", file, tmp_path / "loop", tmp_path / "dangling"):
        assert mentions(refused([*words[:4], taken], capsys), str(taken), "--out")
    assert mentions(refused([*words[:4], file / "hf"], capsys), str(file), "--out")
    checkpoints = tmp_path / "run" / runs.CHECKPOINTS
    for inside in ("step-00000099", "step-00000020/model.gguf"):
        form = "gguf" if inside.endswith(".gguf") else "native"
        assert mentions(refused([*words[:4], checkpoints / inside, "--format", form], capsys), inside, "--out")
    long = "a" * 245 + ".gguf"  # its hidden name is too long
    too_long = refused([*words[:4], tmp_path / long, "--format", "gguf"], capsys)
    assert mentions(too_long, os.strerror(errno.ENAMETOOLONG))
    with monkeypatch.context() as patch:
        (tmp_path / "volume").mkdir()
        patch.setattr(os.path, "ismount", lambda path: Path(path).name == "volume")
        assert mentions(refused([*words[:4], tmp_path / "volume"], capsys), str(tmp_path / "volume"), "--out")
    for name in ("\udcff", "\0"):
        assert mentions(refused([*words[:4], name], capsys), ascii(name), "UTF-8")
    make_run(tmp_path / "ablated", ablation="no-lerp")
    ablated = ["export", "--checkpoint", tmp_path / "ablated", *words[3:]]
    assert mentions(refused(ablated, capsys), str(tmp_path / "ablated"), "no-lerp")
    state = next((tmp_path / "run/checkpoints").iterdir()) / "state.json"
    content = state.read_text()
    state.write_text(content.replace('"version": 2', '"version": 9'))
    assert mentions(refused(words, capsys), str(state.parent), 9, checkpoint.VERSION)
    state.write_text(content)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        assert mentions(refused(words, capsys), "transformers", "antransformer[hf]")
        patch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))  # too old for the Auto classes
        assert mentions(refused(words, capsys), "transformers", "--upgrade", "antransformer[hf]")
    with pytest.raises(ConfigError, match="int8"):
        export(*runs.open_checkpoint(tmp_path / "run"), tmp_path / "hf", dtype="int8")
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob(".partial*"))


def test_the_check_uses_the_text_of_a_run_on_the_default_data(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verification, "run_folder_of", lambda checkpoint: tmp_path)
    (tmp_path / "config.yaml").write_text("data: python-stdlib\n")
    checkpoint = types.SimpleNamespace(model=types.SimpleNamespace(vocab_size=257))
    assert verification.held_out(checkpoint, 50) is None
    shutil.copytree(corpus, "data/python-stdlib")
    expected = Dataset.open(corpus).split("val").arrays[0][:50]
    assert verification.held_out(checkpoint, 50).tolist() == expected.tolist()


@pytest.mark.parametrize(("value", "dtype"), [(0.5, "float32"), (torch.nan, "float16")])
def test_an_export_that_computes_something_else_leaves_nothing(tmp_path, monkeypatch, value, dtype):
    make_run(tmp_path / "run")
    monkeypatch.setattr("antransformer.interop.layers_antransformer.normalize", lambda x: x * value)
    with pytest.raises(MachineError):
        export(*runs.open_checkpoint(tmp_path / "run"), tmp_path / "hf", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


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
        export(*runs.open_checkpoint(tmp_path / "run"), tmp_path / "new/hf")
    assert mentions(str(error.value), str(tmp_path / "new/hf"), reason)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
