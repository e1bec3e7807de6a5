import math

import numpy as np
import pytest
import scipy.stats

from antransformer.comparison import statistics
from antransformer.comparison.statistics import loss_curve, paired_difference, pooled_differences, sensitivity, speedups

BUDGETS = (250_000, 500_000, 1_000_000, 2_000_000)


def curve(tokens, speed=1.0):
    """A loss that falls as a power of the tokens; ``speed`` times the tokens count."""
    return 2.0 + 60 * (np.asarray(tokens) * speed) ** -0.25


def tokens_needed(budgets, losses, target):
    return loss_curve(budgets, losses)(target)


def table(speed, noise=0.0, seeds=3, rng=None):
    losses = np.repeat(curve(BUDGETS, speed)[:, None], seeds, axis=1)
    return losses + (rng.normal(0, noise, losses.shape) if noise else 0)


def test_tokens_needed_inverts_the_curve_between_budgets():
    losses = curve(BUDGETS)
    for tokens in (250_000, 300_000, 500_000, 777_777, 1_900_000, 2_000_000):
        assert tokens_needed(BUDGETS, losses, float(curve(tokens))) == pytest.approx(tokens, rel=0.01)


def test_nothing_is_extrapolated():
    losses = curve(BUDGETS)
    assert tokens_needed(BUDGETS, losses, losses[-1] - 1e-9) == math.inf
    assert tokens_needed(BUDGETS, losses, losses[0] + 1e-9) == 0
    assert tokens_needed(BUDGETS, losses, math.inf) == 0  # the method diverged
    assert tokens_needed(BUDGETS, losses, math.nan) == math.inf
    assert tokens_needed(BUDGETS[:1], losses[:1], losses[0]) == pytest.approx(BUDGETS[0])


def test_a_longer_run_that_ended_worse_takes_no_reference_away():
    losses = np.array([3.0, 2.5, 2.6, 2.2])
    assert tokens_needed(BUDGETS, losses, 2.5) == pytest.approx(500_000, rel=1e-6)  # the first that reached it
    assert 1_000_000 < tokens_needed(BUDGETS, losses, 2.45) < 2_000_000


@pytest.mark.parametrize("speed", [0.7, 1.0, 1.5, 1.9])
def test_the_true_speedup_comes_back(speed):
    found = speedups(BUDGETS, table(1.0), table(speed))
    for point in found:
        needed = point.tokens * speed
        if needed > BUDGETS[-1] * 1.0001:
            assert point.ratio == math.inf
        elif needed < BUDGETS[0] * 0.9999:
            assert point.ratio == 0
        else:
            assert point.ratio == pytest.approx(speed, rel=0.01)


def test_the_interval_holds_the_truth_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    rng = np.random.default_rng(0)
    draws, inside, widths = 100, 0, []
    for number in range(draws):
        point = speedups(BUDGETS, table(1.0, 0.02, rng=rng), table(1.5, 0.02, rng=rng), seed=number)[1]
        inside += point.low <= 1.5 <= point.high
        widths.append(point.high - point.low)
    assert inside >= 88  # 95 +- 2.2 are expected
    assert 0.1 < np.median(widths) < 0.8  # nor does it hold it by being wide


def test_one_seed_has_no_interval_and_no_test():
    point = speedups(BUDGETS, table(1.0, seeds=1), table(1.5, seeds=1))[0]
    assert point.ratio == pytest.approx(1.5, rel=0.01) and math.isnan(point.low) and math.isnan(point.high)
    difference = paired_difference(np.array([3.0]), np.array([2.9]))
    assert difference.mean == pytest.approx(-0.1) and math.isnan(difference.p) and not difference.significant


def test_paired_difference_is_the_paired_t_test():
    reference, other = np.array([3.10, 3.00, 3.25]), np.array([2.95, 2.90, 3.05])
    found = paired_difference(reference, other)
    expected = scipy.stats.ttest_rel(other, reference)
    assert found.p == pytest.approx(expected.pvalue) and found.significant
    assert found.mean == pytest.approx(-0.15) and found.low < -0.15 < found.high < 0
    assert not paired_difference(reference, reference + np.array([0.1, -0.1, 0.01])).significant


def test_divergence_is_no_number():
    found = paired_difference(np.array([3.0, 3.1]), np.array([2.9, math.inf]))
    assert math.isnan(found.mean) and math.isnan(found.p) and not found.significant
    diverged = table(1.5)
    diverged[1, 0] = math.inf
    assert speedups(BUDGETS, table(1.0), diverged)[1].ratio == 0
    baseline = table(1.0)
    baseline[3, 1] = math.inf
    assert speedups(BUDGETS, baseline, table(1.5))[2].ratio == math.inf  # its longest budget shows nothing
    baseline = table(1.0)
    baseline[0] = math.inf
    assert [point.ratio for point in speedups(BUDGETS, baseline, table(1.5))[:2]] == [0, pytest.approx(1.5, rel=0.01)]


def test_sensitivity_measures_three_times_off_to_either_side():
    rates = [1e-3 * 2**power for power in range(-2, 3)]
    losses = [3 + 0.1 * math.log(rate / 1e-3) ** 2 for rate in rates]
    low, high = sensitivity(rates, losses)
    assert low == pytest.approx(0.1 * math.log(3) ** 2, rel=0.1) and high == pytest.approx(low)
    low, high = sensitivity(rates, [*losses[:3], math.inf, math.inf])
    assert high == math.inf and low == pytest.approx(0.1 * math.log(3) ** 2, rel=0.1)
    assert sensitivity([1.0, 2.0, 4.0], [2.0, math.inf, 2.1])[1] == math.inf  # diverged on the way
    assert all(math.isnan(side) for side in sensitivity(rates[1:4], losses[1:4]))  # twice off is not three times
    assert all(math.isnan(side) for side in sensitivity([1.0, 2.0], [math.inf, math.inf]))


def test_pooled_differences_find_what_one_pair_of_three_seeds_can_not():
    rng = np.random.default_rng(0)
    found = {"pooled": 0, "paired": 0}
    wrong = 0
    for _ in range(50):
        seeds = rng.normal(0, 0.05, 3)
        table = 3 + seeds + rng.normal(0, 0.01, (21, 3))
        table[1] += 0.04
        differences = pooled_differences(table[0], list(table[1:]))
        found["pooled"] += differences[0].p < 0.05 / 20
        found["paired"] += paired_difference(table[0], table[1]).p < 0.05 / 20
        wrong += sum(difference.significant for difference in differences[1:])
    assert found["pooled"] > 30 > 10 > found["paired"]
    assert 0.02 < wrong / (50 * 19) < 0.09  # as often as it says


def test_pooled_differences_of_one_other_are_the_paired_test():
    reference, other = np.array([3.10, 3.00, 3.25]), np.array([2.95, 2.90, 3.05])
    (found,), expected = pooled_differences(reference, [other]), paired_difference(reference, other)
    assert (found.mean, found.low, found.high, found.p) == pytest.approx(
        (expected.mean, expected.low, expected.high, expected.p)
    )
    lost, kept = pooled_differences(reference, [np.array([3.0, math.inf, 3.0]), other])
    assert math.isnan(lost.mean) and kept.p == pytest.approx(expected.p)
