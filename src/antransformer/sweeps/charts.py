"""Charts of a sweep: loss over learning rate, the best of it over size, and activations over width."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from antransformer.diagnostics.coord_check import CoordCheck
from antransformer.reporting.figure import (
    INK,
    PAPER,
    SIZE,
    Chart,
    budget_ticks,
    legend,
    log_ticks,
    mark_diverged,
    new_figure,
    styled,
)
from antransformer.reporting.labels import format_count, style_of
from antransformer.results.observations import Observation, column, swept
from antransformer.results.sweep import Sweep
from antransformer.scaling.fits import SizeOptimum, optima_of
from antransformer.scaling.fitting import PowerLaw, interpolated, optimum, power_law, searched

COLUMNS = 3
LEAST_SHOWN = 0.15  # nats above the best; and no curve is drawn to more than so many times the height of its valley
SHADES = (0.35, 1.0)  # opacity of the smallest and the largest


@dataclass(frozen=True)
class TokenBudget:
    """The runs of one of the numbers of tokens that each size was trained on.

    Attributes:
        name: in words, such as ``20 tokens a parameter``.
        slug: for a file's name; empty where there is one level.
        rows: its runs.
        widths: by number of parameters where only the width differs, else empty.
    """

    name: str
    slug: str
    rows: tuple[Observation, ...]
    widths: dict[float, int]

    @property
    def architectures(self) -> list[str]:
        """In order of appearance."""
        return list(dict.fromkeys(row.architecture for row in self.rows))

    def of(self, architecture: str) -> list[Observation]:
        """Runs of one architecture."""
        return [row for row in self.rows if row.architecture == architecture]

    def optima(self, architecture: str) -> list[SizeOptimum]:
        """Best settings of its sizes, ascending."""
        return optima_of(self.of(architecture))

    def label(self, parameters: float) -> str:
        """A size in words."""
        return f"width {self.widths[parameters]}" if self.widths else format_count(parameters)

    def place(self, parameters: float) -> float:
        """A size on the axis."""
        return self.widths[parameters] if self.widths else parameters


@dataclass(frozen=True)
class Named:
    """An architecture, for a legend."""

    name: str


def token_budgets(sweep: Sweep) -> list[TokenBudget]:
    """One for each number of tokens, or of tokens a parameter, from few to many."""
    sizes: dict[str, set[int]] = {}
    for run in sweep.runs:
        sizes.setdefault(run.size, set()).add(run.tokens)
    number = max(map(len, sizes.values()))
    widths = {float(run.parameters): run.width for run in sweep.runs} if sweep.coordinates else {}
    made = []
    for index in range(number):
        chosen = {size: sorted(tokens)[min(index, len(tokens) - 1)] for size, tokens in sizes.items()}
        runs = [run for run in sweep.runs if run.tokens == chosen[run.size]]
        rows = tuple(row for row, run in zip(swept(sweep), sweep.runs, strict=True) if run in runs)
        fixed = len(set(chosen.values())) == 1
        ratio = np.median([run.tokens / run.parameters for run in runs])
        name = f"{format_count(runs[0].tokens)} tokens" if fixed else f"about {ratio:.3g} tokens a parameter"
        made.append(TokenBudget(name, f"-{index + 1}" if number > 1 else "", rows, widths))
    return made


def law(level: TokenBudget, architecture: str) -> PowerLaw | None:
    """The best learning rate as a power of the width or the size, from the bracketed ones; None from fewer than two."""
    known = [it for it in level.optima(architecture) if it.known_lr]
    if len(known) < 2:
        return None
    return power_law(np.array([level.place(it.parameters) for it in known]), np.array([it.best.lr for it in known]))


def regret(level: TokenBudget, architecture: str, it: SizeOptimum) -> float:
    """What it costs a size to be trained at the best learning rate of the smallest, in nats; NaN where not tried."""
    smallest = level.optima(architecture)[0].best.lr
    _, rates, means = _curve([row for row in level.of(architecture) if row.parameters == it.parameters])
    finite = np.isfinite(means)
    inside = finite.sum() > 1 and rates[finite].min() <= smallest <= rates[finite].max()
    if not inside:
        return math.nan
    curve = interpolated(np.log(rates), means)
    fine = np.log(np.geomspace(rates[finite].min(), rates[finite].max(), 500))
    return float(curve(np.log(smallest)) - min(curve(fine).min(), means[finite].min()))


@styled
def loss_by_rate(level: TokenBudget) -> Chart:
    """Loss against learning rate, a line a size, a panel an architecture."""
    names = level.architectures
    figure, panels = _panels(len(names))
    sizes = sorted({row.parameters for row in level.rows})
    lowest, words = [], []
    for axes, name in zip(panels, names, strict=False):
        for it in level.optima(name):
            own = [row for row in level.of(name) if row.parameters == it.parameters]
            batch, rates, means = _curve(own)
            best = optimum(
                *(column([row for row in own if row.batch == batch], key) for key in ("batch", "lr", "loss"))
            )
            assert best is not None  # a batch was chosen for its loss
            shade, colour = _shade(sizes, it.parameters), style_of(name).colour
            _draw(axes, rates, means, colour, shade, level.label(it.parameters))
            mark_diverged(axes, rates[~np.isfinite(means)], colour, 0)
            axes.plot(best.lr, best.loss, "*", color=colour, ms=9, mec=PAPER, zorder=4)
            lowest.append(best.loss)
            words.append(f"{style_of(name).label}, {level.label(it.parameters)}: {best.lr:.2g} (loss {best.loss:.3f})")
        axes.set_xscale("log")
        log_ticks(axes.xaxis)
        axes.set_title(style_of(name).label)
    if lowest:
        low, high = min(lowest), max(lowest)
        room = max(LEAST_SHOWN, high - low)
        panels[0].set_ylim(low - 0.1 * room, high + room)
    panels[0].set(ylabel="validation loss (nats per token)")
    panels[min(len(names), COLUMNS) // 2].set(xlabel="learning rate")
    _size_legend(figure, panels)
    note = f"{level.name}. Akima interpolation; a star is its lowest point, a cross at the top a run that diverged. "
    note += "The darker, the larger. Of several batches the best."
    return Chart(
        f"loss-lr{level.slug}", "Loss against learning rate", note, f"Best learning rates: {'; '.join(words)}.", figure
    )


@styled
def best_rate(level: TokenBudget) -> Chart:
    """The best learning rate against width or size."""
    figure, axes = new_figure()
    names = [name for name in level.architectures if level.optima(name)]
    places = sorted({level.place(row.parameters) for row in level.rows})
    words = []
    for name in names:
        drawn, optima = style_of(name), level.optima(name)
        x = np.array([level.place(it.parameters) for it in optima])
        y, known = np.array([it.best.lr for it in optima]), np.array([it.known_lr for it in optima], bool)
        axes.plot(x, y, color=drawn.colour, lw=1.0, alpha=0.5)
        for where, fill in ((known, drawn.colour), (~known, "none")):
            axes.plot(x[where], y[where], drawn.marker, color=drawn.colour, mfc=fill, mew=1.3)
        words.append(law_in_words(level, name))
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    middle = math.sqrt(low * high)
    axes.set_ylim(min(low, middle / 2), max(high, middle * 2))  # what hardly moves looks so
    log_ticks(axes.yaxis)
    budget_ticks(axes, [round(place) for place in places])
    if level.widths:
        axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.set(xlabel="width" if level.widths else "parameters", ylabel="best learning rate")
    legend(figure, [Named(name) for name in names])
    note = f"{level.name}. Hollow: learning rate or batch at an edge of what was tried."
    return Chart(f"best-lr{level.slug}", "Best learning rate", note, " ".join(words), figure)


def law_in_words(level: TokenBudget, architecture: str) -> str:
    """How the best learning rate moves."""
    label, of = style_of(architecture).label, "width" if level.widths else "N"
    found = law(level, architecture)
    if found is None:
        return f"{label}: too few sizes with a best learning rate inside of what was tried."
    low, high = found.delta["exponent"]
    interval = f"95% interval {low:.2f} to {high:.2f}" if math.isfinite(low) else "from two points, without an interval"
    return f"{label}: best learning rate ~ {of}^{found.exponent:.2f} ({interval})."


@styled
def stream_by_width(found: Sequence[CoordCheck]) -> Chart:
    """RMS of the residual stream against width, before and after a few steps, one panel per architecture."""
    names = list(dict.fromkeys(it.architecture for it in found))
    figure, panels = _panels(len(names))
    steps = sorted({it.step for it in found})
    words = []
    for axes, name in zip(panels, names, strict=False):
        own, colour = sorted(_of(found, name), key=lambda it: it.width), style_of(name).colour
        for depth in range(min(len(it.stream) for it in own)):
            shade = _shade(range(max(2, len(own[0].stream))), depth)
            for step in steps:
                line = [
                    (it.width, it.stream[depth]) for it in own if it.step == step and math.isfinite(it.stream[depth])
                ]
                style = "--" if step == steps[0] else "-"
                axes.plot(*_columns(line), style, marker="o", ms=3, color=colour, alpha=shade, lw=1.2)
        last = [(it.width, it.stream[-1]) for it in own if it.step == steps[-1]]
        words.append(f"{style_of(name).label}, last block: " + ", ".join(f"{w} {value:.3g}" for w, value in last))
        _width_axis(axes, own)
        axes.set_title(style_of(name).label)
    _unit_norm(panels, found)
    panels[0].set(ylabel="rms coordinate of the residual stream")
    note = (
        f"Dashed: initial weights; solid: after {steps[-1]} steps at one learning rate for all widths. The darker, the "
    )
    note += "deeper. Dotted: a stream of norm 1."
    return Chart("coordinates", "Activations against width", note, f"{'; '.join(words)}.", figure)


@styled
def turned_by_width(found: Sequence[CoordCheck]) -> Chart:
    """How far the residual stream has turned in a few steps against width, a panel an architecture."""
    last = [it for it in found if it.rotation_deg]
    names = list(dict.fromkeys(it.architecture for it in last))
    figure, panels = _panels(len(names))
    words = []
    for axes, name in zip(panels, names, strict=False):
        own = sorted(_of(last, name), key=lambda it: it.width)
        for depth in range(len(own[0].rotation_deg)):
            line = [(it.width, it.rotation_deg[depth]) for it in own if math.isfinite(it.rotation_deg[depth])]
            shade = _shade(range(max(2, len(own[0].rotation_deg))), depth)
            axes.plot(*_columns(line), marker="o", ms=3, color=style_of(name).colour, alpha=shade, lw=1.2)
        words.append(
            f"{style_of(name).label}, embedding: " + ", ".join(f"{it.width} {it.rotation_deg[0]:.0f}" for it in own)
        )
        _width_axis(axes, own, "linear")
        axes.set_title(style_of(name).label)
    panels[0].set(ylabel="angle from the start (degrees)")
    panels[0].set_ylim(bottom=0)
    note = (
        f"After {last[0].step} steps at one learning rate for all widths. The darker, the deeper; the palest line is "
    )
    note += "the embedding. A learning rate that serves all widths would give level lines."
    return Chart("turned", "How far the residual stream turns", note, f"{'; '.join(words)}.", figure)


@styled
def logits_by_width(found: Sequence[CoordCheck]) -> Chart:
    """Root mean square of the logits against width, before and after a few steps."""
    figure, axes = new_figure()
    names = list(dict.fromkeys(it.architecture for it in found))
    steps = sorted({it.step for it in found})
    words = []
    for name in names:
        own, drawn = sorted(_of(found, name), key=lambda it: it.width), style_of(name)
        for step in steps:
            line = [(it.width, it.logits) for it in own if it.step == step and math.isfinite(it.logits)]
            style = "--" if step == steps[0] else "-"
            axes.plot(*_columns(line), style, marker=drawn.marker, color=drawn.colour, lw=1.2)
            words.append(f"{drawn.label} at step {step}: " + ", ".join(f"{w} {value:.3g}" for w, value in line))
        _width_axis(axes, own)
    axes.set(ylabel="rms logit")
    legend(figure, [Named(name) for name in names])
    note = f"Dashed: initial weights; solid: after {steps[-1]} steps at one learning rate for all widths."
    return Chart("logits", "Logits against width", note, f"{'; '.join(words)}.", figure)


def _of(found: Iterable[CoordCheck], name: str) -> list[CoordCheck]:
    return [it for it in found if it.architecture == name]


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _curve(rows: Sequence[Observation]) -> tuple[float, Any, Any]:
    """Of the batch with the lowest loss: it, the learning rates tried, and the mean loss with each."""
    batches, lrs, losses = (column(rows, key) for key in ("batch", "lr", "loss"))
    curves = {batch: searched(batches, lrs, losses, batch) for batch in np.unique(batches)}
    batch = min(curves, key=lambda batch: curves[batch][1].min())
    return float(batch), *curves[batch]


def _draw(axes: Any, rates: Any, means: Any, colour: str, shade: float, label: str) -> None:
    """Points and the line between them."""
    finite = np.isfinite(means)
    axes.plot(rates[finite], means[finite], "o", color=colour, alpha=shade, ms=3.5, mew=0)
    if finite.sum() > 1:
        fine = np.linspace(np.log(rates[finite].min()), np.log(rates[finite].max()), 100)
        axes.plot(
            np.exp(fine), interpolated(np.log(rates), means)(fine), color=colour, alpha=shade, lw=1.3, label=label
        )


def _panels(number: int) -> tuple[Any, Any]:
    """So many axes beside each other, in rows of three."""
    rows = -(-number // COLUMNS)
    figure, panels = new_figure(rows, min(number, COLUMNS), height=SIZE[1] * (0.5 + 0.5 * rows))
    panels = np.atleast_1d(panels).ravel()
    for axes in panels[number:]:
        axes.set_axis_off()
    return figure, panels


def _shade(sizes: Sequence[float], size: float) -> float:
    low, high = SHADES
    return low + (high - low) * list(sizes).index(size) / max(1, len(sizes) - 1)


def _size_legend(figure: Any, panels: Any) -> None:
    """The sizes, in ink: each panel has a colour of its own."""
    from matplotlib.lines import Line2D

    shades = {line.get_label(): line.get_alpha() for axes in panels for line in axes.get_lines()}
    handles = [
        Line2D([], [], color=INK, alpha=shade, label=label) for label, shade in shades.items() if label[0] != "_"
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, alignment="left")


def _width_axis(axes: Any, found: Sequence[CoordCheck], vertical: str = "log") -> None:
    widths = sorted({it.width for it in found})
    axes.set_xscale("log")
    axes.set_yscale(vertical)
    axes.minorticks_off()
    if vertical == "log":
        log_ticks(axes.yaxis)
    shown = widths if len(widths) <= 4 else widths[:: len(widths) - 1]
    axes.set_xticks(shown, [str(width) for width in shown])
    axes.set(xlabel="width")


def _unit_norm(panels: Any, found: Sequence[CoordCheck]) -> None:
    widths = np.array(sorted({it.width for it in found}), float)
    for axes in panels[: len({it.architecture for it in found})]:
        axes.plot(widths, widths**-0.5, ":", color=INK, lw=1, label="_")
        axes.minorticks_off()
        log_ticks(axes.yaxis)
