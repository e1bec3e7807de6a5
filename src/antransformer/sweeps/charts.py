"""Charts of a sweep: loss over learning rate, best learning rate over size, and activations over width."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from antransformer.diagnostics.coord_check import CoordCheck
from antransformer.figure_style import INK, PAPER, SIZE, new_figure
from antransformer.reporting.figure import Chart, budget_ticks, legend, log_ticks, mark_diverged, styled
from antransformer.reporting.labels import format_count, style_of
from antransformer.results.observations import Observation, column, sweep_observations
from antransformer.results.sweep import Sweep, SweepRun
from antransformer.scaling.fits import SizeOptimum, optima_of
from antransformer.scaling.fitting import MIN_LENGTH_RATIO, PowerLaw, akima, mean_losses, optimum, power_law

COLUMNS = 3  # of panels
MIN_LOSS_RANGE = 0.15  # nats above the best loss that a panel shows at least
SHADES = (0.35, 1.0)  # opacity of the smallest and of the largest


@dataclass(frozen=True)
class TokenBudget:
    """Runs of one training length: the n-th number of tokens of each size.

    Attributes:
        name: description, such as ``about 20 tokens per parameter``.
        slug: suffix of file names; empty if there is one budget.
        rows: runs.
        widths: widths by number of parameters if the sizes differ only in width, else empty.
    """

    name: str
    slug: str
    rows: tuple[Observation, ...]
    widths: dict[float, int]

    @property
    def architectures(self) -> list[str]:
        """Architectures in order of appearance."""
        return list(dict.fromkeys(row.architecture for row in self.rows))

    def runs_of(self, architecture: str) -> list[Observation]:
        """Runs of one architecture."""
        return [row for row in self.rows if row.architecture == architecture]

    def optima(self, architecture: str) -> list[SizeOptimum]:
        """Best settings for each size of one architecture, ascending."""
        return optima_of(self.runs_of(architecture))

    def label(self, parameters: float) -> str:
        """Text for a size: ``width 128`` or ``32M``."""
        return f"width {self.widths[parameters]}" if self.widths else format_count(parameters)

    def axis_value(self, parameters: float) -> float:
        """Position of a size on the axis: its width, or its number of parameters."""
        return self.widths[parameters] if self.widths else parameters


def token_budgets(sweep: Sweep) -> list[TokenBudget]:
    """Token budgets of a sweep, ascending, with the sizes that have runs at each."""
    widths = {float(run.parameters): run.width for run in sweep.runs} if sweep.coord_check else {}
    lengths = _lengths(sweep.runs)
    budgets = []
    for index, length in enumerate(lengths):
        runs = [run for run in sweep.runs if (run.size, run.tokens) in length]
        rows = tuple(sweep_observations(replace(sweep, runs=tuple(runs))))
        ratio = np.median([run.tokens / run.parameters for run in runs])
        same = len({tokens for _, tokens in length}) == 1
        name = f"{format_count(runs[0].tokens)} tokens" if same else f"about {ratio:.3g} tokens per parameter"
        budgets.append(TokenBudget(name, f"-{index + 1}" if len(lengths) > 1 else "", rows, widths))
    return budgets


def _lengths(runs: Sequence[SweepRun]) -> list[set[tuple[str, int]]]:
    """Size and tokens of runs of one length, by ascending length.

    Runs have one length at equal tokens or, if the sizes have their own, at about equal tokens per parameter.
    """
    parameters = {run.size: run.parameters for run in runs}
    sizes = {(run.size, run.tokens) for run in runs}
    shared = len({tokens for _, tokens in sizes}) == max(Counter(size for size, _ in sizes).values())
    lengths: list[set[tuple[str, int]]] = []
    shortest = 0.0
    for length, size, tokens in sorted(
        (tokens / (1 if shared else parameters[size]), size, tokens) for size, tokens in sizes
    ):
        if length > shortest * (1 if shared else MIN_LENGTH_RATIO) or size in {name for name, _ in lengths[-1]}:
            lengths.append(set())
            shortest = length
        lengths[-1].add((size, tokens))
    return lengths


def law(budget: TokenBudget, architecture: str) -> PowerLaw | None:
    """Best learning rate as a power law of width or size, from bracketed optima; None from fewer than two."""
    known = [size for size in budget.optima(architecture) if size.known_lr]
    x = np.array([budget.axis_value(size.parameters) for size in known])
    if len(np.unique(x)) < 2:
        return None
    return power_law(x, np.array([size.best.lr for size in known]))


def regret(budget: TokenBudget, architecture: str, size: SizeOptimum) -> float:
    """Increase in the loss of a size, in nats, at the best learning rate of the smallest size.

    NaN if that rate is outside the range of rates with a finite loss.
    """
    transferred = budget.optima(architecture)[0].best.lr
    _, rates, means = _best_batch_curve(_of_size(budget, architecture, size))
    finite = np.isfinite(means)
    low, high = rates[finite].min(initial=math.inf), rates[finite].max(initial=0.0)
    # The best rate comes from the logarithm of a rate, and can be one digit outside of the range.
    if finite.sum() < 2 or not low * (1 - 1e-9) <= transferred <= high * (1 + 1e-9):
        return math.nan
    transferred = float(np.clip(transferred, low, high))
    curve = akima(np.log(rates), means)
    grid = np.log(np.geomspace(low, high, 500))
    return float(curve(np.log(transferred)) - min(curve(grid).min(), means[finite].min()))


@styled
def loss_by_rate(budget: TokenBudget) -> Chart:
    """Loss over learning rate: one line for each size, one panel for each architecture."""
    names = budget.architectures
    figure, panels = _panels(len(names))
    sizes = sorted({row.parameters for row in budget.rows})
    lowest, descriptions = [], []
    for axes, name in zip(panels, names, strict=False):
        style = style_of(name)
        for size in budget.optima(name):
            rows = _of_size(budget, name, size)
            batch, rates, means = _best_batch_curve(rows)
            rows = [row for row in rows if row.batch == batch]
            best = optimum(*(column(rows, key) for key in ("batch", "lr", "loss")))
            assert best is not None  # this batch has a finite loss
            shade, label = _shade(sizes, size.parameters), budget.label(size.parameters)
            _draw_curve(axes, rates, means, style.colour, shade, label)
            mark_diverged(axes, rates[~np.isfinite(means)], style.colour, 0)
            axes.plot(best.lr, best.loss, "*", color=style.colour, ms=9, mec=PAPER, zorder=4)
            lowest.append(best.loss)
            descriptions.append(f"{style.label}, {label}: {best.lr:.2g} (loss {best.loss:.3f})")
        axes.set_xscale("log")
        log_ticks(axes.xaxis)
        axes.set_title(style.label)
    if lowest:
        # Show the valleys: rates far from the best have losses so high that all minima would look alike.
        low, high = min(lowest), max(lowest)
        margin = max(MIN_LOSS_RANGE, high - low)
        panels[0].set_ylim(low - 0.1 * margin, high + margin)
    panels[0].set(ylabel="validation loss (nats per token)")
    panels[min(len(names), COLUMNS) // 2].set(xlabel="learning rate")
    _size_legend(figure, panels)
    note = (
        f"{budget.name}. Lines: Akima interpolation at the best batch; darker is larger. Star: lowest point. "
        "Cross at the top: diverged run."
    )
    alt = f"Best learning rates: {'; '.join(descriptions)}."
    return Chart(f"loss-lr{budget.slug}", "Loss over learning rate", note, alt, figure)


@styled
def best_rate(budget: TokenBudget) -> Chart:
    """Best learning rate over width or size."""
    figure, axes = new_figure()
    names = [name for name in budget.architectures if budget.optima(name)]
    for name in names:
        style, optima = style_of(name), budget.optima(name)
        x = np.array([budget.axis_value(size.parameters) for size in optima])
        y, known = np.array([size.best.lr for size in optima]), np.array([size.known_lr for size in optima], bool)
        axes.plot(x, y, color=style.colour, lw=1.0, alpha=0.5)
        for mask, fill in ((known, style.colour), (~known, "none")):
            axes.plot(x[mask], y[mask], style.marker, color=style.colour, mfc=fill, mew=1.3)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    middle = math.sqrt(low * high)
    axes.set_ylim(min(low, middle / 2), max(high, middle * 2))  # a factor of four, so that noise looks like noise
    log_ticks(axes.yaxis)
    ticks = sorted({budget.axis_value(row.parameters) for row in budget.rows})
    budget_ticks(axes, [round(tick) for tick in ticks])
    if budget.widths:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(xlabel="width" if budget.widths else "parameters", ylabel="best learning rate")
    legend(figure, names)
    note = f"{budget.name}. Hollow markers: learning rate or batch at an edge of the grid."
    alt = " ".join(describe_law(budget, name) for name in names)
    return Chart(f"best-lr{budget.slug}", "Best learning rate", note, alt, figure)


def describe_law(budget: TokenBudget, architecture: str) -> str:
    """Sentence with the exponent of the best learning rate over width or size; without it, with the best settings."""
    label, variable = style_of(architecture).label, "width" if budget.widths else "N"
    fitted = law(budget, architecture)
    if fitted is None:
        best = "; ".join(_describe_best(budget, size) for size in budget.optima(architecture))
        best = best or "no best learning rate was found"
        return f"{label}: {best}. A law needs two sizes with a best learning rate inside the grid."
    low, high = fitted.delta["exponent"]
    interval = f"95% interval {low:.2f} to {high:.2f}" if math.isfinite(low) else "two points, so without an interval"
    return f"{label}: best learning rate ~ {variable}^{fitted.exponent:.2f} ({interval})."


def _describe_best(budget: TokenBudget, size: SizeOptimum) -> str:
    best = size.best
    rate = f"learning rate {best.lr:.2e}" + ("" if best.lr_bracketed else " (at an edge of the grid)")
    batch_known = best.batches == 1 or best.batch_bracketed
    batch = f"batch of {format_count(float(f'{best.batch:.3g}'))} tokens" + ("" if batch_known else " (at an edge)")
    return f"{budget.label(size.parameters)}: {rate}, {batch}, loss {best.loss:.3f}"


@styled
def residual_stream_by_width(checks: Sequence[CoordCheck]) -> Chart:
    """RMS of the residual stream over width, before and after a few steps, with one panel for each architecture."""
    names = list(dict.fromkeys(check.architecture for check in checks))
    figure, panels = _panels(len(names))
    steps = sorted({check.step for check in checks})
    descriptions = []
    for axes, name in zip(panels, names, strict=False):
        by_width, colour = _by_width(checks, name), style_of(name).colour
        for depth in range(min(len(check.stream) for check in by_width)):
            shade = _depth_shade(by_width[0].stream, depth)
            for step in steps:
                line = [(check.width, check.stream[depth]) for check in by_width if check.step == step]
                style = "--" if step == steps[0] else "-"
                axes.plot(*_finite_columns(line), style, marker="o", ms=3, color=colour, alpha=shade, lw=1.2)
        last = [f"{check.width} {check.stream[-1]:.3g}" for check in by_width if check.step == steps[-1]]
        descriptions.append(f"{style_of(name).label}, last block: {', '.join(last)}")
        _width_axis(axes, by_width)
        axes.set_title(style_of(name).label)
    _draw_unit_norm(panels[: len(names)], checks)
    panels[0].set(ylabel="RMS of the residual stream")
    note = (
        f"Dashed: initial weights. Solid: after {steps[-1]} steps {_rate_text(checks)}. Darker is deeper. "
        "Dotted: a residual stream of norm 1."
    )
    return Chart("coordinates", "Activations over width", note, f"{'; '.join(descriptions)}.", figure)


@styled
def rotation_by_width(checks: Sequence[CoordCheck]) -> Chart:
    """Rotation of the residual stream in a few steps over width, with one panel for each architecture."""
    rotated = [check for check in checks if check.rotation_deg]
    names = list(dict.fromkeys(check.architecture for check in rotated))
    figure, panels = _panels(len(names))
    descriptions = []
    for axes, name in zip(panels, names, strict=False):
        by_width = _by_width(rotated, name)
        for depth in range(len(by_width[0].rotation_deg)):
            line = [(check.width, check.rotation_deg[depth]) for check in by_width]
            shade = _depth_shade(by_width[0].rotation_deg, depth)
            axes.plot(*_finite_columns(line), marker="o", ms=3, color=style_of(name).colour, alpha=shade, lw=1.2)
        angles = ", ".join(f"{check.width} {check.rotation_deg[0]:.0f}" for check in by_width)
        descriptions.append(f"{style_of(name).label}, embedding: {angles}")
        _width_axis(axes, by_width, "linear")
        axes.set_title(style_of(name).label)
    panels[0].set(ylabel="rotation from the start (degrees)")
    panels[0].set_ylim(bottom=0)
    note = (
        f"After {rotated[0].step} steps {_rate_text(checks)}. Darker is deeper; the lightest line is the "
        "embedding. Level lines mean that the learning rate transfers between widths."
    )
    return Chart("rotation", "Rotation of the residual stream", note, f"{'; '.join(descriptions)}.", figure)


@styled
def logits_by_width(checks: Sequence[CoordCheck]) -> Chart:
    """RMS of the logits over width, before and after a few steps."""
    figure, axes = new_figure()
    names = list(dict.fromkeys(check.architecture for check in checks))
    steps = sorted({check.step for check in checks})
    descriptions = []
    for name in names:
        by_width, style = _by_width(checks, name), style_of(name)
        for step in steps:
            widths, logits = _finite_columns([(check.width, check.logits) for check in by_width if check.step == step])
            axes.plot(
                widths, logits, "--" if step == steps[0] else "-", marker=style.marker, color=style.colour, lw=1.2
            )
            values = ", ".join(f"{width} {value:.3g}" for width, value in zip(widths, logits, strict=True))
            descriptions.append(f"{style.label} at step {step}: {values}")
        _width_axis(axes, by_width)
    axes.set(ylabel="RMS of the logits")
    legend(figure, names)
    note = f"Dashed: initial weights. Solid: after {steps[-1]} steps {_rate_text(checks)}."
    return Chart("logits", "Logits over width", note, f"{'; '.join(descriptions)}.", figure)


def _rate_text(checks: Sequence[CoordCheck]) -> str:
    """Learning rate of each architecture, which is the same for all widths; without it in results of older releases."""
    known = {(check.architecture, check.peak_lr) for check in checks if math.isfinite(check.peak_lr)}
    rates = ", ".join(f"{style_of(name).label} {rate:g}" for name, rate in sorted(known))
    shared = f"at the same learning rate for all widths{f' ({rates})' if rates else ''}"
    return f"{shared}, apart from the scaling by lr width"


def _by_width(checks: Sequence[CoordCheck], architecture: str) -> list[CoordCheck]:
    return sorted((check for check in checks if check.architecture == architecture), key=lambda check: check.width)


def _finite_columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """x and y of the points with finite y."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    return [x for x, _ in finite], [y for _, y in finite]


def _of_size(budget: TokenBudget, architecture: str, size: SizeOptimum) -> list[Observation]:
    return [row for row in budget.runs_of(architecture) if row.parameters == size.parameters]


def _best_batch_curve(rows: Sequence[Observation]) -> tuple[float, Any, Any]:
    """The batch with the lowest loss, its learning rates, and the mean loss of each."""
    batches, lrs, losses = (column(rows, key) for key in ("batch", "lr", "loss"))
    curves = {batch: mean_losses(batches, lrs, losses, batch) for batch in np.unique(batches)}
    batch = min(curves, key=lambda batch: curves[batch][1].min())
    return float(batch), *curves[batch]


def _draw_curve(axes: Any, rates: Any, means: Any, colour: str, shade: float, label: str) -> None:
    """Draw the points with a finite loss and the interpolation between them."""
    finite = np.isfinite(means)
    axes.plot(rates[finite], means[finite], "o", color=colour, alpha=shade, ms=3.5, mew=0)
    if finite.sum() > 1:
        grid = np.linspace(np.log(rates[finite].min()), np.log(rates[finite].max()), 100)
        curve = akima(np.log(rates), means)(grid)
        axes.plot(np.exp(grid), curve, color=colour, alpha=shade, lw=1.3, label=label)


def _panels(count: int) -> tuple[Any, Any]:
    """A figure with ``count`` axes in rows of three, and these axes followed by unused, hidden ones."""
    rows = -(-count // COLUMNS)
    figure, panels = new_figure(rows, min(count, COLUMNS), height=SIZE[1] * (0.5 + 0.5 * rows))
    panels = np.atleast_1d(panels).ravel()
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels


def _shade(sizes: Sequence[float], size: float) -> float:
    low, high = SHADES
    return low + (high - low) * list(sizes).index(size) / max(1, len(sizes) - 1)


def _depth_shade(depths: Sequence[float], depth: int) -> float:
    return _shade(range(max(2, len(depths))), depth)


def _size_legend(figure: Any, panels: Any) -> None:
    """Add a legend of the sizes in the ink colour, since each panel has its own colour."""
    from matplotlib.lines import Line2D

    shades = {line.get_label(): line.get_alpha() for axes in panels for line in axes.get_lines()}
    handles = [
        Line2D([], [], color=INK, alpha=shade, label=label) for label, shade in shades.items() if label[0] != "_"
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, alignment="left")


def _width_axis(axes: Any, checks: Sequence[CoordCheck], y_scale: str = "log") -> None:
    widths = sorted({check.width for check in checks})
    axes.set_xscale("log")
    axes.set_yscale(y_scale)
    axes.minorticks_off()
    if y_scale == "log":
        log_ticks(axes.yaxis)
    ticks = widths if len(widths) <= 4 else widths[:: len(widths) - 1]
    axes.set_xticks(ticks, [str(width) for width in ticks])
    axes.set(xlabel="width")


def _draw_unit_norm(panels: Any, checks: Sequence[CoordCheck]) -> None:
    """Draw width ** -0.5, the RMS of a vector of norm 1."""
    widths = np.array(sorted({check.width for check in checks}), float)
    for axes in panels:
        axes.plot(widths, widths**-0.5, ":", color=INK, lw=1, label="_")
        axes.minorticks_off()
        log_ticks(axes.yaxis)
