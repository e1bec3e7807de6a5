"""95% intervals of fitted coefficients, by the delta method and by a bootstrap of the residuals.

If the logarithm of a coefficient was fitted, the interval is the exponential of one for that logarithm: it is never
negative. If the data do not determine a coefficient, its interval is infinite. Needs the extra ``analysis`` (scipy).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from antransformer.bootstrap import TAILS, residual_inflation, student_t

Array = NDArray[np.float64]
Interval = tuple[float, float]
Matrix = tuple[tuple[float, ...], ...]


def delta_intervals(
    estimates: Array, covariance: Array, degrees_of_freedom: int, logs: Mapping[str, bool]
) -> dict[str, Interval]:
    """Intervals of the delta method: estimate plus or minus t standard errors.

    Args:
        estimates: fitted values, in the order of ``logs``, as logarithms where it is true.
        covariance: of ``estimates``.
        degrees_of_freedom: number of points minus number of coefficients; 0 gives infinite intervals.
        logs: for each coefficient's name, whether its logarithm was fitted.
    """
    if not degrees_of_freedom:
        return _unknown(logs)
    margin = student_t(degrees_of_freedom) * np.sqrt(np.diag(covariance))
    return _by_name(estimates - margin, estimates + margin, logs)


def bootstrap_intervals(refitted: Array, logs: Mapping[str, bool]) -> dict[str, Interval]:
    """Quantiles of the estimates (resamples, coefficients) that were refitted to bootstrap samples.

    Without samples the intervals are infinite. ``logs`` is as in ``delta_intervals``.
    """
    if not len(refitted):
        return _unknown(logs)
    low, high = np.quantile(refitted, TAILS, axis=0)
    return _by_name(low, high, logs)


def bootstrap_samples(fitted: Array, residuals: Array, coefficients: int, resamples: int) -> Array:
    """Values to refit, (resamples, points): the fitted values plus residuals drawn with replacement.

    The residuals are corrected three times, because a plain bootstrap of so few points gives intervals that are too
    narrow. Without degrees of freedom there are no samples.
    """
    points, degrees_of_freedom = len(fitted), len(fitted) - coefficients
    if not degrees_of_freedom:
        return np.empty((0, points))
    scale = residual_inflation(points, degrees_of_freedom)
    # A Huber fit passes exactly through some points. Drawing their zero residuals again and again makes the fit look
    # more certain than it is, so smooth by Silverman's rule, in standard deviations, at the same total variance.
    bandwidth = 1.06 * points**-0.2
    generator = np.random.default_rng(0)
    drawn = generator.choice(residuals - residuals.mean(), (resamples, points))
    drawn += bandwidth * residuals.std() * generator.normal(size=drawn.shape)
    return fitted + scale / math.sqrt(1 + bandwidth**2) * drawn


def relative_band(values: Any, slopes: Array, covariance: Matrix, degrees_of_freedom: int) -> tuple[Any, Any]:
    """95% band of positive values by the delta method: values divided and multiplied by exp(t standard errors).

    Args:
        values: predictions, of any shape.
        slopes: derivatives (..., coefficients) of the logarithm of the values with respect to the coefficients.
        covariance: of the coefficients; if any entry is infinite, the band is 0 to infinity.
        degrees_of_freedom: number of points minus number of coefficients.
    """
    matrix = np.array(covariance)
    if not np.isfinite(matrix).all():
        return np.zeros_like(values), np.full_like(values, math.inf)
    variance = np.einsum("...i,ij,...j->...", slopes, matrix, slopes)
    factor = np.exp(student_t(degrees_of_freedom) * np.sqrt(np.maximum(variance, 0)))  # rounding can give -1e-20
    return values / factor, values * factor


def as_matrix(array: Array) -> Matrix:
    """Nested tuples of floats, which a frozen dataclass can compare and JSON can hold."""
    return tuple(tuple(map(float, row)) for row in array)


def _unknown(logs: Mapping[str, bool]) -> dict[str, Interval]:
    infinite = np.full(len(logs), math.inf)
    return _by_name(-infinite, infinite, logs)


def _by_name(low: Array, high: Array, logs: Mapping[str, bool]) -> dict[str, Interval]:
    with np.errstate(over="ignore"):
        return {
            name: (float(np.exp(start)), float(np.exp(end))) if log else (float(start), float(end))
            for (name, log), start, end in zip(logs.items(), low, high, strict=True)
        }
