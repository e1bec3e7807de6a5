"""Findings of an experiment: speedups of pairs of variants, differences in the final loss, and their significance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from antransformer.bootstrap import CONFIDENCE
from antransformer.comparison.statistics import (
    Array,
    Difference,
    Speedup,
    holm,
    paired_difference,
    pooled_differences,
    speedups,
)
from antransformer.results.comparison import Results, Variant


def finished_budgets(results: Results, variant: Variant) -> list[int]:
    """Return the budgets at which no run of the variant diverged."""
    losses = variant.losses(results.budgets, results.seeds)
    return [budget for budget, row in zip(results.budgets, losses, strict=True) if np.isfinite(row).all()]


@dataclass(frozen=True)
class PairwiseSpeedup:
    """Speedup of one variant over another.

    Attributes:
        variant: the variant that is measured.
        baseline: the variant that it is compared with; any other variant, not only the baseline of the experiment.
        points: speedup at each budget where no run of ``variant`` diverged; empty where ``baseline`` diverged at all
            budgets.
        shortest: shortest budget with finished runs of ``baseline``.
        longest: longest budget with finished runs of ``baseline``.
    """

    variant: Variant
    baseline: Variant
    points: tuple[Speedup, ...]
    shortest: int
    longest: int

    @classmethod
    def measure(cls, results: Results, variant: Variant, baseline: Variant) -> "PairwiseSpeedup":
        """Compute the speedups at all budgets with their intervals."""
        baseline_budgets, variant_budgets = (finished_budgets(results, item) for item in (baseline, variant))
        if not baseline_budgets:
            return cls(variant, baseline, (), 0, 0)
        baseline_losses, losses = (item.losses(results.budgets, results.seeds) for item in (baseline, variant))
        points = speedups(results.budgets, baseline_losses, losses)
        finished = tuple(point for point in points if point.tokens in variant_budgets)
        return cls(variant, baseline, finished, baseline_budgets[0], baseline_budgets[-1])

    def clamp_to_bound(self, point: Speedup, ratio: float, seconds: bool = False) -> float:
        """Replace a ratio of 0 or infinity by the known bound, and convert it to a ratio of seconds if requested.

        The bound is the budget at the end of the baseline's range over the budget of the point.
        """
        scale = self.baseline.seconds_per_step / self.variant.seconds_per_step if seconds else 1.0
        bounds = {0.0: self.shortest / point.tokens, math.inf: self.longest / point.tokens}
        return float(bounds.get(ratio, ratio) * scale)

    def format_ratio(self, point: Speedup, ratio: float, seconds: bool = False) -> str:
        """Return a ratio as text: 1.70x, or as a bound > 4.00x or < 0.25x."""
        sign = "< " if ratio == 0 else "> " if math.isinf(ratio) else ""
        return f"{sign}{self.clamp_to_bound(point, ratio, seconds):.2f}x"


def final_difference(results: Results, variant: Variant, baseline: Variant | None = None) -> Difference:
    """Difference of a variant from another, by default the baseline, at the largest budget, with the paired t-test."""
    return paired_difference(*(_final_losses(results, item) for item in (baseline or results.baseline, variant)))


def variant_differences(results: Results) -> list[Difference]:
    """Differences of all other variants from the baseline at the largest budget, tested with their pooled noise."""
    baseline, *others = (_final_losses(results, item) for item in results.variants)
    return pooled_differences(baseline, others)


def significant(differences: Sequence[Difference]) -> list[bool]:
    """Whether each difference is significant after Holm's correction for their number."""
    return [p < 1 - CONFIDENCE for p in holm([difference.p for difference in differences])]


def _final_losses(results: Results, variant: Variant) -> Array:
    losses: Array = variant.losses(results.budgets[-1:], results.seeds)[0]
    return losses
