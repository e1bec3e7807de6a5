"""Fit scaling laws: best learning rate and batch, loss on the compute frontier, and L(N, D), with 95% intervals.

RESULTS are folders of sweeps and comparisons, measured on the same data, or CSV files of your own with a header and one
finished run a row, whose columns are: architecture; parameters (all of them); tokens (of the whole run); batch (in
tokens); lr (the peak); loss (held out, in nats per token; inf for a run that diverged). Other columns are ignored.

Runs that differ in nothing but learning rate and batch give the best of both for their size and tokens; the best over
sizes, and the lowest loss over compute, follow power laws. docs/scaling-laws.md has the formulas.

With --optima the best settings are known already: columns architecture, parameters, batch (in any unit; for
'antransformer plan --fits' in tokens), lr.

examples:
  antransformer fit runs/sweep
  antransformer fit runs/compare-*
  antransformer fit runs.csv --json laws.json --out pictures
  antransformer fit --optima optima.csv --json laws.json
"""

import argparse
import json
import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from antransformer.cli.common import check_folder, check_target, new_table
from antransformer.cli.options import Parser, number
from antransformer.errors import ConfigError, MissingExtraError
from antransformer.extras import require
from antransformer.reporting.labels import format_count, style_of
from antransformer.results.observations import BestSettings, Observations, read_observations, read_table
from antransformer.scaling.charts import charts
from antransformer.scaling.fits import LAWS, Fit, fit, fit_optima
from antransformer.scaling.fitting import Surface
from antransformer.scaling.intervals import Interval

USAGE = "antransformer fit RESULTS... [options]\n       antransformer fit --optima FILE.csv [options]"
SURFACE = ("E", "A", "B", "alpha", "beta")


def add_arguments(parser: Parser) -> None:
    """Options of the verb."""
    parser.add_argument(
        "results", nargs="*", type=Path, metavar="RESULTS", help="folders of sweeps and comparisons, or CSV"
    )
    parser.add_argument("--optima", type=Path, metavar="FILE", help="CSV of best settings, in place of RESULTS")
    parser.add_argument("--bins", metavar="N", help="log-spaced bins of compute (default: four a decade)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the pictures (default runs/fit)")


def run(parsed: argparse.Namespace) -> None:
    """Read, fit, print, draw."""
    if bool(parsed.results) == bool(parsed.optima):
        raise ConfigError("give either RESULTS, folders or CSV files with losses, or --optima FILE")
    folder = parsed.out or Path("runs") / "fit"
    check_folder(folder)
    if parsed.json:
        check_target("--json", parsed.json)
    bins = number(parsed, "bins", None)
    require("scipy", "analysis")
    if parsed.optima:
        observed = Observations((), ())
        fits = fit_optima(read_table(parsed.optima, BestSettings))
    else:
        observed = read_observations(parsed.results)
        fits = fit(observed, bins)
    for it in fits:
        show(it)
    if parsed.json:
        content = {it.name: it.content() for it in fits}
        parsed.json.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        print(f"figures: {parsed.json}")
    try:
        drawn = charts(fits, observed.searches)
        folder.mkdir(parents=True, exist_ok=True)
        print("pictures:", *(chart.save_png(folder) for chart in drawn))
    except MissingExtraError as error:
        print(f"no pictures: {error}")


def show(it: Fit) -> None:
    """Tables of one architecture, and what is to be known of them."""
    console = Console(highlight=False)
    console.print(style_of(it.name).label, style="bold")
    if any(math.isfinite(place.best.loss) for place in it.optima):  # found here, not given
        console.print(optima_table(it))
    if it.laws:
        console.print(laws_table(it))
    if it.surface:
        console.print(surface_table(it.surface))
    for note in it.notes:
        print(f"- {note}")
    print()


def optima_table(it: Fit) -> Table:
    """A row for each size."""
    table = new_table("parameters", "tokens", "best batch", "best LR", "loss", "at an edge")
    for place in it.optima:
        best = place.best
        edges = {"batch": best.batch_bracketed or best.batches == 1, "LR": best.lr_bracketed}
        table.add_row(
            format_count(place.parameters),
            format_count(place.tokens),
            format_count(float(f"{best.batch:.3g}")),
            f"{best.lr:.2e}",
            f"{best.loss:.3f}",
            ", ".join(name for name, inside in edges.items() if not inside),
        )
    return table


def laws_table(it: Fit) -> Table:
    """A row for each power law."""
    table = new_table("law, C = 6 N D FLOPs", "exponent, 95% (t)", "bootstrap", "R2", "points")
    for name, (_, of) in LAWS.items():
        if law := it.laws.get(name):
            table.add_row(
                f"{name} = {law.coefficient:.3g} {of}^{law.exponent:.3f}",
                interval(law.delta["exponent"], ".3f"),
                interval(law.bootstrap["exponent"], ".3f"),
                "" if math.isnan(law.r2) else f"{law.r2:.3f}",
                str(law.points),
            )
    return table


def surface_table(law: Surface) -> Table:
    """A row for each number of L(N, D)."""
    table = new_table("L = E + A / N^alpha + B / D^beta", "95% (t)", "bootstrap")
    for name in SURFACE:
        ends = interval(law.delta[name]), interval(law.bootstrap[name])
        table.add_row(f"{name} = {getattr(law, name):.4g}", *ends)
    return table


def interval(ends: Interval, digits: str = ".3g") -> str:
    """``low to high``."""
    return f"{ends[0]:{digits}} to {ends[1]:{digits}}" if all(map(math.isfinite, ends)) else "unknown"
