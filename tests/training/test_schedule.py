"""Learning-rate schedules: their formulas, warm-up, plateau and decay."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antransformer.errors import ConfigError
from antransformer.training.config import resolve_config
from antransformer.training.schedule import SHAPES, learning_rate
from helpers.messages import mentions

TOKENS_PER_STEP = 256


def config_of(steps=100, **settings):
    length = {"batch_tokens": TOKENS_PER_STEP, "tokens": TOKENS_PER_STEP * steps}
    return resolve_config({"preset": "pico", "context": 32, **length, **settings}, 257)


@pytest.mark.parametrize("schedule", SHAPES)
def test_decay_follows_its_formula(schedule):
    config = config_of(schedule=schedule, decay_fraction=0.4, warmup_fraction=0.1, min_lr_ratio=0.1)
    decay = {
        "cosine": lambda r: (1 + math.cos(math.pi * r)) / 2,
        "linear": lambda r: 1 - r,
        "wsd": lambda r: 1 - r,
        "log": lambda r: 1 - math.log(1 + r / 0.1) / math.log(1 + 1 / 0.1),
        "sqrt": lambda r: 1 - r**0.5,
    }[schedule]
    rates = [config.lr_at(step, 2.0) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert set(rates[10:60]) == {2.0}
    expected = [2 * (0.1 + 0.9 * decay(step / 40)) for step in range(1, 41)]
    assert rates[60:] == pytest.approx(expected) and rates[-1] == pytest.approx(0.2)
    assert all(earlier > later for earlier, later in itertools.pairwise(rates[59:]))


@pytest.mark.parametrize("schedule", sorted(set(SHAPES) - {"wsd"}))
def test_without_a_decay_fraction_all_steps_after_the_warm_up_decay(schedule):
    whole = config_of(schedule=schedule, warmup_fraction=0.25)
    part = config_of(schedule=schedule, warmup_fraction=0.25, decay_fraction=0.75)
    assert whole.decay_start == whole.warmup_steps == 25
    assert all(whole.lr_at(step, 1.0) == part.lr_at(step, 1.0) for step in range(1, 101))


def test_cosine_has_the_bits_of_earlier_releases():
    for warmup_fraction in (0.0, 0.1, 0.37):
        config = config_of(97, warmup_fraction=warmup_fraction)
        warmup_steps = int(warmup_fraction * 97)
        for step in range(1, 98):
            if step <= warmup_steps:
                expected = 3e-3 * step / warmup_steps
            else:
                progress = (step - warmup_steps) / (97 - warmup_steps)
                expected = 3e-3 * (0.01 + (1 - 0.01) * 0.5 * (1 + math.cos(math.pi * progress)))
            assert config.lr_at(step, 3e-3) == expected


COSINE = config_of()


@given(
    st.sampled_from(sorted(SHAPES)),
    st.integers(1, 60),
    st.floats(0, 0.9),
    st.floats(0.01, 1),
    st.floats(0, 1),
)
def test_any_schedule_stays_between_zero_and_the_peak(schedule, steps, warmup_fraction, decay_fraction, min_lr_ratio):
    decay_fraction = min(decay_fraction, 1 - warmup_fraction)
    fractions = {"warmup_fraction": warmup_fraction, "decay_fraction": decay_fraction, "min_lr_ratio": min_lr_ratio}
    config = replace(COSINE, tokens=TOKENS_PER_STEP * steps, schedule=schedule, **fractions)
    assert 0 <= config.warmup_steps <= config.decay_start < steps
    rates = [config.lr_at(step, 1.0) for step in range(1, steps + 1)]
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates) and rates[-1] == pytest.approx(min_lr_ratio, abs=1e-12)


def test_a_second_rise_starts_from_a_given_rate():
    rates = [learning_rate(step, 60, 2.0, warmup_steps=10, start=40, start_ratio=0.3) for step in range(40, 61)]
    assert rates[0] == 0.6 and rates[:11] == pytest.approx([0.6 + 0.14 * number for number in range(11)])
    assert rates[15] == pytest.approx(2 * (0.01 + 0.99 / 2)) and rates[-1] == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"schedule": "wds"}, ["schedule", "wsd", "wds"]),
        ({"schedule": "wsd"}, ["wsd", "decay_fraction"]),
        ({"decay_fraction": 0}, ["decay_fraction", 0]),
        ({"decay_fraction": 1.5}, ["decay_fraction", 1.5]),
        ({"decay_fraction": 0.6, "warmup_fraction": 0.5}, ["decay_fraction", "warmup_fraction", 0.6, 0.5]),
        ({"initial_tokens": 10**9}, ["initial_tokens", 10**9]),
        ({"rewarm_from": 5}, ["rewarm_from", "rewarm_ratio", "rewarm_steps"]),
        ({"rewarm_from": 95, "rewarm_ratio": 0.1, "rewarm_steps": 6}, ["rewarm_from", "rewarm_steps", 100]),
    ],
)
def test_contradictory_settings_are_refused(settings, facts):
    with pytest.raises(ConfigError) as error:
        config_of(**settings)
    assert mentions(error.value, *facts)
