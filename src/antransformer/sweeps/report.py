"""The report of a sweep: what stands on its page."""

import math
from pathlib import Path

from antransformer.reporting.html import Section, method_section, save, table
from antransformer.reporting.labels import format_count, style_of
from antransformer.results.sweep import Sweep
from antransformer.sweeps import charts as sweep_charts
from antransformer.sweeps.charts import TokenBudget, law_in_words, token_budgets


def write(sweep: Sweep, folder: Path) -> list[Path]:
    """Write ``report.html`` and its charts as PNG into the sweep's folder; returns the files, the page first.

    Raises:
        MissingExtraError: matplotlib or scipy is not installed.
    """
    names = list(dict.fromkeys(run.architecture for run in sweep.runs))
    diverged = sum(not math.isfinite(run.loss) for run in sweep.runs)
    facts = [
        f"{len(sweep.runs)} runs",
        f"{len({run.size for run in sweep.runs})} sizes",
        f"{', '.join(format_count(batch) for batch in sorted({run.batch for run in sweep.runs}))} tokens a batch",
        f"{diverged} diverged",
    ]
    title = f"Sweep: {', '.join(style_of(name).label for name in names)}"
    sections = [_level_section(level) for level in token_budgets(sweep)]
    if sweep.coordinates:
        draws = (sweep_charts.stream_by_width, sweep_charts.turned_by_width, sweep_charts.logits_by_width)
        sections.append(Section("Activations", "", [draw(sweep.coordinates) for draw in draws]))
    sections += [Section("All runs", _all_runs(sweep)), method_section(sweep.setup, RULES)]
    return save(folder, title, lead(sweep), facts, sections)


RULES = (
    "Learning rates are tried in factors of 10^(1/3), and where the best lies at an edge the grid goes on, for each "
    "size, number of tokens and batch by itself.",
    "Every architecture has the same data, tokens and batches, and as many learning rates around its own default.",
    "The best learning rate is the lowest point of an Akima interpolation of the loss; the best batch that of these "
    "minima. One that lies at an edge is not known.",
    "Where lr width below is not 0, the matrices of the blocks take lr width / width of the learning rate shown, "
    "embedding and head the square root of it.",
    "Every point is a run to the end of its own schedule. With one seed its noise is in the best learning rate.",
)


def lead(sweep: Sweep) -> str:
    """What was found, of the longest runs."""
    level = token_budgets(sweep)[-1]
    return f"At {level.name}: {' '.join(law_in_words(level, name) for name in level.architectures)}"


def _level_section(level: TokenBudget) -> Section:
    return Section(
        f"Best settings at {level.name}",
        "",
        [sweep_charts.loss_by_rate(level), sweep_charts.best_rate(level)],
        _best_table(level),
    )


def _best_table(level: TokenBudget) -> str:
    head = ["variant", "size", "parameters", "tokens", "best batch", "best LR", "loss", "lost at the smallest's LR"]
    rows = []
    for name in level.architectures:
        for it in level.optima(name):
            lost = sweep_charts.regret(level, name, it)
            rows.append(
                [
                    style_of(name).label,
                    level.label(it.parameters),
                    f"{it.parameters:,.0f}",
                    format_count(it.tokens),
                    format_count(float(f"{it.best.batch:.3g}"))
                    + ("" if it.best.batches == 1 or it.best.batch_bracketed else " (edge)"),
                    f"{it.best.lr:.2e}" + ("" if it.best.lr_bracketed else " (edge)"),
                    f"{it.best.loss:.3f}",
                    "not tried" if math.isnan(lost) else f"{lost:+.3f}",
                ]
            )
    return table("Best settings", head, rows)


def _all_runs(sweep: Sweep) -> str:
    head = ["run", "loss", "s/step"]
    rows = [
        [
            run.folder,
            f"{run.loss:.4f}" if math.isfinite(run.loss) else "diverged",
            f"{run.seconds_per_step:.3g}" if math.isfinite(run.seconds_per_step) else "",
        ]
        for run in sweep.runs
    ]
    return f"<details><summary>{len(rows)} runs</summary>{table('All runs', head, rows)}</details>"
