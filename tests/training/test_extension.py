"""Extending a run to more tokens: equal to a longer run, or with a second rise of the learning rate."""

import json
import math
import re
import shutil

import pytest
import yaml

import antransformer
from antransformer.errors import CheckpointError, ConfigError, UsageError
from antransformer.interop.model_card import learning_rate
from antransformer.settings import Count
from antransformer.training import run_folder
from antransformer.training.config import resolve_config
from antransformer.training.distributed.parallel import DistributedContext
from antransformer.training.extension import LENGTH_SETTINGS, describe_finished
from antransformer.training.extension import extend as extend_config
from antransformer.training.metrics import read_metrics
from antransformer.training.schedule import SHAPES
from antransformer.training.trainer import Trainer
from helpers.messages import mentions
from helpers.trainers import losses, resume, run_until, settings, start, weights

STEP = 256  # tokens
WSD = {"schedule": "wsd", "decay_fraction": 0.25, "checkpoint_every": 4}


def rates(folder):
    return {line["step"]: line["lr"] for line in read_metrics(folder / "metrics.jsonl")}


def extend(folder, steps, **options):
    return antransformer.train(out=folder, resume=True, tokens=STEP * steps, **options)


def interrupt_extension(folder, steps, monkeypatch, after, **options):
    """Extend a run and interrupt it before step ``after + 1``, as a power cut would."""
    update = Trainer.update

    def interrupted(self, step):
        if step > after:
            raise KeyboardInterrupt
        return update(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            extend(folder, steps, **options)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("schedule", SHAPES)
def test_every_schedule_resumes_bit_identically(corpus, tmp_path, schedule):
    options = {"schedule": schedule, "decay_fraction": 0.7, "tokens": STEP * 10, "checkpoint_every": 3}
    start(corpus, tmp_path / "uninterrupted", **options).run()
    run_until(start(corpus, tmp_path / "run", **options), 6)
    trainer, _ = resume(corpus, tmp_path / "run")
    assert trainer.done == 3
    trainer.run()
    assert losses(tmp_path / "run") == losses(tmp_path / "uninterrupted")
    assert weights(tmp_path / "run", 10) == weights(tmp_path / "uninterrupted", 10)


@pytest.mark.parametrize(
    ("options", "warmup_fractions"),
    [({}, (0, 0)), ({"architecture": "gpt+"}, (0.25, 0.15)), ({"optimizer": "muon"}, (0.75, 0.45))],
    ids=["angpt", "warm-up", "in the warm-up"],
)
def test_run_extended_before_its_decay_equals_a_longer_run(corpus, tmp_path, options, warmup_fractions):
    """Also if the run is extended within its warm-up, and twice."""
    short, long = ({**WSD, **options, "warmup_fraction": fraction} for fraction in warmup_fractions)
    start(corpus, tmp_path / "long", **long, tokens=STEP * 20).run()
    run_until(start(corpus, tmp_path / "run", **short, tokens=STEP * 12), 10)
    with pytest.raises(UsageError):
        extend(tmp_path / "run", 12, rewarm=0.5)
    run = run_folder.saved_config(tmp_path / "run")
    assert run.warmup_steps == resolve_config(settings(corpus, **long), 257).warmup_steps
    extend(tmp_path / "run", 20)
    assert losses(tmp_path / "run") == losses(tmp_path / "long")
    assert rates(tmp_path / "run") == rates(tmp_path / "long")
    assert weights(tmp_path / "run", 20) == weights(tmp_path / "long", 20)


def test_run_extended_twice_and_interrupted_equals_a_longer_run(corpus, tmp_path, monkeypatch):
    start(corpus, tmp_path / "long", **WSD, tokens=STEP * 20).run()
    run_until(start(corpus, tmp_path / "run", **WSD, tokens=STEP * 8), 6)
    interrupt_extension(tmp_path / "run", 14, monkeypatch, after=6)  # before its first new checkpoint
    assert run_folder.saved_config(tmp_path / "run").steps == 14
    run_until(resume(corpus, tmp_path / "run")[0], 11)
    extend(tmp_path / "run", 20)
    assert losses(tmp_path / "run") == losses(tmp_path / "long")
    assert weights(tmp_path / "run", 20) == weights(tmp_path / "long", 20)
    config = run_folder.saved_config(tmp_path / "run")
    assert (config.steps, config.initial_steps, config.checkpoint_every) == (20, 8, 4)


@pytest.mark.parametrize("after", [11, 17])
def test_interrupted_extension_with_rewarm_resumes_bit_identically(corpus, tmp_path, monkeypatch, after):
    """Interrupted before its first new checkpoint, and after it."""
    start(corpus, tmp_path / "run", tokens=STEP * 10, ema=0.3).run()
    shutil.copytree(tmp_path / "run", tmp_path / "uninterrupted")
    extend(tmp_path / "uninterrupted", 20, rewarm=0.4)
    interrupt_extension(tmp_path / "run", 20, monkeypatch, after, rewarm=0.4)
    antransformer.train(out=tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "uninterrupted")
    assert rates(tmp_path / "run") == rates(tmp_path / "uninterrupted")
    for kind in ("model", "average"):
        assert weights(tmp_path / "run", 20, kind) == weights(tmp_path / "uninterrupted", 20, kind)


def test_an_extension_with_rewarm_may_be_repeated(corpus, tmp_path, monkeypatch):
    """A restarted job repeats the arguments, of which ``rewarm`` may already be in config.yaml."""
    start(corpus, tmp_path / "run", tokens=STEP * 10).run()
    interrupt_extension(tmp_path / "run", 16, monkeypatch, after=12, rewarm=0.5)
    before = (tmp_path / "run/config.yaml").read_text()
    with pytest.raises(ConfigError):
        extend(tmp_path / "run", 16, rewarm=0.2)
    assert extend(tmp_path / "run", 16, rewarm=0.5).result.step == 16
    assert (tmp_path / "run/config.yaml").read_text() == before


def test_run_without_a_checkpoint_is_extended_but_not_rewarmed(corpus, tmp_path):
    run_until(start(corpus, tmp_path / "run", tokens=STEP * 10), 3)
    with pytest.raises(CheckpointError) as error:
        extend(tmp_path / "run", 12, rewarm=0.5)
    assert mentions(error.value, tmp_path / "run", "rewarm")
    start(corpus, tmp_path / "long", tokens=STEP * 12).run()
    extend(tmp_path / "run", 12)
    assert weights(tmp_path / "run", 12) == weights(tmp_path / "long", 12)


def test_rewarm_rises_from_the_rate_at_the_checkpoint_and_decays_again(corpus, tmp_path):
    start(corpus, tmp_path / "run", tokens=STEP * 10, min_lr_ratio=0.2).run()
    extend(tmp_path / "run", 20, rewarm=0.4)
    found = list(rates(tmp_path / "run").values())
    assert found[9] == pytest.approx(0.2e-2)
    assert found[10:14] == pytest.approx([4e-3, 6e-3, 8e-3, 1e-2])
    decay = [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * number / 6)) for number in range(1, 7)]
    assert found[14:] == pytest.approx([1e-2 * ratio for ratio in decay])


def test_rewarm_within_the_decay_keeps_the_decay_fraction_of_the_added_steps(corpus, tmp_path):
    start(corpus, tmp_path / "run", **WSD, tokens=STEP * 8).run()
    extend(tmp_path / "run", 16, rewarm=0.25)
    found = [rate / 1e-2 for rate in rates(tmp_path / "run").values()]
    assert found[5:8] == pytest.approx([1, 0.505, 0.01])
    assert found[8:] == pytest.approx([0.505, 1, 1, 1, 1, 1, 0.505, 0.01])
    with pytest.raises(CheckpointError):
        extend(tmp_path / "run", 24)
    extend(tmp_path / "run", 24, rewarm=0.5)
    found = [rate / 1e-2 for rate in rates(tmp_path / "run").values()]
    assert found[15:20] == pytest.approx([0.01, 0.2575, 0.505, 0.7525, 1]) and found[-1] == pytest.approx(0.01)


def test_rewarmed_run_is_extended_again_before_its_decay(corpus, tmp_path, monkeypatch):
    start(corpus, tmp_path / "run", **WSD, tokens=STEP * 8).run()
    shutil.copytree(tmp_path / "run", tmp_path / "direct")
    extend(tmp_path / "direct", 20, rewarm=2 / 12)
    interrupt_extension(tmp_path / "run", 16, monkeypatch, after=13, rewarm=2 / 8)
    extend(tmp_path / "run", 20)
    assert rates(tmp_path / "run") == rates(tmp_path / "direct")
    assert weights(tmp_path / "run", 20) == weights(tmp_path / "direct", 20)


def test_config_of_a_run_extended_before_its_decay_repeats_it(corpus, tmp_path):
    run_until(start(corpus, tmp_path / "run", **WSD, warmup_fraction=0.25, tokens=STEP * 8), 6)
    extend(tmp_path / "run", 12)
    antransformer.train(config=tmp_path / "run/config.yaml", out=tmp_path / "again")
    assert weights(tmp_path / "run", 12) == weights(tmp_path / "again", 12)


def test_rewarmed_run_needs_a_checkpoint_from_its_rewarm_on(corpus, tmp_path):
    start(corpus, tmp_path / "run", tokens=STEP * 10).run()
    extend(tmp_path / "run", 12, rewarm=0.5)
    for step in (10, 12):
        (tmp_path / f"run/checkpoints/step-{step:08d}/model.safetensors").write_bytes(b"")
    for options in ({}, {"tokens": STEP * 20}, {"tokens": STEP * 20, "rewarm": 0.2}):
        with pytest.raises(CheckpointError) as error:
            antransformer.train(out=tmp_path / "run", resume=True, **options)
        assert mentions(error.value, tmp_path / "run", 10, 5, "state.json", *LENGTH_SETTINGS)
    with pytest.raises(ConfigError) as error:
        antransformer.train(config=tmp_path / "run/config.yaml", out=tmp_path / "again")
    assert mentions(error.value, *LENGTH_SETTINGS[2:]) and not (tmp_path / "again").exists()
    # As the first error advises:
    state = json.loads((tmp_path / "run/checkpoints/step-00000005/state.json").read_text())
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    settings = {name: value for name, value in state["extra"]["settings"].items() if name in LENGTH_SETTINGS}
    config = {name: value for name, value in config.items() if name not in LENGTH_SETTINGS} | settings
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    assert antransformer.train(out=tmp_path / "run", resume=True).result.step == 10


def test_model_card_tells_schedule_and_rewarm(corpus, tmp_path):
    start(corpus, tmp_path / "run", **WSD, warmup_fraction=0.1, tokens=STEP * 8).run()
    extend(tmp_path / "run", 16, rewarm=0.25)
    row = learning_rate(run_folder.saved_config(tmp_path / "run"))
    assert "wsd" in row and mentions(row, "10%", 2048, 8, 2, 512, 4096)


def test_extension_keeps_the_peak_rates(corpus, tmp_path):
    horizon = {"lr_horizon": 5, "horizon_exponent": 0.4}
    trainer = start(corpus, tmp_path / "run", lr_width=128, **horizon, tokens=STEP * 10)
    peaks = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    trainer.run()
    extend(tmp_path / "run", 20, rewarm=0.5)
    extended, _ = resume(corpus, tmp_path / "run")
    assert [group["initial_lr"] for group in extended.optimizer.param_groups] == peaks


def test_eval_and_checkpoint_intervals_stay_unless_given(corpus, tmp_path):
    run_until(start(corpus, tmp_path / "run", **WSD, eval_every=6, tokens=STEP * 12), 6)
    extend(tmp_path / "run", 20, checkpoint_every=5)
    config = run_folder.saved_config(tmp_path / "run")
    assert (config.eval_every, config.checkpoint_every) == (6, 5)


def test_data_in_another_place_is_recorded_with_an_absolute_path(corpus, tmp_path, monkeypatch):
    run_until(start(corpus, tmp_path / "run", **WSD, tokens=STEP * 12), 6)
    shutil.copytree(corpus, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    extend(tmp_path / "run", 20, data="moved")
    assert run_folder.saved_config(tmp_path / "run").data == str(tmp_path / "moved")


def test_lengthened_config_without_an_extension_is_refused(corpus, tmp_path):
    start(corpus, tmp_path / "run", **WSD, tokens=STEP * 5).run()
    file = tmp_path / "run/config.yaml"
    for change in ("tokens: 2560", "tokens: 2560\ninitial_tokens: 1280", "tokens: 2560\ninitial_tokens: 512"):
        text = file.read_text()
        file.write_text(text.replace("tokens: 1280", change, 1))
        assert file.read_text() != text
        with pytest.raises(CheckpointError) as error:
            resume(corpus, tmp_path / "run")
        assert mentions(error.value, "tokens", "config.yaml")
        file.write_text(text)


@pytest.mark.parametrize(
    ("steps", "options", "facts"),
    [
        (20, {}, ["rewarm", "--out", 10]),
        (9, {}, ["tokens", "--out", 2304, 2560]),
        (10.5, {}, ["tokens", 2688, 2816]),
        (20, {"rewarm": 0}, ["rewarm", 0]),
        (20, {"rewarm": 1}, ["rewarm", 1]),
        (20, {"rewarm": math.nan}, ["rewarm", "nan"]),
        (20, {"rewarm": "much"}, ["rewarm", "much"]),
        (20, {"rewarm": 0.8}, ["rewarm", "decay_fraction", 0.8, 0.5]),
        (20, {"rewarm": 0.2, "lr": 1}, ["lr", 0.01, "1.0"]),
        (10, {"rewarm": 0.2}, ["rewarm", "tokens", 2560]),
        (20, {"rewarm": 0.2, "resume": False}, ["rewarm", "--resume"]),
    ],
)
def test_wrong_extension_is_refused_and_changes_nothing(finished, steps, options, facts):
    before = contents(finished)
    with pytest.raises(UsageError) as error:
        antransformer.train(**{"out": finished, "resume": True, "tokens": int(STEP * steps), **options})
    assert mentions(error.value, *facts)
    assert contents(finished) == before


def test_a_run_of_a_constant_rate_is_extended_without_a_rise(corpus, tmp_path):
    start(corpus, tmp_path / "run", min_lr_ratio=1.0, tokens=STEP * 8).run()
    assert "--rewarm" not in describe_finished(run_folder.saved_config(tmp_path / "run"), tmp_path / "run")
    extend(tmp_path / "run", 12)
    assert set(rates(tmp_path / "run").values()) == {1e-2}


@pytest.mark.parametrize(("machines", "processes"), [(1, ["3"]), (2, [])])
def test_the_suggested_command_starts_as_many_processes_on_one_machine(corpus, tmp_path, machines, processes):
    start(corpus, tmp_path / "run", tokens=STEP * 8)
    dist_ctx = DistributedContext(world_size=3 * machines, local_world_size=3)
    text = describe_finished(run_folder.saved_config(tmp_path / "run"), tmp_path / "run", dist_ctx)
    assert re.findall(r"--processes (\S+)", text) == processes and "--tokens 4096" in text


@pytest.mark.parametrize(("decay_fraction", "rewarm"), [(0.5, 0.1), (0.95, 0.05), (None, 0.1), (1.0, None)])
def test_the_suggested_rise_is_possible(corpus, tmp_path, decay_fraction, rewarm):
    start(corpus, tmp_path / "run", decay_fraction=decay_fraction, tokens=STEP * 40)
    config = run_folder.saved_config(tmp_path / "run")
    text = describe_finished(config, tmp_path)
    if rewarm:
        assert re.findall(r"--rewarm (\S+)", text) == [str(rewarm)]
        extend_config(config, Count(STEP * 80), 40, rewarm, tmp_path)
    else:
        assert "--rewarm" not in text and "--out" in text
        with pytest.raises(ConfigError, match="--out"):
            extend_config(config, Count(STEP * 80), 40, 0.1, tmp_path)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """Run of ten steps whose learning rate decayed over the last five."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    start(corpus, folder, schedule="linear", decay_fraction=0.5, tokens=STEP * 10).run()
    return folder
