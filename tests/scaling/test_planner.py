"""antransformer plan: from a budget to a config that train accepts; the laws, the memory and the traffic behind it."""

import errno
import json
import math
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from antransformer.cli import main
from antransformer.errors import ConfigError, DataError
from antransformer.functional import CHUNK, LARGE_CHUNK
from antransformer.models import ModelConfig
from antransformer.results.observations import Observation, Observations
from antransformer.scaling import fitting as scaling
from antransformer.scaling import law_files as laws
from antransformer.scaling import planner as plans
from antransformer.scaling.fits import fit
from antransformer.scaling.law_files import nearest_shipped, predict, read_laws
from antransformer.scaling.planner import Cluster
from antransformer.training.config import read_yaml, resolve_config
from antransformer.training.cost_model.memory import Layout, block_parameters, memory, saved_activations
from antransformer.training.cost_model.throughput import comm_volume, expected_mfu, flops_per_token
from antransformer.training.defaults import parameter_count
from helpers.memory_tracker import in_fresh_process

SMALL = ModelConfig(width=256, layers=4, context=128, vocab_size=1024)
H100S = Cluster("h100", 8, 8, 50e9)
HALF = torch.bfloat16
BUDGETS = ("--flops", "--hours", "--gpus", "--tokens", "--size")
SHAPE = ("--width", 128, "--layers", 3, "--context", 64, "--vocab-size", 512)


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    """What antransformer fit --json leaves of runs that follow a law, with noise."""
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
        content = {it.name: it.content() for it in fit(Observations((), tuple(rows)))}
    path.write_text(json.dumps(content))
    return path


def planned(capsys, *words):
    assert main(["plan", *map(str, words)]) == 0
    return capsys.readouterr().out


def config_of(out):
    """The file that is printed below the tables."""
    return resolve_config(yaml.safe_load(out[out.rindex("\n# ") :]), 50_304)


def test_compute_to_a_config_by_the_papers_laws(capsys):
    out = planned(capsys, "--flops", "1e20")
    config = config_of(out)
    size = parameter_count(config.model)
    assert size == pytest.approx(0.6505 * 1e20**0.4514, rel=0.05)
    assert 6 * size * config.tokens == pytest.approx(1e20, rel=0.01)
    assert config.lr == pytest.approx(0.065 * size**-0.178, rel=0.01)
    assert config.batch_size == pytest.approx(1.1e-6 * size**0.984, rel=0.1) and config.batch_size % 8 == 0
    assert f"{config.steps:,}" in out and re.search(rf"\b{config.batch_size:,}\D+2,048\b", out)
    for name, loss in (("anGPT", 28.4 * 1e20**-0.053), ("GPT+", 32.6 * 1e20**-0.056)):
        (line,) = [line for line in out.splitlines() if line.strip().startswith(f"{name} ") and "L(C)" in line]
        assert float(line.split()[1]) == pytest.approx(loss, abs=2e-3)
        low, high = re.findall(r"\d\.\d{3}", line)[1:]
        assert float(low) < loss < float(high) and "95%" not in line  # a band by rounding alone
    assert "paper.json" in out and read_laws(laws.SHIPPED / "paper.json").measured in out
    assert "2.7e+20" not in out and "1.1B" not in out  # the largest measured


def test_what_lies_outside_of_what_was_measured_is_said_with_how_far(capsys):
    out = planned(capsys, "--tokens", "2T", "--size", "3B", "--gpus", 512)
    for name in ("anGPT", "GPT+"):
        assert re.search(rf"\b{re.escape(name)}.*compute.*3\.6e\+22\b.*\b134\b.*2\.7e\+20\b", out)
    assert len(re.findall(r"parameters.*\b3\.02B\b.*\b2\.75\b.*\b1\.1B\b", out)) == 2  # of batch and learning rate


def test_hours_of_gpus_are_used_up(tmp_path, capsys):
    target = tmp_path / "plan.yaml"
    words = ["--gpus", 8, "--gpu", "A100-80GB", "--hours", 10, "--mfu", 0.5, "--architecture", "gpt+"]
    out = planned(capsys, *words, "--out", target)
    config = resolve_config(read_yaml(target), 50_304)
    assert config.tokens * flops_per_token(config.model) == pytest.approx(8 * 312e12 * 0.5 * 36_000, rel=0.02)
    assert config.model.architecture == "gpt+" and config.warmup_fraction > 0 and config.precision == "bfloat16"
    assert "50.0%" in out and re.search(r" 10 \w+ *\n", out) and f"train --config {target} --data" in out
    assert main(["plan", "--flops", "1e18", "--out", str(target)]) == 2
    errors = capsys.readouterr().err
    assert "--out" in errors and str(target) in errors and errors.count("\n") == 1
    assert resolve_config(read_yaml(target), 50_304) == config


def test_tokens_and_a_preset(capsys):
    config = config_of(planned(capsys, "--tokens", "100B", "--size", "0.5b"))
    assert (config.preset, config.model.width, config.model.layers) == ("0.5b", 1024, 24)
    assert config.tokens == pytest.approx(100e9, rel=1e-3)


def test_a_run_shorter_than_its_batch_is_said(capsys):
    out = planned(capsys, "--tokens", "1M", "--size", "1b")
    assert config_of(out).steps == 1 and any("1.77M" in line and "1.0M" in line for line in out.splitlines())
    assert planned(capsys, "--tokens", "1B", "--size", "1b").count("1.0B") == 1  # in the table alone


def test_laws_of_the_users_own(fits, capsys):
    out = planned(capsys, "--flops", "1e14", "--fits", fits, "--vocab-size", 512, "--context", 256, "--gpus", 1)
    assert "laws.json" in out and "paper.json" not in out and "None" not in out
    (line,) = [line for line in out.splitlines() if line.strip().startswith("anGPT ") and "L(N, D)" in line]
    words = line.split()
    low, loss, high = float(words[2]), float(words[1]), float(words[4])
    assert low < loss < high and words[5] == "(95%)"
    # The band is the fit's own, at the model's size and the run's tokens.
    config = resolve_config(yaml.safe_load(out[out.rindex("\n# ") :]), 512)
    found = predict(read_laws(fits).of["angpt"], parameter_count(config.model), config.tokens)
    assert (found.loss, found.low, found.high) == pytest.approx((loss, low, high), abs=1e-3)
    assert "ddp" not in out[: out.rindex("\n# ")]  # nothing to share on one GPU


def test_a_default_rate_is_for_its_width_and_that_of_a_law_for_the_models(fits, capsys):
    words = ["--tokens", "1M", "--size", "1M", "--vocab-size", 512, "--context", 256]
    out = planned(capsys, *words)
    config = config_of(out)
    assert (config.lr, config.lr_width) == (1.2e-2, 128) and re.search(r" 0\.012\b.*\b128\b", out)
    content = json.loads(fits.read_text())
    content["angpt"]["lr"] = {**content["angpt"]["loss"], "coefficient": 2e-3, "exponent": -0.1}
    fits.with_name("with-lr.json").write_text(json.dumps(content))
    assert config_of(planned(capsys, *words, "--fits", fits.with_name("with-lr.json"))).lr_width == 0
    assert config_of(planned(capsys, "--tokens", "1B", "--size", "62m")).lr_width == 0


def test_a_band_as_the_fit_has_it_and_none_where_it_has_none(fits):
    content = json.loads(fits.read_text())
    surface = read_laws(fits).of["angpt"].surface
    # By hand: the slope of log L in each of the five numbers, and Student's t with 7 degrees of freedom.
    n, d = 1e6, 2e7
    size, data = surface.A / n**surface.alpha, surface.B / d**surface.beta
    slope = np.array([1, size, data, -size * math.log(n), -data * math.log(d)]) / surface(n, d)
    error = math.sqrt(slope @ np.array(content["angpt"]["surface"]["covariance"]) @ slope)
    found = predict(read_laws(fits).of["angpt"], n, d)
    assert math.log(found.high / found.loss) == pytest.approx(2.3646 * error, rel=1e-3)
    assert not found.outside
    content["angpt"]["surface"]["covariance"] = [[None] * 5] * 5
    fits.with_name("without.json").write_text(json.dumps(content))
    unknown = predict(read_laws(fits.with_name("without.json")).of["angpt"], n, 1e10)
    assert unknown.high == math.inf
    (outside,) = unknown.outside
    assert all(word in outside for word in ("tokens", "10B", "52.1", "192M"))


def test_of_shipped_laws_those_measured_nearest_count(fits, tmp_path, monkeypatch):
    shipped = tmp_path / "laws"
    shipped.mkdir()
    (shipped / "paper.json").write_text((laws.SHIPPED / "paper.json").read_text())
    (shipped / "cpu.json").write_text(json.dumps({"measured": "on a CPU", **json.loads(fits.read_text())}))
    monkeypatch.setattr(laws, "SHIPPED", shipped)
    assert nearest_shipped("angpt", 1e13).measured == "on a CPU"
    assert nearest_shipped("angpt", 1e20).name == "paper.json"
    assert nearest_shipped("ngpt", 1e20) is None


def test_every_shipped_law_says_where_it_was_measured():
    for path in laws.SHIPPED.glob("*.json"):
        file = read_laws(path)
        assert len(file.measured) > 40 and {"angpt", "gpt+"} <= file.of.keys()
        assert all(it.compute for it in file.of.values())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], BUDGETS),
        (["--flops", "1e20", "--hours", "3", "--gpus", "8"], BUDGETS),
        (["--hours", "3"], BUDGETS),
        (["--size", "1b"], BUDGETS),
        (["--flops", "0"], ["--flops", "1e30", " 0"]),
        (["--flops=-1e20"], ["--flops", "1e30", "-1e+20"]),
        (["--flops", "much"], ["--flops", "'much'"]),
        (["--flops", "1e20", "--gpu", "h10"], ["--gpu", "h10", "h100", "b200, h200, h100-pcie"]),
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
def test_a_mistake_is_one_line_and_status_2(words, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    law = {"coefficient": 1e-6, "exponent": 0.98, "span": [1e6, 1e7]}
    (tmp_path / "half.json").write_text(json.dumps({"angpt": {"batch": law}}))
    (tmp_path / "list.json").write_text("[1]")
    assert main(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert all(word in captured.err for word in named), captured.err
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
def test_what_is_no_law_is_refused(change, tmp_path):
    content = json.loads((laws.SHIPPED / "paper.json").read_text())
    content["angpt"]["size"] |= change
    (tmp_path / "laws.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"laws\.json"):
        read_laws(tmp_path / "laws.json")


def test_a_law_may_say_that_nothing_moves_but_not_that_more_does_not_help(fits, tmp_path):
    content = json.loads(fits.read_text())
    content["angpt"]["lr"] = {"coefficient": 2e-3, "exponent": 0.0, "span": [1e6, 1e8]}
    (tmp_path / "laws.json").write_text(json.dumps(content))
    assert read_laws(tmp_path / "laws.json").of["angpt"].powers["lr"](1e9) == 2e-3
    content["angpt"]["surface"]["alpha"] = -0.3
    (tmp_path / "laws.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"-0\.3\b"):
        read_laws(tmp_path / "laws.json")


def test_digits_lost_in_rounding_are_two_numbers_however_large(tmp_path):
    content = json.loads((laws.SHIPPED / "paper.json").read_text())
    content["angpt"]["loss"]["rounded"] = [0.05, 30.0]
    (tmp_path / "laws.json").write_text(json.dumps(content))
    found = predict(read_laws(tmp_path / "laws.json").of["angpt"], 1e9, 2e10)
    assert 0 <= found.low < 1e-200 and found.high > 1e200
    content["angpt"]["loss"]["rounded"] = [0.05]
    (tmp_path / "laws.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"laws\.json"):
        read_laws(tmp_path / "laws.json")


def test_an_architecture_without_laws_still_has_a_plan(capsys):
    out = planned(capsys, "--tokens", "1B", "--size", "32m", "--architecture", "ngpt", "--gpus", 1)
    assert re.search(r"\bnGPT\b.*--fits", out) and "L(C)" not in out and config_of(out).model.architecture == "ngpt"


# Sizes and ways to share


@pytest.mark.parametrize("parameters", [2e7, 1e8, 6.9e8, 7e9, 7e10, 5e11])
def test_shapes_have_about_the_parameters_and_can_be_split(parameters):
    config = plans.shape(parameters, SMALL)
    assert parameter_count(config) == pytest.approx(parameters, rel=0.06)
    assert (config.context, config.vocab_size) == (128, 1024)
    assert config.width < 2048 or plans.splits(config, 8)


@pytest.mark.parametrize(
    ("parameters", "devices", "way", "tensor", "checkpointing"),
    [
        (5e8, 8, "ddp", 1, False),
        (7e9, 8, "fsdp", 1, False),
        (3e10, 256, "ddp", 8, False),
        (7e10, 1024, "fsdp", 1, True),
    ],
)
def test_the_simplest_way_that_fits_and_is_not_slow(parameters, devices, way, tensor, checkpointing):
    config, batch = plans.shape(parameters, ModelConfig()), 16 * devices
    layout, need = plans.share(config, batch, Cluster("h100", devices, 8, 50e9))
    assert (layout.way, layout.tensor, layout.checkpointing) == (way, tensor, checkpointing)
    assert need.total < 0.9 * 80e9 and need == memory(config, layout, HALF)
    assert layout.copies * layout.passes * layout.micro_batch_size == pytest.approx(batch, rel=0.1)


def test_nothing_is_recommended_that_does_not_fit():
    with pytest.raises(ConfigError, match="8 rtx4090"):
        plans.share(plans.shape(7e10, ModelConfig()), 64, Cluster("rtx4090", 8, 8, 50e9))


# Memory


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("--architecture", "angpt"), marks=pytest.mark.slow),
        ("--devices", 16, "--way", "hsdp", "--passes", 2, "--architecture", "gpt+"),
        pytest.param(("--devices", 4, "--way", "fsdp", "--checkpointing"), marks=pytest.mark.slow),
        pytest.param(("--devices", 4, "--way", "ddp", "--checkpointing"), marks=pytest.mark.slow),
        pytest.param(("--precision", "float32", "--passes", 2), marks=pytest.mark.slow),
        pytest.param(("--checkpointing", "--architecture", "gpt+"), marks=pytest.mark.slow),
    ],
)
def test_the_model_agrees_with_torchs_memory_tracker(words):
    measured, expected = in_fresh_process("tracked", *SHAPE, "--micro-batch-size", 4, *words)
    assert expected == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
def test_the_model_agrees_with_the_memory_of_a_real_process(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what was freed is given back at once
    words = ["--precision", "float32", "--width", 512, "--layers", 6, "--context", 512, "--vocab-size", 8192]
    measured, expected = in_fresh_process("resident", *words, "--micro-batch-size", 4)
    # The model has the logits of as many tokens at once as a GPU makes, in two formats of 4 bytes.
    expected -= (LARGE_CHUNK - CHUNK["cpu"]) * 8 * 8192
    assert expected == pytest.approx(measured, rel=0.1)


def test_parts_of_the_memory():
    alone = memory(SMALL, Layout(micro_batch_size=8), HALF)
    block, root = block_parameters(SMALL)
    assert block * 4 + root == parameter_count(SMALL)
    assert alone.parameters == 4 * parameter_count(SMALL) and alone.optimizer == 2 * alone.parameters
    assert memory(SMALL, Layout(micro_batch_size=16), HALF).activations == 2 * alone.activations
    assert (
        memory(replace(SMALL, vocab_size=2 * SMALL.vocab_size), Layout(micro_batch_size=8), HALF).logits > alone.logits
    )
    many = 64 * SMALL.context  # tokens, whose logits are never there at once
    assert memory(SMALL, Layout(micro_batch_size=64), HALF).logits < many * SMALL.vocab_size * 4
    sharded = memory(SMALL, Layout("fsdp", 64, micro_batch_size=8), HALF)
    hybrid = memory(SMALL, Layout("hsdp", 64, micro_batch_size=8), HALF)
    assert sharded.parameters == alone.parameters / 64 and hybrid.parameters == alone.parameters / 8
    # With accumulation the gradients of all parameters stay on every device, however these are shared.
    passes = memory(SMALL, Layout("fsdp", 64, micro_batch_size=8, passes=2), HALF)
    assert passes.gradients == alone.parameters and not sharded.gradients
    split = memory(SMALL, Layout("fsdp", 64, tensor=4, micro_batch_size=8), HALF)
    assert sharded.activations / 4 < split.activations < sharded.activations
    again = memory(SMALL, Layout("fsdp", 64, checkpointing=True, micro_batch_size=8), HALF)
    assert again.activations < sharded.activations / 3 and again.copies < sharded.copies / 3


def test_factors_cost_no_copies_of_weights():
    block, _ = block_parameters(SMALL)
    assert saved_activations(SMALL, HALF, distributed=True)[0].once < 0.02 * block
    assert saved_activations(SMALL, torch.float32, distributed=False)[0].once < 0.02 * block


# Traffic


def test_bytes_that_are_sent():
    parameters = parameter_count(SMALL)
    tokens = 8 * SMALL.context
    alone = comm_volume(SMALL, Layout(micro_batch_size=8))
    assert (alone.shards, alone.replicas, alone.tensor) == (0, 0, 0)
    replicas = comm_volume(SMALL, Layout("ddp", 8, micro_batch_size=8))
    assert (replicas.shards, replicas.tensor) == (0, 0)
    assert replicas.replicas == 2 * 4 * parameters * 7 / 8  # a sum in a ring: scattered, then gathered
    shards = comm_volume(SMALL, Layout("fsdp", 8, micro_batch_size=8, passes=3))
    assert shards.replicas == 0 and shards.shards == (3 * 2 * 2 + 4) * parameters * 7 / 8
    split = comm_volume(SMALL, Layout("fsdp", 8, tensor=8, micro_batch_size=8))
    assert split.tensor == 4 * 4 * (2 * tokens * 256 * 2) * 7 / 8  # four sums in each of four layers


def test_a_slow_network_is_seen():
    config, gpu = plans.shape(1e9, ModelConfig()), H100S.gpu
    layout = Layout("fsdp", 64, 8, micro_batch_size=8)
    fast, slow = (expected_mfu(config, layout, gpu, network) for network in (50e9, 1e9))
    assert slow < 0.5 * fast < fast < 0.4
    assert expected_mfu(config, replace(layout, way="hsdp"), gpu, 1e9) > slow
    recomputed = expected_mfu(config, replace(layout, checkpointing=True), gpu, 50e9)
    assert recomputed == pytest.approx(0.75 * fast, rel=0.05)
