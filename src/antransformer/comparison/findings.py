"""What follows from an experiment's results: speedups of pairs, differences at the end, and which are significant."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from antransformer.bootstrap import CONFIDENCE
from antransformer.comparison.statistics import (
    Difference,
    Speedup,
    holm,
    paired_difference,
    pooled_differences,
    speedups,
)
from antransformer.results.comparison import Results, Variant


def finished_budgets(results: Results, variant: Variant) -> list[int]:
    """Those at which none of its runs diverged."""
    losses = variant.losses(results.budgets, results.seeds)
    return [budget for budget, ended in zip(results.budgets, losses, strict=True) if np.isfinite(ended).all()]


@dataclass(frozen=True)
class PairwiseSpeedup:
    """The speedup of one variant over another.

    Attributes:
        points: at each budget at which no run of ``variant`` diverged; none where ``over`` diverged at all of them.
        shortest, longest: the budgets between which ``over`` has finished runs.
    """

    variant: Variant
    over: Variant
    points: tuple[Speedup, ...]
    shortest: int
    longest: int

    @classmethod
    def of(cls, results: Results, variant: Variant, over: Variant) -> "PairwiseSpeedup":
        """Measure it."""
        there, here = finished_budgets(results, over), finished_budgets(results, variant)
        if not there:
            return cls(variant, over, (), 0, 0)
        theirs, own = (item.losses(results.budgets, results.seeds) for item in (over, variant))
        points = speedups(results.budgets, theirs, own)
        return cls(variant, over, tuple(point for point in points if point.tokens in here), there[0], there[-1])

    def bounded(self, point: Speedup, ratio: float, seconds: bool = False) -> float:
        """A ratio at this point, in tokens or seconds; what could not be measured is set to the bound that is known."""
        scale = self.over.seconds_per_step / self.variant.seconds_per_step if seconds else 1.0
        bounds = {0.0: self.shortest / point.tokens, math.inf: self.longest / point.tokens}
        return float(bounds.get(ratio, ratio) * scale)

    def words(self, point: Speedup, ratio: float, seconds: bool = False) -> str:
        """The same as text: 1.70x, or as a bound > 4.00x or < 0.25x."""
        sign = "< " if ratio == 0 else "> " if math.isinf(ratio) else ""
        return f"{sign}{self.bounded(point, ratio, seconds):.2f}x"


def final_difference(results: Results, variant: Variant) -> Difference:
    """From the baseline, at the largest budget."""
    longest = results.budgets[-1:]
    losses = [item.losses(longest, results.seeds)[0] for item in (results.baseline, variant)]
    return paired_difference(*losses)


def variant_differences(results: Results) -> list[Difference]:
    """Of all but the baseline from it, at the largest budget, judged by the noise of all of them."""
    longest = results.budgets[-1:]
    baseline, *others = (item.losses(longest, results.seeds)[0] for item in results.variants)
    return pooled_differences(baseline, others)


def significant(differences: Sequence[Difference]) -> list[bool]:
    """Which differences are, after Holm's correction for their number."""
    return [p < 1 - CONFIDENCE for p in holm([difference.p for difference in differences])]
