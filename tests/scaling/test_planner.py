"""antransformer plan: from a budget to a config that train accepts, and the scaling laws behind it."""

import errno
import json
import math
import os
import re

import numpy as np
import pytest
import torch
import yaml

import antransformer
from antransformer.cli import main
from antransformer.errors import ConfigError, DataError
from antransformer.models import ModelConfig
from antransformer.results.observations import Observation, Observations
from antransformer.scaling import fitting as scaling
from antransformer.scaling import law_files as laws
from antransformer.scaling import planner
from antransformer.scaling.fits import fit
from antransformer.scaling.law_files import format_quantity, nearest_shipped, predict, read_laws
from antransformer.scaling.planner import Cluster
from antransformer.training.config import resolve_config
from antransformer.training.config_files import read_yaml
from antransformer.training.cost_model.memory import estimate_memory
from antransformer.training.cost_model.throughput import flops_per_token
from antransformer.training.defaults import parameter_count
from antransformer.training.learning_rates import peak_rates
from antransformer.training.optimizer_registry import OPTIMIZERS

SMALL = ModelConfig(width=256, layers=4, context=128, vocab_size=1024)
BUDGETS = ("--flops", "--hours", "--gpus", "--tokens", "--size")


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    """Return a file as antransformer fit --json writes it, of noisy runs that follow a law."""
    noise = np.random.default_rng(0)
    rows = [
        Observation(
            name,
            n,
            ratio * n,
            8192,
            1e-3,
            (2 + floor + 400 / n**0.33 + 500 / (ratio * n) ** 0.3) * noise.normal(1, 0.003),
        )
        for name, floor in (("angpt", 0.0), ("gpt+", 0.1))
        for n in (3e5, 6e5, 1.2e6, 2.4e6)
        for ratio in (5, 20, 80)
    ]
    path = tmp_path_factory.mktemp("fits") / "laws.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "SURFACE_RESAMPLES", 0)
        content = {fitted.name: fitted.content() for fitted in fit(Observations((), tuple(rows)))}
    path.write_text(json.dumps(content))
    return path


def plan_output(capsys, *options):
    """Run ``antransformer plan`` and return what it prints."""
    assert main(["plan", *map(str, options)]) == 0
    return capsys.readouterr().out


def config_of(out):
    """Return the config that is printed below the tables."""
    return resolve_config(yaml.safe_load(out[out.rindex("\n# ") :]), 50_304)


def test_flops_give_a_config_by_the_papers_laws(capsys):
    out = plan_output(capsys, "--flops", "1e20")
    config = config_of(out)
    parameters = parameter_count(config.model)
    assert parameters == pytest.approx(0.6505 * 1e20**0.4514, rel=0.05)
    assert 6 * parameters * config.tokens == pytest.approx(1e20, rel=0.01)
    assert config.lr == pytest.approx(0.065 * parameters**-0.178, rel=0.01)
    assert config.batch_size == pytest.approx(1.1e-6 * parameters**0.984, rel=0.1) and config.batch_size % 8 == 0
    assert f"{config.steps:,}" in out and re.search(rf"\b{config.batch_size:,}\D+2,048\b", out)
    for name, loss in (("anGPT", 28.4 * 1e20**-0.053), ("GPT+", 32.6 * 1e20**-0.056)):
        (line,) = [line for line in out.splitlines() if line.strip().startswith(f"{name} ") and "L(C)" in line]
        assert float(line.split()[1]) == pytest.approx(loss, abs=2e-3)
        low, high = re.findall(r"\d\.\d{3}", line)[1:]
        assert (
            float(low) < loss < float(high) and "95%" not in line
        )  # rounding of the printed law, not a confidence interval
    assert "paper.json" in out and read_laws(laws.SHIPPED / "paper.json").measured in out
    assert "2.7e+20" not in out and "1.1B" not in out  # ends of the measured range: nothing is extrapolated


def test_extrapolation_is_reported_with_its_factor(capsys):
    out = plan_output(capsys, "--tokens", "2T", "--size", "3B", "--gpus", 512)
    for name in ("anGPT", "GPT+"):
        assert re.search(rf"\b{re.escape(name)}.*compute.*3\.6e\+22\b.*\b134\b.*2\.7e\+20\b", out)
    assert len(re.findall(r"parameters.*\b3\.02B\b.*\b2\.75\b.*\b1\.1B\b", out)) == 2  # for batch and learning rate


def test_a_plan_fills_its_hours_where_two_layouts_alternate():
    planned = antransformer.plan(hours=3, gpus=64, gpu="h100")  # by size alone it would take 2.90 hours
    assert planned.hours == pytest.approx(3, rel=1e-3)
    assert planned.tokens == planned.steps * planned.batch * planned.config.context


def test_the_plan_uses_the_given_hours(tmp_path, capsys):
    target = tmp_path / "plan.yaml"
    options = ["--gpus", 8, "--gpu", "A100-80GB", "--hours", 10, "--mfu", 0.5, "--architecture", "gpt+"]
    out = plan_output(capsys, *options, "--out", target)
    config = resolve_config(read_yaml(target), 50_304)
    assert config.tokens * flops_per_token(config.model) == pytest.approx(8 * 312e12 * 0.5 * 36_000, rel=0.02)
    assert config.model.architecture == "gpt+" and config.warmup_fraction > 0 and config.precision == "bfloat16"
    assert "50.0%" in out and re.search(r" 10 \w+ *\n", out) and f"train --config {target} --data" in out
    assert main(["plan", "--flops", "1e18", "--out", str(target)]) == 2
    errors = capsys.readouterr().err
    assert "--out" in errors and str(target) in errors and errors.count("\n") == 1
    assert resolve_config(read_yaml(target), 50_304) == config


def test_tokens_and_a_preset_give_a_config(capsys):
    config = config_of(plan_output(capsys, "--tokens", "100B", "--size", "0.5b"))
    assert (config.preset, config.model.width, config.model.layers) == ("0.5b", 1024, 24)
    assert config.tokens == pytest.approx(100e9, rel=1e-3)


def test_a_size_that_no_model_has_is_reported(capsys):
    def reported(size):
        out = plan_output(capsys, "--tokens", "1B", "--size", size)
        nearest = format_quantity(parameter_count(config_of(out).model))
        return any(line.startswith("- ") and nearest in line for line in out.splitlines())

    assert reported("1M") and not reported("32M") and not reported("32m")


def test_a_run_shorter_than_its_batch_is_reported(capsys):
    out = plan_output(capsys, "--tokens", "1M", "--size", "1b")
    assert config_of(out).steps == 1 and any("1.77M" in line and "1.0M" in line for line in out.splitlines())
    assert plan_output(capsys, "--tokens", "1B", "--size", "1b").count("1.0B") == 1  # only in the table


def test_the_users_own_laws_are_used(fits, capsys):
    out = plan_output(capsys, "--flops", "1e14", "--fits", fits, "--vocab-size", 512, "--context", 256, "--gpus", 1)
    assert "laws.json" in out and "paper.json" not in out and "None" not in out
    (line,) = [line for line in out.splitlines() if line.strip().startswith("anGPT ") and "L(N, D)" in line]
    columns = line.split()
    low, loss, high = float(columns[2]), float(columns[1]), float(columns[4])
    assert low < loss < high and columns[5] == "(95%)"
    # The band is the confidence band of the fit, at the model's size and the run's tokens.
    config = resolve_config(yaml.safe_load(out[out.rindex("\n# ") :]), 512)
    prediction = predict(read_laws(fits).by_architecture["angpt"], parameter_count(config.model), config.tokens)
    assert (prediction.loss, prediction.low, prediction.high) == pytest.approx((loss, low, high), abs=1e-3)
    assert "ddp" not in out[: out.rindex("\n# ")]  # one GPU has no strategy


def test_a_default_rate_has_a_width_and_the_rate_of_a_law_has_none(fits, capsys):
    options = ["--tokens", "1M", "--size", "1M", "--vocab-size", 512, "--context", 256]
    out = plan_output(capsys, *options)
    config = config_of(out)
    assert (config.lr, config.lr_width) == (1.2e-2, 128) and re.search(r" 0\.012\b.*\b128\b", out)
    content = json.loads(fits.read_text())
    content["angpt"]["lr"] = {**content["angpt"]["loss"], "coefficient": 2e-3, "exponent": -0.1}
    fits.with_name("with-lr.json").write_text(json.dumps(content))
    by_law = config_of(plan_output(capsys, *options, "--fits", fits.with_name("with-lr.json")))
    assert (by_law.lr_width, by_law.lr_horizon, by_law.optimizer) == (0, 0, "adam")
    content["angpt"]["optimizer"] = "muon"
    fits.with_name("with-lr.json").write_text(json.dumps(content))
    with_muon = config_of(plan_output(capsys, *options, "--fits", fits.with_name("with-lr.json")))
    assert (with_muon.optimizer, with_muon.lr) == ("muon", by_law.lr)
    # In the proportion of a sweep with recipe paper: the defaults are 0.04 and 0.012.
    assert with_muon.muon_lr == pytest.approx(by_law.lr * 0.04 / 0.012, rel=0.01)
    # Above the sizes of the paper's fits too, where ``train`` has no default.
    law = ["--fits", fits.with_name("with-lr.json")]
    large = config_of(plan_output(capsys, "--tokens", "20B", "--size", "7B", "--gpus", 64, *law))
    assert large.optimizer == "muon" and large.muon_lr / large.lr > with_muon.muon_lr / with_muon.lr
    assert config_of(plan_output(capsys, "--tokens", "1B", "--size", "62m")).lr_width == 0


def test_a_rate_of_a_law_has_the_schedule_of_the_runs_that_gave_it(fits, capsys):
    content, file = json.loads(fits.read_text()), fits.with_name("with-schedule.json")
    content["angpt"]["training"] = {"optimizer": "adam", "schedule": "wsd", "decay_fraction": 0.2, "ema": 0.1}
    file.write_text(json.dumps(content))
    options = ["--tokens", "1M", "--size", "1M", "--vocab-size", 512, "--context", 256, "--fits", file]
    default = config_of(plan_output(capsys, *options))
    assert (default.optimizer, default.schedule, default.ema) == ("adam", "cosine", 0)  # no law of the rate
    content["angpt"]["lr"] = {**content["angpt"]["loss"], "coefficient": 2e-3, "exponent": -0.1}
    file.write_text(json.dumps(content))
    by_law = config_of(plan_output(capsys, *options))
    assert (by_law.schedule, by_law.decay_fraction, by_law.ema) == ("wsd", 0.2, 0.1)


def test_batch_and_rate_of_a_preset_are_those_of_train_with_any_vocabulary(capsys):
    for preset in ("pico", "32m"):
        options = ("--size", preset, "--tokens", "100M", "--gpus", 1, "--vocab-size", 4096)
        planned = config_of(plan_output(capsys, *options))
        expected = resolve_config({"preset": preset, "recipe": "paper", "tokens": "100M"}, 4096)
        assert (planned.batch_tokens, planned.lr, planned.lr_width) == (
            expected.batch_tokens,
            expected.lr,
            expected.lr_width,
        )


def test_the_learning_rate_of_a_plan_follows_the_length_of_the_run(fits, capsys):
    options = ["--size", "62m", "--vocab-size", 50304]
    default = config_of(plan_output(capsys, *options, "--tokens", "1.25B"))
    long = config_of(plan_output(capsys, *options, "--tokens", "12.5B"))
    assert (long.lr, long.lr_horizon) == (default.lr, default.lr_horizon)
    assert default.lr_horizon == pytest.approx(default.steps, rel=0.02)
    exponent = OPTIMIZERS["adam"].horizon_exponents["angpt"]
    assert peak_rates(long).blocks == pytest.approx(default.lr * 10**-exponent, rel=0.02)
    content = json.loads(fits.read_text())
    content["angpt"]["lr"] = {**content["angpt"]["loss"], "coefficient": 2e-3, "exponent": -0.1}
    content["angpt"]["horizon"] = {"exponent": 0.3, "tokens_per_parameter": 4}
    fits.with_name("horizon.json").write_text(json.dumps(content))
    small = ["--size", "1M", "--vocab-size", 512, "--context", 256, "--fits", fits.with_name("horizon.json")]
    config = config_of(plan_output(capsys, *small, "--tokens", "40M"))
    assert config.horizon_exponent == 0.3
    assert config.lr_horizon * config.batch_tokens == pytest.approx(4 * 1e6, rel=0.15)


def test_the_band_follows_from_the_covariance(fits):
    content = json.loads(fits.read_text())
    surface = read_laws(fits).by_architecture["angpt"].surface
    # Delta method: the gradient of log L in the five parameters; Student's t with 7 degrees of freedom.
    n, d = 1e6, 2e7
    size, data = surface.A / n**surface.alpha, surface.B / d**surface.beta
    gradient = np.array([1, size, data, -size * math.log(n), -data * math.log(d)]) / surface(n, d)
    error = math.sqrt(gradient @ np.array(content["angpt"]["surface"]["covariance"]) @ gradient)
    prediction = predict(read_laws(fits).by_architecture["angpt"], n, d)
    assert math.log(prediction.high / prediction.loss) == pytest.approx(2.3646 * error, rel=1e-3)
    assert not prediction.extrapolations
    content["angpt"]["surface"]["covariance"] = [[None] * 5] * 5
    fits.with_name("without.json").write_text(json.dumps(content))
    undetermined = read_laws(fits.with_name("without.json")).by_architecture["angpt"]
    without_covariance = predict(undetermined, n, 1e10)
    assert without_covariance.high == math.inf
    # Such a law does not choose the model size.
    assert undetermined.compute == (undetermined.powers["size"].span if "size" in undetermined.powers else None)
    (note,) = without_covariance.extrapolations
    assert all(fact in note for fact in ("tokens", "10B", "52.1", "192M"))


def test_the_shipped_laws_measured_nearest_are_used(fits, tmp_path, monkeypatch):
    shipped = tmp_path / "laws"
    shipped.mkdir()
    (shipped / "paper.json").write_text((laws.SHIPPED / "paper.json").read_text())
    (shipped / "cpu.json").write_text(json.dumps({"measured": "on a CPU", **json.loads(fits.read_text())}))
    monkeypatch.setattr(laws, "SHIPPED", shipped)
    assert nearest_shipped("angpt", 1e13).measured == "on a CPU"
    assert nearest_shipped("angpt", 1e20).name == "paper.json"
    assert nearest_shipped("ngpt", 1e20) is None


def test_every_shipped_law_describes_its_measurement():
    for path in laws.SHIPPED.glob("*.json"):
        file = read_laws(path)
        assert len(file.measured) > 40 and {"angpt", "gpt+"} <= file.by_architecture.keys()
        assert all(architecture_laws.compute for architecture_laws in file.by_architecture.values())


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ([], BUDGETS),
        (["--flops", "1e20", "--hours", "3", "--gpus", "8"], BUDGETS),
        (["--hours", "3"], BUDGETS),
        (["--size", "1b"], BUDGETS),
        (["--flops", "0"], ["--flops", "1e30", " 0"]),
        (["--flops=-1e20"], ["--flops", "1e30", "-1e+20"]),
        (["--flops", "much"], ["--flops", "'much'"]),
        (["--flops", "1e20", "--gpu", "h10"], ["--gpu", "h10", "h100", "b200, gh200, h200-nvl"]),
        (["--flops", "1e20", "--gpus", "0"], ["--gpus", " 0"]),
        (["--flops", "1e20", "--gpus", "12"], ["12", "8", "--gpus", "--gpus-per-machine"]),
        (["--flops", "1e20", "--mfu", "1.4"], ["--mfu", "1.4"]),
        (["--flops", "1e20", "--network", "0"], ["--network", " 0"]),
        (["--flops", "1e20", "--architecture", "bert"], ["--architecture", "bert", "angpt"]),
        (["--flops", "1e20", "--architecture", "ngpt"], ["ngpt", "--fits"]),
        (["--flops", "1e20", "--vocab-size", "many"], ["--vocab-size", "'many'"]),
        (["--flops", "1e20", "--fits", "nowhere.json"], ["nowhere.json", os.strerror(errno.ENOENT)]),
        (["--flops", "1e20", "--fits", "half.json"], ["angpt", "half.json", "--fits", "--tokens", "--size"]),
        (["--flops", "1e20", "--fits", "list.json"], ["list.json"]),
        (["--tokens", "1B", "--size", "62m", "--fits", "half.json"], ["batch", "43.5", "2,048", "--context"]),
        (["--flops", "1e20", "--out", "no/where.yaml"], ["--out", "no/where.yaml"]),
        (["--tokens", "0", "--size", "1b"], ["--tokens", " 0"]),
        (["--tokens", "1B", "--size", "huge"], ["--size", "pico, nano, 32m", "huge"]),
        (["--tokens", "1B", "--size", "70B", "--gpus", "1"], ["69.8B", "1 h100", "--gpus", "--gpu"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(options, facts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    law = {"coefficient": 1e-6, "exponent": 0.98, "span": [1e6, 1e7]}
    (tmp_path / "half.json").write_text(json.dumps({"angpt": {"batch": law}}))
    (tmp_path / "list.json").write_text("[1]")
    assert main(["plan", *options]) == 2
    captured = capsys.readouterr()
    assert all(fact in captured.err for fact in facts), captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize(
    "change",
    [
        {"coefficient": -1},
        {"coefficient": "1"},
        {"coefficient": True},
        {"exponent": 1e9},
        {"exponent": None},
        {"span": [1e20, 1e17]},
        {"span": [1e20]},
        {"covariance": [[1, 2]]},
        {"covariance": [[1, "a"], [1, 2]]},
        {"points": "many"},
    ],
)
def test_an_invalid_law_is_refused(change, tmp_path):
    content = json.loads((laws.SHIPPED / "paper.json").read_text())
    content["angpt"]["size"] |= change
    (tmp_path / "laws.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"laws\.json"):
        read_laws(tmp_path / "laws.json")


def test_an_exponent_may_be_0_but_loss_must_fall_with_size(fits, tmp_path):
    content = json.loads(fits.read_text())
    content["angpt"]["lr"] = {"coefficient": 2e-3, "exponent": 0.0, "span": [1e6, 1e8]}
    (tmp_path / "laws.json").write_text(json.dumps(content))
    assert read_laws(tmp_path / "laws.json").by_architecture["angpt"].powers["lr"](1e9) == 2e-3
    content["angpt"]["surface"]["alpha"] = -0.3
    (tmp_path / "laws.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"-0\.3\b"):
        read_laws(tmp_path / "laws.json")
    for wrong in ({"optimizer": "sgd"}, {"training": {"optimizer": "sgd"}}, {"training": {"seed": 3}}):
        (tmp_path / "laws.json").write_text(json.dumps({"angpt": wrong}))
        with pytest.raises(DataError, match=r"\b(sgd|seed)\b"):
            read_laws(tmp_path / "laws.json")


def test_rounding_errors_are_two_numbers_of_any_size(tmp_path):
    content = json.loads((laws.SHIPPED / "paper.json").read_text())
    content["angpt"]["loss"]["rounded"] = [0.05, 30.0]
    (tmp_path / "laws.json").write_text(json.dumps(content))
    prediction = predict(read_laws(tmp_path / "laws.json").by_architecture["angpt"], 1e9, 2e10)
    assert 0 <= prediction.low < 1e-200 and prediction.high > 1e200
    content["angpt"]["loss"]["rounded"] = [0.05]
    (tmp_path / "laws.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"laws\.json"):
        read_laws(tmp_path / "laws.json")


def test_an_architecture_without_laws_can_be_planned(capsys):
    out = plan_output(capsys, "--tokens", "1B", "--size", "32m", "--architecture", "ngpt", "--gpus", 1)
    assert re.search(r"\bnGPT\b.*--fits", out) and "L(C)" not in out and config_of(out).model.architecture == "ngpt"


# Sizes and layouts


@pytest.mark.parametrize("parameters", [2e7, 1e8, 6.9e8, 7e9, 7e10, 5e11])
def test_a_config_has_about_the_given_size_and_can_be_split(parameters):
    config = planner.config_of_size(parameters, SMALL)
    assert parameter_count(config) == pytest.approx(parameters, rel=0.06)
    assert (config.context, config.vocab_size) == (128, 1024)
    assert config.width < 2048 or planner.can_split(config, 8)


@pytest.mark.parametrize(
    ("parameters", "devices", "strategy", "tensor_parallel", "checkpointing"),
    [
        (5e8, 8, "ddp", 1, False),
        (7e9, 8, "fsdp", 1, False),
        (3e10, 256, "ddp", 8, False),
        (7e10, 1024, "fsdp", 1, True),
    ],
)
def test_the_simplest_layout_that_fits_and_is_not_slow(parameters, devices, strategy, tensor_parallel, checkpointing):
    config, batch = planner.config_of_size(parameters, ModelConfig()), 16 * devices
    layout, memory = planner.choose_layout(config, batch, Cluster("h100", devices, 8, 50e9))
    assert (layout.strategy, layout.tensor_parallel, layout.checkpointing) == (strategy, tensor_parallel, checkpointing)
    assert memory.total < 0.9 * 80e9 and memory == estimate_memory(config, layout, torch.bfloat16)
    assert layout.batch_size == pytest.approx(batch, rel=0.1)


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="8 rtx4090"):
        planner.choose_layout(planner.config_of_size(7e10, ModelConfig()), 64, Cluster("rtx4090", 8, 8, 50e9))
