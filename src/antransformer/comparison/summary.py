"""Summary of an experiment in one to four sentences, for the terminal, the report and the model card."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from antransformer.bootstrap import CONFIDENCE
from antransformer.comparison.findings import PairwiseSpeedup, final_difference, significant, variant_differences
from antransformer.comparison.statistics import Speedup
from antransformer.comparison.tuning import tuning_scope
from antransformer.reporting.labels import display_name, format_count, style_of
from antransformer.results.comparison import Results, Run, Trial, Variant, architecture_of
from antransformer.wording import counted

METHOD = "angpt"


def summary(results: Results) -> str:
    """Return the main finding with its interval or test, and the number of diverged runs."""
    return _comparison_summary(results) if results.kind == "compare" else _ablation_summary(results)


def main_variant(results: Results) -> Variant:
    """Return the variant that the summary is about: anGPT, or the last one where anGPT is absent or the baseline."""
    return next((item for item in results.variants[1:] if item.name == METHOD), results.variants[-1])


def compared_with(results: Results, variant: Variant) -> Variant:
    """Return the variant that the summary compares with: one like the baseline, but trained as ``variant``.

    It has the architecture of the baseline and the recipe and optimizer of ``variant``. Without one it is the baseline.
    """
    same = (item for item in results.variants if architecture_of(item) == architecture_of(results.baseline))
    alike = (item for item in same if item is not variant and _training(results, item) == _training(results, variant))
    return next(alike, results.baseline)


def _training(results: Results, variant: Variant) -> tuple[str | None, str | None]:
    """Recipe and optimizer of a variant, None in results of an earlier release."""
    recipe, optimizer = (results.setup.get(key, {}).get(variant.name) for key in ("recipes", "optimizers"))
    return recipe, optimizer


# Comparison


def _comparison_summary(results: Results) -> str:
    variant = main_variant(results)
    baseline = compared_with(results, variant)
    pair = PairwiseSpeedup.measure(results, variant, baseline)
    sentences = [f"{_speedup_clause(results, pair)}.", _loss_sentence(results, pair), _diverged_sentence(results)]
    if _training(results, variant) != _training(results, baseline):
        sentences.append(f"{style_of(variant.name).label} also has another recipe or optimizer.")
    sentences.append(_doubt(results, pair))
    return " ".join(filter(None, sentences))


def _speedup_clause(results: Results, pair: PairwiseSpeedup) -> str:
    name, baseline = style_of(pair.variant.name).label, style_of(pair.baseline.name).label
    size = format_count(pair.variant.parameters)
    scope = f"{format_seeds(results)}, {size} parameters, {tuning_scope(results)}"
    if len(results.budgets) == 1:
        return f"A speedup of {name} over {baseline} cannot be measured with one budget ({scope})"
    if not pair.points:
        return f"A speedup of {name} over {baseline} cannot be measured: runs diverged at every budget ({scope})"
    measured = [point for point in pair.points if 0 < point.ratio < math.inf]
    if not measured:
        return _bounds_clause(pair, scope)
    point = measured[-1]
    unclear = point.low <= 1 <= point.high
    # Bounds at longer budgets follow from a speedup on the same side of 1, unless its interval has both sides.
    others = [
        item
        for item in pair.points
        if item.tokens > point.tokens
        and ((item.ratio > 1) != (point.ratio > 1) or (unclear and _direction(pair, item) != 0))
    ]
    bounds = "".join(f"; {_at_tokens(pair, item)}" for item in others)
    scope = f"({_interval(pair, point)}{format_count(point.tokens)} tokens, {scope}{bounds})"
    if math.isnan(point.low):
        return f"With one seed the speedup of {name} over {baseline} is {point.ratio:.2f}x, without an interval {scope}"
    if unclear:
        return f"{name} shows no significant speedup over {baseline}: {point.ratio:.2f}x {scope}"
    if f"{point.ratio:.2f}" == "1.00":
        return f"{name} needs as many tokens as {baseline} for the same loss {scope}"
    if point.ratio > 1:
        return f"{name} reaches the loss of {baseline} with fewer tokens: the speedup is {point.ratio:.2f}x {scope}"
    return f"{name} needs more tokens than {baseline} for the same loss: the speedup is {point.ratio:.2f}x {scope}"


def _interval(pair: PairwiseSpeedup, point: Speedup) -> str:
    """Return the interval of a speedup in words, to begin a scope with; empty with one seed."""
    if math.isnan(point.low):
        return ""
    ends = (pair.format_ratio(point, end) for end in (point.low, point.high))
    low, high = (end.replace(">", "more than").replace("<", "less than") for end in ends)
    return f"{CONFIDENCE:.0%} interval {low} to {high}; " if low != high else ""


def _at_tokens(pair: PairwiseSpeedup, point: Speedup) -> str:
    return f"{pair.format_ratio(point, point.ratio)} with {format_count(point.tokens)} tokens"


def _bounds_clause(pair: PairwiseSpeedup, scope: str) -> str:
    """Return the speedup of a pair whose ratio is a bound at every budget."""
    name, baseline = style_of(pair.variant.name).label, style_of(pair.baseline.name).label
    first, last = pair.points[0], pair.points[-1]
    ratios = {point.ratio for point in pair.points}
    if ratios == {math.inf} and _direction(pair, first) == 1:
        return (
            f"{name} reaches the loss of {baseline} with fewer tokens: the speedup is more than "
            f"{pair.clamp_to_bound(first, math.inf):.2f}x, since its loss with {format_count(first.tokens)} tokens is "
            f"below that of {baseline} with {format_count(pair.longest)} ({_interval(pair, first)}{scope})"
        )
    if ratios == {0} and _direction(pair, last) == -1:
        return (
            f"{name} needs more tokens than {baseline} for the same loss: the speedup is less than "
            f"{pair.clamp_to_bound(last, 0):.2f}x, since its loss with {format_count(last.tokens)} tokens is above "
            f"that of {baseline} with {format_count(pair.shortest)} ({_interval(pair, last)}{scope})"
        )
    bounds = ", ".join(_at_tokens(pair, point) for point in pair.points)
    return f"A speedup of {name} over {baseline} cannot be measured: it is {bounds} ({scope})"


def _direction(pair: PairwiseSpeedup, point: Speedup) -> int:
    """Return 1 if the interval of a speedup is above 1, -1 if it is below 1, otherwise 0, also with one seed.

    An end that is 0 or infinite is only known to be below or above its bound.
    """
    low, high = point.low, point.high
    if math.isnan(low):
        return 0
    if low > 0 and pair.clamp_to_bound(point, low) >= 1:
        return 1
    return -1 if high < math.inf and pair.clamp_to_bound(point, high) <= 1 else 0


def _loss_sentence(results: Results, pair: PairwiseSpeedup) -> str:
    difference = final_difference(results, pair.variant, pair.baseline)
    start, name = f"With {format_count(results.budgets[-1])} tokens", style_of(pair.variant.name).label
    if math.isnan(difference.mean):
        return f"{start} the losses cannot be compared, since a run diverged."
    if difference.mean == 0:
        return f"{start} the losses are equal."
    distance = f"{abs(difference.mean):.3f} nats {'lower' if difference.mean < 0 else 'higher'}"
    if math.isnan(difference.p):
        return f"{start} the loss of {name} is {distance} ({format_seeds(results)}, too few for a test)."
    if difference.significant:
        return f"{start} the loss of {name} is {distance}, a significant difference ({format_p(difference.p)})."
    return f"{start} the losses do not differ significantly ({name}: {distance}, {format_p(difference.p)})."


def _diverged_sentence(results: Results) -> str:
    counts = [
        f"{style_of(item.name).label} {format_diverged(item.runs)}"
        for item in results.variants
        if count_diverged(item.runs)
    ]
    return f"Diverged runs: {', '.join(counts)}." if counts else ""


def _doubt(results: Results, pair: PairwiseSpeedup) -> str:
    """Return what speaks against the tuning of the two variants compared: best values at an edge, and rising losses."""
    doubts = []
    for item in (pair.baseline, pair.variant):
        label = style_of(item.name).label
        for setting, tokens in dict.fromkeys((trial.setting, trial.tokens) for trial in item.trials):
            if item.best_at_edge(setting, tokens):
                where = f"at {format_count(tokens)} tokens is at the edge of its grid"
                doubts.append(f"{label}'s best {display_name(setting)} {where}")
        means = item.losses(results.budgets, results.seeds).mean(axis=1)
        if any(low < high < math.inf for low, high in pairwise(means)):
            doubts.append(f"{label}'s loss rises with more tokens")
    return f"Not fully tuned: {'; '.join(doubts)}." if doubts else ""


# Ablation


def _ablation_summary(results: Results) -> str:
    baseline, variants = style_of(results.baseline.name).label, results.variants[1:]
    budget, size = format_count(results.budgets[-1]), format_count(results.baseline.parameters)
    scope = f"{format_seeds(results)}, {budget} tokens, {size} parameters, {tuning_scope(results)}"
    if not math.isfinite(results.baseline.losses(results.budgets[-1:], results.seeds).mean()):
        return f"The variants cannot be compared, since the {baseline} diverged ({scope})."
    differences = variant_differences(results)
    means, is_significant = np.array([item.mean for item in differences]), np.array(significant(differences))
    diverged = int(np.isnan(means).sum())
    if all(math.isnan(item.p) for item in differences):
        higher = int((means > 0).sum())
        verb = "has" if higher == 1 else "have"
        counts = f"{higher} {verb} a higher loss than the {baseline}, {(means < 0).sum()} a lower loss"
        test = "no test"
    else:
        worse, better = (int((is_significant & sign).sum()) for sign in (means > 0, means < 0))
        same = len(variants) - diverged - worse - better
        counts = (
            f"{worse} {'is' if worse == 1 else 'are'} significantly worse than the {baseline}, {better} significantly "
            f"better, {same} without a significant difference"
        )
        test = "t-tests with the pooled noise of all variants and Holm's correction"
    sentence = f"Of {counted(len(variants), 'variant')}, {counts}, and {diverged} diverged ({scope}; {test})."
    if diverged == len(variants):
        return sentence
    worst = int(np.nanargmax(means))
    if means[worst] <= 0:
        return sentence
    label = style_of(variants[worst].name).label
    tested = not math.isnan(differences[worst].p)
    note = " (not significant)" if tested and not is_significant[worst] else ""
    return f"{sentence} The largest increase in loss is {means[worst]:+.3f} nats, for {label}{note}."


# Parts of sentences


def format_seeds(results: Results) -> str:
    """Return the number of seeds with its noun, such as 3 seeds."""
    return counted(len(results.seeds), "seed")


def format_p(p: float) -> str:
    """Return a p value with two digits, or with its bound below 0.001; NaN means that there was no test."""
    return "no test" if math.isnan(p) else "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def count_diverged(runs: Sequence[Run] | Sequence[Trial]) -> int:
    """Number of runs or trials that diverged."""
    return sum(not math.isfinite(run.loss) for run in runs)


def format_diverged(runs: Sequence[Run] | Sequence[Trial]) -> str:
    """Return the number of diverged runs and of all runs, such as 1 of 9."""
    return f"{count_diverged(runs)} of {len(runs)}"
