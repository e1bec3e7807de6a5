"""What an experiment found, in a sentence or two."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from antransformer.bootstrap import CONFIDENCE
from antransformer.comparison.findings import PairwiseSpeedup, final_difference, significant, variant_differences
from antransformer.reporting.labels import format_count, style_of
from antransformer.results.comparison import Results, Variant

METHOD = "angpt"


def summary(results: Results) -> str:
    """What was found, in a sentence or two."""
    return (_comparison_verdict if results.kind == "compare" else _ablation_verdict)(results)


# The verdict of a comparison


def _comparison_verdict(results: Results) -> str:
    ours, theirs = method(results), results.baseline
    budget = results.budgets[-1]
    sentence = (
        f"{_speed_words(results, PairwiseSpeedup.of(results, ours, theirs))}; {_loss_words(results, ours, budget)}."
    )
    return f"{sentence} {_diverged_words(results)}".rstrip()


def method(results: Results) -> Variant:
    """The variant that the verdict is about."""
    return next((item for item in results.variants[1:] if item.name == METHOD), results.variants[-1])


def _speed_words(results: Results, pair: PairwiseSpeedup) -> str:
    ours, theirs = style_of(pair.variant.name).label, style_of(pair.over.name).label
    shared = f"{seeds_in_words(results)}, {format_count(pair.variant.parameters)} parameters"
    if len(results.budgets) == 1:
        return f"One budget shows no speedup of {ours} over {theirs} ({shared})"
    if not pair.points:
        return f"No speedup of {ours} over {theirs} can be given, as runs diverged at every budget ({shared})"
    measured = [point for point in pair.points if 0 < point.ratio < math.inf]
    if not measured:
        return _bound_words(pair, shared)
    point = measured[-1]
    ends = point.low, point.high
    low, high = (pair.words(point, end).replace(">", "more than").replace("<", "less than") for end in ends)
    interval = "" if math.isnan(point.low) else f"{CONFIDENCE:.0%} interval {low} to {high}; "
    scope = f"({interval}{format_count(point.tokens)} tokens, {shared})"
    if point.low <= 1 <= point.high:
        return f"No speedup of {ours} over {theirs} could be shown: {point.ratio:.2f}x {scope}"
    if f"{point.ratio:.2f}" == "1.00":
        return f"{ours} needed as many tokens as {theirs} for the same loss {scope}"
    if point.ratio > 1:
        return f"{ours} reached the loss of {theirs} with {point.ratio:.2f}x fewer tokens {scope}"
    return f"{ours} needed more tokens than {theirs} for the same loss, a speedup of only {point.ratio:.2f}x {scope}"


def _bound_words(pair: PairwiseSpeedup, shared: str) -> str:
    """Where every ratio lies outside of what the budgets can show."""
    ours, theirs = style_of(pair.variant.name).label, style_of(pair.over.name).label
    first, last = pair.points[0], pair.points[-1]
    ahead = (
        f"with {format_count(first.tokens)} tokens its loss is below that of {theirs} with {format_count(pair.longest)}"
    )
    behind = (
        f"with {format_count(last.tokens)} tokens its loss is above that of {theirs} with {format_count(pair.shortest)}"
    )
    if all(math.isinf(point.ratio) for point in pair.points):
        limit = pair.bounded(first, math.inf)
        return f"{ours} reached the loss of {theirs} with more than {limit:.2f}x fewer tokens: {ahead} ({shared})"
    if all(point.ratio == 0 for point in pair.points):
        limit = pair.bounded(last, 0)
        return f"{ours} needed more tokens than {theirs}, a speedup of less than {limit:.2f}x: {behind} ({shared})"
    each = ", ".join(
        f"{pair.words(point, point.ratio)} with {format_count(point.tokens)} tokens" for point in pair.points
    )
    return f"The speedup of {ours} over {theirs} has bounds only: {each} ({shared})"


def _loss_words(results: Results, ours: Variant, budget: int) -> str:
    difference = final_difference(results, ours)
    with_tokens, label = f"with {format_count(budget)} tokens", style_of(ours.name).label
    if math.isnan(difference.mean):
        return f"{with_tokens} the losses can not be compared, as a run diverged"
    if difference.mean == 0:
        return f"{with_tokens} the losses are the same"
    distance = f"{abs(difference.mean):.3f} nats {'lower' if difference.mean < 0 else 'higher'}"
    if math.isnan(difference.p):
        return f"{with_tokens} the loss of {label} is {distance} (one seed: neither interval nor test)"
    if difference.significant:
        return f"{with_tokens} the loss of {label} is {distance}, a significant difference ({p_in_words(difference.p)})"
    return f"{with_tokens} no difference of the losses could be shown ({label} {distance}, {p_in_words(difference.p)})"


def _diverged_words(results: Results) -> str:
    found = [
        f"{style_of(item.name).label} {diverged_in_words(item.runs)}"
        for item in results.variants
        if count_diverged(item.runs)
    ]
    return f"Diverged runs: {', '.join(found)}." if found else ""


# The verdict of an ablation


def _ablation_verdict(results: Results) -> str:
    baseline, variants = style_of(results.baseline.name).label, results.variants[1:]
    budget, size = format_count(results.budgets[-1]), format_count(results.baseline.parameters)
    scope = f"{seeds_in_words(results)}, {budget} tokens, {size} parameters"
    differences = variant_differences(results)
    means, known = np.array([difference.mean for difference in differences]), np.array(significant(differences))
    if not math.isfinite(results.baseline.losses(results.budgets[-1:], results.seeds).mean()):
        return f"The {baseline} diverged, so nothing can be said of the variants ({scope})."
    lost = int(np.isnan(means).sum())
    if len(results.seeds) == 1:
        found = f"{(means > 0).sum()} have a higher loss than the {baseline} and {(means < 0).sum()} a lower one"
        test = "no test"
    else:
        worse, better = int((known & (means > 0)).sum()), int((known & (means < 0)).sum())
        same = len(variants) - lost - worse - better
        found = f"{worse} are significantly worse than the {baseline}, {better} better, {same} can not be told from it"
        test = "t-tests with the noise of all variants together and Holm's correction"
    sentence = f"Of {len(variants)} variants {found}, {lost} diverged ({scope}; {test})."
    if lost == len(variants):
        return sentence
    worst = int(np.nanargmax(means))
    label = style_of(variants[worst].name).label
    return f"{sentence} The worst that did not diverge is {label}, {means[worst]:+.3f} nats."


def seeds_in_words(results: Results) -> str:
    """How many."""
    return f"{len(results.seeds)} seed{'s' if len(results.seeds) > 1 else ''}"


def p_in_words(p: float) -> str:
    """A p value; a NaN is no test."""
    return "no test" if math.isnan(p) else "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def count_diverged(runs: Sequence[Any]) -> int:
    """How many of these runs or trials diverged."""
    return sum(not math.isfinite(run.loss) for run in runs)


def diverged_in_words(runs: Sequence[Any]) -> str:
    """Diverged runs of all."""
    return f"{count_diverged(runs)} of {len(runs)}"
