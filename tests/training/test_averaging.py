"""Averaged weights: the average itself, its bounds, its files, and the verbs that use it."""

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file

from antransformer import load
from antransformer.bounds import Bound, norms
from antransformer.cli import main
from antransformer.data import Dataset
from antransformer.errors import CheckpointError, NewerCheckpointError
from antransformer.models import ModelConfig, build
from antransformer.training import run_folder
from antransformer.training.averaging import WeightAverage
from antransformer.training.checkpointing import checkpoint
from antransformer.training.metrics import read_metrics
from antransformer.training.trainer import Trainer
from helpers.commands import refused
from helpers.messages import mentions
from helpers.small import SMALL_OPTIONS, Notes
from helpers.trainers import OPTIMIZED, poison, resume, run_until, settings, start, weights

CPU = torch.device("cpu")


def step_folder(folder, step=20):
    return folder / f"checkpoints/step-{step:08d}"


def record_weights(trainer):
    """Collect copies of the weights after every step that is not skipped."""
    history, update = [], trainer.update

    def recorded(step):
        losses = update(step)
        if losses:
            history.append({name: value.detach().double() for name, value in trainer.model.named_parameters()})
        return losses

    trainer.update = recorded
    return history


def expected_average(history, decay):
    """Weighted mean in float64 by its definition; strict bounds are not restored."""
    coefficients = [decay**age for age in reversed(range(len(history)))]
    return {
        name: sum(factor * step[name] for factor, step in zip(coefficients, history, strict=True)) / sum(coefficients)
        for name in history[0]
    }


def expected_on_spheres(history, decay, bounds):
    """Average in float64 by its recurrence, with the strict bounds restored after every step."""
    average = {}
    for count, step in enumerate(history, start=1):
        share = (1 - decay) / (1 - decay**count)
        average = {name: value * share + average.get(name, 0) * (1 - share) for name, value in step.items()}
        for bound in bounds:
            average[bound.name] = torch.nn.functional.normalize(average[bound.name], dim=bound.axis)
    return average


@pytest.mark.parametrize(("architecture", "optimizer"), OPTIMIZED)
def test_average_equals_a_loop_over_the_weights_of_all_steps_and_is_within_its_bounds(
    corpus, tmp_path, architecture, optimizer
):
    trainer = start(corpus, tmp_path, tokens=2560, ema=0.4, architecture=architecture, optimizer=optimizer)
    history = record_weights(trainer)
    restored = checkpoint.restore(checkpoint.read(trainer.run().checkpoint), CPU)
    bounds = restored.bounds()
    strict = [bound for bound in bounds if bound.strict]
    assert len(history) == 10 and bool(strict) == (architecture == "ngpt")
    decay = 1 - 1 / 4
    expected = expected_on_spheres(history, decay, strict) if strict else expected_average(history, decay)
    for name, value in restored.named_parameters():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)
        assert value.ndim < 2 or not torch.allclose(value.double(), history[-1][name], rtol=1e-4), name
    for bound in bounds:
        assert norms(bound).max() <= 1 + 1e-6, bound.name
        assert not bound.strict or norms(bound).min() >= 1 - 1e-6, bound.name


def test_the_name_of_a_strict_bound_may_be_any(monkeypatch):
    model = build(ModelConfig.preset("pico", "angpt", vocab_size=64))
    monkeypatch.setattr(model, "bounds", lambda: [Bound("rows", model.embedding.weight, strict=True)])
    average = WeightAverage(model, window=2)
    with torch.no_grad():
        model.embedding.weight.copy_(torch.nn.functional.normalize(torch.randn_like(model.embedding.weight)))
    average.update()
    average.update()
    assert average.weights["embedding.weight"].norm(dim=1).sub(1).abs().max() < 1e-5


def test_a_window_of_less_than_one_step_averages_nothing(corpus, tmp_path):
    trainer = start(corpus, tmp_path, tokens=256 * 5, ema=0.1)
    trainer.run()
    for name, value in trainer.model.named_parameters():
        assert torch.equal(trainer.average.weights[name], value), name


def test_averaging_changes_the_validation_and_nothing_of_the_training(corpus, tmp_path):
    for name, ema in (("with", 0.3), ("without", 0.0)):
        start(corpus, tmp_path / name, ema=ema).run()
    for step in (10, 15, 20):
        assert weights(tmp_path / "with", step) == weights(tmp_path / "without", step)
    lines, others = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("with", "without"))
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for key in ("loss", "grad_norm", "largest_row_norm", "mean_alpha"):
            assert line[key] == other[key]
        assert "val_loss" not in line or line["val_loss"] != other["val_loss"]


def test_the_validation_loss_is_that_of_the_restored_average(corpus, tmp_path):
    trainer = start(corpus, tmp_path, ema=0.3)
    result = trainer.run()
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    assert trainer.evaluate()["val_loss"] == result.val_loss
    assert all(torch.equal(before[name], value) for name, value in trainer.model.named_parameters())
    restored = checkpoint.restore(checkpoint.read(result.checkpoint), CPU)
    trainer.average = None
    raw_loss = trainer.evaluate()["val_loss"]
    trainer.model.load_state_dict(restored.state_dict())
    assert trainer.evaluate()["val_loss"] == result.val_loss != raw_loss


@pytest.mark.parametrize(("architecture", "optimizer"), [("angpt", "adam"), ("ngpt", "adam"), ("gpt+", "muon")])
def test_resumed_average_is_bit_identical(corpus, tmp_path, architecture, optimizer):
    """One skipped step is before the checkpoint that the run resumes from, one is after it."""
    more = {"ema": 0.3, "max_skipped_steps": 2, "architecture": architecture, "optimizer": optimizer}
    whole = start(corpus, tmp_path / "uninterrupted", **more)
    poison(whole, 7, 12)
    history = record_weights(whole)
    whole.run()
    assert len(history) == whole.average.updates == 18
    interrupted = start(corpus, tmp_path / "interrupted", **more)
    poison(interrupted, 7, 12)
    run_until(interrupted, 13)
    trainer, _ = resume(corpus, tmp_path / "interrupted")
    assert trainer.done == 10 and trainer.average.updates == 9
    poison(trainer, 12)
    trainer.run()
    for kind in ("model", "average"):
        assert weights(tmp_path / "interrupted", 20, kind) == weights(tmp_path / "uninterrupted", 20, kind)
    lines, others = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("interrupted", "uninterrupted"))
    assert [line.get("val_loss") for line in lines] == [line.get("val_loss") for line in others]


def test_a_run_with_only_skipped_steps_averages_its_initial_weights(corpus, tmp_path):
    source = start(corpus, tmp_path / "source", tokens=256 * 5).run().checkpoint
    trainer = start(corpus, tmp_path / "run", ema=0.3, max_skipped_steps=9, init=str(source))
    poison(trainer, *range(1, 7))
    run_until(trainer, 7)
    expected = load_file(source / "model.safetensors")
    saved = load_file(step_folder(tmp_path / "run", 5) / "average.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in expected.items())
    trainer, _ = resume(corpus, tmp_path / "run")
    assert trainer.average.updates == 0
    trainer.run()
    assert trainer.average.updates == 15


def test_only_a_checkpoint_with_an_average_has_its_file_and_the_newer_version(corpus, tmp_path, monkeypatch):
    start(corpus, tmp_path / "without", tokens=256).run()
    start(corpus, tmp_path / "with", tokens=256, ema=0.5).run()
    files, versions = {}, {}
    for name in ("with", "without"):
        folder = step_folder(tmp_path / name, 1)
        files[name] = {path.name for path in folder.iterdir()}
        versions[name] = json.loads((folder / "state.json").read_text())["version"]
    assert files["without"] == {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert files["with"] == files["without"] | {"average.safetensors"}
    assert versions == {"with": 3, "without": 2}
    monkeypatch.setattr(checkpoint, "VERSION", 2)  # as in a release without averages
    assert checkpoint.read(step_folder(tmp_path / "without", 1)).inference_kind == "model"
    with pytest.raises(NewerCheckpointError):
        checkpoint.read(step_folder(tmp_path / "with", 1))


@pytest.mark.parametrize("how", ["flipped", "missing", "unlisted"])
def test_checkpoint_with_a_damaged_average_is_skipped(corpus, tmp_path, how):
    start(corpus, tmp_path, ema=0.3).run()
    path = step_folder(tmp_path) / "average.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if how == "flipped":
        path.write_bytes(content)
    elif how == "missing":
        path.unlink()
    else:
        state = json.loads((path.parent / "state.json").read_text())
        del state["sha256"]["average.safetensors"]
        (path.parent / "state.json").write_text(json.dumps(state))
    trainer, notes = resume(corpus, tmp_path)
    assert trainer.done == 15 and mentions(notes[0], "state.json" if how == "unlisted" else "average.safetensors")


@pytest.mark.slow  # tests/training/test_trainer.py compiles a run
def test_average_is_the_same_compiled(corpus, tmp_path):
    averages = {}
    for name, compiled in (("plain", False), ("compiled", True)):
        trainer = start(corpus, tmp_path / name, tokens=256 * 4, ema=0.5, compile=compiled, eval_every=2)
        history = record_weights(trainer)
        averages[name] = trainer.run().val_loss
        for key, value in expected_average(history, 1 - 1 / 2).items():
            torch.testing.assert_close(trainer.average.weights[key].double(), value, rtol=1e-5, atol=1e-7)
    assert averages["compiled"] == pytest.approx(averages["plain"], rel=1e-4)


@pytest.fixture(scope="module")
def averaged(corpus, tmp_path_factory):
    """Run of the command line with averaged weights."""
    folder = tmp_path_factory.mktemp("averaged") / "run"
    given = [
        f"--{name.replace('_', '-')}={value}" for name, value in settings(corpus, ema=0.3).items() if name != "model"
    ]
    assert main(["train", "--out", str(folder), *given, *SMALL_OPTIONS]) == 0
    return folder


def both_weights(folder):
    """Averaged and raw weights in the files of the last checkpoint."""
    return (load_file(step_folder(folder) / f"{kind}.safetensors") for kind in ("average", "model"))


def test_generate_uses_the_averaged_weights(averaged, tmp_path, capsys, monkeypatch):
    average, raw = both_weights(averaged)
    loaded, _ = load(averaged, "cpu")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, average[name]) and not torch.equal(value, raw[name]), name
    words = ["generate", "--checkpoint", str(averaged), "--prompt", "def ", "--max-new-tokens", "60"]
    assert main(words) == 0
    text = capsys.readouterr().out
    monkeypatch.setattr(checkpoint.Checkpoint, "inference_kind", "model")
    assert main(words) == 0
    assert capsys.readouterr().out != text


def test_export_writes_the_averaged_weights(averaged, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert main(["export", "--checkpoint", str(averaged), "--out", str(tmp_path / "hf")]) == 0
    average, raw = both_weights(averaged)
    tokens = torch.arange(20).unsqueeze(0)
    model, _ = load(averaged, "cpu")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        logits = exported(tokens).logits
        for state, equal in ((average, True), (raw, False)):
            model.load_state_dict(state)
            assert torch.allclose(model(tokens), logits, rtol=1e-4, atol=1e-4) == equal
    card = (tmp_path / "hf/README.md").read_text()
    assert mentions(card, 0.3)
    assert main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "back")]) == 0
    back = load_file(step_folder(tmp_path / "back", 0) / "model.safetensors")
    assert all(torch.equal(back[name], value) for name, value in average.items())


def test_init_starts_from_the_averaged_weights(averaged, corpus, tmp_path):
    average, _ = both_weights(averaged)
    trainer = start(corpus, tmp_path / "run", init=str(averaged))
    assert trainer.average is None
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, average[name]), name


@pytest.mark.parametrize("ema", ["0", "0.2"])
def test_resuming_refuses_another_average(averaged, capsys, ema):
    words = ["train", "--out", averaged, "--resume", "--ema", ema]
    assert mentions(refused(words, capsys), averaged, "ema", 0.3, "--out")


@pytest.mark.parametrize("ema", ["1", "-0.1", "nan", "much"])
def test_a_value_outside_the_range_is_refused(corpus, tmp_path, capsys, ema):
    line = refused(["train", "--data", corpus, "--out", tmp_path / "run", f"--ema={ema}", *SMALL_OPTIONS], capsys)
    assert mentions(line, "ema") or mentions(line, "--ema")
    assert not (tmp_path / "run").exists()


def test_run_without_the_setting_resumes_without_an_average(corpus, tmp_path):
    path = start(corpus, tmp_path, tokens=256 * 5).run().checkpoint
    state, config = json.loads((path / "state.json").read_text()), tmp_path / "config.yaml"
    assert state["extra"]["settings"].pop("ema") == 0
    (path / "state.json").write_text(json.dumps(state))
    content = yaml.safe_load(config.read_text())
    assert content.pop("ema") == 0
    config.write_text(yaml.safe_dump(content))
    trainer, _ = resume(corpus, tmp_path)
    assert trainer.done == 5 and trainer.average is None
    config.write_text(yaml.safe_dump({**content, "ema": 0.5}))
    with pytest.raises(CheckpointError) as error:
        Trainer(run_folder.saved_config(tmp_path), Dataset.open(corpus), tmp_path, Notes(), resume=True)
    assert mentions(error.value, "ema", "config.yaml")


@pytest.mark.parametrize(
    "words",
    [
        ["ablate", "--only", "all-x2", "--seeds=1", "--batch-tokens=256", "--tokens=2560"],
        ["sweep", "--widths", "64", "--batch-tokens=256", "--tokens=2560", "--lrs", "1e-3"],
    ],
    ids=lambda words: words[0],
)
def test_experiments_average_in_all_runs(corpus, in_process, tmp_path, words):
    sizes = [option for option in SMALL_OPTIONS if "width" not in option or words[0] == "ablate"]
    out = ["--data", str(corpus), "--out", str(tmp_path / "out"), "--eval-tokens=1024", "--workers=1", "--ema=0.3"]
    assert main([*words, *out, *sizes]) == 0
    runs = [path.parent for path in (tmp_path / "out").glob("runs/*/result.json")]
    assert runs
    for folder in runs:
        result = json.loads((folder / "result.json").read_text())
        *_, line = read_metrics(folder / "metrics.jsonl")
        assert math.isfinite(result["loss"]) and result["loss"] == line["val_loss"]
        assert run_folder.saved_config(folder).ema == 0.3
