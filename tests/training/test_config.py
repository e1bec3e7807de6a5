"""Settings of a run: defaults, checks, and what a user sees of a mistake."""

import dataclasses
import itertools
import re
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

import antransformer
from antransformer import renamed
from antransformer.errors import ConfigError
from antransformer.models import PRESETS, ModelConfig
from antransformer.models.registry import BUILT_IN
from antransformer.training import defaults
from antransformer.training.config import (
    TrainConfig,
    merge,
    normalize_settings,
    resolve_config,
    to_mapping,
)
from antransformer.training.cost_model.throughput import flops_per_token
from antransformer.training.learning_rates import given_rate, horizon_factor, peak_rates
from antransformer.training.optimizer_registry import OPTIMIZERS
from antransformer.training.schedule import learning_rate
from helpers.messages import mentions


@pytest.mark.parametrize("architecture", BUILT_IN)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_resolves_and_survives_yaml(preset, architecture):
    config = resolve_config({"preset": preset, "architecture": architecture}, vocab_size=5000)
    assert config.model.architecture == architecture
    again = resolve_config(yaml.safe_load(yaml.safe_dump(to_mapping(config))), vocab_size=1)
    assert again == config


# arXiv:2505.22014, interpolated optima at 20 tokens per parameter: (learning rate, batch size in sequences of 2,048).
# The fits are rough (R2 0.66 to 0.97), so the tolerances are wide.
OPTIMA = {
    ("angpt", "32m"): (3.4e-3, 31),
    ("angpt", "0.5b"): (1.9e-3, 394),
    ("angpt", "1b"): (1.6e-3, 846),
    ("gpt+", "32m"): (1.1e-2, 25),
    ("gpt+", "0.5b"): (2.8e-3, 158),
    ("gpt+", "1b"): (1.9e-3, 345),
}


@pytest.mark.parametrize(("architecture", "preset"), OPTIMA)
@pytest.mark.parametrize("vocab_size", [257, 50_304])
def test_defaults_in_the_fitted_range_are_near_the_papers_optima(architecture, preset, vocab_size):
    lr, sequences = OPTIMA[architecture, preset]
    config = resolve_config({"preset": preset, "architecture": architecture}, vocab_size)
    assert config.lr == pytest.approx(lr, rel=0.3)
    assert config.batch_size == pytest.approx(sequences, rel=0.45)
    assert config.tokens == pytest.approx(20 * defaults.parameter_count(config.model), rel=1e-6)


def test_defaults_below_the_fitted_range_are_measured():
    for architecture in BUILT_IN:
        config = resolve_config({"architecture": architecture}, vocab_size=4096)
        assert config.lr == defaults.SMALL_LR[architecture] < 0.05
        assert config.batch_tokens == defaults.SMALL_BATCH_TOKENS == 2048
        expected = 0 if architecture in ("angpt", "ngpt") else 0.1
        assert config.warmup_fraction == config.weight_decay == expected


@pytest.mark.parametrize("recipe", ["paper", "best"])
def test_below_100m_parameters_the_default_of_beta2_is_that_of_the_papers_sweeps(recipe):
    for preset, expected in {"pico": 0.99, "nano": 0.99, "32m": 0.99, "62m": 0.99, "125m": 0.95, "1b": 0.95}.items():
        for vocab_size in (257, 50_304):  # a preset has one default, whatever the tokenizer
            settings = {"preset": preset, "recipe": recipe}
            assert resolve_config(settings, vocab_size).beta2 == expected
            assert resolve_config({**settings, "beta2": 0.9}, vocab_size).beta2 == 0.9


def test_default_learning_rates_of_matrices_scale_with_width_in_small_models():
    def rates(**settings):
        rates = peak_rates(resolve_config({"recipe": "paper", **settings}, vocab_size=4096))
        assert rates.embedding == rates.head
        return rates.vectors, rates.head, rates.blocks

    root, wide = pytest.approx(1e-3 / 2**0.5), {"model": {"width": 256, "layers": 2}}
    for architecture in BUILT_IN:
        lr = defaults.SMALL_LR[architecture]
        assert rates(architecture=architecture) == (lr, lr, lr)  # nano is 128 wide
        assert rates(architecture=architecture, **wide, lr=1e-3) == (1e-3, root, 5e-4)
        assert len(set(rates(architecture=architecture, preset="32m"))) == 1
    assert rates(**wide) == (1.2e-2, pytest.approx(1.2e-2 / 2**0.5), 6e-3)
    assert rates(**wide, lr=1e-3, lr_width=0) == (1e-3, 1e-3, 1e-3)
    assert rates(**wide, lr=1e-3, lr_width=1024) == (1e-3, 2e-3, 4e-3)
    with pytest.raises(ConfigError) as error:
        resolve_config({"lr_width": -1}, vocab_size=4096)
    assert mentions(str(error.value), *["lr_width", "0", "-1"])


def test_separate_rates_take_the_place_of_lr_and_scale_like_it():
    given = {"recipe": "paper", "lr": 1e-3, "embed_lr": 3e-2, "head_lr": 4e-3, "vector_lr": 5e-3}
    nano = {"model": {"width": 128, "layers": 1}}
    assert peak_rates(resolve_config({**given, **nano}, 4096)) == (3e-2, 4e-3, 5e-3, 1e-3)
    narrow = peak_rates(resolve_config({**given, "model": {"width": 64, "layers": 1}}, 4096))
    assert narrow == pytest.approx((3e-2 * 2**0.5, 4e-3 * 2**0.5, 5e-3, 2e-3))
    muon = resolve_config({**given, **nano, "optimizer": "muon", "muon_lr": 0.02}, 4096)
    assert peak_rates(muon) == (3e-2, 4e-3, 5e-3, 0.02)
    long = {**given, **nano, "lr_horizon": 100, "horizon_exponent": 0.5, "tokens": 2048 * 400}
    assert peak_rates(resolve_config(long, 4096)) == pytest.approx((1.5e-2, 2e-3, 2.5e-3, 5e-4))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("architecture", ["angpt", "gpt+"])
def test_default_rates_follow_the_length_of_the_run_and_given_rates_do_not(architecture, optimizer):
    def config(steps, **settings):
        given = {"architecture": architecture, "optimizer": optimizer, "tokens": steps * 2048, **settings}
        return resolve_config(given, 4096)

    reference, exponent = defaults.SMALL_LR_STEPS, OPTIMIZERS[optimizer].horizon_exponents[architecture]
    short, long = config(reference), config(16 * reference)
    assert (long.lr_horizon, long.horizon_exponent) == (reference, exponent) and 0 < exponent < 1
    assert (short.lr_horizon, short.horizon_exponent) == (0, 0.0)
    assert horizon_factor(short) == horizon_factor(config(reference // 2)) == 1
    for early, late in zip(peak_rates(short), peak_rates(long), strict=True):
        assert late == pytest.approx(early * 16**-exponent)
    assert peak_rates(config(16 * reference, lr_horizon=0)) == peak_rates(short)
    # A given rate is exact, and the optimizer's own rate follows a given lr.
    mixed = config(16 * reference, lr=1e-3)
    assert (mixed.lr, mixed.lr_horizon) == (1e-3, 0)
    own = OPTIMIZERS[optimizer].lr_setting
    if own:
        assert getattr(mixed, own) / mixed.lr == pytest.approx(getattr(long, own) / long.lr, rel=5e-3)
    assert config(16 * reference, lr=given_rate(long, "lr")).lr == pytest.approx(peak_rates(long).vectors)
    assert resolve_config(to_mapping(long), 1) == long and resolve_config(to_mapping(mixed), 1) == mixed


@pytest.mark.parametrize("preset", ["32m", "125m", "1b"])
def test_in_the_fitted_range_the_horizon_is_the_default_length(preset):
    default = resolve_config({"preset": preset}, 50_304)
    assert (default.lr_horizon, horizon_factor(default)) == (0, 1) and default.steps > 1000
    longer = resolve_config({"preset": preset, "tokens": 4 * default.tokens}, 50_304)
    assert longer.lr_horizon == default.steps
    assert horizon_factor(longer) == pytest.approx(4**-longer.horizon_exponent, rel=1e-3)


@pytest.mark.parametrize(
    ("architecture", "measured"), [("angpt", (0.05, 0.032, 0.021)), ("gpt+", (0.01, 0.0071, 0.0051))]
)
def test_at_the_body_of_32m_the_rate_of_muon_falls_with_the_steps(architecture, measured):
    shape = {"preset": "32m", "context": 256, "batch_tokens": 4096, "architecture": architecture}
    runs = [resolve_config({**shape, "tokens": f"{size}M"}, 4096) for size in (2.5, 5, 10, 1000)]
    rates = [peak_rates(config).blocks for config in runs]
    for rate, found in zip(rates, measured, strict=False):  # docs/results.md
        assert found / 2.1 < rate < 2.1 * found
    for config, rate in zip(runs, rates, strict=True):
        expected = rates[0] * (runs[0].steps / config.steps) ** runs[-1].horizon_exponent
        assert rate == pytest.approx(expected, rel=0.01)
    exact = resolve_config({**shape, "tokens": "10M", "lr_horizon": 0}, 4096)
    assert peak_rates(exact).blocks == exact.muon_lr > rates[0]


@pytest.mark.parametrize("horizon", [600, 1200, 2000])
def test_a_given_horizon_lowers_the_rate_of_muon_once(horizon):
    shape = {"preset": "32m", "tokens": 4096 * 3000, "batch_tokens": 4096}
    default, given = (resolve_config({**shape, **more}, 4096) for more in ({}, {"lr_horizon": horizon}))
    assert default.lr_horizon == 0 and given.lr_horizon == horizon
    assert peak_rates(given).blocks == pytest.approx(peak_rates(default).blocks, rel=0.01)


def test_a_given_rate_leaves_the_other_rates_at_their_scaled_defaults():
    shape = {"tokens": 2048 * 4800, "optimizer": "muon"}
    default = peak_rates(resolve_config(shape, 4096))
    for name, field in (("embed_lr", "embedding"), ("muon_lr", "blocks")):
        given = peak_rates(resolve_config({**shape, name: 0.1}, 4096))
        assert getattr(given, field) == pytest.approx(0.1)
        others = {"embedding", "head", "vectors", "blocks"} - {field}
        assert all(getattr(given, other) == pytest.approx(getattr(default, other), rel=5e-3) for other in others)


@pytest.mark.parametrize(
    ("architecture", "relative"), [("ngpt", "angpt"), ("gpt", "gpt+"), ("ln-scaling", "gpt+"), ("dyt", "gpt+")]
)
def test_an_architecture_without_fits_has_the_defaults_of_its_relative(architecture, relative):
    for preset in ("nano", "125m"):
        settings = {"preset": preset, "tokens": "1B"}
        config, other = (
            resolve_config({**settings, "architecture": name}, 50_304) for name in (architecture, relative)
        )
        assert config.batch_tokens == other.batch_tokens
        if (architecture, preset) == ("ngpt", "nano"):
            assert config.lr == 6e-3 != other.lr  # measured for nGPT
        else:
            assert config.lr == pytest.approx(other.lr, rel=2e-3)  # the parameter counts differ slightly


def test_above_the_fitted_range_there_are_no_defaults():
    sizes = {"preset": "1b", "model": {"width": 2048}}
    with pytest.raises(ConfigError) as error:
        resolve_config(sizes, 50_304)
    assert mentions(str(error.value), *["lr", "batch_tokens", "1.1B"]) and re.search(r"\b2\.\dB\b", str(error.value))
    given = {**sizes, "lr": "1e-3", "batch_tokens": "1M"}
    with pytest.raises(ConfigError, match="muon_lr"):
        resolve_config(given, 50_304)
    assert resolve_config({**given, "muon_lr": 0.02}, 50_304).lr == 1e-3
    assert resolve_config({**given, "optimizer": "adam"}, 50_304).lr == 1e-3


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("vocab_size", [4096, 50_304])
def test_default_micro_batches_are_even_and_fit(preset, vocab_size):
    for architecture in ("angpt", "gpt+"):
        config = resolve_config({"preset": preset, "architecture": architecture}, vocab_size)
        most = max(1, 2**28 // (vocab_size * config.model.context))
        passes = -(-config.batch_size // config.micro_batch_size)
        assert config.micro_batch_size <= most and passes == -(-config.batch_size // most)


def test_batches_are_rounded_to_sequences():
    assert resolve_config({"preset": "125m", "batch_tokens": "0.5M", "lr": "2e-3"}, 300).batch_tokens == 244 * 2048


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"lrr": 1}, "config.yaml lrr lr"),
        ({"learning_rate": 1}, "config.yaml learning_rate"),
        ({"model": {"widht": 64}}, "config.yaml model.widht model.width"),
        ({"lr": "fast"}, "config.yaml lr fast"),
        ({"lr": [1]}, "config.yaml lr [1]"),
        ({"lr": "nan"}, "config.yaml lr nan"),
        ({"lr": -1}, "config.yaml lr 0 -1.0"),
        ({"seed": 1.5}, "config.yaml seed 1.5"),
        ({"seed": True}, "config.yaml seed True"),
        ({"tokens": "many"}, "config.yaml tokens many"),
        ({"tokens": "-5K"}, "config.yaml tokens 1 -5000"),
        ({"tokens": 1000}, "tokens 1,000 2,048 batch_tokens"),
        ({"tokens": 1000, "model": {"context": 4096}}, "tokens 1,000 4,096 context"),
        ({"compile": "perhaps"}, "config.yaml compile true false perhaps"),
        ({"precision": "fp4"}, "config.yaml precision auto float32 bfloat16 fp8 fp4"),
        ({"data": 5}, "config.yaml data 5"),
        ({"model": 5}, "config.yaml model 5"),
        ({"model": {"layers": "two"}}, "config.yaml model.layers two"),
        ({"preset": "huge"}, "preset huge pico nano 32m"),
        ({"architecture": "gpt2"}, "architecture angpt ngpt gpt+ gpt ln-scaling dyt gpt2"),
        ({"model": {"ablation": "no"}}, "config.yaml model.ablation none constant-x0.5 no"),
        ({"context": 64, "model": {"context": 32}}, "config.yaml context model.context"),
        ({"model": {"width": 100}}, "width 100 head_dim 64 128"),
        ({"micro_batch_size": 0}, "config.yaml micro_batch_size 1 0"),
        ({"batch_tokens": 100}, "batch_tokens 100 256"),
        ({"tokens": "1e30"}, "config.yaml tokens 1e30"),
        ({"width": 64}, "config.yaml width model.width"),
        ({"model": {"width": 2**40}}, "config.yaml model.width 2^31 1099511627776"),
        ({"model": {"s_scale": 1e300}}, "s_scale 1e+300"),
        ({"optimizer": "adam", "muon_lr": 0.02}, "muon_lr optimizer muon normuon"),
        ({"cautious_weight_decay": True}, "cautious_weight_decay weight_decay 0"),
        ({"cautious_weight_decay": True, "architecture": "gpt+", "weight_decay": 0}, "cautious_weight_decay"),
        ({"optimizer": "muon", "muon_lr": 0}, "muon_lr 0.0"),
        ({"optimizer": "sgd"}, "config.yaml optimizer adam muon normuon sgd"),
        ({"warmup_fraction": 1}, "warmup_fraction 0 1 1.0"),
        ({"micro_batch_size": 2**63}, "micro_batch_size 63"),
        ({"lr_width": 2**31}, "lr_width 0 2^31"),
        ({"lr_horizon": -1}, "lr_horizon 0 -1"),
        ({"horizon_exponent": 3}, "horizon_exponent 0 2 3.0"),
        ({"embed_lr": 0}, "embed_lr 0"),
        ({"log_every": 0}, "log_every 1 0"),
        ({"max_skipped_steps": -1}, "max_skipped_steps 0 -1"),
        ({"timeout": 0}, "timeout 1 1,000,000 0"),
        ({"tensor_parallel": 0}, "tensor_parallel 1 0"),
        ({"tensor_parallel": 2, "architecture": "ngpt"}, "tensor_parallel angpt gpt+ ngpt"),
        ({"tensor_parallel": 4}, "tensor_parallel 4 2"),
    ],
)
def test_wrong_settings_are_refused(settings, facts):
    with pytest.raises(ConfigError) as error:
        resolve_config(settings, 4096, "config.yaml")
    assert mentions(str(error.value), *facts.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("old", "new"), renamed.TRAINING.items())
def test_an_old_setting_is_refused_with_its_new_name(old, new):
    with pytest.raises(ConfigError) as error:
        resolve_config({old: 1}, 4096, "config.yaml")
    assert mentions(error.value, "config.yaml", old, new)


@pytest.mark.parametrize(("old", "new"), renamed.MODEL.items())
def test_an_old_model_setting_is_refused_with_its_new_name(old, new):
    for refuse in (lambda: resolve_config({"model": {old: 1}}, 4096), lambda: ModelConfig.preset("nano", **{old: 1})):
        with pytest.raises(ConfigError) as error:
            refuse()
        assert mentions(error.value, old, f"model.{new}")


@pytest.mark.parametrize(("old", "new"), renamed.VALUES["parallel"].items())
def test_an_old_value_is_refused_with_its_new_name(old, new):
    with pytest.raises(ConfigError) as error:
        resolve_config({"parallel": old}, 4096, "command line")
    assert mentions(error.value, "parallel", old, new)


@pytest.mark.parametrize("name", renamed.REMOVED_MODEL)
def test_a_removed_setting_is_refused(name):
    with pytest.raises(ConfigError) as error:
        resolve_config({"model": {name: "one"}}, 4096, "config.yaml")
    assert mentions(error.value, "config.yaml", f"model.{name}")


def test_the_settings_import_no_torch():
    # The parent packages are replaced, so that only the settings and their own imports are tested.
    code = """
import sys, types
from pathlib import Path
root = Path(sys.argv[1])
for name, path in (("antransformer", root), ("antransformer.models", root / "models")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(path)]
import antransformer.models.config, antransformer.training.config, antransformer.training.config_files
print("torch" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(Path(antransformer.__file__).parent)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_initial_weights_for_muon_are_smaller_unless_normalized():
    def initial(architecture, **settings):
        return resolve_config({"architecture": architecture, **settings}, 4096).model.init_std

    assert initial("gpt+", optimizer="muon") == initial("ln-scaling", optimizer="muon") == 0.02
    assert initial("gpt+", optimizer="muon", model={"init_std": 0.05}) == 0.05
    assert initial("gpt+", recipe="paper") == initial("gpt+", optimizer="adam") == 128**-0.5
    assert initial("gpt+", optimizer="normuon") == 0.02
    assert initial("angpt", optimizer="muon") is None


def test_upper_settings_win_key_by_key():
    lower = normalize_settings({"lr": 1e-3, "context": 64, "model": {"layers": 2}}, "file")
    upper = normalize_settings({"lr": "2e-3", "model": {"context": 32}}, "command line")
    assert merge(lower, upper) == {"lr": 2e-3, "model": {"layers": 2, "context": 32}}


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
train_names = [item.name for item in dataclasses.fields(TrainConfig)]
model_names = [item.name for item in dataclasses.fields(ModelConfig)]


@hypothesis.settings(suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(
    st.dictionaries(st.sampled_from(train_names), json_like, max_size=3),
    st.dictionaries(st.sampled_from(model_names), json_like, max_size=2),
)
def test_any_settings_are_normalized_or_refused(settings, model):
    try:
        normalize_settings({**settings, "model": model}, "fuzz")
    except ConfigError as error:
        assert "\n" not in str(error)


def test_learning_rate_schedule():
    rates = [learning_rate(step, 100, 2.0, warmup_steps=10, min_lr_ratio=0.01) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert max(rates) == rates[9] == 2.0
    assert rates[54] == pytest.approx(2 * (0.01 + 0.99 / 2))
    assert rates[-1] == pytest.approx(0.02)
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert learning_rate(1, 1000, 1.0) == pytest.approx(1.0, rel=1e-4)


def test_flops_count_matrix_products_and_causal_attention():
    config = ModelConfig(vocab_size=100, width=64, layers=2, context=32)
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 256) + 100 * 64
    assert flops_per_token(config) == 6 * weights + 2 * 6 * 64 * 32
