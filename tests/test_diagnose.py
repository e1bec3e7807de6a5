import json
import math
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from antransformer.analysis.diagnose import FactorError, Spread, diagnose, meaning, number, record
from antransformer.cli import main
from antransformer.cli.diagnose import show
from antransformer.errors import CheckpointError
from antransformer.models import ABLATIONS, OPTIONS, ModelConfig, build
from antransformer.nn import Linear
from conftest import SMALL_OPTIONS

QUICK = ["--batch-tokens=256", "--tokens=2560", "--eval-tokens=1024", *SMALL_OPTIONS]
LOOK = ["--tokens=2K", "--device=cpu"]


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """A short run of each architecture, by name."""
    folder = tmp_path_factory.mktemp("runs")
    for architecture in OPTIONS:
        out = str(folder / architecture)
        assert main(["train", "--data", str(corpus), "--out", out, "--architecture", architecture, *QUICK]) == 0
    return folder


def model_of(architecture="angpt", seed=0, **more):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50, "width": 128, "layers": 2, "context": 24, "head_width": 32}
    return build(ModelConfig(architecture=architecture, **{**sizes, **more}))


def some_tokens(batch=40, length=24):
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(1))


def stirred(model):
    """Every parameter away from its initial value."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("architecture", OPTIONS)
def test_tables_words_and_picture_of_a_run(runs, architecture, tmp_path, capsys):
    run, figures = runs / architecture, tmp_path / "figures.json"
    assert main(["diagnose", "--checkpoint", str(run), *LOOK, "--json", str(figures)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{architecture} ({architecture}), step 10: 1,984 tokens of held-out text from ")
    assert all(len(line) <= 80 for line in out.splitlines()[1:] if str(tmp_path.parent) not in line)
    assert "8 frequent tokens, each 32 times" in out and "first " in out and "last " in out and "…" not in out
    assert "The residual stream is" in out and "Weight vectors" in out
    found = json.loads(figures.read_text())
    assert (found["architecture"], found["step"], found["tokens"]) == (architecture, 10, 1984)
    assert len(found["residual_norm"]["text"]) == len(found["residual_norm"]["repeated"]) == 3
    assert 2 <= len(found["meaning"]) <= 5 and " ".join(found["meaning"]) in " ".join(out.split())
    bounds = {"angpt": "at most 1", "ngpt": "exactly 1"}
    assert found["bound"] == bounds.get(architecture, "none")
    assert ("has no constant factors" in out) == (found["factors"] == {}) == (architecture != "angpt")
    assert (found["alpha"] is None) == (architecture not in bounds)
    rows = found["row_norm"]
    assert rows["min"] <= rows["mean"] <= rows["max"] and 0 <= rows["near_bound"] <= 1
    written = 64 + 256 if architecture == "ngpt" else 64 + 64  # its out and down projections are bounded by column
    assert sum(rows["counts"]) == 2 * 257 + 2 * (192 + 256 + 256 + written)
    assert_picture(run / "diagnose.png")


def assert_picture(path):
    image = pytest.importorskip("matplotlib.image").imread(path)
    assert image.shape[0] > 300 and image.shape[1] > 600
    drawn = (image[..., :3] < 0.9).any(-1)
    third = image.shape[1] // 3
    assert all(drawn[:, at : at + third].mean() > 0.01 for at in (0, third, 2 * third))  # something in every column
    coloured = image[..., :3].max(-1) - image[..., :3].min(-1) > 0.3
    assert coloured.sum() > 1000


def test_a_checkpoint_folder_says_the_same_and_the_picture_goes_elsewhere(runs, corpus, tmp_path, capsys):
    run = runs / "angpt"
    look = ["diagnose", *LOOK, "--out", str(tmp_path / "picture.svg")]
    assert main([*look, "--checkpoint", str(run)]) == 0
    first = capsys.readouterr().out
    checkpoint = run / "checkpoints/step-00000010"
    assert main([*look, "--checkpoint", str(checkpoint), "--data", str(corpus)]) == 0
    assert capsys.readouterr().out == first
    assert "<svg" in (tmp_path / "picture.svg").read_text()


def test_without_matplotlib_the_tables_are_printed(runs, monkeypatch, capsys, tmp_path):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    picture = tmp_path / "picture.png"
    assert main(["diagnose", "--checkpoint", str(runs / "angpt"), *LOOK, "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "needed" in out and "no picture: matplotlib is not installed: pip install 'antransformer[plots]'" in out
    assert not picture.exists()


@pytest.mark.parametrize("architecture", OPTIONS)
def test_norms_and_ratios_against_a_forward_pass_by_hand(architecture):
    model, tokens = stirred(model_of(architecture)), some_tokens()
    found = diagnose(model, tokens)
    values, counts = tokens.unique(return_counts=True)
    assert len(found.repeated_ids) == 8
    assert min(counts[values == i] for i in found.repeated_ids) >= counts.sort(descending=True).values[7]
    repeated = torch.tensor(found.repeated_ids).unsqueeze(1).repeat(1, 24)
    assert found.repeated_length == 24
    with torch.no_grad():
        for kind, given in (("text", tokens), ("repeated", repeated)):
            norms = model.hidden(given).norm(dim=-1)
            assert found.residual_norm[kind][-1].mean == pytest.approx(float(norms.mean()), rel=1e-5)
            assert found.residual_norm[kind][-1].std == pytest.approx(float(norms.std()), rel=2e-2, abs=1e-6)
        x, places = model.embed(tokens), model.places(tokens, None)
        block = model.blocks[0]
        ratio = block(x, places).norm(dim=-1) / x.norm(dim=-1)
        assert found.norm_ratio["block"][0].mean == pytest.approx(float(ratio.mean()), rel=1e-5)
        assert found.norm_ratio["block"][0].std == pytest.approx(float(ratio.std()), rel=1e-2, abs=1e-6)
        before = block.attention_norm(x) if hasattr(block, "attention_norm") else x
        ratio = block.attention(before, places).norm(dim=-1) / before.norm(dim=-1)
        assert found.norm_ratio["attention"][0].mean == pytest.approx(float(ratio.mean()), rel=1e-5)
    if architecture == "ngpt":
        assert all(spread.mean == pytest.approx(1, abs=1e-5) for spread in found.residual_norm["text"][1:])


@pytest.mark.parametrize("options", [{}, {"nu_p": "one", "gate_scale": "none"}, {"gate_scale": "sqrt_mlp"}])
@pytest.mark.parametrize("width", [128, 512])
def test_factors_are_right_at_initialisation_on_random_inputs(width, options):
    model = model_of(width=width, head_width=64, **options)
    for name, kinds in diagnose(model, some_tokens()).factors.items():
        for layer in kinds["random"]:
            assert abs(layer.error) < 3 / width, name  # what is left is of order 1 / width and of the weights drawn
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
    """What each map of the first block of a stirred model makes of norms, against the factor that would be right."""
    model, tokens = stirred(model_of()), some_tokens()
    found = diagnose(model, tokens).factors
    block, d, h = model.blocks[0], 128, 32
    attention, mlp = block.attention, block.mlp

    def rms(values):
        return float(values.square().mean().sqrt())

    def check(name, needed):
        assert found[name]["text"][0].needed == pytest.approx(needed, rel=1e-4)

    with torch.no_grad():
        x, places = model.embed(tokens), model.places(tokens, None)
        size = x.norm(dim=-1)
        q, k, v = (x @ attention.qkv_proj.weight.T).unflatten(-1, (-1, 3, h)).unbind(-2)
        for name, head in (("q", q), ("k", k), ("v", v)):
            check(name, 1 / rms(head.norm(dim=-1) / size.unsqueeze(-1)))
        with record([block]) as calls:
            block(x, places)
        heads = calls["attention.out_proj"].inputs[0]
        check("p", math.sqrt(h / d) / rms((heads @ attention.out_proj.weight.T).norm(dim=-1) / heads.norm(dim=-1)))
        y = attention(x, places)
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
    assert found["u"]["text"][0].spread == pytest.approx(float(gain.std() / gain.mean()), rel=1e-2)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablations_show_what_they_changed(ablation, capsys):
    found = diagnose(model_of(ablation=ablation), some_tokens())
    errors = {name: kinds["random"][0].error for name, kinds in found.factors.items()}
    constants = {"constant-x0.5": -0.5, "constant-x2": 1, "all-x0.5": -0.5, "all-x2": 1, "error-5": 0.05}
    if ablation in constants:
        for name in ("q", "p", "z", "d"):
            assert errors[name] == pytest.approx(constants[ablation], abs=0.05)
        nu = constants[ablation] if "constant" not in ablation else 0
        assert errors["nu_A"] == pytest.approx(nu, abs=1e-3)
    if ablation in ("residual-none", "all-none"):
        layer = found.factors["nu_M"]["random"][0]
        assert layer.factor == 1 and layer.needed == pytest.approx(1 / math.hypot(0.05, 0.95), rel=1e-3)
    assert ("nu_A" in errors) == (found.alpha is not None) == (ablation != "no-lerp")
    show(found)
    assert "spread" in capsys.readouterr().out


@pytest.mark.parametrize("architecture", OPTIONS)
def test_nothing_is_left_behind(architecture):
    model = model_of(architecture).train()
    random_state = torch.get_rng_state()
    before = [weight.clone() for weight in model.parameters()]
    diagnose(model, some_tokens())
    assert torch.equal(torch.get_rng_state(), random_state) and model.training
    assert not any(module._forward_hooks for module in model.modules())
    for weight, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight, old) and weight.grad is None


def test_hooks_go_when_a_forward_pass_fails():
    model = model_of()
    with pytest.raises(RuntimeError), record(model.blocks):
        model.blocks[0].mlp(torch.zeros(3, 5))
    assert not any(module._forward_hooks for module in model.modules())


def test_broken_weights_are_said():
    model = model_of()
    with torch.no_grad():
        model.blocks[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(CheckpointError, match="the model's weights are not finite"):
        diagnose(model, some_tokens())


def test_portions_do_not_change_the_figures(monkeypatch):
    model, tokens = stirred(model_of()), some_tokens()
    whole = diagnose(model, tokens)
    monkeypatch.setattr("antransformer.analysis.diagnose.FORWARD_TOKENS", 100)
    parts = diagnose(model, tokens)
    for one, other in zip(whole.residual_norm["text"], parts.residual_norm["text"], strict=True):
        assert other.mean == pytest.approx(one.mean, rel=1e-5) and other.std == pytest.approx(one.std, rel=1e-3)


def test_words_follow_the_figures():
    found = diagnose(model_of(), some_tokens())
    words = " ".join(meaning(found))
    assert "is compact" in words and "holds for all." in words and "began at 0.05 and are now 0.05 to 0.05" in words
    growing = {
        "text": [Spread(1, 0.1), Spread(5, 0.1), Spread(60, 9)],
        "repeated": [Spread(1, 0)] * 2 + [Spread(40, 0)],
    }
    assert "is not compact: its mean norm on text goes from 1.00" in meaning(replace(found, residual_norm=growing))[0]
    far = {**found.factors["d"], "random": [FactorError(2, 1, 1.0, 0.05)] * 2}
    words = " ".join(meaning(replace(found, factors={**found.factors, "d": far})))
    assert "within 100.0% of what the weights need (worst: d)" in words and "holds for all but d." in words


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "0.012"), (0.99999, "1.00"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (1830.6, "1,831")],
)
def test_numbers(value, text):
    assert number(value) == text
    assert number(0.5, like=1831) == "0"


def wrong(arguments, capsys):
    """Run the verb, which must end with status 2; returns its one line."""
    status = main(["diagnose", *(str(word) for word in arguments)])
    captured = capsys.readouterr()
    assert status == 2, captured.err
    assert captured.err.startswith("antransformer: error: ") and captured.err.count("\n") == 1
    return captured.err


def prepared(folder, text, held_out, *options):
    (folder / "text.txt").write_text(text)
    (folder / "held-out.txt").write_text(held_out)
    words = ["prepare", folder / "text.txt", "--val", folder / "held-out.txt", "--out", folder / "data", *options]
    assert main([str(word) for word in words]) == 0
    return folder / "data"


def test_mistakes_are_one_line_and_status_2(runs, corpus, tmp_path, capsys):
    run = runs / "angpt"
    files = sorted(tmp_path.parent.rglob("*"))
    assert "the following arguments are required: --checkpoint" in wrong([], capsys)
    assert "nowhere: no such run or checkpoint folder" in wrong(["--checkpoint", "nowhere"], capsys)
    assert "no checkpoint in it" in wrong(["--checkpoint", corpus], capsys)
    look = ["--checkpoint", run]
    assert "tokens must be at least one sequence of 32, got 31" in wrong([*look, "--tokens=31"], capsys)
    assert "--tokens must be a count of tokens" in wrong([*look, "--tokens=many"], capsys)
    assert "device 'tpu' is not available here" in wrong([*look, "--device=tpu"], capsys)
    assert "not a prepared data folder" in wrong([*look, "--data", run], capsys)
    assert "the name of a picture ends in .png, .pdf, .svg" in wrong([*look, "--out", tmp_path / "x.jpg"], capsys)
    assert "a file in a folder that exists" in wrong([*look, "--out", tmp_path / "no/x.png"], capsys)
    assert "a file in a folder that exists" in wrong([*look, "--json", tmp_path], capsys)
    assert sorted(tmp_path.parent.rglob("*")) == files


def test_other_data_is_refused(runs, corpus, tmp_path, capsys):
    text = "To be, or not to be, that is the question. " * 200
    (tmp_path / "bpe").mkdir()
    (tmp_path / "short").mkdir()
    larger = prepared(tmp_path / "bpe", text, text, "--train-bpe", "280")
    short = prepared(tmp_path / "short", text, "To be")
    look = ["--checkpoint", runs / "angpt"]
    assert "is outside the model's vocabulary of 257" in wrong([*look, "--data", larger], capsys)
    assert "context 32 needs 33 tokens in a row, and the longest val shard has" in wrong(
        [*look, "--data", short], capsys
    )
    roomy = tmp_path / "run"
    train = ["train", "--data", corpus, "--out", roomy, *QUICK, "--model.vocab-size=300"]
    assert main([str(word) for word in train]) == 0
    capsys.readouterr()
    message = wrong(["--checkpoint", roomy, "--data", larger], capsys)
    assert "its tokenizer has" in message and "ids, the run's 257" in message
    assert not (roomy / "diagnose.png").exists()
