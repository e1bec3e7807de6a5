"""Charts of scaling laws, modelled on figures 2, 4, G.1 and J.1 of arXiv:2505.22014."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from antransformer.figure_style import PAPER, new_figure
from antransformer.reporting.figure import Chart, budget_ticks, legend, log_ticks, styled
from antransformer.reporting.labels import format_count, slug, style_of
from antransformer.results.observations import Observation, column
from antransformer.scaling.fits import LAWS, Fit
from antransformer.scaling.fitting import FLOPS_PER_PARAMETER, PowerLaw, akima, mean_losses
from antransformer.scaling.intervals import Array

BANDS = "Bands: 95%, Student's t."


def charts(fits: Sequence[Fit], searches: Sequence[Observation]) -> list[Chart]:
    """All charts that the fits have data for."""
    drawn: list[Chart] = []
    if any(fit.optima for fit in fits):
        drawn += [best_setting(fits, name) for name in ("batch", "lr")]
    if any(fit.frontier for fit in fits):
        drawn += [loss_by_compute(fits), best_by_compute(fits, "size"), best_by_compute(fits, "tokens")]
    return drawn + [search(fit, searches) for fit in fits if fit.optima and searches]


@styled
def best_setting(fits: Sequence[Fit], name: str) -> Chart:
    """Best batch or learning rate over model size, with the fitted law."""
    figure, axes = new_figure()
    sizes = sorted(optimum.parameters for fit in fits for optimum in fit.optima)
    for fit in fits:
        x = np.array([optimum.parameters for optimum in fit.optima])
        y = np.array([getattr(optimum.best, name) for optimum in fit.optima])
        _draw_points(axes, fit, x, y, np.array([getattr(optimum, f"known_{name}") for optimum in fit.optima], bool))
        _draw_law(axes, fit, name, sizes[0] / 1.15, sizes[-1] * 1.15)
    _log_axes(axes)
    budget_ticks(axes, [round(size) for size in sizes])
    log_ticks(axes.yaxis)
    if name == "batch":
        _count_ticks(axes)
    axes.set(xlabel="parameters", ylabel=LAWS[name][0])
    legend(figure, [fit.name for fit in fits])
    note = f"Hollow markers: optimum at an edge of the grid, left out of the law. {BANDS}"
    return Chart(f"best-{name}", title(name), note, _describe_laws(fits, name), figure)


@styled
def loss_by_compute(fits: Sequence[Fit]) -> Chart:
    """Loss of all runs over compute, with the frontier and its law."""
    figure, axes = new_figure()
    for fit in _with_frontier(fits):
        frontier, colour = fit.frontier, style_of(fit.name).colour
        points = [(FLOPS_PER_PARAMETER * run.parameters * run.tokens, run.loss) for run in fit.runs]
        axes.plot(*zip(*points, strict=True), ".", color=colour, ms=5, alpha=0.5, mew=0)
        _draw_points(axes, fit, frontier.compute, frontier.losses, np.ones_like(frontier.compute, bool))
        _draw_law(axes, fit, "loss", frontier.compute[0], frontier.compute[-1])
    _log_axes(axes)
    _compute_axis(axes)
    log_ticks(axes.yaxis)
    axes.set(ylabel="validation loss (nats per token)")
    legend(figure, [fit.name for fit in fits])
    note = f"Dots: runs. Markers: lowest loss in each bin of compute. {BANDS}"
    return Chart("loss-compute", "Loss over compute", note, _describe_laws(fits, "loss"), figure)


@styled
def best_by_compute(fits: Sequence[Fit], name: str) -> Chart:
    """Size or tokens of the frontier's runs over compute, with the law and the prediction of L(N, D)."""
    figure, axes = new_figure()
    for fit in _with_frontier(fits):
        frontier = fit.frontier
        y = frontier.parameters if name == "size" else frontier.tokens
        _draw_points(axes, fit, frontier.compute, y, frontier.bracketed)
        _draw_law(axes, fit, name, frontier.compute[0], frontier.compute[-1])
        if fit.surface and np.isfinite(fit.surface.covariance).all():
            compute = np.geomspace(frontier.compute[0], frontier.compute[-1])
            sizes = fit.surface.best_size(compute)
            y = sizes if name == "size" else compute / FLOPS_PER_PARAMETER / sizes
            axes.plot(compute, y, "--", color=style_of(fit.name).colour, lw=1.1)
    _log_axes(axes)
    _compute_axis(axes)
    log_ticks(axes.yaxis)
    _count_ticks(axes)
    axes.set(ylabel={"size": "parameters", "tokens": "tokens"}[name])
    legend(figure, [fit.name for fit in fits])
    note = f"Hollow markers: no smaller and larger size to compare with, left out of the law. Dashed: L(N, D). {BANDS}"
    return Chart(f"best-{name}", f"{title(name)} over compute", note, _describe_laws(fits, name), figure)


@styled
def search(fit: Fit, searches: Sequence[Observation]) -> Chart:
    """Excess loss over learning rate: one line for each batch, one panel for each of up to three sizes."""
    count = len(fit.optima)
    optima = fit.optima if count <= 3 else [fit.optima[index] for index in (0, count // 2, count - 1)]
    figure, panels = new_figure(1, len(optima))
    panels = np.atleast_1d(panels)
    rows = [row for row in searches if row.architecture == fit.name]
    batches = sorted({row.batch for row in rows})
    for axes, optimum in zip(panels, optima, strict=True):
        group = [row for row in rows if (row.parameters, row.tokens) == (optimum.parameters, optimum.tokens)]
        for batch in sorted({row.batch for row in group}):
            rates, means = mean_losses(column(group, "batch"), column(group, "lr"), column(group, "loss"), batch)
            shade = str(0.8 - 0.7 * batches.index(batch) / max(1, len(batches) - 1))
            axes.plot(rates, means - optimum.best.loss, "o", color=shade, ms=3.5, label=format_count(batch))
            if np.isfinite(means).sum() > 1:
                finite = np.log(rates[np.isfinite(means)])
                grid = np.linspace(finite[0], finite[-1], 100)
                curve = akima(np.log(rates), means)(grid)
                axes.plot(np.exp(grid), curve - optimum.best.loss, color=shade, lw=1.2)
        axes.plot(optimum.best.lr, 0, "*", color=style_of(fit.name).colour, ms=10, mec=PAPER, zorder=4)
        axes.set_xscale("log")
        log_ticks(axes.xaxis)
        axes.set_title(f"{format_count(optimum.parameters)} parameters")
    panels[0].set(ylabel="loss above the best (nats)")
    panels[len(optima) // 2].set(xlabel="learning rate")
    handles = {line.get_label(): line for axes in panels for line in axes.get_lines() if line.get_label()[0] != "_"}
    figure.legend(handles=handles.values(), loc="outside upper left", ncols=4, alignment="left")
    label = style_of(fit.name).label
    best = [
        f"{format_count(optimum.parameters)}: batch {format_count(optimum.best.batch)}, "
        f"learning rate {optimum.best.lr:.2g}"
        for optimum in fit.optima
    ]
    note = "Lines: Akima interpolation for each batch in tokens; darker is larger. Star: optimum."
    alt = f"Best settings of {label}, {'; '.join(best)}."
    return Chart(f"search-{slug(fit.name)}", f"Learning-rate search of {label}", note, alt, figure)


def title(name: str) -> str:
    """Title of a law with a capital letter, for a heading."""
    words = LAWS[name][0]
    return words[0].upper() + words[1:]


def _with_frontier(fits: Sequence[Fit]) -> list[Any]:
    return [fit for fit in fits if fit.frontier]


def _draw_points(axes: Any, fit: Fit, x: Array, y: Array, known: Any) -> None:
    """Draw filled markers where ``known`` and hollow ones elsewhere."""
    style = style_of(fit.name)
    for mask, fill in ((known, style.colour), (~known, "none")):
        axes.plot(x[mask], y[mask], style.marker, color=style.colour, mfc=fill, mew=1.3)


def _draw_law(axes: Any, fit: Fit, name: str, low: float, high: float) -> None:
    """Draw the line of a law between two x, and its band if that is finite."""
    law: PowerLaw | None = fit.laws.get(name)
    if law is None:
        return
    x, colour = np.geomspace(low, high), style_of(fit.name).colour
    axes.plot(x, law(x), color=colour, lw=1.3)
    lower, upper = law.band(x)
    if math.isfinite(upper[0]):
        axes.fill_between(x, lower, upper, color=colour, alpha=0.13, lw=0)


def _log_axes(axes: Any) -> None:
    """Make both axes logarithmic, and limit y to the points and lines, since a band may be far wider."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    values = np.concatenate([line.get_ydata() for line in axes.get_lines()])
    low, high = np.nanmin(values), np.nanmax(values)
    margin = max((high / low) ** 0.12, 1.02)
    axes.set_ylim(low / margin, high * margin)


def _compute_axis(axes: Any) -> None:
    log_ticks(axes.xaxis)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("e+", "e"))
    axes.set(xlabel="training compute (FLOPs)")


def _count_ticks(axes: Any) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: format_count(value))


def _describe_laws(fits: Sequence[Fit], name: str) -> str:
    variable = LAWS[name][1]
    laws = [(style_of(fit.name).label, fit.laws[name]) for fit in fits if name in fit.laws]
    formulas = ", ".join(f"{label} {law.coefficient:.3g} {variable}^{law.exponent:.3f}" for label, law in laws)
    return f"{title(name)}: {formulas or 'no law'}."
