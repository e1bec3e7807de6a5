import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import normalizers

from antransformer.cli import main
from antransformer.cli.diagnose import print_tables
from antransformer.data import Dataset, byte_tokenizer
from antransformer.diagnostics.diagnose import diagnose, text_tokens
from antransformer.diagnostics.diagnosis import FactorError, Spread
from antransformer.diagnostics.measurement import record
from antransformer.diagnostics.summary import MAX_COMPACT_RATIO, format_number, summarize
from antransformer.errors import CheckpointError, DataError
from antransformer.models import ModelConfig, build
from antransformer.models.ablations import ABLATIONS
from antransformer.models.registry import BUILT_IN
from antransformer.nn import Linear
from helpers.commands import refused
from helpers.small import SMALL_OPTIONS

QUICK = ["--batch-tokens=256", "--tokens=2560", "--eval-tokens=1024", *SMALL_OPTIONS]
SMALL_TEXT = ["--tokens=2K", "--device=cpu"]


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Folder with a short run of each architecture."""
    folder = tmp_path_factory.mktemp("runs")
    for architecture in BUILT_IN:
        out = str(folder / architecture)
        assert main(["train", "--data", str(corpus), "--out", out, "--architecture", architecture, *QUICK]) == 0
    return folder


def model_of(architecture="angpt", seed=0, **more):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50, "width": 128, "layers": 2, "context": 24, "head_dim": 32}
    return build(ModelConfig(architecture=architecture, **{**sizes, **more}))


def some_tokens(batch=40, length=24):
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(1))


def perturbed(model):
    """Move every parameter away from its initial value."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def test_a_closed_pipe_loses_no_file(runs, tmp_path):
    words = [sys.executable, "-m", "antransformer", "diagnose", "--checkpoint", str(runs / "angpt"), *SMALL_TEXT]
    words += ["--json", str(tmp_path / "all.json"), "--out", str(tmp_path / "all.png")]
    reader, writer = os.pipe()
    os.close(reader)
    assert subprocess.run(words, stdout=writer, stderr=subprocess.PIPE).stderr == b""
    os.close(writer)
    assert json.loads((tmp_path / "all.json").read_text())["step"] == 10 and (tmp_path / "all.png").exists()


@pytest.mark.parametrize("architecture", BUILT_IN)
def test_tables_summary_and_figure_of_a_run(runs, corpus, architecture, tmp_path, capsys):
    run, figures = runs / architecture, tmp_path / "figures.json"
    assert main(["diagnose", "--checkpoint", str(run), *SMALL_TEXT, "--json", str(figures)]) == 0
    out = capsys.readouterr().out
    title = out.splitlines()[0]
    assert all(word in title for word in (architecture, " 10", "1,984", str(corpus)))
    assert all(len(line) <= 80 for line in out.splitlines()[1:] if str(tmp_path.parent) not in line)
    assert "…" not in out and any({"8", "32"} <= set(re.findall(r"\d+", line)) for line in out.splitlines())
    diagnosis = json.loads(figures.read_text())
    assert (diagnosis["architecture"], diagnosis["step"], diagnosis["tokens"]) == (architecture, 10, 1984)
    stream, repeated = diagnosis["residual_norm"]["text"], diagnosis["residual_norm"]["repeated"]
    assert len(stream) == len(repeated) == 3
    assert len(diagnosis["repeated_ids"]) == 8 and diagnosis["repeated_length"] == 32
    for spread in (stream[-1], repeated[-1], *diagnosis["norm_ratio"]["block"], *diagnosis["norm_ratio"]["mlp"]):
        assert f"{format_number(spread['mean'])} ± {format_number(spread['std'], precision_of=spread['mean'])}" in out
    sentence = diagnosis["summary"][0]
    assert format_number(stream[0]["mean"]) in sentence and format_number(stream[-1]["mean"]) in sentence
    assert format_number(stream[-1]["mean"] / repeated[-1]["mean"]) in sentence
    assert 2 <= len(diagnosis["summary"]) <= 5 and " ".join(diagnosis["summary"]) in " ".join(out.split())
    bounds = {"angpt": "at most 1", "ngpt": "exactly 1"}
    assert diagnosis["bound"] == bounds.get(architecture, "none")
    assert ("nu_A" in out) == bool(diagnosis["factors"]) == (architecture == "angpt")
    assert (diagnosis["alpha"] is None) == (architecture not in bounds)
    rows, sentence = diagnosis["row_norm"], diagnosis["summary"][-1]
    figures = {
        "angpt": [f"{rows['mean']:.3f}", f"{rows['min']:.2f}", f"{rows['near_bound']:.0%}"],
        "ngpt": [f"{max(rows['max'] - 1, 1 - rows['min']):.0e}"],
    }
    expected = figures.get(architecture, [format_number(rows["min"]), format_number(rows["max"])])
    assert all(word in sentence for word in expected)
    assert rows["min"] <= rows["mean"] <= rows["max"] and 0 <= rows["near_bound"] <= 1
    written = 64 + 256 if architecture == "ngpt" else 64 + 64  # its out and down projections are bounded by column
    assert sum(rows["counts"]) == 2 * 257 + 2 * (192 + 256 + 256 + written)
    assert_figure(run / "diagnose.png")


def assert_figure(path):
    image = pytest.importorskip("matplotlib.image").imread(path)
    assert image.shape[0] > 300 and image.shape[1] > 600
    drawn = (image[..., :3] < 0.9).any(-1)
    third = image.shape[1] // 3
    assert all(drawn[:, at : at + third].mean() > 0.01 for at in (0, third, 2 * third))  # every column has a panel
    coloured = image[..., :3].max(-1) - image[..., :3].min(-1) > 0.3
    assert coloured.sum() > 1000


def test_a_checkpoint_folder_gives_the_same_output_and_out_sets_the_figure_file(
    runs, corpus, tmp_path, capsys, monkeypatch
):
    run = runs / "angpt"
    command = ["diagnose", *SMALL_TEXT, "--out", str(tmp_path / "figure.svg")]
    assert main([*command, "--checkpoint", str(run)]) == 0
    first = capsys.readouterr().out
    checkpoint = run / "checkpoints/step-00000010"
    assert main([*command, "--checkpoint", str(checkpoint), "--data", str(corpus)]) == 0
    assert capsys.readouterr().out == first
    assert "<svg" in (tmp_path / "figure.svg").read_text()
    monkeypatch.chdir(checkpoint.parent)
    assert main([*command, "--checkpoint", checkpoint.name, "--data", str(corpus)]) == 0
    assert capsys.readouterr().out == first


def test_without_matplotlib_the_tables_are_printed(runs, monkeypatch, capsys, tmp_path):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    figure = tmp_path / "figure.png"
    assert main(["diagnose", "--checkpoint", str(runs / "angpt"), *SMALL_TEXT, "--out", str(figure)]) == 0
    out = capsys.readouterr().out
    assert "nu_A" in out and "matplotlib" in out and "'antransformer[plots]'" in out
    assert not figure.exists()


@pytest.mark.parametrize("architecture", BUILT_IN)
def test_norms_and_ratios_against_a_forward_pass_by_hand(architecture):
    model, tokens = perturbed(model_of(architecture)), some_tokens()
    diagnosis = diagnose(model, tokens)
    values, counts = tokens.unique(return_counts=True)
    assert len(diagnosis.repeated_ids) == 8
    assert min(counts[values == i] for i in diagnosis.repeated_ids) >= counts.sort(descending=True).values[7]
    repeated = torch.tensor(diagnosis.repeated_ids).unsqueeze(1).repeat(1, 24)
    assert diagnosis.repeated_length == 24
    with torch.no_grad():
        for kind, ids in (("text", tokens), ("repeated", repeated)):
            norms = model.hidden(ids).norm(dim=-1)
            assert diagnosis.residual_norm[kind][-1].mean == pytest.approx(float(norms.mean()), rel=1e-5)
            assert diagnosis.residual_norm[kind][-1].std == pytest.approx(float(norms.std()), rel=2e-2, abs=1e-6)
        x, ctx = model.embed(tokens), model.attention_context(tokens, None)
        block = model.blocks[0]
        ratio = block(x, ctx).norm(dim=-1) / x.norm(dim=-1)
        assert diagnosis.norm_ratio["block"][0].mean == pytest.approx(float(ratio.mean()), rel=1e-5)
        assert diagnosis.norm_ratio["block"][0].std == pytest.approx(float(ratio.std()), rel=1e-2, abs=1e-6)
        before = block.attention_norm(x) if hasattr(block, "attention_norm") else x
        ratio = block.attention(before, ctx).norm(dim=-1) / before.norm(dim=-1)
        assert diagnosis.norm_ratio["attention"][0].mean == pytest.approx(float(ratio.mean()), rel=1e-5)
    if architecture == "ngpt":
        assert all(spread.mean == pytest.approx(1, abs=1e-5) for spread in diagnosis.residual_norm["text"][1:])


@pytest.mark.parametrize("options", [{}, {"gate_scale": "none"}, {"gate_scale": "sqrt_mlp"}])
@pytest.mark.parametrize("width", [128, 512])
def test_factors_are_right_at_initialisation_on_random_inputs(width, options):
    model = model_of(width=width, head_dim=64, **options)
    for name, kinds in diagnose(model, some_tokens()).factors.items():
        for layer in kinds["random"]:
            assert abs(layer.error) < 3 / width, name  # the rest is sampling noise of order 1 / width
            assert layer.factor == pytest.approx(layer.needed * (1 + layer.error))
            # A norm of n coordinates of a random vector scatters by 1 / sqrt(2 n).
            coordinates = {"q": 64, "k": 64, "v": 64, "nu_A": width * 200, "nu_M": width * 200}.get(name, width)
            assert layer.spread < 1.5 / math.sqrt(2 * coordinates), name


LINEARS = {
    "attention.qkv_proj": {"q", "k", "v"},
    "attention.out_proj": {"p"},
    "mlp.up_proj": {"u"},
    "mlp.gate_proj": {"z"},
    "mlp.down_proj": {"d"},
}


@pytest.mark.parametrize("name", LINEARS)
def test_a_wrong_factor_is_the_error_of_its_map_alone(name):
    model = model_of()
    right = diagnose(model, some_tokens()).factors
    linear = model.blocks[1].get_submodule(name)
    assert isinstance(linear, Linear)
    linear.factor *= 1.5
    wrong = diagnose(model, some_tokens()).factors
    for part, kinds in wrong.items():
        before = right[part]["random"]
        assert kinds["random"][0] == before[0]
        expected = 1.5 * (1 + before[1].error) - 1 if part in LINEARS[name] else before[1].error
        assert kinds["random"][1].error == pytest.approx(expected, abs=1e-6)
        assert kinds["random"][1].needed == pytest.approx(before[1].needed, rel=1e-5)
    for part in LINEARS[name]:  # on text too
        assert wrong[part]["text"][1].error == pytest.approx(1.5 * (1 + right[part]["text"][1].error) - 1, rel=1e-4)


def test_factors_on_text_by_hand():
    """Norm ratios of each map in the first block, computed independently for a model with perturbed weights."""
    model, tokens = perturbed(model_of()), some_tokens()
    diagnosis = diagnose(model, tokens).factors
    block, d, h = model.blocks[0], 128, 32
    attention, mlp = block.attention, block.mlp

    def rms(values):
        return float(values.square().mean().sqrt())

    def check(name, needed):
        assert diagnosis[name]["text"][0].needed == pytest.approx(needed, rel=1e-4)

    with torch.no_grad():
        x, ctx = model.embed(tokens), model.attention_context(tokens, None)
        size = x.norm(dim=-1)
        q, k, v = (x @ attention.qkv_proj.weight.T).unflatten(-1, (-1, 3, h)).unbind(-2)
        for name, head in (("q", q), ("k", k), ("v", v)):
            check(name, 1 / rms(head.norm(dim=-1) / size.unsqueeze(-1)))
        with record([block]) as calls:
            block(x, ctx)
        heads = calls["attention.out_proj"].inputs[0]
        check("p", math.sqrt(h / d) / rms((heads @ attention.out_proj.weight.T).norm(dim=-1) / heads.norm(dim=-1)))
        y = attention(x, ctx)
        y = y / y.norm(dim=-1, keepdim=True)
        alpha = block.attention_residual.alpha()
        weight = 1 / (alpha**2 + (1 - alpha) ** 2)
        expected = ((weight * (1 - alpha) ** 2).mean() * size**2 + (weight * alpha**2).mean()).sqrt()
        check("nu_A", float(weight.sqrt().mean()) / rms(block.attention_residual(x, y).norm(dim=-1) / expected))
        x = block.attention_residual(x, y)
        u, z = x @ mlp.up_proj.weight.T, x @ mlp.gate_proj.weight.T * mlp.gate_proj.factor
        check("u", 1 / rms(u.norm(dim=-1) / x.norm(dim=-1)))
        check("z", 1 / rms((x @ mlp.gate_proj.weight.T).norm(dim=-1) / x.norm(dim=-1)))
        check("act", 1 / rms((u * F.silu(z)).norm(dim=-1) / u.norm(dim=-1)))
        c = u * F.silu(z)
        check("d", 1 / rms((c @ mlp.down_proj.weight.T).norm(dim=-1) / c.norm(dim=-1)))
        gain = u.norm(dim=-1) / x.norm(dim=-1)
    assert diagnosis["u"]["text"][0].spread == pytest.approx(float(gain.std() / gain.mean()), rel=1e-2)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablations_show_their_changed_factors(ablation, capsys):
    diagnosis = diagnose(model_of(ablation=ablation), some_tokens())
    errors = {name: kinds["random"][0].error for name, kinds in diagnosis.factors.items()}
    constants = {"constant-x0.5": -0.5, "constant-x2": 1, "all-x0.5": -0.5, "all-x2": 1}
    if ablation in constants:
        for name in ("q", "p", "z", "d"):
            assert errors[name] == pytest.approx(constants[ablation], abs=0.05)
        nu = constants[ablation] if "constant" not in ablation else 0
        assert errors["nu_A"] == pytest.approx(nu, abs=1e-3)
    if ablation in ("residual-none", "all-none"):
        layer = diagnosis.factors["nu_M"]["random"][0]
        assert layer.factor == 1 and layer.needed == pytest.approx(1 / math.hypot(0.05, 0.95), rel=1e-3)
    assert ("nu_A" in errors) == (diagnosis.alpha is not None) == (ablation != "no-lerp")
    print_tables(diagnosis)
    out = capsys.readouterr().out
    assert all(re.search(rf"^ *{name} +\d", out, re.MULTILINE) for name in diagnosis.factors)


@pytest.mark.parametrize("architecture", BUILT_IN)
def test_diagnose_leaves_model_and_random_state_unchanged(architecture):
    model = model_of(architecture).train()
    random_state = torch.get_rng_state()
    before = [weight.clone() for weight in model.parameters()]
    diagnose(model, some_tokens())
    assert torch.equal(torch.get_rng_state(), random_state) and model.training
    assert not any(module._forward_hooks for module in model.modules())
    for weight, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight, old) and weight.grad is None


class Renamed(torch.nn.Module):
    """A block of another package, with other names of its parts."""

    def __init__(self, block):
        super().__init__()
        self.layer = block

    def forward(self, *args):
        return self.layer(*args)


def test_blocks_with_other_parts_are_measured_as_a_whole(capsys):
    model = model_of("gpt+")
    expected = diagnose(model, some_tokens()).norm_ratio["block"]
    model.blocks = torch.nn.ModuleList(Renamed(block) for block in model.blocks)
    diagnosis = diagnose(model, some_tokens())
    assert diagnosis.norm_ratio == {"block": expected}
    print_tables(diagnosis)
    assert capsys.readouterr().out and summarize(diagnosis)


def test_hooks_are_removed_when_a_forward_pass_fails():
    model = model_of()
    with pytest.raises(RuntimeError), record(model.blocks):
        model.blocks[0].mlp(torch.zeros(3, 5))
    assert not any(module._forward_hooks for module in model.modules())


def test_nonfinite_weights_are_refused():
    model = model_of()
    diagnose(model, some_tokens())
    with torch.no_grad():
        model.blocks[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(CheckpointError):
        diagnose(model, some_tokens())


def test_batch_size_does_not_change_the_measurements(monkeypatch):
    model, tokens = perturbed(model_of()), some_tokens()
    at_once = diagnose(model, tokens)
    monkeypatch.setattr("antransformer.diagnostics.diagnose.FORWARD_TOKENS", 100)
    batched = diagnose(model, tokens)
    for one, other in zip(at_once.residual_norm["text"], batched.residual_norm["text"], strict=True):
        assert other.mean == pytest.approx(one.mean, rel=1e-5) and other.std == pytest.approx(one.std, rel=1e-3)


def test_summary_follows_the_measurements():
    diagnosis = diagnose(model_of(), some_tokens())

    def stream(end, repeated):
        norms = {
            "text": [Spread(1, 0.1), Spread(min(5, end), 0.1), Spread(end, 0.1)],
            "repeated": [Spread(1, 0)] * 2 + [Spread(repeated, 0)],
        }
        return summarize(replace(diagnosis, residual_norm=norms))[0]

    growing = stream(60, 40)
    assert {"1.00", "60.0", "1.50"} <= set(re.findall(r"[\d.]*\d", growing))
    # The sentence on a compact residual stream differs from the others in more than its numbers.
    compact = without_numbers(summarize(diagnosis)[0])
    below, above = MAX_COMPACT_RATIO - 0.1, MAX_COMPACT_RATIO + 0.1
    assert without_numbers(stream(below, below)) == compact
    assert without_numbers(stream(above, above)) == without_numbers(growing) != compact
    assert without_numbers(stream(below, 0.1)) == without_numbers(growing)

    steps = " ".join(summarize(replace(diagnosis, alpha_start=0.06, alpha=[[0.07, 0.31], [0.12, 0.2]])))
    assert all(figure in steps for figure in ("0.06", "0.07", "0.31"))

    # The sentence on random inputs names the worst map and all maps with errors.
    right = summarize(diagnosis)[1]
    wrong = {
        name: {**diagnosis.factors[name], "random": [FactorError(1 + error, 1, error, 0.05)] * 2}
        for name, error in (("d", 1.0), ("p", 0.5))
    }
    text = summarize(replace(diagnosis, factors={**diagnosis.factors, **wrong}))[1]
    assert "100.0%" in text and "100.0%" not in right
    assert {"d", "p"} <= set(re.findall(r"\w+", text)) and not {"d", "p"} & set(re.findall(r"\w+", right))


def without_numbers(text):
    """Replace numbers, so that the wording of two sentences can be compared."""
    return re.sub(r"\d[\d.,]*", "#", text)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "0.012"), (0.99999, "1.00"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (1830.6, "1,831")],
)
def test_numbers(value, text):
    assert format_number(value) == text
    assert format_number(0.5, precision_of=1831) == "0"


def error_of(arguments, capsys, *parts):
    """Run the verb, which must exit with status 2, and return its one-line error with all these parts."""
    error = refused(["diagnose", *arguments], capsys)
    assert all(str(word) in error for word in parts), error
    return error


def prepared(folder, text, held_out, *options):
    (folder / "text.txt").write_text(text)
    (folder / "held-out.txt").write_text(held_out)
    words = [
        "prepare",
        folder / "text.txt",
        "--val-inputs",
        folder / "held-out.txt",
        "--out",
        folder / "data",
        *options,
    ]
    assert main([str(word) for word in words]) == 0
    return folder / "data"


def test_mistakes_are_one_line_and_status_2(runs, corpus, tmp_path, capsys):
    run = runs / "angpt"
    files = sorted(tmp_path.parent.rglob("*"))
    error_of([], capsys, "--checkpoint")
    error_of(["--checkpoint", "nowhere"], capsys, "nowhere")
    error_of(["--checkpoint", corpus], capsys, corpus)
    command = ["--checkpoint", run]
    error_of([*command, "--tokens=31"], capsys, "tokens", "32", "31")
    error_of([*command, "--tokens=many"], capsys, "--tokens", "'many'")
    error_of([*command, "--device=tpu"], capsys, "'tpu'")
    error_of([*command, "--data", run], capsys, run)
    error_of([*command, "--out", tmp_path / "x.jpg"], capsys, "--out", tmp_path / "x.jpg", ".png, .pdf, .svg")
    assert ".svg" not in error_of([*command, "--out", tmp_path / "no/x.png"], capsys, "--out", tmp_path / "no/x.png")
    error_of([*command, "--json", tmp_path], capsys, "--json", tmp_path)
    assert sorted(tmp_path.parent.rglob("*")) == files


def test_other_data_is_refused(runs, corpus, tmp_path, capsys):
    text = "To be, or not to be, that is the question. " * 200
    (tmp_path / "bpe").mkdir()
    (tmp_path / "short").mkdir()
    larger = prepared(tmp_path / "bpe", text, text, "--bpe-vocab-size", "280")
    short = prepared(tmp_path / "short", text, "To be")
    command = ["--checkpoint", runs / "angpt"]
    data = Dataset.open(larger)
    error_of([*command, "--data", larger], capsys, larger, data.max_token, 257)
    error_of([*command, "--data", short], capsys, 32, 33)
    larger_run = tmp_path / "run"
    train = ["train", "--data", corpus, "--out", larger_run, *QUICK, "--model.vocab-size=300"]
    assert main([str(word) for word in train]) == 0
    capsys.readouterr()
    assert data.vocab_size != data.max_token < 300
    error_of(["--checkpoint", larger_run, "--data", larger], capsys, larger)
    assert not (larger_run / "diagnose.png").exists()


def test_data_of_another_tokenizer_with_the_same_vocabulary_is_refused(corpus):
    dataset, tokenizer = Dataset.open(corpus), byte_tokenizer()
    config = ModelConfig(architecture="angpt", vocab_size=257, width=128, layers=2, context=24, head_dim=32)
    assert text_tokens(dataset, tokenizer, config, 48).shape == (2, 24)
    tokenizer._library.normalizer = normalizers.Lowercase()
    assert tokenizer.vocabulary() == dataset.tokenizer().vocabulary()
    with pytest.raises(DataError, match=re.escape(str(corpus))):
        text_tokens(dataset, tokenizer, config, 48)
