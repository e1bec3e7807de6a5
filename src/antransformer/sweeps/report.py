"""Report page of a sweep."""

import math
from pathlib import Path

from antransformer.reporting.html import Section, method_section, save, table
from antransformer.reporting.labels import format_count, style_of
from antransformer.results.sweep import Sweep
from antransformer.runs.search import EXTENSIONS
from antransformer.sweeps import charts as sweep_charts
from antransformer.sweeps.charts import TokenBudget, describe_law, token_budgets
from antransformer.wording import counted

RULES = (
    "Learning rates are spaced by factors of 10^(1/3) around the default of each architecture, as many for each. For a "
    f"size, number of tokens and batch, up to {EXTENSIONS} are added while the best rate is at an edge. With --lrs all "
    "architectures have the given rates, and none are added.",
    "All architectures use the same data, tokens and batches.",
    "The best learning rate is the minimum of an Akima interpolation of the loss. The best batch is the minimum of an "
    "interpolation of these minima. An optimum at an edge is not known.",
    "If lr width below is not 0, embedding and head use the learning rate shown times the square root of lr width / "
    "width. With AdamW the block matrices use it times lr width / width.",
    "Every point is a complete run with its own schedule. With one seed, its noise is part of the best learning rate.",
)


def write(sweep: Sweep, folder: Path) -> list[Path]:
    """Write ``report.html`` and its charts as PNG into the sweep's folder.

    Returns:
        The files, the page first.

    Raises:
        MissingExtraError: matplotlib or scipy is not installed.
    """
    names = list(dict.fromkeys(run.architecture for run in sweep.runs))
    diverged = sum(not math.isfinite(run.loss) for run in sweep.runs)
    facts = [
        counted(len(sweep.runs), "run"),
        counted(len({run.size for run in sweep.runs}), "size"),
        f"{', '.join(format_count(batch) for batch in sorted({run.batch for run in sweep.runs}))} tokens per batch",
        f"{diverged} diverged",
    ]
    title = f"Sweep: {', '.join(style_of(name).label for name in names)}"
    sections = [_budget_section(budget) for budget in token_budgets(sweep)]
    if sweep.coord_check:
        draws = (sweep_charts.residual_stream_by_width, sweep_charts.rotation_by_width, sweep_charts.logits_by_width)
        sections.append(Section("Activations", "", [draw(sweep.coord_check) for draw in draws]))
    sections += [Section("All runs", _all_runs(sweep)), method_section(sweep.setup, RULES)]
    return save(folder, title, lead(sweep), facts, sections)


def lead(sweep: Sweep) -> str:
    """Summary sentence of the longest runs: the exponent of the best learning rate of each architecture."""
    budget = token_budgets(sweep)[-1]
    return f"At {budget.name}: {' '.join(describe_law(budget, name) for name in budget.architectures)}"


def _budget_section(budget: TokenBudget) -> Section:
    charts = [sweep_charts.loss_by_rate(budget), sweep_charts.best_rate(budget)]
    return Section(f"Best settings at {budget.name}", "", charts, _best_table(budget))


def _best_table(budget: TokenBudget) -> str:
    head = [
        "variant",
        "size",
        "parameters",
        "tokens",
        "best batch",
        "best LR",
        "loss",
        "excess loss at the smallest size's LR",
    ]
    rows = []
    for name in budget.architectures:
        for size in budget.optima(name):
            regret = sweep_charts.regret(budget, name, size)
            batch_known = size.best.batches == 1 or size.best.batch_bracketed
            rows.append(
                [
                    style_of(name).label,
                    budget.label(size.parameters),
                    f"{size.parameters:,.0f}",
                    format_count(size.tokens),
                    format_count(float(f"{size.best.batch:.3g}")) + ("" if batch_known else " (edge)"),
                    f"{size.best.lr:.2e}" + ("" if size.best.lr_bracketed else " (edge)"),
                    f"{size.best.loss:.3f}",
                    "not tried" if math.isnan(regret) else f"{regret:+.3f}",
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
    return f"<details><summary>{counted(len(rows), 'run')}</summary>{table('All runs', head, rows)}</details>"
