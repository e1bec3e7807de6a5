"""The statistics of comparisons: speedup without extrapolation, bootstrap intervals, paired tests.

Convergence speedup (arXiv:2505.22014, section 5.2): the tokens that the baseline would need for the loss that the
method reached, over the tokens that the method used. Every point is a finished run at its own budget. Needs the extra
``analysis`` (scipy).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from antransformer.bootstrap import CONFIDENCE, RESAMPLES
from antransformer.extras import require

SENSITIVITY_FACTOR = 3.0

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Speedup:
    """Tokens that the baseline needs for the method's loss, over the method's own.

    Attributes:
        tokens: the method's budget.
        ratio: infinite where the baseline's longest run did not reach that loss, 0 where its shortest run is already
            below it (no baseline).
        low, high: bootstrap interval over seeds, with the same two special values; NaN with one seed.
    """

    tokens: int
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Mean difference in loss of two variants over paired seeds, with its 95% interval and p value.

    The interval and p are those of the paired t-test, NaN with one seed; all are NaN where a run diverged.
    """

    mean: float
    low: float
    high: float
    p: float

    @property
    def significant(self) -> bool:
        """Whether p is below 0.05; a NaN is not."""
        return self.p < 1 - CONFIDENCE


def loss_curve(budgets: Sequence[int], losses: Array) -> Callable[[float], float]:
    """The tokens at which a variant reaches a loss, from its finished runs.

    The curve is monotone: PCHIP in log tokens through the running minimum of the losses. Nothing is extrapolated.

    Args:
        budgets: ascending token counts.
        losses: mean loss at each, (len(budgets),); an infinite one, of a diverged run, is left out.

    Returns:
        A function from a loss to tokens: infinite where no budget reaches that loss, 0 where the shortest run is below
        it already.
    """
    finished = np.isfinite(losses)
    if not finished.any():
        return lambda target: math.inf
    x, lowest = np.log(np.asarray(budgets)[finished]), np.minimum.accumulate(losses[finished])
    grid = np.union1d(np.linspace(x[0], x[-1], 512), x)
    curve = np.minimum(_pchip(x, lowest)(grid), lowest[0])

    def tokens(target: float) -> float:
        if not target >= lowest[-1]:
            return math.inf
        if target > lowest[0]:
            return 0.0
        at = int(np.argmax(curve <= target + 1e-12))  # the first point at or below
        if at == 0:
            return math.exp(grid[0])
        share = (curve[at - 1] - target) / (curve[at - 1] - curve[at])
        return math.exp(grid[at - 1] + share * (grid[at] - grid[at - 1]))

    return tokens


def speedups(budgets: Sequence[int], baseline: Array, method: Array, seed: int = 0) -> list[Speedup]:
    """Convergence speedup of ``method`` over ``baseline`` at each budget of the method.

    The interval is a bootstrap over seeds: residuals about each budget's mean, pooled over the budgets of one variant
    and widened for their small number, are drawn anew for every run. (Drawing among two or three seeds of one budget
    alone would give intervals that are far too narrow.) A diverged run makes the loss at its budget infinite.

    Args:
        budgets: ascending token counts, the same for both.
        baseline, method: losses (budgets, seeds).
        seed: of the resampling.
    """
    generator = np.random.default_rng(seed)
    curve, targets = loss_curve(budgets, baseline.mean(1)), method.mean(1)
    ratios = np.array([[curve(target) for target in targets]]) / budgets
    low = high = np.full(len(budgets), math.nan)
    if baseline.shape[1] > 1:
        curves = (loss_curve(budgets, drawn) for drawn in _resampled(baseline, generator))
        drawn_targets = _resampled(method, generator)
        drawn = [[curve(target) for target in row] for curve, row in zip(curves, drawn_targets, strict=True)]
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(np.array(drawn) / budgets, [tail, 1 - tail], axis=0, method="closest_observation")
    points = zip(budgets, ratios[0], low, high, strict=True)
    return [Speedup(tokens, float(ratio), float(low), float(high)) for tokens, ratio, low, high in points]


def paired_difference(baseline: Array, other: Array) -> Difference:
    """``other - baseline`` over seeds, paired; both (seeds,)."""
    if not np.isfinite([other, baseline]).all():
        return Difference(math.nan, math.nan, math.nan, math.nan)
    differences = other - baseline
    mean = float(differences.mean())
    if len(differences) < 2 or not differences.any():
        return Difference(mean, math.nan, math.nan, math.nan)
    require("scipy", "analysis")
    from scipy.stats import ttest_1samp

    test = ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    return Difference(mean, float(interval.low), float(interval.high), float(test.pvalue))


def pooled_differences(baseline: Array, others: Sequence[Array]) -> list[Difference]:
    """Differences of many variants from one, over seeds, with one residual variance for all of them.

    The model is loss = variant + seed + noise: what a variant gains from a seed beyond what all gain from it is
    noise, and all variants together measure its size, which three seeds of one alone hardly do. Intervals and p are
    those of Student's t; a variant with a diverged run has NaN and no part in the pool.

    Args:
        baseline: losses (seeds,).
        others: losses of each other variant, (seeds,).
    """
    finished = [losses for losses in others if np.isfinite(losses).all()]
    table = np.array([baseline, *finished])
    rows, seeds = table.shape
    freedom = (rows - 1) * (seeds - 1)
    if not np.isfinite(baseline).all() or not freedom:
        return [paired_difference(baseline, losses) for losses in others]
    require("scipy", "analysis")
    from scipy.stats import t

    noise = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    error = math.sqrt(2 * (noise**2).sum() / freedom / seeds)
    half = float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * error

    def difference(losses: Array) -> Difference:
        if not np.isfinite(losses).all():
            return paired_difference(baseline, losses)
        mean = float((losses - baseline).mean())
        p = float(2 * t.sf(abs(mean) / error, freedom)) if error else math.nan
        return Difference(mean, mean - half, mean + half, p)

    return [difference(losses) for losses in others]


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values of several tests by Holm's method; a NaN is no test and stays."""
    adjusted, largest = list(p_values), 0.0
    tests = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    for done, (p, place) in enumerate(tests):
        largest = max(largest, min(1.0, p * (len(tests) - done)))
        adjusted[place] = largest
    return adjusted


def sensitivity(values: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """Loss lost when a setting is 3 times too small, and when it is 3 times too large.

    The curve is PCHIP in the logarithm of the setting through the finished trials, and its best point the best trial.

    Returns:
        The two losses over the best; NaN on a side where no trial lies that far away, infinite where one diverged on
        the way there.
    """
    order = np.argsort(values)
    x, y = np.log(np.asarray(values, float))[order], np.asarray(losses, float)[order]
    finished = np.isfinite(y)
    if not finished.any():
        return math.nan, math.nan
    best, slack = x[np.argmin(y)], 1e-9

    def lost(side: float) -> float:
        away = math.log(SENSITIVITY_FACTOR)
        distance = (x[~finished] - best) * side
        if ((distance > 0) & (distance <= away + slack)).any():
            return math.inf
        at = best + side * away
        if not x[finished][0] - slack <= at <= x[finished][-1] + slack:
            return math.nan
        return float(_pchip(x[finished], y[finished])(at) - y.min())

    return lost(-1), lost(1)


def _resampled(losses: Array, generator: np.random.Generator) -> Array:
    """Bootstrap means, (resamples, budgets)."""
    budgets, seeds = losses.shape
    means = losses.mean(1)
    finished = np.isfinite(means)
    pool = (losses[finished] - means[finished, None]).flatten()
    if seeds < 2 or not pool.size:
        return np.broadcast_to(means, (RESAMPLES, budgets))
    require("scipy", "analysis")
    from scipy.stats import norm, t

    # Resampled residuals are too small by the mean that was taken off, and know nothing of how badly few of them
    # measure their own spread: Student's t over the normal quantile makes up for that.
    upper = (1 + CONFIDENCE) / 2
    wider = math.sqrt(seeds / (seeds - 1)) * t.ppf(upper, finished.sum() * (seeds - 1)) / norm.ppf(upper)
    drawn = generator.choice(pool * wider, (RESAMPLES, budgets, seeds))
    return means + drawn.mean(2)


def _pchip(x: Array, y: Array) -> Callable[[Array | float], Array]:
    """Monotone interpolation; a single point is a constant."""
    if len(x) == 1:
        return lambda at: np.full(np.shape(at), y[0])
    require("scipy", "analysis")
    from scipy.interpolate import PchipInterpolator

    return PchipInterpolator(x, y)
