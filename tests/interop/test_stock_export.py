"""Exports to standard architectures: EXAONE-4 and Qwen3 in transformers, and GGUF in llama.cpp."""

import contextlib
import http.client
import json
import math
import re
import sys
import sysconfig
import threading
import unicodedata
import urllib.request
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

import antransformer
from antransformer.cli import main
from antransformer.data import Tokenizer, byte_tokenizer, train_bpe
from antransformer.errors import CheckpointError, ConfigError, MachineError, MissingExtraError
from antransformer.inference import fold, generate
from antransformer.interop import exaone4, gguf_writer, serving, stock_export, verification
from antransformer.interop.export import export
from antransformer.interop.formats import GGUF_DTYPES
from antransformer.interop.gguf_tokenizer import LLAMA3_PATTERN, gguf_tokenizer
from antransformer.interop.llama_cpp import complete, start_server, tokenize
from antransformer.interop.stock_weights import StockModel
from antransformer.models import ModelConfig, build
from antransformer.training import run_folder as runs
from antransformer.training.checkpointing import checkpoint
from helpers.commands import refused
from helpers.exported import make_run
from helpers.messages import mentions
from helpers.small import SMALL

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
transformers.utils.logging.disable_progress_bar()

END = 256
CONTEXT = 64
# Bounds on the error of the largest logit. The first is of float32; the others are of rounding our own weights. They
# depend on the trained model, and its text is the standard library of the Python that runs the tests.
ERRORS = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
GGUF_ERRORS = {"f32": 1e-4, "f16": 4e-3, "bf16": 1e-2, "q8_0": 3e-2}
TRAINED = [("angpt", 0.5), ("angpt", 1.0), ("angpt", 0.0), ("gpt+", 0.5), ("gpt+", 1.0)]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """Function that returns the run of an architecture and rotary fraction after some steps of training."""
    folder = tmp_path_factory.mktemp("trained")

    def run(architecture, rotary_fraction=0.5):
        out = folder / f"{architecture}-{rotary_fraction}"
        if not out.exists():
            model = {**SMALL, "context": CONTEXT, "rotary_fraction": rotary_fraction, "architecture": architecture}
            lengths = {"batch_tokens": 512, "tokens": 512 * 25, "eval_tokens": 1024}
            with torch.enable_grad():
                antransformer.train(data=str(corpus), out=out, **lengths, optimizer="adam", lr=0.02, model=model)
        return out

    return run


def load_model(run):
    return antransformer.load(run, "cpu")[0].double()


def tokens(batch=4, length=CONTEXT, seed=1):
    return torch.randint(0, 257, (batch, length), generator=torch.Generator().manual_seed(seed))


def form_of(architecture):
    return stock_export.FORMS[architecture]


def greedy(run, prompt, count):
    model, _ = antransformer.load(run, "cpu")
    return [step[0] for step in generate(model, [prompt], max_new_tokens=count, temperature=0)]


# Folders


@pytest.mark.parametrize(("architecture", "rotary_fraction"), TRAINED)
@torch.no_grad()
def test_transformers_own_classes_compute_the_same_function(trained, tmp_path, architecture, rotary_fraction):
    run = trained(architecture, rotary_fraction)
    expected = load_model(run)(tokens())
    for dtype, bound in ERRORS.items():
        checks = []
        folder = tmp_path / dtype
        antransformer.export(run, folder, format=form_of(architecture), dtype=dtype, on_check=checks.append)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert type(theirs).__module__.startswith("transformers.models") and str(theirs.dtype) == f"torch.{dtype}"
        error = (theirs(tokens()).logits.double() - expected).abs().max() / expected.abs().max()
        assert error < bound, dtype
        [check] = checks
        assert check.engine == "transformers" and check.error < bound
        assert check.predictions == 2 * verification.ROWS * CONTEXT  # random ids and held-out text
        assert not list(folder.glob("*.py")) and "auto_map" not in (folder / "config.json").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["angpt", "gpt+"])
def test_padding_on_the_left_changes_no_logit(trained, tmp_path, architecture, dtype):
    antransformer.export(trained(architecture), tmp_path / "hf", format=form_of(architecture), dtype=dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = tokens(batch=1, length=12)
    batch = torch.cat([ids, torch.cat([ids.new_full((1, 5), END), ids[:, :7]], 1)])
    output = theirs(batch, attention_mask=torch.tensor([[1] * 12, [0] * 5 + [1] * 7]), labels=batch)
    expected = theirs(ids).logits[0].detach()
    for row, real in ((0, expected), (1, expected[:7])):
        error = (output.logits[row, -len(real) :] - real).abs().max() / expected.abs().max()
        assert error < ERRORS[dtype]
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in theirs.parameters())


def test_the_residual_factors_of_the_trained_models_have_moved(trained):
    model = load_model(trained("angpt"))
    alphas = torch.cat([block.attention_residual.alpha() for block in model.blocks])
    assert (alphas - 0.05).abs().mean() > 0.02


def test_greedy_text_in_transformers_is_equal(trained, tmp_path):
    for architecture in ("angpt", "gpt+"):
        run, folder = trained(architecture), tmp_path / architecture
        antransformer.export(run, folder, format=form_of(architecture))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        for row in tokens(batch=4, length=8).tolist():
            options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
            output = theirs.generate(torch.tensor([row]), **options)[0, 8:].tolist()
            assert output == greedy(run, row, 40)


def test_both_spellings_of_the_rotary_embedding_are_in_the_configuration(trained, tmp_path):
    antransformer.export(trained("angpt"), tmp_path / "hf", format="exaone4")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == config["rope_scaling"]["rope_type"] == "llama3"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e8
    assert config["sliding_window"] is None and config["head_dim"] == 32 and not config["tie_word_embeddings"]
    rotary = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").model.rotary_emb
    expected = [10_000 ** (-2 * i / 16) if i < 8 else 0.0 for i in range(16)]
    torch.testing.assert_close(rotary.inv_freq, torch.tensor(expected), rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("fraction", [0.25, 0.75])
def test_any_rotary_fraction_and_depth(tmp_path, fraction):
    """The stream grows over twelve layers with large steps, and most weights are far from their initial values."""
    sizes = {"layers": 12, "head_dim": 32, "rotary_fraction": fraction, "alpha_init": 0.3}
    make_run(tmp_path / "run", "angpt", **sizes)
    for dtype, bound in {"float32": 2e-4, "bfloat16": 0.05}.items():
        check = export(*runs.open_checkpoint(tmp_path / "run"), tmp_path / dtype, dtype, format="exaone4")
        assert check.error < bound and check.predictions == verification.ROWS * 48  # no held-out text


def test_ids_outside_the_tokenizer_are_not_generated(tmp_path):
    make_run(tmp_path / "run", "gpt+", vocab_size=300)
    export(*runs.open_checkpoint(tmp_path / "run"), tmp_path / "hf", format="qwen3")
    generation = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert generation["suppress_tokens"] == list(range(257, 300)) and generation["eos_token_id"] == END
    assert "llama-server" not in (tmp_path / "hf/README.md").read_text()  # llama.cpp's Qwen3 rotates whole heads


def test_the_card_of_a_standard_architecture(trained, tmp_path):
    antransformer.export(trained("angpt"), tmp_path / "hf", format="exaone4", max_shard_size="100KB")
    text = (tmp_path / "hf/README.md").read_text()
    assert mentions(text, "EXAONE-4", "vllm serve", "mlx_lm", "llama-server", "ollama", "--format native", "25")
    assert "trust_remote_code" not in text and "antransformer.bind" not in text
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert len({file.stat().st_mode for file in (tmp_path / "hf").iterdir()}) == 1


# GGUF


@pytest.fixture(scope="module")
def llama_cpp():
    return pytest.importorskip("xllamacpp")


@pytest.mark.parametrize(("architecture", "rotary_fraction"), [*TRAINED[:3], ("gpt+", 1.0)])
def test_llama_cpp_computes_the_same_function(trained, tmp_path, llama_cpp, architecture, rotary_fraction):
    run = trained(architecture, rotary_fraction)
    checks = {}
    for dtype in GGUF_DTYPES:
        file = tmp_path / f"{dtype}.gguf"
        antransformer.export(
            run, file, format="gguf", dtype=dtype, on_check=lambda check, dtype=dtype: checks.update({dtype: check})
        )
    assert {check.engine for check in checks.values()} == {"llama.cpp"}
    assert all(checks[dtype].error < bound for dtype, bound in GGUF_ERRORS.items())
    sizes = {dtype: (tmp_path / f"{dtype}.gguf").stat().st_size for dtype in checks}
    assert sizes["f32"] > sizes["f16"] == sizes["bf16"] > sizes["q8_0"] > sizes["q4_0"]
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("architecture", ["angpt", "gpt+"])
def test_greedy_text_in_llama_cpp_is_equal(trained, tmp_path, llama_cpp, architecture):
    run = trained(architecture, 1.0)
    antransformer.export(run, tmp_path / "model.gguf", format="gguf")
    server = start_server(tmp_path / "model.gguf", exact=True)
    for prompt in ("def ", "import ", "x = ", "class A", "    return", "# ", "é", "for i in"):
        ids = [*prompt.encode()]
        expected = bytes(token for token in greedy(run, ids, 24) if token != END).decode(errors="ignore")
        assert complete(server, ids, 24) == expected, prompt


@torch.no_grad()
def test_quantization_is_not_worse_than_rounding_our_own_weights(trained):
    gguf = pytest.importorskip("gguf")
    model = load_model(trained("angpt"))
    expected = model(tokens())
    stock = exaone4.exaone4(model, "run", float16=True)
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0):
        own = fold(model)
        for weight in own.parameters():
            if weight.ndim == 2:
                weight.copy_(rounded(gguf, weight, kind))
        theirs = stock_in_transformers(
            stock, {name: rounded(gguf, weight, kind) for name, weight in stock.weights.items() if weight.ndim == 2}
        )
        errors = [float((logits - expected).norm()) for logits in (theirs(tokens()).logits, own(tokens()))]
        assert errors[0] < 1.1 * errors[1]


def rounded(gguf, weight, kind):
    """Weight with each value rounded as a GGUF file stores it."""
    stored = gguf.quants.quantize(weight.float().numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(stored, kind)).double()


def stock_in_transformers(stock: StockModel, replaced):
    from antransformer.interop.stock_folder import configuration

    config = configuration(stock, END, torch.float64)
    model = transformers.AutoModelForCausalLM.from_config(transformers.Exaone4Config(**config), dtype=torch.float64)
    model.load_state_dict({**stock.weights, **replaced})
    return model.eval()


def test_without_llama_cpp_the_tensors_are_read_back(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    for dtype, bound in {"f32": 1e-6, "bf16": 2**-8, "q8_0": 2**-7}.items():
        checks = []
        file = tmp_path / f"{dtype}.gguf"
        antransformer.export(trained("angpt"), file, format="gguf", dtype=dtype, on_check=checks.append)
        assert checks[0].engine is None and checks[0].error < bound and "xllamacpp" in str(checks[0])


# Tokenizers

TEXTS = [
    *verification.HARD_TEXTS,
    "",
    "to be or not to be",
    "e\u0301 \u00e9 \ufffd \u200d\U0001f469",
    "\U0001f1e9\U0001f1ea \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "<|endoftext|> <|endoftext|>",
    "ABCdefGHI 1a2b3c a_b-c/d\\e{f}[g]",
    "\x01\x02\x7f",
    " \t \n x  \r\n\r\n  y ",
]
LLAMA3 = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def texts_of_the_library():
    return [Path(sysconfig.get_path("stdlib"), name).read_text() for name in ("argparse.py", "ast.py")] + TEXTS * 3


def imported(pre_tokenizer, normalizer=None, added=(), ignore_merges=False, **flags):
    """Tokenizer as published models have it."""
    library = Library(models.BPE(ignore_merges=ignore_merges))
    library.pre_tokenizer, library.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        library.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 800, "special_tokens": ["<|endoftext|>"], "initial_alphabet": alphabet}
    library.train_from_iterator(texts_of_the_library(), trainers.BpeTrainer(**options, show_progress=False))
    library.add_tokens([AddedToken(text, **{"normalized": True, **flags}) for text in added])
    return Tokenizer(library, "imported")


TOKENIZERS = {
    "byte": byte_tokenizer,
    "bpe": lambda: train_bpe(texts_of_the_library(), 800),
    "neox": lambda: imported(GPT2, normalizers.NFC(), [" " * count for count in range(24, 1, -1)]),
    "llama3": lambda: imported(LLAMA3, ignore_merges=True),
    "llama3 by merges": lambda: imported(LLAMA3),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_engines_encode_as_the_tokenizer_does(tmp_path, llama_cpp, name):
    tokenizer = TOKENIZERS[name]()
    make_run(tmp_path / "run", tokenizer=tokenizer, vocab_size=tokenizer.vocab_size + 3)
    opened = runs.open_checkpoint(tmp_path / "run")
    export(*opened, tmp_path / "model.gguf", format="gguf")
    server = start_server(tmp_path / "model.gguf")
    export(*opened, tmp_path / "hf", format="exaone4")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS:
        assert theirs(text).input_ids == tokenizer.encode(text)
        plain = unicodedata.normalize("NFC", text) if name == "neox" else text
        assert tokenize(server, plain) == tokenizer.encode(text), text


def test_llama_cpp_reads_an_end_of_text_token_in_a_prompt(trained, tmp_path, llama_cpp):
    antransformer.export(trained("angpt"), tmp_path / "model.gguf", format="gguf")
    server = start_server(tmp_path / "model.gguf")
    usage = server.handle_completions({"prompt": "<|endoftext|>ab", "max_tokens": 1})["usage"]
    assert usage["prompt_tokens"] == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: imported(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda: imported(GPT2, normalizers.Lowercase()),
        lambda: imported(pre_tokenizers.Sequence([pre_tokenizers.Digits(), GPT2])),
        lambda: imported(GPT2, added=["<tag>"], lstrip=True),
        lambda: imported(GPT2, added=["<tag>"], single_word=True),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_have_are_refused(tmp_path, capsys, make):
    make_run(tmp_path / "run", tokenizer=make(), vocab_size=900)
    words = ["export", "--checkpoint", tmp_path / "run", "--format", "gguf", "--out", tmp_path / "model.gguf"]
    assert mentions(refused(words, capsys), str(tmp_path / "run"), "--format exaone4")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    antransformer.export(tmp_path / "run", tmp_path / "hf", format="exaone4")
    assert "llama-server" not in (tmp_path / "hf/README.md").read_text()


def test_a_vocabulary_that_merges_do_not_make_is_refused():
    tokenizer = imported(LLAMA3)
    content = json.loads(tokenizer.to_json())
    content["model"]["vocab"]["zqxzq"] = len(content["model"]["vocab"])
    broken = Tokenizer(Library.from_str(json.dumps(content)), "broken")
    with pytest.raises(CheckpointError):
        gguf_tokenizer(broken, 900, "run")
    content["model"]["ignore_merges"] = True
    fixed = Tokenizer(Library.from_str(json.dumps(content)), "fixed")
    assert gguf_tokenizer(fixed, 900, "run").pre == "llama-bpe"


# Refusals


def test_wrong_exports_are_refused(tmp_path, capsys, monkeypatch):
    for architecture in ("angpt", "ngpt", "gpt+", "dyt"):
        make_run(tmp_path / architecture, architecture)
    make_run(tmp_path / "ablated", ablation="no-lerp")
    before = sorted(path.name for path in tmp_path.iterdir())

    def line(name, *options, out="out"):
        return refused(["export", "--checkpoint", tmp_path / name, "--out", tmp_path / out, *options], capsys)

    assert mentions(line("angpt", "--format", "onnx"), "onnx", "native", "exaone4", "qwen3", "gguf")
    for name in ("ngpt", "dyt"):
        for form in ("exaone4", "gguf"):
            assert mentions(line(name, "--format", form, out="out.gguf"), name, form, "--format native")
    assert mentions(line("angpt", "--format", "qwen3"), "angpt", "--format exaone4 or gguf or native")
    assert mentions(line("gpt+", "--format", "exaone4"), "gpt+", "qwen3")
    assert mentions(line("ablated", "--format", "exaone4"), "no-lerp")
    gguf = ("--format", "gguf")
    assert mentions(line("gpt+", *gguf, out="out.gguf"), "rotary_fraction", 0.5, "--format qwen3")
    assert mentions(line("angpt", *gguf), "out", ".gguf")
    assert mentions(line("angpt", out="out.gguf"), "out.gguf", "native", "--format gguf")
    assert mentions(line("angpt", *gguf, out="missing/out.gguf"), "missing")
    assert mentions(line("angpt", *gguf, "--dtype", "float32", out="out.gguf"), "float32", "f32", "q8_0")
    assert mentions(line("angpt", "--format", "exaone4", "--dtype", "q8_0"), "q8_0", "bfloat16")
    assert mentions(line("angpt", *gguf, "--max-shard-size", "5GB", out="out.gguf"), "max_shard_size")
    (tmp_path / "taken.gguf").touch()
    assert mentions(line("angpt", *gguf, out="taken.gguf"), "taken.gguf", "--out")
    (tmp_path / "taken.gguf").unlink()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        assert mentions(line("angpt", *gguf, out="out.gguf"), "gguf", "antransformer[gguf]")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        assert mentions(line("angpt", "--format", "exaone4"), "transformers", "antransformer[hf]")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("layout", "sizes", "dtype"),
    [
        ("exaone4", {"layers": 64}, "f32"),
        ("exaone4", {"width": 80, "head_dim": 16}, "q8_0"),
        ("exaone4", {"context": 1}, "f32"),
        ("qwen3", {"rotary_fraction": 0.5}, "f32"),
    ],
)
def test_sizes_that_llama_cpp_does_not_run_are_refused(layout, sizes, dtype):
    with pytest.raises(CheckpointError, match=re.escape("run")):
        gguf_writer.check_sizes(ModelConfig(**{**SMALL, **sizes}), layout, dtype, "run")
    gguf_writer.check_sizes(ModelConfig(**{**SMALL, "layers": 63, "rotary_fraction": 1.0}), layout, dtype, "run")


def make_run_with_alpha(folder, alpha):
    model = make_run(folder, alpha_init=0.5, s_scale=0.5)
    with torch.no_grad():
        model.blocks[1].mlp_residual.alpha.value[3] = alpha
    checkpoint.save(folder / runs.CHECKPOINTS, 30, model, torch.optim.Adam(model.parameters()), {}, keep=1)


def test_an_alpha_that_rounds_to_one_is_folded(tmp_path):
    make_run_with_alpha(tmp_path / "run", 1 - 1e-6)
    for dtype, bound in {"float32": 1e-4, "bfloat16": 5e-2}.items():
        check = export(*runs.open_checkpoint(tmp_path / "run"), tmp_path / dtype, dtype, format="exaone4")
        assert check.error < bound


def test_an_alpha_of_one_is_refused(tmp_path, capsys):
    make_run_with_alpha(tmp_path / "run", 1.0)
    for form, out in (("exaone4", "hf"), ("gguf", "model.gguf")):
        words = ["export", "--checkpoint", tmp_path / "run", "--format", form, "--out", tmp_path / out]
        assert mentions(refused(words, capsys), str(tmp_path / "run"), "--format native")
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


def deep(alpha, layers=24):
    torch.manual_seed(0)
    sizes = {**SMALL, "layers": layers, "vocab_size": 257, "alpha_init": alpha}
    return build(ModelConfig(**sizes)).eval()


def test_float16_lowers_the_scales_before_it_is_refused():
    shallow, middle = (exaone4.exaone4(deep(alpha), "run", float16=True) for alpha in (0.05, 0.25))
    assert shallow.fits_float16() and middle.fits_float16()
    assert shallow.eps == 2.0**8 and 2.0**2 <= middle.eps < shallow.eps
    assert not exaone4.exaone4(deep(0.25), "run").fits_float16()
    with pytest.raises(CheckpointError, match="bfloat16"):
        exaone4.exaone4(deep(0.45), "run", float16=True)
    assert exaone4.exaone4(deep(0.45), "run").eps == 2.0**14


@pytest.mark.parametrize("base", [1.0, 1e11])
def test_rotary_embeddings_without_an_equivalent_are_refused(base):
    fraction = 2 / 32
    config = ModelConfig(**SMALL, vocab_size=257, rope_theta=base, rotary_fraction=fraction)
    with pytest.raises(CheckpointError, match="rope_theta"):
        exaone4.exaone4(build(config), "run")


def test_a_wrong_export_fails_and_leaves_nothing(trained, tmp_path, monkeypatch):
    true = stock_export.exaone4

    def wrong(*arguments):
        stock = true(*arguments)
        stock.weights["lm_head.weight"].mul_(1.01)
        return stock

    monkeypatch.setitem(stock_export.DERIVATIONS, "exaone4", wrong)
    for form, out in (("exaone4", "hf"), ("gguf", "model.gguf")):
        with pytest.raises(MachineError):
            antransformer.export(trained("angpt"), tmp_path / out, format=form)
        assert not list(tmp_path.iterdir())


def test_an_error_of_nan_fails_in_every_dtype():
    for dtype in ("float32", "bfloat16", "q4_0"):
        with pytest.raises(MachineError):
            verification.Verification("transformers", 1, math.nan, 1.0).require_accurate(dtype)


@pytest.mark.parametrize(
    ("dtype", "right", "wrong"),
    [
        ("float32", 1e-5, 1e-2),
        ("f32", 1e-5, 1e-2),
        ("bfloat16", 0.09, 0.9),
        ("float16", 0.09, 0.9),
        ("q8_0", 0.09, 0.9),
    ],
)
def test_a_wrong_export_fails_in_half_precision_too(dtype, right, wrong):
    verification.Verification("transformers", 1, right, 1.0).require_accurate(dtype)
    with pytest.raises(MachineError):
        verification.Verification("transformers", 1, wrong, 1.0).require_accurate(dtype)


# Serving


def test_serve_answers_and_removes_its_file(trained, llama_cpp, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with antransformer.serve(trained("angpt"), port=0) as address:
        assert address.startswith("http://127.0.0.1:") and list(tmp_path.rglob("*.gguf"))
        body = json.dumps({"prompt": "def ", "max_tokens": 4, "temperature": 0}).encode()
        request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 4
        with opener.open(f"{address}/v1/models") as answer:
            assert [model["id"] for model in json.load(answer)["data"]] == [trained("angpt").name]
        port = int(address.rpartition(":")[2])
        with pytest.raises(ConfigError, match=str(port)), antransformer.serve(trained("angpt"), port=port):
            pass
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_server_stops_during_a_request(trained, llama_cpp):
    started, opener = threading.Event(), urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(address):
        body = json.dumps({"prompt": "def ", "max_tokens": 10_000, "ignore_eos": True, "stream": True}).encode()
        request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
        with contextlib.suppress(OSError, http.client.HTTPException), opener.open(request) as answer:
            while answer.readline():
                started.set()

    with antransformer.serve(trained("angpt"), port=0) as address:
        client = threading.Thread(target=ask, args=(address,))
        client.start()
        assert started.wait(60)
    client.join(60)
    assert not client.is_alive()
    with pytest.raises(OSError):
        opener.open(f"{address}/v1/models", timeout=10)


def test_a_server_that_ends_is_an_error(trained, llama_cpp, monkeypatch, capsys):
    wait = serving.Server.wait

    def kill_and_wait(server):
        server.process.kill()
        wait(server)

    monkeypatch.setattr(serving.Server, "wait", kill_and_wait)
    assert main(["serve", "--checkpoint", str(trained("angpt")), "--port", "0"]) == 1
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and mentions(complaint, -9)


def test_a_file_that_llama_cpp_cannot_load_is_an_error(trained, llama_cpp, tmp_path, monkeypatch):
    monkeypatch.setattr("antransformer.interop.serving.check_gguf", lambda file: None)
    (tmp_path / "text.gguf").write_text("no")
    with pytest.raises(MachineError) as error, antransformer.serve(gguf=tmp_path / "text.gguf", port=0):
        pass
    assert mentions(error.value, "text.gguf")


def test_wrong_servers_are_refused(tmp_path, capsys, monkeypatch, llama_cpp):
    make_run(tmp_path / "run", "ngpt")
    (tmp_path / "text.gguf").write_text("no")
    assert mentions(refused(["serve"], capsys), "checkpoint", "gguf")
    assert mentions(refused(["serve", "--gguf", tmp_path / "text.gguf", "--port", 0], capsys), "text.gguf")
    assert mentions(refused(["serve", "--checkpoint", tmp_path / "run", "--port", 0], capsys), "ngpt", "native")
    assert mentions(refused(["serve", "--checkpoint", tmp_path / "run", "--port", 99999], capsys), "--port", 99999)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    assert main(["serve", "--checkpoint", str(tmp_path / "run")]) == 2
    assert mentions(capsys.readouterr().err, "xllamacpp", "antransformer[serve]")
    with pytest.raises(MissingExtraError):
        start_server(tmp_path / "text.gguf")
