import dataclasses
import itertools

import hypothesis
import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from antransformer.errors import ConfigError
from antransformer.models import ARCHITECTURES, PRESETS, ModelConfig
from antransformer.training import defaults
from antransformer.training.config import (
    TrainConfig,
    merge,
    normalise,
    read_count,
    read_yaml,
    resolve,
    shipped_configs,
    to_mapping,
)
from antransformer.training.schedule import learning_rate
from antransformer.training.throughput import flops_per_token


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_resolves(name):
    config = resolve(read_yaml(shipped_configs()[name]), vocab_size=4096)
    assert config.steps > 0


def test_there_are_shipped_configs():
    assert "demo" in shipped_configs()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_resolves_and_survives_yaml(preset, architecture):
    config = resolve({"preset": preset, "architecture": architecture}, vocab_size=5000)
    assert config.model.architecture == architecture
    again = resolve(yaml.safe_load(yaml.safe_dump(to_mapping(config))), vocab_size=1)
    assert again == config


# arXiv:2505.22014, interpolated optima at 20 tokens a parameter: (learning rate, batch in sequences of 2,048). The
# fits are rough (R2 0.66 to 0.97), so they need only be near.
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
    config = resolve({"preset": preset, "architecture": architecture}, vocab_size)
    assert config.lr == pytest.approx(lr, rel=0.3)
    assert config.batch_size == pytest.approx(sequences, rel=0.45)
    assert config.tokens == pytest.approx(20 * defaults.parameter_count(config.model), rel=1e-6)


def test_defaults_below_the_fitted_range_are_the_measured_ones():
    for architecture in ARCHITECTURES:
        config = resolve({"architecture": architecture}, vocab_size=4096)
        assert config.lr == defaults.SMALL_LR[architecture] < 0.05
        assert config.batch_tokens == defaults.SMALL_BATCH_TOKENS == 2048
        expected = 0 if architecture in ("angpt", "ngpt") else 0.1
        assert config.warmup == config.weight_decay == expected


def test_the_default_rate_of_matrices_follows_the_width_of_a_small_model():
    def rates(**given):
        config = resolve(given, vocab_size=4096)
        return config.lr, *config.matrix_lrs

    root, wide = pytest.approx(1e-3 / 2**0.5), {"model": {"width": 256, "layers": 2}}
    for architecture in ARCHITECTURES:
        lr = defaults.SMALL_LR[architecture]
        assert rates(architecture=architecture) == (lr, lr, lr)  # nano is 128 wide
        assert rates(architecture=architecture, **wide, lr=1e-3) == (1e-3, root, 5e-4)
        assert len(set(rates(architecture=architecture, preset="32m"))) == 1
    assert rates(**wide) == (1.2e-2, pytest.approx(1.2e-2 / 2**0.5), 6e-3)
    assert rates(**wide, lr=1e-3, lr_width=0) == (1e-3, 1e-3, 1e-3)
    assert rates(**wide, lr=1e-3, lr_width=1024) == (1e-3, 2e-3, 4e-3)
    with pytest.raises(ConfigError, match="lr_width must be at least 0, got -1"):
        resolve({"lr_width": -1}, vocab_size=4096)


def test_rates_in_words():
    assert resolve({"lr": 1e-3}, 4096).lr_text == resolve({"lr": 1e-3, "lr_width": 0}, 4096).lr_text == "0.001"
    given = {"lr": 1e-3, "lr_width": 512}
    assert resolve(given, 4096).lr_text == "0.001 (embedding and head 0.002, matrices of the blocks 0.004)"
    assert resolve({**given, "optimizer": "muon"}, 4096).lr_text == "0.001 (embedding and head 0.002)"


@pytest.mark.parametrize(
    ("architecture", "relative"), [("ngpt", "angpt"), ("gpt", "gpt+"), ("ln-scaling", "gpt+"), ("dyt", "gpt+")]
)
def test_an_architecture_without_fits_takes_its_relatives(architecture, relative):
    for preset in ("nano", "125m"):
        settings = {"preset": preset, "tokens": "1B"}
        mine, theirs = (resolve({**settings, "architecture": name}, 50_304) for name in (architecture, relative))
        assert mine.batch_tokens == theirs.batch_tokens
        if (architecture, preset) == ("ngpt", "nano"):
            assert mine.lr == 6e-3 != theirs.lr  # measured for itself
        else:
            assert mine.lr == pytest.approx(theirs.lr, rel=2e-3)  # a few parameters more or less


def test_above_the_fitted_range_the_user_decides():
    sizes = {"preset": "1b", "model": {"width": 2048}}
    with pytest.raises(ConfigError, match="no default learning rate or batch is known for 2"):
        resolve(sizes, 50_304)
    assert resolve({**sizes, "lr": "1e-3", "batch_tokens": "1M"}, 50_304).lr == 1e-3


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("60K", 60_000),
        ("2.5B", 2_500_000_000),
        ("1e6", 10**6),
        ("4_096", 4096),
        (17, 17),
        ("1t", 10**12),
        ("0.5m", 500_000),
    ],
)
def test_counts(text, count):
    assert read_count(text) == count


@given(st.integers(0, 2**63 - 1))
def test_any_whole_number_is_a_count(number):
    assert read_count(str(number)) == read_count(number) == number


@given(st.integers(1, 9999), st.sampled_from([1, 2, 3]), st.sampled_from("KMBT"))
def test_any_decimal_that_comes_out_whole_is_a_count(digits, places, suffix):
    count = digits * {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}[suffix] // 10**places
    text = f"{digits // 10**places}.{digits % 10**places:0{places}}{suffix}"
    assert read_count(text) == count


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("vocab_size", [4096, 50_304])
def test_default_micro_batches_are_even_and_fit(preset, vocab_size):
    for architecture in ("angpt", "gpt+"):
        config = resolve({"preset": preset, "architecture": architecture}, vocab_size)
        most = max(1, 2**28 // (vocab_size * config.model.context))
        passes = -(-config.batch_size // config.micro_batch)
        assert config.micro_batch <= most and passes == -(-config.batch_size // most)


def test_batches_are_whole_sequences():
    assert resolve({"preset": "125m", "batch_tokens": "0.5M", "lr": "2e-3"}, 300).batch_tokens == 244 * 2048


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lrr": 1}, "config.yaml: unknown key lrr: did you mean lr?"),
        ({"learning_rate": 1}, "config.yaml: unknown key learning_rate"),
        ({"model": {"widht": 64}}, "config.yaml: unknown key model.widht: did you mean model.width?"),
        ({"lr": "fast"}, "config.yaml: lr must be a number, got 'fast'"),
        ({"lr": [1]}, "config.yaml: lr must be a number, got [1]"),
        ({"lr": "nan"}, "config.yaml: lr must be a number, got 'nan'"),
        ({"lr": -1}, "lr must be positive, got -1.0"),
        ({"seed": 1.5}, "config.yaml: seed must be a whole number, got 1.5"),
        ({"seed": True}, "config.yaml: seed must be a whole number, got True"),
        ({"tokens": "many"}, "config.yaml: tokens must be a count of tokens such as 4096, 60K or 2.5B, got 'many'"),
        ({"tokens": "-5K"}, "tokens must be at least 1, got -5000"),
        ({"tokens": 1000}, "tokens 1,000 is less than one batch of 2,048: raise tokens or lower batch_tokens"),
        ({"compile": "perhaps"}, "config.yaml: compile must be true or false, got 'perhaps'"),
        ({"precision": "fp4"}, "config.yaml: precision must be one of auto, float32, bfloat16, fp8, got 'fp4'"),
        ({"data": 5}, "config.yaml: data must be text, got 5"),
        ({"model": 5}, "config.yaml: model must be a mapping of model settings, got 5"),
        ({"model": {"layers": "two"}}, "config.yaml: model.layers must be a whole number, got 'two'"),
        ({"preset": "huge"}, "unknown preset 'huge': choose from pico, nano, 32m"),
        ({"architecture": "gpt2"}, "architecture must be one of angpt, ngpt, gpt+, gpt, ln-scaling, dyt, got 'gpt2'"),
        ({"model": {"ablation": "no"}}, "config.yaml: model.ablation must be one of none, constant-x0.5, "),
        ({"context": 64, "model": {"context": 32}}, "context and model.context disagree"),
        ({"model": {"width": 100}}, "width 100 is not a multiple of head_width 64: 128 would be"),
        ({"micro_batch": 0}, "micro_batch must be at least 1, got 0"),
        ({"batch_tokens": 100}, "batch_tokens 100 is less than one sequence of 256 tokens"),
        ({"tokens": "1e30"}, "config.yaml: tokens must be a count of tokens"),
        ({"width": 64}, "config.yaml: unknown key width: did you mean model.width?"),
        ({"model": {"width": 2**40}}, "width must be a positive integer below 2^31"),
        ({"model": {"s_scale": 1e300}}, "s_scale must be a positive number of ordinary size, got 1e+300"),
        ({"muon_lr": 0.02}, "muon_lr is the learning rate of optimizer muon: set both, or leave muon_lr out"),
        ({"optimizer": "muon", "muon_lr": 0}, "muon_lr must be positive, got 0.0"),
        ({"optimizer": "sgd"}, "config.yaml: optimizer must be one of adam, muon, got 'sgd'"),
        ({"warmup": 1}, "warmup must be at least 0 and below 1, got 1.0"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"skip_nonfinite": -1}, "skip_nonfinite must be at least 0, got -1"),
        ({"timeout": 0}, "timeout must be between 1 and 1,000,000 seconds, got 0"),
        ({"tensor_parallel": 0}, "tensor_parallel must be at least 1, got 0"),
        ({"tensor_parallel": 2, "architecture": "ngpt"}, "tensor_parallel is for angpt and gpt+, not ngpt: leave it"),
        ({"tensor_parallel": 4}, "tensor_parallel 4 can not split 2 heads evenly: choose a divisor"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError) as error:
        resolve(settings, 4096, "config.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_muon_steps_begin_smaller_where_they_are_not_of_unit_norm():
    def initial(architecture, **settings):
        return resolve({"architecture": architecture, **settings}, 4096).model.init_std

    assert initial("gpt+", optimizer="muon") == initial("ln-scaling", optimizer="muon") == 0.02
    assert initial("gpt+", optimizer="muon", model={"init_std": 0.05}) == 0.05
    assert initial("gpt+") == initial("gpt+", optimizer="adam") == 128**-0.5
    assert initial("angpt", optimizer="muon") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", "not valid YAML near line 1"),
        ("- 1", "must hold settings as key: value"),
        ("1: 2", "must hold settings as key: value"),
        ("[" * 20_000, "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_broken_yaml_is_named_and_never_executed(tmp_path, content, message):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_yaml(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="can not be read: No such file"):
        read_yaml(tmp_path / "none.yaml")


def test_later_settings_win_key_by_key():
    below = normalise({"lr": 1e-3, "context": 64, "model": {"layers": 2}}, "file")
    above = normalise({"lr": "2e-3", "model": {"context": 32}}, "command line")
    assert merge(below, above) == {"lr": 2e-3, "model": {"layers": 2, "context": 32}}


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
names = [item.name for item in dataclasses.fields(TrainConfig)]
model_names = [item.name for item in dataclasses.fields(ModelConfig)]


@hypothesis.settings(suppress_health_check=[HealthCheck.too_slow])  # of a busy machine
@given(
    st.dictionaries(st.sampled_from(names), json_like, max_size=3),
    st.dictionaries(st.sampled_from(model_names), json_like, max_size=2),
)
def test_whatever_the_settings_only_a_config_error_comes_out(settings, model):
    try:
        normalise({**settings, "model": model}, "fuzz")
    except ConfigError as error:
        assert "\n" not in str(error)


def test_learning_rate_schedule():
    rates = [learning_rate(step, 100, 2.0, warmup=0.1, final=0.01) for step in range(1, 101)]
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
