"""Fit scaling laws: best learning rate and batch, compute frontier, and L(N, D), with 95% intervals.

RESULTS are folders of sweeps and comparisons measured on the same data, or CSV files with a header and one finished run
per row. Columns of a CSV file: architecture; parameters (their number); tokens (length of the run); batch (in
tokens); lr (the peak); loss (validation loss in nats per token; inf for a diverged run). Other columns are ignored.

Runs that differ only in learning rate and batch give the best values of both for their size and tokens. The best values
over sizes, and the lowest loss over compute, follow power laws. docs/scaling-laws.md has the formulas.

With --optima the best settings are known already: columns architecture, parameters, batch (in any unit; for
'antransformer plan --fits' in tokens), lr.

examples:
  antransformer fit runs/sweep
  antransformer fit runs/compare-*
  antransformer fit runs.csv --json laws.json --out figures
  antransformer fit --optima optima.csv --json laws.json
"""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

import antransformer
from antransformer.cli.options import Parser, number
from antransformer.cli.tables import TableConsole, new_table
from antransformer.errors import MissingExtraError
from antransformer.files import check_json_target, write_result
from antransformer.reporting.labels import format_count, style_of

if TYPE_CHECKING:
    from antransformer.scaling.fits import Fit
    from antransformer.scaling.fitting import Horizon, Surface
    from antransformer.scaling.intervals import Interval

USAGE = "antransformer fit RESULTS... [options]\n       antransformer fit --optima FILE.csv [options]"
SURFACE = ("E", "A", "B", "alpha", "beta")
VARIABLES = {"N": "N: parameters", "C": "C: training compute in FLOPs, 6 x parameters x tokens"}


def add_arguments(parser: Parser) -> None:
    """Add the options of ``fit``: measurements, bins and output files."""
    parser.add_argument(
        "results", nargs="*", type=Path, metavar="RESULTS", help="folders of sweeps and comparisons, or CSV files"
    )
    parser.add_argument("--optima", type=Path, metavar="FILE", help="CSV file of best settings, instead of RESULTS")
    parser.add_argument("--bins", metavar="N", help="log-spaced bins of compute (default: four per decade)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the figures (default runs/fit)")


def _is_fit(content: Any) -> bool:
    return isinstance(content, dict) and "notes" in content


def run(parsed: argparse.Namespace) -> None:
    """Fit, print tables, write numbers and figures."""
    from antransformer.results.folder import require_own_folder

    folder = parsed.out or Path("runs") / "fit"
    require_own_folder(folder, "fit")
    if parsed.json:
        check_json_target("--json", parsed.json, lambda content: all(map(_is_fit, content.values())))
    fits = antransformer.fit(parsed.results, optima=parsed.optima, bins=number(parsed, "bins", None))
    for fit in fits:
        print_laws(fit)
    if parsed.json:
        content = {fit.name: fit.content() for fit in fits}
        write_result(parsed.json, json.dumps(content, indent=2, allow_nan=False) + "\n")
        print(f"numbers: {parsed.json}")
    from antransformer.scaling.charts import charts

    try:
        figures = charts(fits, fits[0].searches)
        folder.mkdir(parents=True, exist_ok=True)
        print("figures:", *(figure.save_png(folder) for figure in figures))
    except MissingExtraError as error:
        print(f"no figures: {error}")


def print_laws(fit: "Fit") -> None:
    """Print the tables and notes of one architecture."""
    console = TableConsole()
    console.print(style_of(fit.name).label, style="bold")
    if any(math.isfinite(optimum.best.loss) for optimum in fit.optima):  # searched, not read from --optima
        console.print(optima_table(fit))
    if fit.laws:
        console.print(laws_table(fit))
    if fit.horizon:
        console.print(horizon_table(fit.horizon))
    if fit.surface:
        console.print(surface_table(fit.surface))
    for note in fit.notes:
        print(f"- {note}")
    print()


def optima_table(fit: "Fit") -> Table:
    """Return a table of the best settings, one row per size and number of tokens."""
    table = new_table("parameters", "tokens", "best batch", "best LR", "loss", "at an edge")
    for optimum in fit.optima:
        best = optimum.best
        inside = {"batch": best.batch_bracketed or best.batches == 1, "LR": best.lr_bracketed}
        table.add_row(
            format_count(optimum.parameters),
            format_count(optimum.tokens),
            format_count(float(f"{best.batch:.3g}")),
            f"{best.lr:.2e}",
            f"{best.loss:.3f}",
            ", ".join(name for name in inside if not inside[name]),
        )
    return table


def laws_table(fit: "Fit") -> Table:
    """Return a table of the power laws, with two intervals of each exponent."""
    from antransformer.scaling.fits import LAWS

    table = new_table("power law", "exponent, 95% (t)", "bootstrap", "R2", "points")
    for name, (_, variable) in LAWS.items():
        if law := fit.laws.get(name):
            table.add_row(
                f"{name} = {law.coefficient:.3g} {variable}^{law.exponent:.3f}",
                format_interval(law.delta["exponent"], ".3f"),
                format_interval(law.bootstrap["exponent"], ".3f"),
                "" if math.isnan(law.r2) else f"{law.r2:.3f}",
                str(law.points),
            )
    used = {LAWS[name][1] for name in fit.laws}
    table.caption = "\n".join(text for variable, text in VARIABLES.items() if variable in used)
    table.caption_justify = "left"
    return table


def horizon_table(horizon: "Horizon") -> Table:
    """Return a table of the exponent of the best learning rate over the steps of a run."""
    table = new_table("best learning rate ~ steps^-p", "95% (t)", "steps", "points")
    steps = f"{horizon.span[0]:,.0f} to {horizon.span[1]:,.0f}"
    table.add_row(f"p = {horizon.exponent:.3f}", format_interval(horizon.interval, ".3f"), steps, str(horizon.points))
    return table


def surface_table(law: "Surface") -> Table:
    """Return a table of the parameters of L(N, D), with two intervals each."""
    table = new_table("L = E + A / N^alpha + B / D^beta", "95% (t)", "bootstrap")
    for name in SURFACE:
        intervals = format_interval(law.delta[name]), format_interval(law.bootstrap[name])
        table.add_row(f"{name} = {getattr(law, name):.4g}", *intervals)
    return table


def format_interval(ends: "Interval", digits: str = ".3g") -> str:
    """Return ``LOW to HIGH``, or ``unknown`` if an end is not finite."""
    return f"{ends[0]:{digits}} to {ends[1]:{digits}}" if all(map(math.isfinite, ends)) else "unknown"
