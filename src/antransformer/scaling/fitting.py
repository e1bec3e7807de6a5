"""Scaling laws as pure functions of arrays: best settings, power laws, the compute frontier and L(N, D).

Every law has 95% intervals by the delta method and by a bootstrap; ``scaling.intervals`` has both. Needs the extra
``analysis`` (scipy, threadpoolctl).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from antransformer.bootstrap import student_t
from antransformer.extras import require
from antransformer.scaling.intervals import (
    Array,
    Interval,
    Matrix,
    as_matrix,
    bootstrap_intervals,
    bootstrap_samples,
    delta_intervals,
    relative_band,
)

FLOPS_PER_PARAMETER = 6  # per token, forward and backward: C = 6 N D
RESAMPLES = 2000  # of a power law, which has a closed-form solution
SURFACE_RESAMPLES = 200  # of L(N, D), which is refitted by search
BINS_PER_DECADE = 4
HUBER = 1e-3  # residual at which the loss becomes linear; arXiv:2203.15556, appendix D.3
EXPONENTS = np.linspace(0.05, 1.2, 24)  # grid of alpha and of beta from which the search for L(N, D) starts
STARTS = 4  # number of grid points, the best ones, from which the search is run to convergence
BOUNDS = ((-12.0, 12.0),) * 3 + ((0.005, 3.0),) * 2  # three log terms and two exponents; wider than any plausible law
COLLINEAR = 0.99  # correlation of log N and log D above which the intervals were seen to miss the truth
MAX_CONDITION = 1e7  # of the scaled Jacobian
POWER_LAW_LOGS = {"coefficient": True, "exponent": False}
SURFACE_LOGS = {"E": False, "A": True, "B": True, "alpha": False, "beta": False}


@dataclass(frozen=True)
class Optimum:
    """Best learning rate and batch for one model size and number of tokens.

    Attributes:
        batch, lr, loss: at the lowest point of the interpolation.
        batch_bracketed, lr_bracketed: whether both a smaller and a larger value were tried and gave a higher loss. If
            not, the true optimum may be outside the range that was tried.
        batches: number of batch sizes that were compared.
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
        r2: fraction of the variance of log y that the law explains; NaN if all y are equal.
        points: number of points in the fit. With two points the intervals are infinite.
        span: smallest and largest x.
        covariance: covariance of (log coefficient, exponent).
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
        """Ends of the 95% band of the law at x, by the delta method; new observations scatter more widely."""
        slopes = np.stack([np.ones_like(x), np.log(x)], -1)
        return relative_band(self(x), slopes, self.covariance, self.points - 2)


@dataclass(frozen=True)
class Horizon:
    """Dependence of the best learning rate on the length of the run at a fixed size: lr ~ steps ** -exponent.

    Attributes:
        exponent: one exponent for all sizes.
        interval: its 95% interval; infinite without degrees of freedom.
        tokens_per_parameter: geometric mean over the runs; the law of the best learning rate over N holds there.
        points: number of best learning rates in the fit.
        span: fewest and most steps.
    """

    exponent: float
    interval: Interval
    tokens_per_parameter: float
    points: int
    span: Interval


@dataclass(frozen=True)
class Frontier:
    """Runs with the lowest loss for their compute, one for each bin, by ascending compute and falling loss.

    Attributes:
        compute, parameters, tokens, losses: values of these runs.
        bracketed: whether the bin also holds a smaller and a larger model, both with a higher loss.
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
        points: number of runs in the fit.
        error: standard deviation of log L around the fit.
        sizes, tokens: smallest and largest N, and smallest and largest D.
        covariance: covariance of (E, log A, log B, alpha, beta).
        delta, bootstrap: 95% intervals of the five coefficients.
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
        """Loss at N ``parameters`` and D ``tokens``."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def band(self, parameters: Any, tokens: Any) -> tuple[Any, Any]:
        """Ends of the 95% band of the law at (N, D), by the delta method; new runs scatter more widely."""
        loss, size, data = self(parameters, tokens), self.A / parameters**self.alpha, self.B / tokens**self.beta
        slopes = [np.ones_like(loss), size, data, -size * np.log(parameters), -data * np.log(tokens)]
        return relative_band(loss, np.stack([slope / loss for slope in slopes], -1), self.covariance, self.points - 5)

    def best_size(self, compute: Any) -> Any:
        """Number of parameters with the lowest loss for C = 6 N D (arXiv:2203.15556, equation 4)."""
        exponents = self.alpha + self.beta
        factor = (self.alpha * self.A / (self.beta * self.B)) ** (1 / exponents)
        return factor * (compute / FLOPS_PER_PARAMETER) ** (self.beta / exponents)


# Best learning rate and batch


def optimum(batches: Array, lrs: Array, losses: Array) -> Optimum | None:
    """Best batch and learning rate, by two stages of Akima interpolation (arXiv:2406.19146).

    Stage one minimizes the loss over log learning rate for each batch; stage two minimizes these minima over log batch.

    Args:
        batches, lrs, losses: one entry for each run. Repeated settings are averaged; a diverged run has infinite loss.

    Returns:
        The optimum, or None if all runs diverged.
    """
    minima = []
    for batch in np.unique(batches):
        rates, means = mean_losses(batches, lrs, losses, batch)
        if np.isfinite(means).any():
            minima.append((math.log(batch), *_interpolated_minimum(np.log(rates), means)))
    if not minima:
        return None
    # A batch whose best rate is at an edge has an unknown minimum, so it is used only if no batch has a known one.
    used = [minimum for minimum in minima if minimum[3]] or minima
    log_batches, log_rates, lowest, bracketed = (np.array(column) for column in zip(*used, strict=True))
    log_batch, loss, batch_bracketed = _interpolated_minimum(log_batches, lowest)
    log_rate = akima(log_batches, log_rates)(log_batch) if len(used) > 1 else log_rates[0]
    return Optimum(math.exp(log_batch), math.exp(log_rate), loss, batch_bracketed, bool(bracketed.all()), len(minima))


def mean_losses(batches: Array, lrs: Array, losses: Array, batch: float) -> tuple[Array, Array]:
    """Learning rates tried with one batch, ascending, and the mean loss of each."""
    with_batch = batches == batch
    rates = np.unique(lrs[with_batch])
    return rates, np.array([losses[with_batch & (lrs == rate)].mean() for rate in rates])


def akima(x: Array, y: Array) -> Any:
    """Akima interpolation through the points with finite y, of which two are needed."""
    finite = np.isfinite(y)
    return require("scipy.interpolate", "analysis").Akima1DInterpolator(x[finite], y[finite])


def _interpolated_minimum(x: Array, y: Array) -> tuple[float, float, bool]:
    """Position and value of the minimum of the interpolation, and whether points on both sides are higher."""
    finite = np.isfinite(y)
    lowest = int(np.argmin(y))
    bracketed = 0 < lowest < len(y) - 1  # a diverged run counts as higher
    if finite.sum() < 3:
        return float(x[lowest]), float(y[lowest]), bracketed
    curve = akima(x, y)
    extrema = curve.derivative().roots(extrapolate=False)
    candidates = np.concatenate([x[finite], extrema[np.isfinite(extrema)]])
    position = candidates[np.argmin(curve(candidates))]
    return float(position), float(curve(position)), bracketed


# Power laws


MIN_LENGTH_RATIO = 1.2  # closer lengths change the best rate by about a tenth or less, at exponents of 0.4 to 0.6


def horizon(parameters: Array, tokens: Array, batches: Array, lrs: Array) -> Horizon | None:
    """Least-squares fit of log lr over log steps, with one exponent and a coefficient for each size.

    Args:
        parameters, tokens, batches, lrs: one entry for each best learning rate.

    Returns:
        The law, or None if no size has two lengths that differ by more than a factor of 1.2.
    """
    steps, sizes = tokens / batches, np.unique(parameters)
    u, v = _centered(np.log(steps), parameters), _centered(np.log(lrs), parameters)
    if np.ptp(u) < math.log(MIN_LENGTH_RATIO):
        return None
    variation = float(u @ u)
    slope = float(u @ v) / variation
    degrees_of_freedom = len(u) - len(sizes) - 1
    margin = math.inf
    if degrees_of_freedom > 0:
        residuals = v - slope * u
        margin = student_t(degrees_of_freedom) * math.sqrt(residuals @ residuals / degrees_of_freedom / variation)
    return Horizon(
        exponent=-slope,
        interval=(-slope - margin, -slope + margin),
        tokens_per_parameter=float(np.exp(np.log(tokens / parameters).mean())),
        points=len(u),
        span=(float(steps.min()), float(steps.max())),
    )


def _centered(values: Array, groups: Array) -> Array:
    """Values minus the mean of their group."""
    means = {group: values[groups == group].mean() for group in np.unique(groups)}
    centered: Array = values - np.array([means[group] for group in groups])
    return centered


def power_law(x: Array, y: Array) -> PowerLaw:
    """Least-squares fit of log y over log x, which needs two different x."""
    u, v = np.log(x), np.log(y)
    # Not scipy's linregress: it takes the standard error from 1 - r2, which loses all digits of a nearly exact law.
    (exponent, log_coefficient), inverse = np.polyfit(u, v, 1, cov="unscaled")
    fitted = log_coefficient + exponent * u
    residuals, degrees_of_freedom = v - fitted, len(u) - 2
    covariance = np.full((2, 2), math.inf)
    if degrees_of_freedom:
        covariance = inverse[::-1, ::-1] * (residuals @ residuals / degrees_of_freedom)
    refitted = np.polyfit(u, bootstrap_samples(fitted, residuals, 2, RESAMPLES).T, 1)[::-1].T
    spread = ((v - v.mean()) ** 2).sum()
    return PowerLaw(
        coefficient=math.exp(log_coefficient),
        exponent=float(exponent),
        r2=float(1 - residuals @ residuals / spread) if spread > 1e-20 else math.nan,
        points=len(u),
        span=(float(x.min()), float(x.max())),
        covariance=as_matrix(covariance),
        delta=delta_intervals(np.array([log_coefficient, exponent]), covariance, degrees_of_freedom, POWER_LAW_LOGS),
        bootstrap=bootstrap_intervals(refitted, POWER_LAW_LOGS),
    )


# The compute frontier


def frontier(parameters: Array, tokens: Array, losses: Array, bins: int | None = None) -> Frontier:
    """Lowest loss in each logarithmic bin of compute 6 N D (arXiv:2203.15556, approach 1).

    A bin is left out if a cheaper bin has a loss as low.

    Args:
        parameters, tokens, losses: finite values, one for each run.
        bins: number of bins (default: four per decade).
    """
    compute = FLOPS_PER_PARAMETER * parameters * tokens
    low, high = np.log10(compute.min()), np.log10(compute.max())
    bins = bins or max(1, round((high - low) * BINS_PER_DECADE))
    bin_of_run = np.minimum(((np.log10(compute) - low) / max(high - low, 1e-9) * bins).astype(int), bins - 1)
    kept: list[int] = []
    bracketed = []
    for index in np.unique(bin_of_run):
        (inside,) = np.nonzero(bin_of_run == index)
        best = inside[np.argmin(losses[inside])]
        if not kept or losses[best] < losses[kept[-1]]:
            kept.append(int(best))
            sizes = parameters[inside]
            bracketed.append(bool(sizes.min() < parameters[best] < sizes.max()))
    return Frontier(compute[kept], parameters[kept], tokens[kept], losses[kept], np.array(bracketed, bool))


# Loss as a function of parameters and tokens


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Limit BLAS to one thread, also as a decorator.

    Products in a search with five variables are too small for more. Next to a busy process, threads that wait for each
    other made the search six times as slow.
    """
    require("scipy.optimize", "analysis")  # the limit holds for libraries that are loaded
    with require("threadpoolctl", "analysis").threadpool_limits(1, user_api="blas"):
        yield


@_one_blas_thread()
def surface(parameters: Array, tokens: Array, losses: Array, resamples: int = SURFACE_RESAMPLES) -> Surface:
    """Fit E + A / N^alpha + B / D^beta by the Huber loss of log L (arXiv:2203.15556, approach 3).

    The Huber loss is summed, not averaged, and minimized to convergence: stopping early biases the fit
    (arXiv:2404.10102). The delta method assumes normal residuals with the observed standard deviation.

    Args:
        parameters, tokens, losses: finite values, one for each run, of which six are needed.
        resamples: number of bootstrap samples; 0 skips the bootstrap, whose intervals are then infinite.

    Returns:
        The fitted law. Where the runs do not determine its coefficients, all intervals are infinite.
    """
    n, d, y = np.log(parameters), np.log(tokens), np.log(losses)
    # Centered, the exponents hardly depend on A and B, so the search converges fast and the Jacobian is well scaled.
    centers = n.mean(), d.mean()
    n, d = n - centers[0], d - centers[1]
    theta = min((_minimize_huber(start, n, d, y) for start in _starts(n, d, losses)), key=lambda end: end[1])[0]
    fitted, jacobian = _log_loss(theta, n, d)
    residuals, degrees_of_freedom = y - fitted, len(y) - 5
    error = math.sqrt(residuals @ residuals / degrees_of_freedom)
    E, log_a, log_b, alpha, beta = coefficients = _uncentered(theta, *centers)
    covariance = np.full((5, 5), math.inf)
    refitted: list[Array] = []
    if _identifiable(theta, jacobian, n, d):
        # Derivatives of the coefficients with respect to theta carry its covariance over.
        to_coefficients = np.eye(5)
        to_coefficients[0, 0], to_coefficients[1, 3], to_coefficients[2, 4] = E, *centers
        solve = to_coefficients @ np.linalg.pinv(jacobian)
        covariance = solve @ solve.T * _huber_variance(error)
        samples = bootstrap_samples(fitted, residuals, 5, resamples)
        refitted = [_uncentered(_minimize_huber(theta, n, d, sample)[0], *centers) for sample in samples]
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
        covariance=as_matrix(covariance),
        delta=delta_intervals(coefficients, covariance, degrees_of_freedom, SURFACE_LOGS),
        bootstrap=bootstrap_intervals(np.array(refitted).reshape(-1, 5), SURFACE_LOGS),
    )


def _log_loss(theta: Array, n: Array, d: Array) -> tuple[Array, Array]:
    """log L and its derivatives (runs, 5) at theta = (log E, log size term, log data term, alpha, beta).

    The two terms are those at the center, where n = d = 0.
    """
    terms = np.exp([np.full_like(n, theta[0]), theta[1] - theta[3] * n, theta[2] - theta[4] * d])
    total = terms.sum(0)
    shares = terms / total
    return np.log(total), np.stack([*shares, -shares[1] * n, -shares[2] * d], -1)


def _starts(n: Array, d: Array, losses: Array) -> Array:
    """The best theta of a grid of exponents, (STARTS, 5), with E and both terms by linear least squares."""
    alpha, beta = (grid.ravel() for grid in np.meshgrid(EXPONENTS, EXPONENTS))
    columns = np.stack([np.ones((len(alpha), len(n))), np.exp(-alpha[:, None] * n), np.exp(-beta[:, None] * d)], -1)
    weighted = columns / losses[:, None]  # relative errors, which the Huber loss of log L sees
    square = np.einsum("gri,grj->gij", weighted, weighted) + 1e-9 * np.eye(3)  # tokens may follow size: singular
    terms = np.linalg.solve(square, weighted.sum(1)[..., None])[..., 0]
    terms = np.maximum(terms, 1e-3 * losses.min())  # the logarithm needs positive terms
    residuals = np.log(losses) - np.log((columns @ terms[..., None])[..., 0])
    best = np.argsort(np.abs(residuals).sum(1))[:STARTS]
    return np.column_stack([np.log(terms[best]), alpha[best], beta[best]])


def _minimize_huber(start: Array, n: Array, d: Array, y: Array) -> tuple[Array, float]:
    """Theta at the end of a search from ``start``, and the summed Huber loss there divided by HUBER squared.

    Uses L-BFGS-B and not ``least_squares(loss="huber")``. Both find the same minimum inside the bounds. The latter
    stays strictly inside them: for data without E it stops before the bound, where ``_identifiable`` misses it.
    """

    def objective(theta: Array) -> tuple[float, Array]:
        fitted, jacobian = _log_loss(theta, n, d)
        scaled = (fitted - y) / HUBER
        clipped = np.clip(scaled, -1, 1)
        return float((clipped * (scaled - clipped / 2)).sum()), clipped @ jacobian / HUBER

    options = {"maxiter": 2000, "ftol": 1e-12}
    minimize = require("scipy.optimize", "analysis").minimize
    end = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=BOUNDS, options=options)
    return end.x, float(end.fun)


def _uncentered(theta: Array, n_center: float, d_center: float) -> Array:
    """(E, log A, log B, alpha, beta) of a theta that holds at these centers of log N and log D."""
    log_e, size, data, alpha, beta = theta
    return np.array([math.exp(log_e), size + alpha * n_center, data + beta * d_center, alpha, beta])


def _huber_variance(error: float) -> float:
    """Asymptotic variance of the Huber estimate of a mean of normal values, times their number.

    It is E[psi^2] / E[psi']^2 for the clipped residual psi. As HUBER / error falls it tends to pi / 2 of the variance
    of least squares, which is the price of ignoring outliers.
    """
    if not error:
        return 0.0
    norm = require("scipy.stats", "analysis").norm
    k = HUBER / error
    inside = 1 - 2 * norm.sf(k)
    return float(error**2 * (inside - 2 * k * norm.pdf(k) + 2 * k**2 * norm.sf(k)) / inside**2)


def _identifiable(theta: Array, jacobian: Array, n: Array, d: Array) -> bool:
    """Whether the runs determine all five coefficients, so that intervals mean something.

    They do not if tokens grow with size, if the search ended at a bound (such as E = 0), or if changing one coefficient
    has the same effect as changing others.
    """
    collinear = abs(np.corrcoef(n, d)[0, 1]) > COLLINEAR
    at_bound = np.isclose(theta, np.transpose(BOUNDS)).any()
    scale = np.linalg.norm(jacobian, axis=0)
    return not collinear and not at_bound and bool(scale.all()) and np.linalg.cond(jacobian / scale) < MAX_CONDITION
