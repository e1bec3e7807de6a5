"""Charts of an experiment for its report: each function reads results and returns a ``Chart``."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from antransformer.comparison.findings import PairwiseSpeedup
from antransformer.comparison.statistics import Array, Difference
from antransformer.reporting.figure import (
    INK,
    PAPER,
    Chart,
    budget_ticks,
    integer_ticks,
    legend,
    log_ticks,
    mark_diverged,
    new_figure,
    styled,
    token_axis,
)
from antransformer.reporting.labels import (
    SeriesStyle,
    display_name,
    finite_or_diverged,
    format_count,
    slug,
    style_of,
    time_unit,
)
from antransformer.results.comparison import Results, Trial, Variant

CURVE_POINTS = 400
LEAST_SPAN = 0.05  # nats; where differences are smaller they look small

Lines = Sequence[Mapping[str, Any]]  # of a run's metrics or probes


# Loss and speedup of finished runs


@styled
def loss_by_tokens(results: Results) -> Chart:
    """Loss of the finished runs against their tokens."""
    figure, axes = new_figure()
    for variant in results.variants:
        _finished_runs(axes, variant, results, np.array(results.budgets, float))
    budget_ticks(axes, results.budgets)
    axes.set(xlabel="tokens of the run", ylabel="validation loss (nats per token)")
    legend(figure, results.variants)
    return Chart(
        "loss-tokens",
        "Loss against tokens",
        "Each point is a run finished at its own budget: small dots are the seeds, lines their mean.",
        _mean_losses(results),
        figure,
    )


@styled
def loss_by_seconds(results: Results) -> Chart:
    """Loss of the finished runs against the time that they took."""
    figure, axes = new_figure()
    steps = np.array(results.budgets) / results.setup["batch_tokens"]
    unit, size = time_unit(steps[-1] * min(variant.seconds_per_step for variant in results.variants))
    for variant in results.variants:
        _finished_runs(axes, variant, results, steps * variant.seconds_per_step / size)
    axes.set_xscale("log")
    log_ticks(axes.xaxis)
    axes.set(xlabel=f"{unit} of training", ylabel="validation loss (nats per token)")
    legend(figure, results.variants)
    each = ", ".join(
        f"{style_of(item.name).label} {finite_or_diverged(item.seconds_per_step)}" for item in results.variants
    )
    return Chart(
        "loss-seconds",
        "Loss against time",
        "The same runs over their steps times the seconds that each variant takes for a step.",
        f"Seconds a step: {each}. {_mean_losses(results)}",
        figure,
    )


def _finished_runs(axes: Any, variant: Variant, results: Results, x: Array) -> None:
    losses, drawn = variant.losses(results.budgets, results.seeds), style_of(variant.name)
    finished = np.isfinite(losses)
    means = np.where(finished.all(1), losses.mean(1), math.nan)
    axes.plot(x, means, color=drawn.colour, marker=drawn.marker, zorder=3)
    axes.plot(x[np.nonzero(finished)[0]], losses[finished], ".", color=drawn.colour, ms=3.5, alpha=0.7)
    mark_diverged(axes, x[~finished.all(1)], drawn.colour, results.variants.index(variant))


def _mean_losses(results: Results) -> str:
    """Of the longest runs, in words."""
    longest = results.budgets[-1:]
    each = [
        f"{style_of(variant.name).label} {finite_or_diverged(float(variant.losses(longest, results.seeds).mean()))}"
        for variant in results.variants
    ]
    return f"Mean loss with {format_count(longest[0])} tokens: {', '.join(each)}."


@styled
def speedup(pairs: Sequence[PairwiseSpeedup], budgets: Sequence[int], seconds: bool = False) -> Chart:
    """Speedup of several variants over one at each budget, with intervals."""
    figure, axes = new_figure()
    for place, pair in enumerate(pairs):
        _speedup_points(axes, pair, seconds, apart=1.04 ** (place - (len(pairs) - 1) / 2))
    over = style_of(pairs[0].over.name)
    axes.axhline(1, color=over.colour, lw=1.2, ls="--")
    axes.set_yscale("log")
    low, high = axes.dataLim.intervaly
    axes.set_ylim(min(low, 0.8) / 1.05, max(high, 1.25) * 1.05)
    log_ticks(axes.yaxis, "x")
    budget_ticks(axes, budgets)
    unit = "seconds" if seconds else "tokens"
    axes.set(xlabel="tokens of the run", ylabel=f"speedup over {over.label} in {unit}")
    legend(figure, [pair.variant for pair in pairs])
    return Chart(
        f"speedup-{unit}",
        f"Speedup in {unit}",
        f"{unit.capitalize()} that {over.label} needs for the same loss, over those used, with 95% intervals. Hollow "
        f"triangles are bounds. Up: more than this, the longest run of {over.label} does not reach the loss. Down: "
        "less than this, its shortest run is below the loss already.",
        " ".join(_in_words(pair, seconds) for pair in pairs),
        figure,
    )


def _in_words(pair: PairwiseSpeedup, seconds: bool) -> str:
    each = ", ".join(f"{pair.words(at, at.ratio, seconds)} with {format_count(at.tokens)} tokens" for at in pair.points)
    return f"{style_of(pair.variant.name).label}: {each or 'diverged'}."


def _speedup_points(axes: Any, pair: PairwiseSpeedup, seconds: bool, apart: float) -> None:
    drawn = style_of(pair.variant.name)
    measured = [point for point in pair.points if 0 < point.ratio < math.inf]
    axes.plot(
        [point.tokens * apart for point in measured],
        [pair.bounded(point, point.ratio, seconds) for point in measured],
        color=drawn.colour,
        lw=0.9,
        alpha=0.6,
    )
    for point in pair.points:
        x, y = point.tokens * apart, pair.bounded(point, point.ratio, seconds)
        if not math.isnan(point.low):
            ends = [pair.bounded(point, end, seconds) for end in (point.low, point.high)]
            axes.plot([x, x], ends, color=drawn.colour, lw=3, alpha=0.35, solid_capstyle="butt")
        marker = drawn.marker if point in measured else "^" if point.ratio else "v"
        axes.plot(x, y, marker, color=drawn.colour, mfc=drawn.colour if point in measured else PAPER, mew=1.4, ms=6)


# The search


@styled
def search(results: Results, setting: str) -> Chart:
    """Loss of the trials over one setting."""
    figure, axes = new_figure()
    searched = [(item, trials) for item in results.variants if (trials := trials_of(item, setting))]
    for place, (variant, trials) in enumerate(searched):
        _trials(axes, style_of(variant.name), trials, place)
    if all(trial.value > 0 for _, trials in searched for trial in trials):
        axes.set_xscale("log")
        log_ticks(axes.xaxis)
    axes.margins(y=0.12)
    low, high = axes.get_ylim()
    room = max(0, LEAST_SPAN - (high - low)) / 2
    axes.set_ylim(low - room, high + room)
    name = display_name(setting)
    axes.set(xlabel=name, ylabel="validation loss (nats per token)")
    legend(figure, [variant for variant, _ in searched])
    best = [(style_of(item.name).label, min(trials, key=lambda trial: trial.loss)) for item, trials in searched]
    each = ", ".join(f"{label} {trial.value:g} (loss {finite_or_diverged(trial.loss)})" for label, trial in best)
    return Chart(
        f"search-{slug(name)}",
        f"Search: {name}",
        f"Trials of {format_count(results.trial_tokens)} tokens. A ring marks the best trial, a cross at the top "
        "a diverged one.",
        f"Best {name}: {each}.",
        figure,
    )


def trials_of(variant: Variant, setting: str) -> list[Trial]:
    """Its trials of one setting, by value."""
    return sorted((trial for trial in variant.trials if trial.setting == setting), key=lambda trial: trial.value)


def _trials(axes: Any, drawn: SeriesStyle, trials: Sequence[Trial], place: int) -> None:
    finished = [trial for trial in trials if math.isfinite(trial.loss)]
    values, losses = [trial.value for trial in finished], [trial.loss for trial in finished]
    axes.plot(values, losses, color=drawn.colour, marker=drawn.marker)
    mark_diverged(axes, [trial.value for trial in trials if trial not in finished], drawn.colour, place)
    if finished:
        best = int(np.argmin(losses))
        axes.plot(values[best], losses[best], "o", ms=12, mfc="none", mec=drawn.colour, mew=1.2)


# What happened during the runs


@styled
def training_curves(results: Results, logs: Mapping[str, Lines]) -> Chart:
    """Loss of the training batches, smoothed, over the longest runs."""
    figure, axes = new_figure()
    ends, tops = [], []
    for variant in _logged(results, logs):
        tokens, losses = _column(logs, variant, "tokens"), _smooth(_column(logs, variant, "loss"))
        drawn = style_of(variant.name)
        every = math.ceil(len(tokens) / CURVE_POINTS)
        _line(axes, drawn, tokens[::every], losses[::every])
        ends.append(f"{drawn.label} {finite_or_diverged(float(losses[-1]))}")
        tops.append(losses[len(losses) // 10])
    axes.set_ylim(top=float(np.nanmax(tops)))  # the fall from the first steps would flatten all that follows
    axes.margins(x=0.02)
    token_axis(axes)
    axes.set(ylabel="training loss (nats per token)")
    legend(figure, _logged(results, logs))
    return Chart(
        "training-curves",
        "Loss during training",
        f"Loss of the training batches, smoothed; one run of {format_count(results.budgets[-1])} tokens each. The "
        "learning rate falls to the end, so only the ends compare.",
        f"Training loss at the end: {', '.join(ends)}.",
        figure,
    )


@styled
def residual_by_layer(results: Results, logs: Mapping[str, Lines]) -> Chart:
    """Norm of the residual stream after each block, at three times of the run."""
    figure, panels = new_figure(1, 3)
    ends = []
    for variant in _logged(results, logs):
        norms, drawn = _column(logs, variant, "residual_norm"), style_of(variant.name)
        for axes, norm in zip(panels, (norms[0], norms[len(norms) // 2], norms[-1]), strict=True):
            axes.plot(norm, color=drawn.colour, marker=drawn.marker, ms=3.5)
        ends.append(f"{drawn.label} {norms[-1][0]:.3g} to {norms[-1][-1]:.3g}")
    for axes, title in zip(panels, ("start", "middle", "end"), strict=True):
        axes.set_title(title)
        axes.set_yscale("log")
        integer_ticks(axes.xaxis)
    log_ticks(panels[0].yaxis)
    panels[0].set(ylabel="norm of the residual stream")
    panels[1].set(xlabel="after block (0: embedding)")
    legend(figure, _logged(results, logs))
    return Chart(
        "residual-by-layer",
        "Residual stream by depth",
        "Mean length of the vectors that the blocks read and write, at three times of the run.",
        f"At the end, from the embedding to the last block: {', '.join(ends)}.",
        figure,
    )


@styled
def residual_by_time(results: Results, logs: Mapping[str, Lines]) -> Chart:
    """Norm of the residual stream after the last block over the run."""

    def last(variant: Variant) -> Array:
        return _column(logs, variant, "residual_norm")[:, -1]

    figure, ends = _over_time(results, logs, last, "norm after the last block", log=True)
    note = "Mean length of the vectors that the head reads, over the run."
    return Chart("residual-by-time", "Residual stream over time", note, f"After the last block: {ends}.", figure)


@styled
def row_norms(results: Results, logs: Mapping[str, Lines]) -> Chart:
    """Norms of the weight vectors over the run: mean, smallest and largest."""

    def of(variant: Variant, key: str) -> Array:
        return np.array([line["row_norm"][key] for line in logs[variant.name]], float)

    figure, ends = _over_time(results, logs, lambda variant: of(variant, "mean"), "norm of a weight vector")
    (axes,) = figure.axes
    for variant in _logged(results, logs):
        tokens, colour = _column(logs, variant, "tokens"), style_of(variant.name).colour
        axes.fill_between(tokens, of(variant, "min"), of(variant, "max"), color=colour, alpha=0.15, lw=0)
    note = "Over all weight vectors of a model: the line is the mean, the band goes from the smallest to the largest."
    return Chart("row-norms", "Weight vectors over time", note, f"Mean norm of a weight vector: {ends}.", figure)


@styled
def moment_variance(results: Results, logs: Mapping[str, Lines]) -> Chart:
    """Relative variance of Adam's first moment over the run."""
    figure, ends = _over_time(
        results, logs, lambda variant: _column(logs, variant, "moment_variance"), "relative variance"
    )
    note = "Share of noise in Adam's first moment, which steers the updates: 0 is none, 1 and more is mostly noise."
    return Chart("moment-variance", "Noise in the updates", note, f"Relative variance: {ends}.", figure)


@styled
def alphas(variant: Variant, lines: Lines) -> Chart:
    """Mean residual step of each layer over the run, attention's and the MLP's."""
    from matplotlib.colors import LinearSegmentedColormap

    figure, panels = new_figure(1, 2)
    tokens = np.array([line["tokens"] for line in lines], float)
    values = np.array([line["alpha"] for line in lines], float)  # (times, layers, 2)
    layers = values.shape[1]
    shades = LinearSegmentedColormap.from_list("depth", ["#2578d1", "#9a7fb5", "#d98a1f"])(np.linspace(0, 1, layers))
    for axes, part, title in zip(panels, (0, 1), ("attention", "MLP"), strict=True):
        for layer in range(layers):
            axes.plot(tokens, values[:, layer, part], color=shades[layer], lw=1.3, label=f"layer {layer + 1}")
        axes.set_title(title)
        token_axis(axes, ticks=3)
    panels[0].set(ylabel="mean residual step alpha")
    handles = panels[0].get_lines()
    named = handles if layers <= 6 else [handles[0], handles[layers // 2], handles[-1]]
    figure.legend(handles=named, loc="outside upper left", ncols=min(4, len(named)), alignment="left")
    label = style_of(variant.name).label
    return Chart(
        f"alpha-{slug(variant.name)}",
        f"Residual steps of {label}",
        "How far each block moves the residual stream towards its output; mean over coordinates, one line a layer.",
        f"{label}: alpha from {values[0].mean():.3f} at the start to {values[-1].min():.3f} - {values[-1].max():.3f} "
        "over the layers at the end.",
        figure,
    )


def _over_time(
    results: Results, logs: Mapping[str, Lines], values: Callable[[Variant], Array], label: str, log: bool = False
) -> tuple[Any, str]:
    """A line a variant over the run, and the last values in words."""
    figure, axes = new_figure()
    ends = []
    for variant in _logged(results, logs):
        drawn, y = style_of(variant.name), values(variant)
        _line(axes, drawn, _column(logs, variant, "tokens"), y)
        ends.append(f"{drawn.label} {y[-1]:.3g}")
    if log:
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
    token_axis(axes)
    axes.set(ylabel=label)
    legend(figure, _logged(results, logs))
    return figure, f"{', '.join(ends)} at the end"


def _line(axes: Any, drawn: SeriesStyle, x: Array, y: Array) -> None:
    """Many points, and a marker now and then."""
    axes.plot(x, y, color=drawn.colour, lw=1.3, marker=drawn.marker, ms=4, markevery=max(1, len(x) // 6))


def _logged(results: Results, logs: Mapping[str, Lines]) -> list[Variant]:
    return [variant for variant in results.variants if variant.name in logs]


def _column(logs: Mapping[str, Lines], variant: Variant, key: str) -> Array:
    """One value of every line; NaN where it is null."""
    return np.array([line[key] for line in logs[variant.name]], float)


def _smooth(values: Array) -> Array:
    """Mean over a window of a fortieth of the values, at the edges over what there is of it."""
    half = len(values) // 80 + 1
    return np.array([values[max(0, at - half) : at + half + 1].mean() for at in range(len(values))])


# Ablation


@styled
def forest(results: Results, differences: Sequence[Difference], significant: Sequence[bool]) -> Chart:
    """Difference in loss of each variant from the baseline, with its interval."""
    variants = results.variants[1:]
    figure, axes = new_figure(height=1.2 + 0.32 * len(variants))
    axes.set_xlim(_forest_limits(differences))
    for row, (difference, known) in enumerate(zip(differences, significant, strict=True)):
        _forest_row(axes, row, difference, known)
    axes.axvline(0, color=INK, lw=1)
    axes.set_yticks(range(len(variants)), [textwrap.fill(style_of(variant.name).label, 26) for variant in variants])
    axes.set_ylim(len(variants) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.set(xlabel=f"difference in loss from {style_of(results.baseline.name).label} (nats)")
    return Chart(
        "ablation",
        "What each part is worth",
        "Right of the line: worse than the unchanged model. Bars are 95% intervals, each for itself; filled points are "
        "significant after Holm's correction. An arrow points beyond the scale.",
        "; ".join(
            f"{style_of(variant.name).label} {_signed(difference)}"
            for variant, difference in zip(variants, differences, strict=True)
        )
        + ".",
        figure,
    )


def _forest_limits(differences: Sequence[Difference]) -> tuple[float, float]:
    """Ends of the scale; a variant that is far worse than most does not flatten the others."""
    finite = [difference for difference in differences if math.isfinite(difference.mean)]
    most = np.quantile([abs(difference.mean) for difference in finite] or [0], 0.8, method="lower")
    usual = [item for item in finite if abs(item.mean) <= max(2 * LEAST_SPAN, 4 * float(most))]
    ends = [end for item in usual for end in (item.mean, item.low, item.high) if not math.isnan(end)]
    low, high = min(0, *ends, 0), max(LEAST_SPAN, *ends, 0)
    room = 0.08 * (high - low)
    return low - room, high + room


def _forest_row(axes: Any, row: int, difference: Difference, significant: bool) -> None:
    worse, better, unknown = "#d4320c", "#2578d1", "#777371"
    colour = unknown if not significant else worse if difference.mean > 0 else better
    low, high = axes.get_xlim()
    across = axes.get_yaxis_transform()
    axes.text(1.02, row, _signed(difference), va="center", fontsize=8, transform=across)
    if math.isnan(difference.mean):
        axes.plot(0.97, row, "x", color=worse, ms=7, mew=1.8, transform=across)
    elif not low < difference.mean < high:
        axes.plot(*((0.97, row, ">") if difference.mean > 0 else (0.03, row, "<")), color=colour, transform=across)
    else:
        axes.plot([difference.low, difference.high], [row, row], color=colour, lw=2)
        axes.plot(difference.mean, row, "o", color=colour, mfc=colour if significant else PAPER, mew=1.4, ms=6)


def _signed(difference: Difference) -> str:
    return "diverged" if math.isnan(difference.mean) else f"{difference.mean:+.3f}"
