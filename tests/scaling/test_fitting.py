"""Fits of scaling laws, against published numbers, scipy, and the laws that generated the data."""

import math

import numpy as np
import pytest
from scipy.stats import linregress

from antransformer.scaling import fitting as scaling
from antransformer.scaling.fitting import FLOPS_PER_PARAMETER, frontier, optimum, power_law, surface

SIZES = np.array([32.10, 62.28, 127.08, 247.21, 505.78]) * 1e6
# Hoffmann et al., arXiv:2203.15556, equation 10.
CHINCHILLA = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
DRAWS = 200  # of which 190 +- 3.1 intervals contain the truth at 95%


def chinchilla(n, d):
    return CHINCHILLA["E"] + CHINCHILLA["A"] / n ** CHINCHILLA["alpha"] + CHINCHILLA["B"] / d ** CHINCHILLA["beta"]


def grid(sizes=6, budgets=6):
    n, d = np.meshgrid(np.geomspace(44e6, 16e9, sizes), np.geomspace(1e9, 5e11, budgets))
    return n.ravel(), d.ravel()


def contains(interval, truth, scale=1.0):
    """Whether an interval, scaled about its middle, contains the truth."""
    middle, half = sum(interval) / 2, (interval[1] - interval[0]) / 2
    return abs(truth - middle) <= half * scale


# Power laws


@pytest.mark.parametrize(
    ("best", "exponent", "r2"),
    [
        ([31, 39, 120, 218, 394], 0.984, 0.974),  # anGPT, batch
        ([3.4e-3, 2.1e-3, 2.6e-3, 2.1e-3, 1.9e-3], -0.178, 0.659),
        ([25, 31, 134, 123, 158], 0.729, 0.827),  # GPT+, batch
        ([1.1e-2, 5.3e-3, 7.7e-3, 3.1e-3, 2.8e-3], -0.482, 0.783),
    ],
)
def test_the_papers_optima_give_its_laws(best, exponent, r2):
    law = power_law(SIZES, np.array(best))
    assert law.exponent == pytest.approx(exponent, abs=0.015)
    assert law.r2 == pytest.approx(r2, abs=0.06)
    low, high = law.delta["exponent"]
    assert low < exponent < high


def test_power_law_intervals_cover_the_truth_at_95_percent():
    rng = np.random.default_rng(0)
    covered = {(kind, name): 0 for kind in ("delta", "bootstrap") for name in ("coefficient", "exponent")}
    tight = band = 0
    for _ in range(DRAWS):
        law = power_law(SIZES, 0.065 * SIZES**-0.178 * np.exp(0.2 * rng.normal(size=5)))
        for kind, name in covered:
            covered[kind, name] += inside(getattr(law, kind)[name], {"coefficient": 0.065, "exponent": -0.178}[name])
        tight += contains(law.delta["exponent"], -0.178, scale=0.5)
        low, high = law.band(1e9)
        band += low <= 0.065 * 1e9**-0.178 <= high
    # With 3 degrees of freedom, the normal quantile instead of Student's t would cover it 171 times.
    assert all(182 <= count <= 198 for (kind, _), count in covered.items() if kind == "delta"), covered
    assert all(count >= 176 for count in covered.values()), covered
    assert 182 <= band <= 198 and tight < 170


def inside(interval, truth):
    return interval[0] <= truth <= interval[1]


def test_fewer_points_widen_the_interval_and_two_make_it_infinite():
    y = 3 * SIZES**0.5 * np.array([1.1, 0.9, 1.1, 0.9, 1.1])
    widths = [np.ptp(power_law(SIZES[:points], y[:points]).delta["exponent"]) for points in (5, 4, 3)]
    assert widths[0] < widths[1] < widths[2]
    law = power_law(SIZES[:2], y[:2])
    for intervals in (law.delta, law.bootstrap):
        assert intervals["exponent"] == (-math.inf, math.inf) and intervals["coefficient"] == (0, math.inf)
    assert law.band(1e8) == (0, math.inf)
    assert law(SIZES[1]) == pytest.approx(y[1])


def test_r2_of_a_constant_is_nan():
    law = power_law(SIZES, np.full(5, 0.0269))
    assert law.exponent == pytest.approx(0, abs=1e-12) and math.isnan(law.r2)


def test_the_band_is_narrowest_near_the_points_and_agrees_with_the_intervals():
    law = power_law(SIZES, 3 * SIZES**0.5 * np.array([1.1, 0.9, 1.1, 0.9, 1.1]))
    low, high = law.band(np.array([1e7, 1.2e8, 1e10]))
    ratio = high / low
    assert ratio[1] < ratio[0] < ratio[2]
    assert law.band(1.0) == pytest.approx(law.delta["coefficient"])


def test_a_power_law_agrees_with_linregress():
    y = 3 * SIZES**0.5 * np.array([1.1, 0.9, 1.1, 0.9, 1.1])
    law, line = power_law(SIZES, y), linregress(np.log(SIZES), np.log(y))
    assert (math.log(law.coefficient), law.exponent) == pytest.approx((line.intercept, line.slope), rel=1e-9)
    assert law.r2 == pytest.approx(line.rvalue**2, rel=1e-9)
    errors = np.sqrt(np.diag(law.covariance))
    assert errors == pytest.approx([line.intercept_stderr, line.stderr], rel=1e-9)


def test_a_nearly_exact_power_law_keeps_the_digits_of_its_error():
    noise = np.array([1, -1, 0, -1, 1]) * 1e-9  # r2 differs from 1 by less than its rounding error
    law, exact = power_law(SIZES, 3 * SIZES**0.5 * np.exp(noise)), power_law(SIZES, np.exp(noise))
    assert law.covariance[1][1] == pytest.approx(exact.covariance[1][1], rel=1e-4)


# Best settings


def bowl(best_batch, best_lr, batches, lrs):
    """Runs whose loss is quadratic in log batch and log rate, with a higher best rate for a larger batch."""
    b, r = (axis.ravel() for axis in np.meshgrid(batches, lrs))
    off = np.log(r / best_lr) - 0.5 * np.log(b / best_batch)
    return b, r, 3 + 0.02 * np.log(b / best_batch) ** 2 + 0.1 * off**2


BATCHES, RATES = 32_768 * 2.0 ** np.arange(6), 1e-3 * 10 ** (np.arange(-2, 4) / 3)


def test_best_settings_are_interpolated():
    best = optimum(*bowl(200_000, 1.3e-3, BATCHES, RATES))
    assert best.batch == pytest.approx(200_000, rel=0.05) and best.lr == pytest.approx(1.3e-3, rel=0.05)
    assert best.loss == pytest.approx(3, abs=0.002)
    assert best.batch_bracketed and best.lr_bracketed and best.batches == 6


def test_repeated_settings_are_averaged():
    b, r, loss = bowl(200_000, 1.3e-3, BATCHES, RATES)
    twice = optimum(np.tile(b, 2), np.tile(r, 2), np.concatenate([loss + 0.1, loss - 0.1]))
    once = optimum(b, r, loss)
    assert (twice.batch, twice.lr, twice.loss) == pytest.approx((once.batch, once.lr, once.loss))


def test_an_optimum_at_an_edge_is_not_bracketed():
    assert not optimum(*bowl(10_000, 1.3e-3, BATCHES, RATES)).batch_bracketed
    beyond = optimum(*bowl(200_000, 0.2, BATCHES, RATES))
    assert not beyond.lr_bracketed
    single = optimum(*bowl(200_000, 1.3e-3, [200_000], RATES))
    assert single.lr_bracketed and not single.batch_bracketed and single.batches == 1
    assert single.lr == pytest.approx(1.3e-3, rel=0.05)


def test_a_batch_with_its_best_rate_at_an_edge_does_not_bracket():
    b, r, loss = bowl(200_000, 1.3e-3, BATCHES, RATES)
    assert optimum(b, r, loss).batch_bracketed
    kept = (b < 250_000) | (r < 1e-3)  # larger batches have only rates that are far too low
    best = optimum(b[kept], r[kept], loss[kept])
    assert not best.batch_bracketed and best.batch <= 262_144


def test_a_diverged_run_brackets_the_best_rate():
    b, r, loss = bowl(200_000, 2e-3, [200_000], RATES)
    best = optimum(b, r, np.where(r > 2.5e-3, math.inf, loss))
    assert best.lr_bracketed and best.lr == pytest.approx(2e-3, rel=0.05)
    assert optimum(b, r, np.full_like(loss, math.inf)) is None
    assert not optimum(b, r, np.where(r > RATES[0] * 1.1, math.inf, loss)).lr_bracketed


# Compute frontier


def test_the_frontier_has_the_lowest_loss_of_each_bin():
    n = np.array([1e6, 2e6, 4e6, 1e6, 2e6, 4e6, 4e6])
    d = np.array([4e7, 2e7, 1e7, 4e8, 2e8, 1e8, 1e9])
    front = frontier(n, d, np.array([4.0, 3.9, 4.1, 3.5, 3.6, 3.7, 3.8]), bins=4)
    assert front.parameters.tolist() == [2e6, 1e6] and front.tokens.tolist() == [2e7, 4e8]
    assert front.losses.tolist() == [3.9, 3.5]  # not 3.8, which costs more and is worse
    assert front.bracketed.tolist() == [True, False]
    assert front.compute == pytest.approx(FLOPS_PER_PARAMETER * front.parameters * front.tokens)


def test_frontier_and_surface_agree_on_the_best_size():
    n, d = grid(40, 60)
    front = frontier(n, d, chinchilla(n, d))
    known = front.bracketed
    assert known.sum() > 8 and not known[-1]
    share = CHINCHILLA["beta"] / (CHINCHILLA["alpha"] + CHINCHILLA["beta"])
    assert power_law(front.compute[known], front.parameters[known]).exponent == pytest.approx(share, abs=0.06)


# L(N, D)


def test_chinchilla_coefficients_are_recovered():
    n, d = grid()
    law = surface(n, d, chinchilla(n, d), resamples=0)
    assert {name: getattr(law, name) for name in CHINCHILLA} == pytest.approx(CHINCHILLA, rel=1e-4)
    noisy = surface(n, d, chinchilla(n, d) * np.exp(1e-3 * np.random.default_rng(3).normal(size=len(n))), resamples=50)
    for name, truth in CHINCHILLA.items():
        assert inside(noisy.delta[name], truth) and inside(noisy.bootstrap[name], truth)
    assert noisy.delta["alpha"][1] - noisy.delta["alpha"][0] < 0.03


def test_surface_intervals_cover_the_truth_at_95_percent():
    rng = np.random.default_rng(0)
    n, d = grid()
    covered, tight, band = dict.fromkeys(CHINCHILLA, 0), dict.fromkeys(CHINCHILLA, 0), 0
    point = 1e9, 2e10
    for _ in range(DRAWS):
        law = surface(n, d, chinchilla(n, d) * np.exp(0.005 * rng.normal(size=len(n))), resamples=0)
        for name, truth in CHINCHILLA.items():
            covered[name] += inside(law.delta[name], truth)
            tight[name] += contains(law.delta[name], truth, scale=0.5)
        low, high = law.band(*point)
        band += low <= chinchilla(*point) <= high
    assert all(182 <= count <= 199 for count in covered.values()), covered
    assert all(count < 172 for count in tight.values()), tight  # the intervals are not too wide
    assert 182 <= band <= 199


def test_no_random_start_finds_a_lower_minimum():
    n, d = grid(5, 5)
    losses = chinchilla(n, d) * np.exp(0.01 * np.random.default_rng(1).normal(size=len(n)))
    law = surface(n, d, losses, resamples=0)

    def huber(prediction):
        scaled = (np.log(prediction) - np.log(losses)) / scaling.HUBER
        clipped = np.clip(scaled, -1, 1)
        return (clipped * (scaled - clipped / 2)).sum()

    minimum = huber(law(n, d))
    assert minimum <= huber(chinchilla(n, d))
    rng = np.random.default_rng(2)
    x, y = np.log(n) - np.log(n).mean(), np.log(d) - np.log(d).mean()
    for _ in range(20):
        start = np.array([*rng.uniform(-2, 1.5, 3), *rng.uniform(0.1, 1, 2)])
        assert scaling._minimize_huber(start, x, y, np.log(losses))[1] >= minimum * (1 - 1e-4)


def test_one_outlier_hardly_moves_the_exponents():
    n, d = grid()
    losses = chinchilla(n, d) * np.exp(5e-4 * np.random.default_rng(0).normal(size=len(n)))
    losses[8] *= 1.5
    law = surface(n, d, losses, resamples=0)
    assert (law.alpha, law.beta) == pytest.approx((0.34, 0.28), abs=0.01)


def test_the_best_size_has_the_lowest_loss_for_the_compute():
    n, d = grid()
    law = surface(n, d, chinchilla(n, d), resamples=0)
    sizes = np.geomspace(1e7, 1e12, 20_001)
    losses = law(sizes, 1e21 / FLOPS_PER_PARAMETER / sizes)
    assert law.best_size(1e21) == pytest.approx(sizes[np.argmin(losses)], rel=0.01)


@pytest.mark.parametrize("case", ["E at its bound", "one ratio"])
def test_undetermined_coefficients_have_infinite_intervals(case):
    rng = np.random.default_rng(0)
    n, d = grid(4, 4)
    if case == "E at its bound":  # data without an irreducible loss
        losses = (20 / n**0.1 + 20 / d**0.1) * np.exp(1e-3 * rng.normal(size=len(n)))
        losses = losses / losses.min()
    else:  # tokens proportional to size, so the two terms cannot be separated
        n = np.geomspace(44e6, 16e9, 12)
        d = 20 * n
        losses = chinchilla(n, d) * np.exp(1e-3 * rng.normal(size=len(n)))
    law = surface(n, d, losses, resamples=10)
    assert {*law.delta.values(), *law.bootstrap.values()} <= {(-math.inf, math.inf), (0, math.inf)}
    assert law.band(1e9, 1e10) == (0, math.inf)
