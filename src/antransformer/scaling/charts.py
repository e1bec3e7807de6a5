"""Charts of scaling laws, after figures 2, 4, G.1 and J.1 of arXiv:2505.22014."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from antransformer.reporting.figure import PAPER, Chart, budget_ticks, legend, log_ticks, new_figure, styled
from antransformer.reporting.labels import format_count, slug, style_of
from antransformer.results.observations import Observation, column
from antransformer.scaling.fits import LAWS, Fit
from antransformer.scaling.fitting import FLOPS_PER_PARAMETER, Array, PowerLaw, interpolated, searched

EDGES = "Hollow: an edge of what was tried, not in the law. Bands: 95%, Student's t."


def charts(fits: Sequence[Fit], searches: Sequence[Observation]) -> list[Chart]:
    """All that there is something to draw for."""
    drawn = [best_setting(fits, name) for name in ("batch", "lr") if any(it.optima for it in fits)]
    if any(it.frontier for it in fits):
        drawn += [loss_by_compute(fits), best_by_compute(fits, "size"), best_by_compute(fits, "tokens")]
    return drawn + [search(it, searches) for it in fits if it.optima and searches]


@styled
def best_setting(fits: Sequence[Fit], name: str) -> Chart:
    """Best batch or learning rate against size, with its law."""
    figure, axes = new_figure()
    sizes = sorted(it.parameters for fit in fits for it in fit.optima)
    for fit in fits:
        x, y = [it.parameters for it in fit.optima], [getattr(it.best, name) for it in fit.optima]
        known = np.array([getattr(it, f"known_{name}") for it in fit.optima], bool)
        _points(axes, fit, np.array(x), np.array(y), known)
        _law(axes, fit, name, sizes[0] / 1.15, sizes[-1] * 1.15)
    _logarithmic(axes)
    budget_ticks(axes, [round(size) for size in sizes])
    log_ticks(axes.yaxis)
    if name == "batch":
        _count_ticks(axes)
    axes.set(xlabel="parameters", ylabel=LAWS[name][0])
    legend(figure, fits)
    return Chart(f"best-{name}", title(name), EDGES, _in_words(fits, name), figure)


@styled
def loss_by_compute(fits: Sequence[Fit]) -> Chart:
    """Loss of all runs against compute, those on the frontier, and its law."""
    figure, axes = new_figure()
    for fit in _with_frontier(fits):
        front, colour = fit.frontier, style_of(fit.name).colour
        every = [(FLOPS_PER_PARAMETER * run.parameters * run.tokens, run.loss) for run in fit.runs]
        axes.plot(*zip(*every, strict=True), ".", color=colour, ms=5, alpha=0.5, mew=0)
        _points(axes, fit, front.compute, front.losses, np.ones_like(front.compute, bool))
        _law(axes, fit, "loss", front.compute[0], front.compute[-1])
    _logarithmic(axes)
    _compute_axis(axes)
    log_ticks(axes.yaxis)
    axes.set(ylabel="validation loss (nats per token)")
    legend(figure, fits)
    note = "Dots are runs, markers the lowest loss in each bin of compute. Bands: 95%, Student's t."
    return Chart("loss-compute", "Loss against compute", note, _in_words(fits, "loss"), figure)


@styled
def best_by_compute(fits: Sequence[Fit], name: str) -> Chart:
    """Size or tokens of the runs on the frontier against compute, with the law, and what L(N, D) says."""
    figure, axes = new_figure()
    for fit in _with_frontier(fits):
        front = fit.frontier
        _points(axes, fit, front.compute, front.parameters if name == "size" else front.tokens, front.bracketed)
        _law(axes, fit, name, front.compute[0], front.compute[-1])
        if fit.surface and np.isfinite(fit.surface.covariance).all():
            compute = np.geomspace(front.compute[0], front.compute[-1])
            sizes = fit.surface.best_size(compute)
            y = sizes if name == "size" else compute / FLOPS_PER_PARAMETER / sizes
            axes.plot(compute, y, "--", color=style_of(fit.name).colour, lw=1.1)
    _logarithmic(axes)
    _compute_axis(axes)
    log_ticks(axes.yaxis)
    _count_ticks(axes)
    axes.set(ylabel={"size": "parameters", "tokens": "tokens"}[name])
    legend(figure, fits)
    note = "Hollow: no smaller and larger size to compare with, not in the law. Dashed: from L(N, D). Bands: 95%."
    return Chart(f"best-{name}", f"{title(name)} for the compute", note, _in_words(fits, name), figure)


@styled
def search(fit: Fit, searches: Sequence[Observation]) -> Chart:
    """Loss above the best against learning rate, a line a batch, a panel a size."""
    shown = fit.optima if len(fit.optima) <= 3 else [fit.optima[0], fit.optima[len(fit.optima) // 2], fit.optima[-1]]
    figure, panels = new_figure(1, len(shown))
    panels = np.atleast_1d(panels)
    own = [row for row in searches if row.architecture == fit.name]
    batches = sorted({row.batch for row in own})
    for axes, it in zip(panels, shown, strict=True):
        here = [row for row in own if (row.parameters, row.tokens) == (it.parameters, it.tokens)]
        for batch in sorted({row.batch for row in here}):
            rates, means = searched(column(here, "batch"), column(here, "lr"), column(here, "loss"), batch)
            shade = str(0.8 - 0.7 * batches.index(batch) / max(1, len(batches) - 1))
            axes.plot(rates, means - it.best.loss, "o", color=shade, ms=3.5, label=format_count(batch))
            if np.isfinite(means).sum() > 1:
                finite = np.log(rates[np.isfinite(means)])
                fine = np.linspace(finite[0], finite[-1], 100)
                axes.plot(np.exp(fine), interpolated(np.log(rates), means)(fine) - it.best.loss, color=shade, lw=1.2)
        axes.plot(it.best.lr, 0, "*", color=style_of(fit.name).colour, ms=10, mec=PAPER, zorder=4)
        axes.set_xscale("log")
        log_ticks(axes.xaxis)
        axes.set_title(f"{format_count(it.parameters)} parameters")
    panels[0].set(ylabel="loss above the best (nats)")
    panels[len(shown) // 2].set(xlabel="learning rate")
    handles = {item.get_label(): item for axes in panels for item in axes.get_lines() if item.get_label()[0] != "_"}
    figure.legend(handles=handles.values(), loc="outside upper left", ncols=4, alignment="left")
    best = [
        f"{format_count(it.parameters)}: batch {format_count(it.best.batch)}, learning rate {it.best.lr:.2g}"
        for it in fit.optima
    ]
    label = style_of(fit.name).label
    note = "Lines: Akima interpolation for each batch in tokens, the darker the larger. The star is the best."
    return Chart(f"search-{slug(fit.name)}", f"Search of {label}", note, f"Best of {label}, {'; '.join(best)}.", figure)


def title(name: str) -> str:
    """What a law is of, as a heading."""
    words = LAWS[name][0]
    return words[0].upper() + words[1:]


def _with_frontier(fits: Sequence[Fit]) -> list[Any]:
    return [fit for fit in fits if fit.frontier]


def _points(axes: Any, fit: Fit, x: Array, y: Array, known: Any) -> None:
    drawn = style_of(fit.name)
    for where, fill in ((known, drawn.colour), (~known, "none")):
        axes.plot(x[where], y[where], drawn.marker, color=drawn.colour, mfc=fill, mew=1.3)


def _law(axes: Any, fit: Fit, name: str, low: float, high: float) -> None:
    """Its line, with its band where that has an end, between two x."""
    law: PowerLaw | None = fit.laws.get(name)
    if law is None:
        return
    x, colour = np.geomspace(low, high), style_of(fit.name).colour
    axes.plot(x, law(x), color=colour, lw=1.3)
    below, above = law.band(x)
    if math.isfinite(above[0]):
        axes.fill_between(x, below, above, color=colour, alpha=0.13, lw=0)


def _logarithmic(axes: Any) -> None:
    """Both axes, with the vertical one as far as the points and lines reach: a band may be far wider."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    values = np.concatenate([line.get_ydata() for line in axes.get_lines()])
    low, high = np.nanmin(values), np.nanmax(values)
    room = max((high / low) ** 0.12, 1.02)
    axes.set_ylim(low / room, high * room)


def _compute_axis(axes: Any) -> None:
    log_ticks(axes.xaxis)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("e+", "e"))
    axes.set(xlabel="compute 6ND (FLOPs)")


def _count_ticks(axes: Any) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: format_count(value))


def _in_words(fits: Sequence[Fit], name: str) -> str:
    """The laws of all."""
    of = LAWS[name][1]
    laws = [(style_of(fit.name).label, fit.laws[name]) for fit in fits if name in fit.laws]
    each = ", ".join(f"{label} {law.coefficient:.3g} {of}^{law.exponent:.3f}" for label, law in laws)
    return f"{title(name)}: {each or 'no law'}."
