"""The report of an experiment: what stands on its page."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from antransformer.bootstrap import CONFIDENCE
from antransformer.comparison import charts
from antransformer.comparison.charts import Lines
from antransformer.comparison.findings import PairwiseSpeedup, final_difference, significant, variant_differences
from antransformer.comparison.statistics import Difference, holm, sensitivity
from antransformer.comparison.summary import METHOD, diverged_in_words, method, p_in_words, seeds_in_words, summary
from antransformer.reporting.html import Section, method_section, save, table
from antransformer.reporting.labels import display_name, format_count, format_value, style_of
from antransformer.results.comparison import Results, Variant
from antransformer.training.metrics import read_lines

PROBES = {"tokens", "residual_norm", "row_norm", "alpha", "moment_variance"}


def write(results: Results, folder: Path) -> list[Path]:
    """Write ``report.html`` and its charts as PNG into the experiment's folder.

    Args:
        results: what was measured.
        folder: the experiment's; curves and norms are read from the run folders in its ``runs``.

    Returns:
        The files written, the page first.

    Raises:
        MissingExtraError: matplotlib or scipy is not installed.
    """
    sections = _comparison(results, folder) if results.kind == "compare" else _ablation(results)
    names = ", ".join(style_of(item.name).label for item in results.variants)
    title = f"Comparison: {names}" if results.kind == "compare" else f"Ablation of {style_of(METHOD).label}"
    return save(folder, title, summary(results), _facts(results), sections)


# The page of a comparison


def _comparison(results: Results, folder: Path) -> list[Section]:
    return [
        Section("Loss", "", [charts.loss_by_tokens(results), charts.loss_by_seconds(results)]),
        _speedup_section(results),
        _search_section(results),
        _curve_section(results, folder),
        _inside_section(results, folder),
        Section("All numbers", _all_numbers(results)),
        method_section(results.setup, _rules(results)),
    ]


def _speedup_section(results: Results) -> Section:
    pairs = {
        over.name: [PairwiseSpeedup.of(results, item, over) for item in results.variants if item is not over]
        for over in results.variants
    }
    baseline, *others = results.variants
    above = (
        f"<p>How many times the tokens, or the seconds, of a variant {_label(baseline)} needs for the same loss. "
        "Between finished runs the loss is interpolated; beyond the shortest and the longest nothing is guessed, so "
        "some ratios are bounds only.</p>"
    )
    below = "".join(
        f"<details><summary>Over {_label(over)}</summary>{_speedup_tables(results, pairs[over.name])}</details>"
        for over in others
    )
    drawn = [charts.speedup(pairs[baseline.name], results.budgets, seconds) for seconds in (False, True)]
    return Section("Speedup", above, drawn, _speedup_tables(results, pairs[baseline.name]) + below)


def _speedup_tables(results: Results, pairs: Sequence[PairwiseSpeedup]) -> str:
    tables = "".join(_speedup_table(results, pairs, seconds) for seconds in (False, True))
    return f'<div class="tables">{tables}</div>'


def _speedup_table(results: Results, pairs: Sequence[PairwiseSpeedup], seconds: bool) -> str:
    def cell(pair: PairwiseSpeedup, budget: int) -> str:
        point = next((point for point in pair.points if point.tokens == budget), None)
        if point is None:
            return "diverged"
        ratio, low, high = (pair.words(point, value, seconds) for value in (point.ratio, point.low, point.high))
        return ratio if math.isnan(point.low) or low == ratio == high else f"{ratio}\n{low} to {high}"

    unit = "seconds" if seconds else "tokens"
    over = style_of(pairs[0].over.name).label
    return table(
        f"Speedup over {over} in {unit}, with {CONFIDENCE:.0%} intervals",
        [f"in {unit}", *(f"at {format_count(budget)}" for budget in results.budgets)],
        [[style_of(pair.variant.name).label, *(cell(pair, budget) for budget in results.budgets)] for pair in pairs],
    )


def _search_section(results: Results) -> Section:
    settings = list(dict.fromkeys(trial.setting for item in results.variants for trial in item.trials))
    if not settings:
        return Section("Search for settings", "<p>No setting was searched: each variant has its defaults.</p>")
    above = (
        "<p>What it costs to miss the best setting says how hard a variant is to tune: the loss lost where it is 3 "
        "times too small or too large, read off the curve through the trials.</p>"
    )
    rows = [row for setting in settings for item in results.variants if (row := _sensitivity_row(item, setting))]
    head = ["variant", "setting", "trials", "best", "3x too small", "3x too large"]
    lost = table("Loss lost at a wrong setting", head, rows, text_columns=["setting"])
    return Section("Search for settings", above, [charts.search(results, setting) for setting in settings], lost)


def _sensitivity_row(variant: Variant, setting: str) -> list[str]:
    trials = charts.trials_of(variant, setting)
    if not trials:
        return []
    best = min(trials, key=lambda trial: trial.loss)
    lost = sensitivity([trial.value for trial in trials], [trial.loss for trial in trials])
    cells = ["not tried" if math.isnan(loss) else "diverged" if math.isinf(loss) else f"{loss:+.3f}" for loss in lost]
    edge = " (at the edge)" if best.value in (trials[0].value, trials[-1].value) else ""
    shown = f"{best.value:g}{edge}" if math.isfinite(best.loss) else "all diverged"
    return [style_of(variant.name).label, display_name(setting), str(len(trials)), shown, *cells]


def _curve_section(results: Results, folder: Path) -> Section:
    logs, missing = _logs(results, folder, "metrics.jsonl", {"tokens", "loss"})
    return Section("Training curves", missing, [charts.training_curves(results, logs)] if logs else [])


def _inside_section(results: Results, folder: Path) -> Section:
    logs, missing = _logs(results, folder, "probes.jsonl", PROBES)
    if not logs:
        return Section("Inside the models", missing)
    above = (
        f"<p>Measured during the run of {format_count(results.budgets[-1])} tokens with the first seed, on a few "
        f"sequences that are not trained on.</p>{missing}"
    )
    stepping = [item for item in results.variants if item.name in logs and logs[item.name][-1]["alpha"]]
    drawn = [
        draw(results, logs)
        for draw in (charts.residual_by_layer, charts.residual_by_time, charts.row_norms, charts.moment_variance)
    ]
    return Section("Inside the models", above, drawn + [charts.alphas(item, logs[item.name]) for item in stepping])


def _logs(results: Results, folder: Path, name: str, keys: set[str]) -> tuple[dict[str, Lines], str]:
    """Lines of each variant's longest run with the first seed, and a sentence on those that have none.

    Lines without one of the keys, of another release, are left out.
    """
    longest = {
        item.name: next(run for run in item.runs if (run.tokens, run.seed) == (results.budgets[-1], results.seeds[0]))
        for item in results.variants
    }
    logs = {
        variant: [line for line in read_lines(folder / "runs" / run.folder / name) if keys <= line.keys()]
        for variant, run in longest.items()
    }
    empty = ", ".join(style_of(variant).label for variant, lines in logs.items() if not lines)
    missing = (
        f'<p class="note">Left out, as there is no {name} in the run folder: {escape(empty)}.</p>' if empty else ""
    )
    return {variant: lines for variant, lines in logs.items() if lines}, missing


def _all_numbers(results: Results) -> str:
    longest = results.budgets[-1]
    head = [
        "variant",
        "parameters",
        *(f"loss at {format_count(budget)}" for budget in results.budgets),
        f"difference at {format_count(longest)}",
        "bits/byte",
        "s/step",
        "diverged",
        "settings",
    ]
    rows = []
    for variant in results.variants:
        difference = final_difference(results, variant)
        compared = f"{_with_interval(difference)}\n{p_in_words(difference.p)}"
        rows.append(
            [
                style_of(variant.name).label,
                f"{variant.parameters:,}",
                *(_mean_loss(variant, budget, results.seeds) for budget in results.budgets),
                "baseline" if variant is results.baseline else compared,
                _bits(variant, longest),
                f"{variant.seconds_per_step:.4g}" if math.isfinite(variant.seconds_per_step) else "diverged",
                diverged_in_words(variant.runs),
                "\n".join(f"{display_name(key)} {format_value(value)}" for key, value in _own_settings(variant)),
            ]
        )
    note = (
        "<p>Validation loss in nats per token, mean ± standard deviation over seeds. Differences are paired over "
        f"seeds, with {CONFIDENCE:.0%} intervals and p values of the paired t-test.</p>"
    )
    return note + table("Results of every variant", head, rows, text_columns=["settings"])


# The page of an ablation


def _ablation(results: Results) -> list[Section]:
    differences = variant_differences(results)
    known = significant(differences)
    note = (
        "<p>Differences in validation loss are paired over seeds: the same data in the same order. The p values are "
        "those of t-tests with the noise of all variants together, corrected over the rows by Holm's method; the "
        "intervals are not corrected.</p>"
    )
    return [
        Section("Differences", note, [charts.forest(results, differences, known)]),
        Section("All numbers", _ablation_table(results, differences, known)),
        method_section(results.setup, _rules(results)),
    ]


def _own_settings(variant: Variant) -> list[tuple[str, Any]]:
    """Without the architecture, which is its name already."""
    return [(key, value) for key, value in variant.settings.items() if key != "architecture"]


def _ablation_table(results: Results, differences: Sequence[Difference], significant: Sequence[bool]) -> str:
    longest, default = results.budgets[-1], results.baseline.settings
    rows = [[style_of(results.baseline.name).label, _mean_loss(results.baseline, longest, results.seeds), *[""] * 4]]
    corrected = holm([difference.p for difference in differences])
    for variant, difference, p, known in zip(results.variants[1:], differences, corrected, significant, strict=True):
        outcome = "worse" if difference.mean > 0 else "better"
        rows.append(
            [
                style_of(variant.name).label,
                _mean_loss(variant, longest, results.seeds),
                _with_interval(difference),
                p_in_words(p),
                outcome if known else "diverged" if math.isnan(difference.mean) else "not significant",
                ", ".join(
                    f"{display_name(key)} {format_value(value)}"
                    for key, value in variant.settings.items()
                    if default.get(key) != value
                ),
            ]
        )
    head = ["variant", f"loss at {format_count(longest)}", "difference", "p, corrected", "outcome", "what is changed"]
    return table("Results of every variant", head, rows, text_columns=head[-2:])


# How it was made


def _rules(results: Results) -> Iterable[str]:
    seeds = ", ".join(map(str, results.seeds))
    yield f"Every budget is a run of its own to the end of its schedule, with each of the seeds {seeds}."
    yield "Equal seeds see the same data in the same order; validation is the same for all."
    if results.trial_tokens:
        trials = {style_of(item.name).label: len(item.trials) for item in results.variants}
        each = ", ".join(f"{name} {number}" for name, number in trials.items())
        searched = dict.fromkeys(display_name(trial.setting) for item in results.variants for trial in item.trials)
        yield (
            f"Searched: {', '.join(searched)}, with as many values for everyone, in the same ratios around each one's "
            "own default; where the best lay at the edge the search went on. "
            f"Trials of {format_count(results.trial_tokens)} tokens: {each}."
        )
        yield (
            "Trials have one seed, none of those measured, so no measured run was chosen for its luck. The search is "
            "one pass, the learning rate first, and is not repeated at other budgets."
        )
    nothing = "Nothing else" if results.trial_tokens else "No setting"
    yield f"{nothing} was searched: batch size, betas, schedule, clipping and the rest are as given, or the defaults."
    yield "Nothing is extrapolated: a loss that no finished run reached gives a bound, not a number."
    yield (
        "Seconds a step are medians over the runs, variants side by side; their noise, which other work on the "
        "machine adds to, is not in the intervals."
    )


# Numbers and HTML


def _facts(results: Results) -> Iterable[str]:
    number = len(results.variants)
    yield f"{number} variants" if results.kind == "compare" else f"{number - 1} variants"
    yield seeds_in_words(results)
    yield f"{', '.join(map(format_count, results.budgets))} tokens"
    yield f"{format_count(method(results).parameters)} parameters"
    yield f"batches of {results.setup['batch_tokens']:,} tokens"


def _label(variant: Variant) -> str:
    return escape(style_of(variant.name).label)


def _mean_loss(variant: Variant, budget: int, seeds: Sequence[int]) -> str:
    losses = variant.losses([budget], seeds)[0]
    if not np.isfinite(losses).all():
        return f"{(~np.isfinite(losses)).sum()} of {len(losses)} diverged"
    return f"{losses.mean():.4f}" + (f" ± {losses.std(ddof=1):.4f}" if len(losses) > 1 else "")


def _bits(variant: Variant, budget: int) -> str:
    bits = float(np.mean([run.bits_per_byte for run in variant.runs if run.tokens == budget]))
    return f"{bits:.4f}" if math.isfinite(bits) else "diverged"


def _with_interval(difference: Difference) -> str:
    if math.isnan(difference.mean):
        return "diverged"
    interval = "" if math.isnan(difference.low) else f"\n{difference.low:+.4f} to {difference.high:+.4f}"
    return f"{difference.mean:+.4f}{interval}"
