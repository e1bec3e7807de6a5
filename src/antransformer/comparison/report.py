"""The HTML report of a comparison or an ablation: sections, tables and rules."""

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np

from antransformer.bootstrap import CONFIDENCE
from antransformer.comparison import charts
from antransformer.comparison.charts import Lines
from antransformer.comparison.findings import PairwiseSpeedup, final_difference, significant, variant_differences
from antransformer.comparison.statistics import Difference, holm, sensitivity
from antransformer.comparison.summary import METHOD, format_diverged, format_p, format_seeds, main_variant, summary
from antransformer.comparison.tuning import chosen_text, tuning_label, tuning_scope
from antransformer.reporting.html import Section, method_section, save, table
from antransformer.reporting.labels import display_name, format_count, format_value, style_of
from antransformer.results.comparison import Results, Variant
from antransformer.runs.search import EXTENSIONS
from antransformer.training.metrics import METRICS_FILE, read_lines
from antransformer.wording import counted

PROBE_KEYS = {"tokens", "residual_norm", "row_norm", "alpha", "moment_variance"}


def write(results: Results, folder: Path) -> list[Path]:
    """Write ``report.html`` and its charts as PNG files into the experiment's folder.

    Args:
        results: results of the experiment.
        folder: the experiment's folder; metrics and probes are read from the run folders in its ``runs``.

    Returns:
        Paths of the files, the page first.

    Raises:
        MissingExtraError: matplotlib or scipy is not installed.
    """
    sections = _comparison(results, folder) if results.kind == "compare" else _ablation(results)
    names = ", ".join(style_of(item.name).label for item in results.variants)
    title = f"Comparison: {names}" if results.kind == "compare" else f"Ablation of {style_of(METHOD).label}"
    return save(folder, title, summary(results), _facts(results), sections)


# Sections of a comparison


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
        baseline.name: [
            PairwiseSpeedup.measure(results, item, baseline) for item in results.variants if item is not baseline
        ]
        for baseline in results.variants
    }
    baseline, *others = results.variants
    above = (
        f"<p>The speedup is the number of tokens (or seconds) that {_label(baseline)} needs for a variant's loss, "
        "divided by the number that the variant needs. The loss is interpolated between finished runs and never "
        f"extrapolated, so some ratios are only bounds. All speedups are based on {tuning_scope(results)}.</p>"
    )
    below = "".join(
        f"<details><summary>Speedup over {_label(item)}</summary>{_speedup_tables(results, pairs[item.name])}</details>"
        for item in others
    )
    figures = [charts.speedup(pairs[baseline.name], results.budgets, seconds) for seconds in (False, True)]
    return Section("Speedup", above, figures, _speedup_tables(results, pairs[baseline.name]) + below)


def _speedup_tables(results: Results, pairs: Sequence[PairwiseSpeedup]) -> str:
    tables = "".join(_speedup_table(results, pairs, seconds) for seconds in (False, True))
    return f'<div class="tables">{tables}</div>'


def _speedup_table(results: Results, pairs: Sequence[PairwiseSpeedup], seconds: bool) -> str:
    def cell(pair: PairwiseSpeedup, budget: int) -> str:
        point = next((point for point in pair.points if point.tokens == budget), None)
        if point is None:
            return "diverged"
        ratio, low, high = (pair.format_ratio(point, value, seconds) for value in (point.ratio, point.low, point.high))
        return ratio if math.isnan(point.low) or low == ratio == high else f"{ratio}\n{low} to {high}"

    unit = "seconds" if seconds else "tokens"
    baseline = style_of(pairs[0].baseline.name).label
    return table(
        f"Speedup over {baseline} in {unit}, with {CONFIDENCE:.0%} intervals",
        [f"in {unit}", *(f"at {_budget_label(results, budget)}" for budget in results.budgets)],
        [[style_of(pair.variant.name).label, *(cell(pair, budget) for budget in results.budgets)] for pair in pairs],
    )


def _search_section(results: Results) -> Section:
    settings = list(dict.fromkeys(trial.setting for item in results.variants for trial in item.trials))
    if not settings:
        return Section("Tuning", "<p>No setting was tuned: every variant has given or default settings.</p>")
    above = (
        "<p>Regret shows how hard a variant is to tune: the increase in loss where a setting is 3 times too small or 3 "
        "times too large. It is read off the curve through the trials of one budget.</p>"
    )
    rows = [
        _sensitivity_row(item, setting, tokens)
        for setting in settings
        for item in results.variants
        for tokens in _search_budgets(item, setting)
    ]
    head = ["variant", "setting", "tokens", "trials", "best", "3x too small", "3x too large"]
    regrets = table("Regret of a setting 3 times too small or too large", head, rows, text_columns=["setting"])
    figures = [charts.search(results, setting) for setting in settings]
    figures += [charts.best_by_budget(results, setting) for setting in settings if _search_several(results, setting)]
    return Section("Tuning", above, figures, regrets)


def _search_budgets(variant: Variant, setting: str) -> list[int]:
    """Return the budgets at which a setting of a variant was searched, ascending."""
    return sorted({trial.tokens for trial in variant.trials if trial.setting == setting})


def _search_several(results: Results, setting: str) -> bool:
    """Whether a setting was searched at several budgets."""
    return any(len(_search_budgets(item, setting)) > 1 for item in results.variants)


def _sensitivity_row(variant: Variant, setting: str, tokens: int) -> list[str]:
    """Return the best value and the regrets of a variant at one search budget."""
    trials = variant.trials_of(setting, tokens)
    best = min(trials, key=lambda trial: trial.loss)
    regrets = sensitivity([trial.value for trial in trials], [trial.loss for trial in trials])
    cells = [
        "not tried" if math.isnan(loss) else "diverged" if math.isinf(loss) else f"{loss:+.3f}" for loss in regrets
    ]
    edge = " (at the edge)" if variant.best_at_edge(setting, tokens) else ""
    best_value = f"{best.value:g}{edge}" if math.isfinite(best.loss) else "all diverged"
    name, budget = style_of(variant.name).label, format_count(tokens)
    return [name, display_name(setting), budget, str(len(trials)), best_value, *cells]


def _curve_section(results: Results, folder: Path) -> Section:
    logs, missing = _logs(results, folder, METRICS_FILE, {"tokens", "loss"})
    return Section("Training curves", missing, [charts.training_curves(results, logs)] if logs else [])


def _inside_section(results: Results, folder: Path) -> Section:
    logs, missing = _logs(results, folder, "probes.jsonl", PROBE_KEYS)
    if not logs:
        return Section("Inside the models", missing)
    above = (
        f"<p>Measured during the run with {format_count(results.budgets[-1])} tokens and the first seed, on a few "
        f"validation sequences.</p>{missing}"
    )
    # Only architectures with a learned residual step have values of alpha.
    with_alpha = [item for item in results.variants if item.name in logs and logs[item.name][-1]["alpha"]]
    figures = [
        draw(results, logs)
        for draw in (charts.residual_by_layer, charts.residual_by_time, charts.row_norms, charts.moment_variance)
    ]
    return Section("Inside the models", above, figures + [charts.alphas(item, logs[item.name]) for item in with_alpha])


def _logs(results: Results, folder: Path, name: str, keys: set[str]) -> tuple[dict[str, Lines], str]:
    """Return the lines of each variant's longest run with the first seed, and a note on variants without lines.

    Lines that lack one of the keys are skipped: runs of an earlier release may have other probes.
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
    missing = f'<p class="note">Not shown, since the run folder has no {name}: {escape(empty)}.</p>' if empty else ""
    return {variant: lines for variant, lines in logs.items() if lines}, missing


def _all_numbers(results: Results) -> str:
    longest = results.budgets[-1]
    head = [
        "variant",
        "parameters",
        *(f"loss at {_budget_label(results, budget)}" for budget in results.budgets),
        f"difference at {format_count(longest)}",
        "bits/byte",
        "s/step",
        "diverged",
    ]
    rows = []
    for variant in results.variants:
        difference = final_difference(results, variant)
        compared = f"{_with_interval(difference)}\n{format_p(difference.p)}"
        rows.append(
            [
                style_of(variant.name).label,
                f"{variant.parameters:,}",
                *(_mean_loss(variant, budget, results.seeds) for budget in results.budgets),
                "baseline" if variant is results.baseline else compared,
                _bits(variant, longest),
                f"{variant.seconds_per_step:.4g}" if math.isfinite(variant.seconds_per_step) else "diverged",
                format_diverged(variant.runs),
            ]
        )
    note = (
        "<p>Validation loss in nats per token: mean ± standard deviation over seeds. Differences are paired by seed; "
        f"their {CONFIDENCE:.0%} intervals and p values come from the paired t-test"
        f"{', without correction for several variants' if len(results.variants) > 2 else ''}.</p>"
    )
    settings = [[style_of(item.name).label, "\n".join(_settings_text(item))] for item in results.variants]
    return (
        note
        + table("Results of every variant", head, rows)
        + table("Settings of every variant", ["variant", "settings"], settings, text_columns=["settings"])
    )


def _budget_label(results: Results, budget: int) -> str:
    """Return a budget with the origin of its learning rates, such as 250K (tuned)."""
    return f"{format_count(budget)} ({tuning_label(results, budget)})"


def _settings_text(variant: Variant) -> Iterator[str]:
    """Yield the settings without the architecture, which the variant's name tells; then those of each budget."""
    chosen = dict.fromkeys(name for item in variant.chosen for name in item.settings)
    for name, value in variant.settings.items():
        if name != "architecture" and name not in chosen:
            yield f"{display_name(name)} {format_value(value)}"
    for name in chosen:
        yield chosen_text(variant, name)


# Sections of an ablation


def _ablation(results: Results) -> list[Section]:
    differences = variant_differences(results)
    is_significant = significant(differences)
    note = (
        "<p>Differences in validation loss are paired by seed: equal seeds see the same data in the same order. The p "
        "values are those of t-tests with the pooled noise of all variants, corrected for the number of variants by "
        "Holm's method. The intervals are not corrected.</p>"
    )
    return [
        Section("Differences", note, [charts.forest(results, differences, is_significant)]),
        Section("All numbers", _ablation_table(results, differences, is_significant)),
        method_section(results.setup, _rules(results)),
    ]


def _ablation_table(results: Results, differences: Sequence[Difference], is_significant: Sequence[bool]) -> str:
    longest, default = results.budgets[-1], results.baseline.settings
    rows = [[style_of(results.baseline.name).label, _mean_loss(results.baseline, longest, results.seeds), *[""] * 4]]
    corrected = holm([difference.p for difference in differences])
    table_rows = zip(results.variants[1:], differences, corrected, is_significant, strict=True)
    for variant, difference, p, clear in table_rows:
        if clear:
            outcome = "worse" if difference.mean > 0 else "better"
        elif math.isnan(difference.mean):
            outcome = "diverged"
        else:
            outcome = "no test" if math.isnan(difference.p) else "not significant"
        rows.append(
            [
                style_of(variant.name).label,
                _mean_loss(variant, longest, results.seeds),
                _with_interval(difference),
                format_p(p),
                outcome,
                ", ".join(
                    f"{display_name(key)} {format_value(value)}"
                    for key, value in variant.settings.items()
                    if default.get(key) != value
                ),
            ]
        )
    head = ["variant", f"loss at {format_count(longest)}", "difference", "p, corrected", "outcome", "changed settings"]
    return table("Results of every variant", head, rows, text_columns=head[-2:])


# Rules


def _rules(results: Results) -> Iterable[str]:
    """Yield the rules of the experiment, one or two sentences each."""
    seeds = ", ".join(map(str, results.seeds))
    yield f"Every budget is a separate run with a complete learning-rate schedule, repeated with the seeds {seeds}."
    yield "Equal seeds see the same data in the same order. All variants share the validation windows."
    searched = dict.fromkeys(trial.setting for item in results.variants for trial in item.trials)
    if searched:
        yield from _search_rules(results, searched)
    untuned = "No other setting" if searched else "No setting"
    yield f"{untuned} was tuned: batch size, betas, schedule, clipping and all others have given or default values."
    if results.kind == "compare":
        yield "Nothing is extrapolated: where no finished run reaches a loss, the report gives a bound."
        yield (
            "Seconds per step are medians over the runs, in which variants alternate. Other load on the machine "
            "affects them; the intervals do not include that noise."
        )


def _given_text(results: Results) -> str:
    """Return a sentence on the settings that were not searched since they were given for a variant."""
    given = {
        style_of(item.name).label: dict.fromkeys(display_name(name) for chosen in item.chosen for name in chosen.given)
        for item in results.variants
    }
    texts = [f"{label} {', '.join(names)}" for label, names in given.items() if names]
    return f"Given, not searched: {'; '.join(texts)}. " if texts else ""


def _search_rules(results: Results, searched: Iterable[str]) -> Iterable[str]:
    runs = [(style_of(item.name).label, {trial.folder for trial in item.trials}) for item in results.variants]
    counts = ", ".join(f"{label} {len(folders)}" for label, folders in runs)
    yield (
        f"Searched settings: {', '.join(map(display_name, searched))}. {_given_text(results)}Every variant has the "
        f"same number of values, spaced by the same factor. A grid was extended by up to {EXTENSIONS} values while its "
        f"best value was at an edge. Trials: {counts}."
    )
    if any(trial.pass_number > 1 for item in results.variants for trial in item.trials):
        yield "The shortest search had a second pass over all settings, around the choice of the first."
    budgets = {trial.tokens for item in results.variants for trial in item.trials}
    if budgets == set(results.budgets):
        yield (
            "Every budget has its own search. At the shortest budget the grids are around each variant's own default, "
            "at a longer budget around its choice at the next shorter one."
        )
    else:
        tokens = ", ".join(map(format_count, sorted(budgets)))
        yield (
            f"The only search had {tokens} tokens, with grids around each variant's own default. Its choice was used "
            "at all budgets and not tuned at the others."
        )
    yield "All trials use one seed that no measured run uses, so no measured run was selected for a lucky seed."


# Facts and numbers


def _facts(results: Results) -> Iterable[str]:
    compared = results.variants if results.kind == "compare" else results.variants[1:]
    yield counted(len(compared), "variant")
    yield format_seeds(results)
    yield f"{', '.join(map(format_count, results.budgets))} tokens"
    yield f"{format_count(main_variant(results).parameters)} parameters"
    yield f"batches of {results.setup['batch_tokens']:,} tokens"
    yield tuning_scope(results)


def _label(variant: Variant) -> str:
    """Return the variant's display name, escaped for HTML."""
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
