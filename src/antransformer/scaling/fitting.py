"""Scaling laws from finished runs, as pure functions of arrays: best settings, power laws, compute frontier, L(N, D).

Every law has 95% intervals of two kinds: the delta method with Student's t, which knows how few points there are, and
a bootstrap of the residuals, widened for the same reason. What the points can not tell has an infinite interval. Needs
the extra ``analysis`` (scipy).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from antransformer.bootstrap import CONFIDENCE
from antransformer.extras import require

FLOPS_PER_PARAMETER = 6  # a token: forward and backward, C = 6 N D
RESAMPLES = 2000  # of a power law, which is solved in closed form
SURFACE_RESAMPLES = 200
BINS_PER_DECADE = 4
HUBER = 1e-3  # arXiv:2203.15556, appendix D.3
EXPONENTS = np.linspace(0.05, 1.2, 24)  # where the search for L(N, D) starts, both ways
STARTS = 4  # of those, the best that are followed to their end
LIMITS = ((-12.0, 12.0),) * 3 + ((0.005, 3.0),) * 2  # log nats, and exponents, beyond all that is plausible
COLLINEAR = 0.99  # correlation of log N and log D; from there on the intervals were seen to miss the truth

Array = NDArray[np.float64]
Interval = tuple[float, float]
Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Optimum:
    """The best learning rate and batch of one size and number of tokens.

    Attributes:
        batch, lr, loss: at the lowest point of the interpolation.
        batch_bracketed, lr_bracketed: whether a smaller and a larger value were tried and are worse; if not, the best
            may lie beyond what was tried.
        batches: how many batch sizes were compared.
    """

    batch: float
    lr: float
    loss: float
    batch_bracketed: bool
    lr_bracketed: bool
    batches: int


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient * x ** exponent.

    Attributes:
        r2: share of the variance of log y that the law explains; NaN where all y are equal.
        points: that it was fitted to; with two of them nothing says how far off it is.
        span: smallest and largest x.
        covariance: of (log coefficient, exponent).
        delta, bootstrap: 95% intervals of ``coefficient`` and ``exponent``.
    """

    coefficient: float
    exponent: float
    r2: float
    points: int
    span: Interval
    covariance: Matrix
    delta: dict[str, Interval]
    bootstrap: dict[str, Interval]

    def __call__(self, x: Any) -> Any:
        """y at x."""
        return self.coefficient * x**self.exponent

    def band(self, x: Any) -> tuple[Any, Any]:
        """95% of the law itself at x, by the delta method."""
        ones = np.ones_like(x)
        return _band(self(x), np.stack([ones, np.log(x)], -1), self.covariance, self.points - 2)


@dataclass(frozen=True)
class Frontier:
    """The runs of the lowest loss for their compute, one a bin; ascending compute, falling loss.

    Attributes:
        compute, parameters, tokens, losses: of these runs.
        bracketed: whether the bin has a smaller and a larger model too, which are both worse.
    """

    compute: Array
    parameters: Array
    tokens: Array
    losses: Array
    bracketed: NDArray[np.bool_]


@dataclass(frozen=True)
class Surface:
    """L(N, D) = E + A / N ** alpha + B / D ** beta, in nats per token.

    Attributes:
        points: that it was fitted to.
        error: standard deviation of log L about it.
        sizes, tokens: smallest and largest N, and D.
        covariance: of (E, log A, log B, alpha, beta).
        delta, bootstrap: 95% intervals of the five.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    points: int
    error: float
    sizes: Interval
    tokens: Interval
    covariance: Matrix
    delta: dict[str, Interval]
    bootstrap: dict[str, Interval]

    def __call__(self, parameters: Any, tokens: Any) -> Any:
        """Loss with so many parameters and tokens."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def band(self, parameters: Any, tokens: Any) -> tuple[Any, Any]:
        """95% of the law itself there, by the delta method."""
        loss, size, data = self(parameters, tokens), self.A / parameters**self.alpha, self.B / tokens**self.beta
        slopes = [np.ones_like(loss), size, data, -size * np.log(parameters), -data * np.log(tokens)]
        return _band(loss, np.stack([slope / loss for slope in slopes], -1), self.covariance, self.points - 5)

    def best_size(self, compute: Any) -> Any:
        """The number of parameters with the lowest loss for C = 6 N D (arXiv:2203.15556, equation 4)."""
        both = self.alpha + self.beta
        factor = (self.alpha * self.A / (self.beta * self.B)) ** (1 / both)
        return factor * (compute / FLOPS_PER_PARAMETER) ** (self.beta / both)


# The best learning rate and batch


def optimum(batches: Array, lrs: Array, losses: Array) -> Optimum | None:
    """The best batch and learning rate in two stages of Akima interpolation (arXiv:2406.19146).

    For each batch the loss over log learning rate is interpolated and minimised, then these minima over log batch. A
    batch whose best rate lies at the edge of those tried has no known minimum: it only counts where all are so.

    Args:
        batches, lrs, losses: one a run; repeated settings are averaged, a diverged run has an infinite loss.

    Returns:
        None where all diverged.
    """
    stages = []
    for batch in np.unique(batches):
        rates, means = searched(batches, lrs, losses, batch)
        if np.isfinite(means).any():
            stages.append((math.log(batch), *_minimum(np.log(rates), means)))
    if not stages:
        return None
    known = [stage for stage in stages if stage[3]] or stages
    x, rates, lowest, bracketed = (np.array(column) for column in zip(*known, strict=True))
    best, loss, batch_bracketed = _minimum(x, lowest)
    rate = interpolated(x, rates)(best) if len(x) > 1 else rates[0]
    return Optimum(math.exp(best), math.exp(rate), loss, batch_bracketed, bool(bracketed.all()), len(stages))


def searched(batches: Array, lrs: Array, losses: Array, batch: float) -> tuple[Array, Array]:
    """The learning rates tried with a batch, ascending, and the mean loss with each."""
    of_batch = batches == batch
    rates = np.unique(lrs[of_batch])
    return rates, np.array([losses[of_batch & (lrs == rate)].mean() for rate in rates])


def interpolated(x: Array, y: Array) -> Any:
    """Akima interpolation (scipy's) through the finite ones of y; two at least."""
    require("scipy", "analysis")
    from scipy.interpolate import Akima1DInterpolator

    finite = np.isfinite(y)
    return Akima1DInterpolator(x[finite], y[finite])


def _minimum(x: Array, y: Array) -> tuple[float, float, bool]:
    """Where the interpolation is lowest, its value there, and whether points on both sides are higher."""
    finite = np.isfinite(y)
    best = int(np.argmin(y))
    bracketed = 0 < best < len(y) - 1  # by a diverged run too
    if finite.sum() < 3:
        return float(x[best]), float(y[best]), bracketed
    curve = interpolated(x, y)
    turns = curve.derivative().roots(extrapolate=False)
    places = np.concatenate([x[finite], turns[np.isfinite(turns)]])
    lowest = int(np.argmin(curve(places)))
    return float(places[lowest]), float(curve(places)[lowest]), bracketed


# Power laws


def power_law(x: Array, y: Array) -> PowerLaw:
    """Least squares of log y over log x; two different x at least."""
    u, v = np.log(x), np.log(y)
    center = u.mean()
    design = np.stack([np.ones_like(u), u - center], -1)
    solve = np.linalg.pinv(design)
    middle, exponent = solve @ v
    fitted = design @ (middle, exponent)
    residuals, freedom = v - fitted, len(u) - 2
    variance = residuals @ residuals / freedom if freedom else math.inf
    back = np.array([[1, -center], [0, 1]])  # from the value at the center to that at x = 1
    with np.errstate(invalid="ignore"):
        covariance = back @ (solve @ solve.T * variance) @ back.T if freedom else np.full((2, 2), math.inf)
    drawn = _resampled(fitted, residuals, 2, RESAMPLES) @ solve.T @ back.T
    log_coefficient = middle - exponent * center
    spread = ((v - v.mean()) ** 2).sum()
    names, logs = ("coefficient", "exponent"), (True, False)
    return PowerLaw(
        coefficient=math.exp(log_coefficient),
        exponent=float(exponent),
        r2=float(1 - residuals @ residuals / spread) if spread > 1e-20 else math.nan,
        points=len(u),
        span=(float(x.min()), float(x.max())),
        covariance=_matrix(covariance),
        delta=_delta(names, logs, np.array([log_coefficient, exponent]), covariance, freedom),
        bootstrap=_quantiles(names, logs, drawn),
    )


# The compute frontier


def frontier(parameters: Array, tokens: Array, losses: Array, bins: int | None = None) -> Frontier:
    """The lowest loss in each of the log-spaced bins of compute 6 N D (arXiv:2203.15556, approach 1).

    A bin whose lowest loss is not below that of all cheaper bins is not on the frontier.

    Args:
        parameters, tokens, losses: finite, one a run.
        bins: how many; by default four a decade.
    """
    compute = FLOPS_PER_PARAMETER * parameters * tokens
    low, high = np.log10(compute.min()), np.log10(compute.max())
    bins = bins or max(1, round((high - low) * BINS_PER_DECADE))
    number = np.minimum(((np.log10(compute) - low) / max(high - low, 1e-9) * bins).astype(int), bins - 1)
    kept: list[int] = []
    bracketed = []
    for each in np.unique(number):
        (inside,) = np.nonzero(number == each)
        best = inside[np.argmin(losses[inside])]
        if not kept or losses[best] < losses[kept[-1]]:
            kept.append(int(best))
            sizes = parameters[inside]
            bracketed.append(bool(sizes.min() < parameters[best] < sizes.max()))
    return Frontier(compute[kept], parameters[kept], tokens[kept], losses[kept], np.array(bracketed, bool))


# The loss as a function of parameters and tokens


def surface(parameters: Array, tokens: Array, losses: Array, resamples: int = SURFACE_RESAMPLES) -> Surface:
    """E + A / N^alpha + B / D^beta (arXiv:2203.15556, approach 3): the Huber loss of log L, summed, not averaged, and
    followed until it no longer falls (arXiv:2404.10102).

    The search starts from every pair of exponents on a grid, each with the best E, A and B for it; the best few starts
    are followed by L-BFGS. The delta method takes the residuals to be normal with the deviation that they show.

    Args:
        parameters, tokens, losses: finite, one a run; six runs at least.
        resamples: of the bootstrap; 0 leaves it out, and its intervals infinite.

    Returns:
        The law; where the runs do not tell its numbers apart, all intervals are infinite.
    """
    n, d, y = np.log(parameters), np.log(tokens), np.log(losses)
    centers = n.mean(), d.mean()  # about which the exponents hardly depend on A and B
    n, d = n - centers[0], d - centers[1]
    found = min((_followed(start, n, d, y) for start in _starts(n, d, losses)), key=lambda end: end[1])[0]
    fitted, jacobian = _log_loss(found, n, d)
    residuals, freedom = y - fitted, len(y) - 5
    error = math.sqrt(residuals @ residuals / freedom)
    E, log_a, log_b, alpha, beta = natural = _natural(found, *centers)
    covariance = np.full((5, 5), math.inf)
    drawn: list[Array] = []
    if _told_apart(found, jacobian, n, d):
        to_natural = np.eye(5)
        to_natural[0, 0], to_natural[1, 3], to_natural[2, 4] = E, *centers
        solve = to_natural @ np.linalg.pinv(jacobian)
        covariance = solve @ solve.T * _huber_variance(error)
        again = _resampled(fitted, residuals, 5, resamples)
        drawn = [_natural(_followed(found, n, d, values)[0], *centers) for values in again]
    names, logs = ("E", "A", "B", "alpha", "beta"), (False, True, True, False, False)
    return Surface(
        E=float(E),
        A=math.exp(log_a),
        B=math.exp(log_b),
        alpha=float(alpha),
        beta=float(beta),
        points=len(y),
        error=error,
        sizes=(float(parameters.min()), float(parameters.max())),
        tokens=(float(tokens.min()), float(tokens.max())),
        covariance=_matrix(covariance),
        delta=_delta(names, logs, natural, covariance, freedom),
        bootstrap=_quantiles(names, logs, np.array(drawn).reshape(-1, 5)),
    )


def _log_loss(theta: Array, n: Array, d: Array) -> tuple[Array, Array]:
    """log L and its derivatives (runs, 5) by theta = (log E, log of either term at the center, alpha, beta)."""
    terms = np.exp([np.full_like(n, theta[0]), theta[1] - theta[3] * n, theta[2] - theta[4] * d])
    total = terms.sum(0)
    shares = terms / total
    return np.log(total), np.stack([*shares, -shares[1] * n, -shares[2] * d], -1)


def _starts(n: Array, d: Array, losses: Array) -> Array:
    """The most promising thetas, (STARTS, 5): E and the terms by linear least squares for each pair of exponents."""
    alpha, beta = (grid.ravel() for grid in np.meshgrid(EXPONENTS, EXPONENTS))
    columns = np.stack([np.ones((len(alpha), len(n))), np.exp(-alpha[:, None] * n), np.exp(-beta[:, None] * d)], -1)
    weighted = columns / losses[:, None]
    square = np.einsum("gri,grj->gij", weighted, weighted) + 1e-9 * np.eye(3)
    terms = np.linalg.solve(square, weighted.sum(1)[..., None])[..., 0]
    terms = np.maximum(terms, 1e-3 * losses.min())  # a term below nothing starts from next to nothing
    residuals = np.log(losses) - np.log((columns @ terms[..., None])[..., 0])
    best = np.argsort(np.abs(residuals).sum(1))[:STARTS]
    return np.column_stack([np.log(terms[best]), alpha[best], beta[best]])


def _followed(start: Array, n: Array, d: Array, y: Array) -> tuple[Array, float]:
    """The end of the search from a start, and the summed Huber loss there in units of its bend."""
    require("scipy", "analysis")
    from scipy.optimize import minimize

    def objective(theta: Array) -> tuple[float, Array]:
        fitted, jacobian = _log_loss(theta, n, d)
        scaled = (fitted - y) / HUBER
        inside = np.clip(scaled, -1, 1)
        return float((inside * (scaled - inside / 2)).sum()), inside @ jacobian / HUBER

    options: Any = {"maxiter": 2000, "ftol": 1e-12}
    end = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=LIMITS, options=options)
    return end.x, float(end.fun)


def _natural(theta: Array, n_center: float, d_center: float) -> Array:
    """(E, log A, log B, alpha, beta) of a theta about centers."""
    log_e, size, data, alpha, beta = theta
    return np.array([math.exp(log_e), size + alpha * n_center, data + beta * d_center, alpha, beta])


def _huber_variance(error: float) -> float:
    """Variance of the Huber estimate of a mean, times the number of values, where these are normal."""
    from scipy.stats import norm

    if not error:
        return 0.0
    k = HUBER / error
    inside = 1 - 2 * norm.sf(k)
    return float(error**2 * (inside - 2 * k * norm.pdf(k) + 2 * k**2 * norm.sf(k)) / inside**2)


def _told_apart(theta: Array, jacobian: Array, n: Array, d: Array) -> bool:
    """Whether the runs tell the five numbers apart, so that there is a point in intervals of them.

    They do not where tokens go with size, where the search ended at a limit (such as E = 0: log L is straight) or where
    a change of one number looks like a change of others.
    """
    straight = abs(np.corrcoef(n, d)[0, 1]) > COLLINEAR
    at_limit = np.isclose(theta, np.transpose(LIMITS)).any()
    scale = np.linalg.norm(jacobian, axis=0)
    return not straight and not at_limit and bool(scale.all()) and np.linalg.cond(jacobian / scale) < 1e7


# Intervals


def _resampled(fitted: Array, residuals: Array, parameters: int, resamples: int) -> Array:
    """The fit with residuals drawn anew, (resamples, points): as wide as they would be had nothing been fitted to them.

    Beyond that they are widened by Student's t over the normal quantile, for how badly few of them show their spread,
    and smoothed (by Silverman's rule, at the same variance): a fit by Huber's loss runs through some of its points, and
    residuals of exactly nothing, drawn again, make it look surer than it is.
    """
    points, freedom = len(fitted), len(fitted) - parameters
    if not freedom:
        return np.empty((0, points))
    upper = (1 + CONFIDENCE) / 2
    wider = math.sqrt(points / freedom) * _t(freedom) / _normal(upper)
    generator, smooth = np.random.default_rng(0), 1.06 * points**-0.2  # in standard deviations
    drawn = generator.choice(residuals - residuals.mean(), (resamples, points))
    drawn += smooth * residuals.std() * generator.normal(size=drawn.shape)
    return fitted + wider / math.sqrt(1 + smooth**2) * drawn


def _t(freedom: int) -> float:
    """Student's quantile of the interval."""
    require("scipy", "analysis")
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))


def _normal(probability: float) -> float:
    from scipy.stats import norm

    return float(norm.ppf(probability))


def _delta(
    names: tuple[str, ...], logs: tuple[bool, ...], values: Array, covariance: Array, freedom: int
) -> dict[str, Interval]:
    """Intervals of values, given some of them as logarithms."""
    half = _t(freedom) * np.sqrt(np.diag(covariance)) if freedom else np.full(len(names), math.inf)
    return _named(names, logs, values - half, values + half)


def _quantiles(names: tuple[str, ...], logs: tuple[bool, ...], drawn: Array) -> dict[str, Interval]:
    if not len(drawn):
        unknown = np.full(len(names), math.inf)
        return _named(names, logs, -unknown, unknown)
    tail = (1 - CONFIDENCE) / 2
    return _named(names, logs, *np.quantile(drawn, [tail, 1 - tail], axis=0))


def _named(names: tuple[str, ...], logs: tuple[bool, ...], low: Array, high: Array) -> dict[str, Interval]:
    with np.errstate(over="ignore"):
        return {
            name: (float(np.exp(a)), float(np.exp(b))) if log else (float(a), float(b))
            for name, log, a, b in zip(names, logs, low, high, strict=True)
        }


def _band(values: Any, slopes: Array, covariance: Matrix, freedom: int) -> tuple[Any, Any]:
    """Values over and times exp(t standard errors of their logarithm); slopes (..., parameters) of that logarithm."""
    matrix = np.array(covariance)
    if not np.isfinite(matrix).all():
        return np.zeros_like(values), np.full_like(values, math.inf)
    error = np.sqrt(np.maximum(np.einsum("...i,ij,...j->...", slopes, matrix, slopes), 0))
    wider = np.exp(_t(freedom) * error)
    return values / wider, values * wider


def _matrix(array: Array) -> Matrix:
    return tuple(tuple(map(float, row)) for row in array)
