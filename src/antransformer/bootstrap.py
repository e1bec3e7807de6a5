"""Shared by all residual bootstraps: confidence level, number of resamples, and the correction for few residuals."""

import math

from antransformer.extras import require

RESAMPLES = 2000
CONFIDENCE = 0.95
TAILS = ((1 - CONFIDENCE) / 2, 1 - (1 - CONFIDENCE) / 2)


def student_t(degrees_of_freedom: int) -> float:
    """Two-sided Student's t quantile at ``CONFIDENCE``."""
    require("scipy", "analysis")
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, degrees_of_freedom))


def residual_inflation(residuals: int, degrees_of_freedom: int) -> float:
    """Factor by which residuals are multiplied before they are resampled.

    Residuals of a fit are too small on average, since the fit follows the noise: the square root corrects that. A few
    residuals also estimate their own spread badly, which a bootstrap ignores. Student's t over the normal quantile
    widens the interval by what a t interval would add.
    """
    require("scipy", "analysis")
    from scipy.stats import norm

    normal = float(norm.ppf((1 + CONFIDENCE) / 2))
    return math.sqrt(residuals / degrees_of_freedom) * student_t(degrees_of_freedom) / normal
