import math

import numpy as np
import pytest
import scipy.stats

from antransformer.comparison import statistics
from antransformer.comparison.statistics import (
    inverse_loss_curve,
    paired_difference,
    pooled_differences,
    sensitivity,
    speedups,
)

BUDGETS = (250_000, 500_000, 1_000_000, 2_000_000)


def loss_at(tokens, speed=1.0):
    """A loss that falls as a power of the tokens, of a variant that needs 1 / ``speed`` of the tokens."""
    return 2.0 + 60 * (np.asarray(tokens) * speed) ** -0.25


def tokens_needed(budgets, losses, target):
    return inverse_loss_curve(budgets, losses)(target)


def table(speed, noise=0.0, seeds=3, rng=None):
    losses = np.repeat(loss_at(BUDGETS, speed)[:, None], seeds, axis=1)
    return losses + (rng.normal(0, noise, losses.shape) if noise else 0)


def test_tokens_needed_inverts_the_curve_between_budgets():
    losses = loss_at(BUDGETS)
    for tokens in (250_000, 300_000, 500_000, 777_777, 1_900_000, 2_000_000):
        assert tokens_needed(BUDGETS, losses, float(loss_at(tokens))) == pytest.approx(tokens, rel=0.01)


def test_nothing_is_extrapolated():
    losses = loss_at(BUDGETS)
    assert tokens_needed(BUDGETS, losses, losses[-1] - 1e-9) == math.inf
    assert tokens_needed(BUDGETS, losses, losses[0] + 1e-9) == 0
    assert tokens_needed(BUDGETS, losses, math.inf) == 0  # the method diverged
    assert tokens_needed(BUDGETS, losses, math.nan) == math.inf
    assert tokens_needed(BUDGETS[:1], losses[:1], losses[0]) == pytest.approx(BUDGETS[0])


def test_a_longer_run_with_a_higher_loss_does_not_weaken_the_baseline():
    losses = np.array([3.0, 2.5, 2.6, 2.2])
    assert tokens_needed(BUDGETS, losses, 2.5) == pytest.approx(500_000, rel=1e-6)  # the first that reached it
    assert 1_000_000 < tokens_needed(BUDGETS, losses, 2.45) < 2_000_000


@pytest.mark.parametrize("speed", [0.7, 1.0, 1.5, 1.9])
def test_the_true_speedup_is_recovered(speed):
    for point in speedups(BUDGETS, table(1.0), table(speed)):
        needed = point.tokens * speed
        if needed > BUDGETS[-1] * 1.0001:
            assert point.ratio == math.inf
        elif needed < BUDGETS[0] * 0.9999:
            assert point.ratio == 0
        else:
            assert point.ratio == pytest.approx(speed, rel=0.01)


def test_the_interval_has_about_the_nominal_coverage(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    rng = np.random.default_rng(0)
    draws, inside, widths = 100, 0, []
    for number in range(draws):
        point = speedups(BUDGETS, table(1.0, 0.02, rng=rng), table(1.5, 0.02, rng=rng), seed=number)[1]
        inside += point.low <= 1.5 <= point.high
        widths.append(point.high - point.low)
    assert inside >= 88  # expected: 95 +- 2.2
    assert 0.1 < np.median(widths) < 0.8  # the coverage is not due to needlessly wide intervals


def test_one_seed_has_no_interval_and_no_test():
    point = speedups(BUDGETS, table(1.0, seeds=1), table(1.5, seeds=1))[0]
    assert point.ratio == pytest.approx(1.5, rel=0.01) and math.isnan(point.low) and math.isnan(point.high)
    difference = paired_difference(np.array([3.0]), np.array([2.9]))
    assert difference.mean == pytest.approx(-0.1) and math.isnan(difference.p) and not difference.significant


def test_two_seeds_of_one_variant_are_too_few_for_a_test():
    baseline, variant = np.array([3.1, 3.0]), np.array([2.9, 2.85])
    (pooled,) = pooled_differences(baseline, [variant])
    for difference in (paired_difference(baseline, variant), pooled):
        assert difference.mean == pytest.approx(-0.175) and np.isnan([difference.low, difference.p]).all()
    several = pooled_differences(baseline, [variant, variant + np.array([0.1, 0.08])])
    assert all(0 < difference.p < 1 for difference in several)


def test_paired_difference_is_the_paired_t_test():
    baseline, variant = np.array([3.10, 3.00, 3.25]), np.array([2.95, 2.90, 3.05])
    difference = paired_difference(baseline, variant)
    expected = scipy.stats.ttest_rel(variant, baseline)
    assert difference.p == pytest.approx(expected.pvalue) and difference.significant
    assert difference.mean == pytest.approx(-0.15) and difference.low < -0.15 < difference.high < 0
    assert not paired_difference(baseline, baseline + np.array([0.1, -0.1, 0.01])).significant


def test_diverged_runs_give_nan_or_bounds():
    difference = paired_difference(np.array([3.0, 3.1]), np.array([2.9, math.inf]))
    assert math.isnan(difference.mean) and math.isnan(difference.p) and not difference.significant
    diverged = table(1.5)
    diverged[1, 0] = math.inf
    assert speedups(BUDGETS, table(1.0), diverged)[1].ratio == 0
    baseline = table(1.0)
    baseline[3, 1] = math.inf
    assert (
        speedups(BUDGETS, baseline, table(1.5))[2].ratio == math.inf
    )  # the longest finished run of the baseline is above that loss
    baseline = table(1.0)
    baseline[0] = math.inf
    assert [point.ratio for point in speedups(BUDGETS, baseline, table(1.5))[:2]] == [0, pytest.approx(1.5, rel=0.01)]


def test_sensitivity_is_the_regret_of_settings_three_times_too_small_and_too_large():
    rates = [1e-3 * 2**power for power in range(-2, 3)]
    losses = [3 + 0.1 * math.log(rate / 1e-3) ** 2 for rate in rates]
    low, high = sensitivity(rates, losses)
    assert low == pytest.approx(0.1 * math.log(3) ** 2, rel=0.1) and high == pytest.approx(low)
    low, high = sensitivity(rates, [*losses[:3], math.inf, math.inf])
    assert high == math.inf and low == pytest.approx(0.1 * math.log(3) ** 2, rel=0.1)
    assert (
        sensitivity([1.0, 2.0, 4.0], [2.0, math.inf, 2.1])[1] == math.inf
    )  # diverged between the best and three times the best
    assert all(math.isnan(side) for side in sensitivity(rates[1:4], losses[1:4]))  # trials reach only twice the best
    assert all(math.isnan(side) for side in sensitivity([1.0, 2.0], [math.inf, math.inf]))
    # A third and three times the best, each rounded to three digits.
    assert sensitivity([0.00357, 0.0107, 0.0321], [2.3, 2.0, 2.1]) == pytest.approx((0.3, 0.1))


def test_pooled_differences_detect_what_one_pair_of_three_seeds_cannot():
    rng = np.random.default_rng(0)
    detected = {"pooled": 0, "paired": 0}
    false_positives = 0
    for _ in range(50):
        seeds = rng.normal(0, 0.05, 3)
        table = 3 + seeds + rng.normal(0, 0.01, (21, 3))
        table[1] += 0.04
        differences = pooled_differences(table[0], list(table[1:]))
        detected["pooled"] += differences[0].p < 0.05 / 20
        detected["paired"] += paired_difference(table[0], table[1]).p < 0.05 / 20
        false_positives += sum(difference.significant for difference in differences[1:])
    assert detected["pooled"] > 30 > 10 > detected["paired"]
    assert 0.02 < false_positives / (50 * 19) < 0.09  # nominal: 0.05


def test_pooled_differences_of_one_variant_are_the_paired_test():
    baseline, variant = np.array([3.10, 3.00, 3.25]), np.array([2.95, 2.90, 3.05])
    (difference,), expected = pooled_differences(baseline, [variant]), paired_difference(baseline, variant)
    assert (difference.mean, difference.low, difference.high, difference.p) == pytest.approx(
        (expected.mean, expected.low, expected.high, expected.p)
    )
    diverged, finished = pooled_differences(baseline, [np.array([3.0, math.inf, 3.0]), variant])
    assert math.isnan(diverged.mean) and finished.p == pytest.approx(expected.p)
