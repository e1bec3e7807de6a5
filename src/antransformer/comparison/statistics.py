"""Statistics of comparisons: speedups without extrapolation, bootstrap intervals, paired tests.

Convergence speedup (arXiv:2505.22014, section 5.2): tokens that the baseline needs for the variant's loss, divided by
the tokens of the variant. Every point is a finished run with its own budget. Needs the extra ``analysis`` (scipy).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from antransformer.bootstrap import CONFIDENCE, RESAMPLES, TAILS, residual_inflation, student_t
from antransformer.extras import require

SENSITIVITY_FACTOR = 3.0
CURVE_POINTS = 512
MIN_SEEDS = 3  # of a test: two differences have one degree of freedom, which hardly measures the noise
ROUNDING = 6e-3  # slack in the logarithm of a setting: values are rounded to three digits

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Speedup:
    """Speedup of a variant at one budget.

    Attributes:
        tokens: budget of the variant.
        ratio: tokens that the baseline needs for the same loss, over ``tokens``. Infinite where the baseline's longest
            run does not reach that loss; 0 where its shortest run is below that loss already.
        low: lower end of the bootstrap interval over seeds, with the same special values; NaN with one seed.
        high: upper end.
    """

    tokens: int
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Mean difference in loss of two variants over paired seeds.

    Attributes:
        mean: difference in nats per token; NaN where a run diverged.
        low: lower end of the 95% interval of the t-test; NaN with fewer than ``MIN_SEEDS`` seeds or a diverged run.
        high: upper end.
        p: two-sided p value, NaN like the interval.
    """

    mean: float
    low: float
    high: float
    p: float

    @property
    def significant(self) -> bool:
        """Whether p is below 0.05; False for NaN."""
        return self.p < 1 - CONFIDENCE


def inverse_loss_curve(budgets: Sequence[int], losses: Array) -> Callable[[float], float]:
    """Return a function from a loss to the tokens at which a variant reaches it.

    The loss curve is PCHIP in log tokens through the running minimum of the losses. Nothing is extrapolated: the
    function returns infinity where no budget reaches the loss, and 0 where the shortest run is below it already.

    Args:
        budgets: ascending token counts.
        losses: mean loss at each budget, shape (budgets,). Infinite losses of diverged runs are left out.
    """
    finished = np.isfinite(losses)
    if not finished.any():
        return lambda target: math.inf
    # A longer run may end with a higher loss by chance. The running minimum makes the curve monotone, so that it can be
    # inverted, and credits the baseline with the first budget that reached a loss.
    log_tokens, lowest = np.log(np.asarray(budgets)[finished]), np.minimum.accumulate(losses[finished])
    grid = np.union1d(np.linspace(log_tokens[0], log_tokens[-1], CURVE_POINTS), log_tokens)
    curve = np.minimum(_pchip(log_tokens, lowest)(grid), lowest[0])

    def tokens_at(target: float) -> float:
        if not target >= lowest[-1]:  # also for NaN
            return math.inf
        if target > lowest[0]:
            return 0.0
        index = int(np.argmax(curve <= target + 1e-12))  # first point at or below the target
        if index == 0:
            return math.exp(grid[0])
        fraction = (curve[index - 1] - target) / (curve[index - 1] - curve[index])
        return math.exp(grid[index - 1] + fraction * (grid[index] - grid[index - 1]))

    return tokens_at


def speedups(budgets: Sequence[int], baseline: Array, variant: Array, seed: int = 0) -> list[Speedup]:
    """Convergence speedup of a variant over a baseline at each budget of the variant.

    The interval is a bootstrap over seeds. Residuals about the mean of each budget are pooled over the budgets of one
    variant, inflated for their small number, and drawn anew for every run. The two variants are drawn independently,
    although equal seeds have equal batches, so the interval is wide if their noise is correlated. A diverged run makes
    the mean loss at its budget infinite.

    Args:
        budgets: ascending token counts, the same for both.
        baseline: losses, shape (budgets, seeds).
        variant: losses, shape (budgets, seeds).
        seed: seed of the resampling.
    """
    generator = np.random.default_rng(seed)
    curve, targets = inverse_loss_curve(budgets, baseline.mean(1)), variant.mean(1)
    ratios = np.array([[curve(target) for target in targets]]) / budgets
    low = high = np.full(len(budgets), math.nan)
    if baseline.shape[1] > 1:
        curves = (inverse_loss_curve(budgets, losses) for losses in _resampled_means(baseline, generator))
        resampled_targets = _resampled_means(variant, generator)
        tokens = [[curve(target) for target in row] for curve, row in zip(curves, resampled_targets, strict=True)]
        # Ratios may be 0 or infinite, between which interpolation gives NaN: take an observed value as the quantile.
        low, high = np.quantile(np.array(tokens) / budgets, TAILS, axis=0, method="closest_observation")
    points = zip(budgets, ratios[0], low, high, strict=True)
    return [Speedup(budget, float(ratio), float(low), float(high)) for budget, ratio, low, high in points]


def paired_difference(baseline: Array, variant: Array) -> Difference:
    """Difference ``variant - baseline`` of losses of shape (seeds,), with the paired t-test from 3 seeds on."""
    if not np.isfinite([variant, baseline]).all():
        return Difference(math.nan, math.nan, math.nan, math.nan)
    differences = variant - baseline
    mean = float(differences.mean())
    if len(differences) < MIN_SEEDS or not differences.any():
        return Difference(mean, math.nan, math.nan, math.nan)
    require("scipy", "analysis")
    from scipy.stats import ttest_1samp

    test = ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    return Difference(mean, float(interval.low), float(interval.high), float(test.pvalue))


def pooled_differences(baseline: Array, variants: Sequence[Array]) -> list[Difference]:
    """Differences of several variants from a baseline, tested with one residual variance for all of them.

    The model is loss = variant + seed + noise. Three seeds of one variant hardly measure the noise; those of all
    variants together do. Intervals and p values are those of Student's t, without correction for several tests. A
    variant with a diverged run gets NaN and is left out of the pool.

    Args:
        baseline: losses, shape (seeds,).
        variants: losses of each variant, shape (seeds,).
    """
    finished = [losses for losses in variants if np.isfinite(losses).all()]
    table = np.array([baseline, *finished])
    rows, seeds = table.shape
    degrees_of_freedom = (rows - 1) * (seeds - 1)
    if not np.isfinite(baseline).all() or degrees_of_freedom < MIN_SEEDS - 1:
        return [paired_difference(baseline, losses) for losses in variants]
    require("scipy", "analysis")
    from scipy.stats import t

    # Residuals of the additive model: the means of variants and seeds are removed, the grand mean was removed twice.
    noise = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    # A difference of two means over seeds has twice the variance of one mean.
    standard_error = math.sqrt(2 * (noise**2).sum() / degrees_of_freedom / seeds)
    half_width = student_t(degrees_of_freedom) * standard_error

    def difference(losses: Array) -> Difference:
        if not np.isfinite(losses).all():
            return paired_difference(baseline, losses)
        mean = float((losses - baseline).mean())
        p = float(2 * t.sf(abs(mean) / standard_error, degrees_of_freedom)) if standard_error else math.nan
        return Difference(mean, mean - half_width, mean + half_width, p)

    return [difference(losses) for losses in variants]


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p values of several tests by Holm's method; NaN stays NaN and does not count as a test."""
    adjusted, largest = list(p_values), 0.0
    tests = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    for rank, (p, index) in enumerate(tests):
        # The running maximum keeps the order: a larger p value never gets a smaller adjusted one.
        largest = max(largest, min(1.0, p * (len(tests) - rank)))
        adjusted[index] = largest
    return adjusted


def sensitivity(values: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """Regret where a setting is 3 times too small, and where it is 3 times too large.

    The regret is the loss above the best trial's, in nats per token. It is read off a PCHIP curve through the
    finished trials in the logarithm of the setting.

    Returns:
        Both regrets; NaN where no trial is that far from the best, infinite where a trial within that range diverged.
    """
    order = np.argsort(values)
    x, y = np.log(np.asarray(values, float))[order], np.asarray(losses, float)[order]
    finished = np.isfinite(y)
    if not finished.any():
        return math.nan, math.nan
    best, distance = x[np.argmin(y)], math.log(SENSITIVITY_FACTOR)

    def regret(sign: int) -> float:
        distances = (x[~finished] - best) * sign
        if ((distances > 0) & (distances <= distance + ROUNDING)).any():
            return math.inf
        target, low, high = best + sign * distance, x[finished][0], x[finished][-1]
        if not low - ROUNDING <= target <= high + ROUNDING:
            return math.nan
        target = min(max(target, low), high)
        return float(_pchip(x[finished], y[finished])(target) - y.min())

    return regret(-1), regret(1)


def _resampled_means(losses: Array, generator: np.random.Generator) -> Array:
    """Bootstrap means over seeds, shape (RESAMPLES, budgets), from losses of shape (budgets, seeds)."""
    budgets, seeds = losses.shape
    means = losses.mean(1)
    finished = np.isfinite(means)
    # Two or three seeds of one budget have far too few residuals to draw from; the noise is similar at all budgets.
    residuals = (losses[finished] - means[finished, None]).flatten()
    if not residuals.size:
        return np.broadcast_to(means, (RESAMPLES, budgets))
    inflated = residuals * residual_inflation(residuals.size, int(finished.sum()) * (seeds - 1))
    resampled: Array = means + generator.choice(inflated, (RESAMPLES, budgets, seeds)).mean(2)
    return resampled


def _pchip(x: Array, y: Array) -> Callable[[Array | float], Array]:
    """Monotone interpolation (scipy's PCHIP); one point gives a constant."""
    if len(x) == 1:
        return lambda points: np.full(np.shape(points), y[0])
    require("scipy", "analysis")
    from scipy.interpolate import PchipInterpolator

    return PchipInterpolator(x, y)
