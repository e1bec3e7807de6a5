"""Charts of an experiment's report: each function reads results and returns a ``Chart``."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from antransformer.comparison.findings import PairwiseSpeedup
from antransformer.comparison.statistics import Array, Difference
from antransformer.comparison.tuning import tuning_scope
from antransformer.figure_style import INK, PAPER, new_figure
from antransformer.reporting.figure import (
    Chart,
    budget_ticks,
    integer_ticks,
    legend,
    log_ticks,
    mark_diverged,
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
LEAST_SPAN = 0.05  # nats: a shorter axis would make negligible differences look large

Lines = Sequence[Mapping[str, Any]]  # metrics or probes of a run


# Loss and speedup of finished runs


@styled
def loss_by_tokens(results: Results) -> Chart:
    """Validation loss of the finished runs against their budgets."""
    figure, axes = new_figure()
    for variant in results.variants:
        _finished_runs(axes, variant, results, np.array(results.budgets, float))
    budget_ticks(axes, results.budgets)
    axes.set(xlabel="tokens of the run", ylabel="validation loss (nats per token)")
    legend(figure, [variant.name for variant in results.variants])
    return Chart(
        "loss-tokens",
        "Loss against tokens",
        "Each point is a finished run with its own budget. Small dots are single seeds, lines are means over seeds. "
        f"The runs have {tuning_scope(results)}.",
        _mean_losses(results),
        figure,
    )


@styled
def loss_by_seconds(results: Results) -> Chart:
    """Validation loss of the finished runs against training time."""
    figure, axes = new_figure()
    steps = np.array(results.budgets) / results.setup["batch_tokens"]
    unit, size = time_unit(steps[-1] * min(variant.seconds_per_step for variant in results.variants))
    for variant in results.variants:
        _finished_runs(axes, variant, results, steps * variant.seconds_per_step / size)
    axes.set_xscale("log")
    log_ticks(axes.xaxis)
    axes.set(xlabel=f"{unit} of training", ylabel="validation loss (nats per token)")
    legend(figure, [variant.name for variant in results.variants])
    step_times = ", ".join(
        f"{style_of(item.name).label} {finite_or_diverged(item.seconds_per_step)}" for item in results.variants
    )
    return Chart(
        "loss-seconds",
        "Loss against time",
        "The same runs against training time: the number of steps times the variant's median seconds per step.",
        f"Seconds per step: {step_times}. {_mean_losses(results)}",
        figure,
    )


def _finished_runs(axes: Any, variant: Variant, results: Results, x: Array) -> None:
    """Draw the losses of a variant: the mean over seeds, single seeds, and marks for diverged runs."""
    losses, style = variant.losses(results.budgets, results.seeds), style_of(variant.name)
    finished = np.isfinite(losses)
    means = np.where(finished.all(1), losses.mean(1), math.nan)
    axes.plot(x, means, color=style.colour, marker=style.marker, zorder=3)
    axes.plot(x[np.nonzero(finished)[0]], losses[finished], ".", color=style.colour, ms=3.5, alpha=0.7)
    mark_diverged(axes, x[~finished.all(1)], style.colour, results.variants.index(variant))


def _mean_losses(results: Results) -> str:
    """Return the mean losses of the longest runs as a sentence."""
    longest = results.budgets[-1:]
    losses = [
        f"{style_of(variant.name).label} {finite_or_diverged(float(variant.losses(longest, results.seeds).mean()))}"
        for variant in results.variants
    ]
    return f"Mean loss with {format_count(longest[0])} tokens: {', '.join(losses)}."


@styled
def speedup(pairs: Sequence[PairwiseSpeedup], budgets: Sequence[int], seconds: bool = False) -> Chart:
    """Speedup of several variants over the same baseline at each budget, with intervals.

    Args:
        pairs: speedups over one baseline.
        budgets: all budgets of the experiment.
        seconds: whether to compare seconds instead of tokens.
    """
    figure, axes = new_figure()
    for index, pair in enumerate(pairs):
        _speedup_points(axes, pair, seconds, x_factor=1.04 ** (index - (len(pairs) - 1) / 2))
    baseline = style_of(pairs[0].baseline.name)
    axes.axhline(1, color=baseline.colour, lw=1.2, ls="--")
    axes.set_yscale("log")
    low, high = axes.dataLim.intervaly
    axes.set_ylim(min(low, 0.8) / 1.05, max(high, 1.25) * 1.05)
    log_ticks(axes.yaxis, "x")
    budget_ticks(axes, budgets)
    unit = "seconds" if seconds else "tokens"
    axes.set(xlabel="tokens of the run", ylabel=f"speedup over {baseline.label} in {unit}")
    legend(figure, [pair.variant.name for pair in pairs])
    return Chart(
        f"speedup-{unit}",
        f"Speedup in {unit}",
        f"{unit.capitalize()} that {baseline.label} needs for the same loss, divided by the {unit} of the variant. "
        "Bars are 95% intervals. Hollow triangles are bounds. Up: the speedup is larger, since the longest run of "
        f"{baseline.label} does not reach the loss. Down: it is smaller, since its shortest run is already below it.",
        " ".join(_list_speedups(pair, seconds) for pair in pairs),
        figure,
    )


def _list_speedups(pair: PairwiseSpeedup, seconds: bool) -> str:
    ratios = ", ".join(
        f"{pair.format_ratio(point, point.ratio, seconds)} with {format_count(point.tokens)} tokens"
        for point in pair.points
    )
    return f"{style_of(pair.variant.name).label}: {ratios or 'diverged'}."


def _speedup_points(axes: Any, pair: PairwiseSpeedup, seconds: bool, x_factor: float) -> None:
    """Draw the speedups of a pair; ``x_factor`` shifts them, so that intervals of several variants do not overlap."""
    style = style_of(pair.variant.name)
    measured = [point for point in pair.points if 0 < point.ratio < math.inf]
    axes.plot(
        [point.tokens * x_factor for point in measured],
        [pair.clamp_to_bound(point, point.ratio, seconds) for point in measured],
        color=style.colour,
        lw=0.9,
        alpha=0.6,
    )
    for point in pair.points:
        x, y = point.tokens * x_factor, pair.clamp_to_bound(point, point.ratio, seconds)
        if not math.isnan(point.low):
            ends = [pair.clamp_to_bound(point, end, seconds) for end in (point.low, point.high)]
            axes.plot([x, x], ends, color=style.colour, lw=3, alpha=0.35, solid_capstyle="butt")
        marker = style.marker if point in measured else "^" if point.ratio else "v"
        axes.plot(x, y, marker, color=style.colour, mfc=style.colour if point in measured else PAPER, mew=1.4, ms=6)


# The search


@styled
def search(results: Results, setting: str) -> Chart:
    """Loss of the trials of the longest search against the values of one setting."""
    figure, axes = new_figure()
    tokens = max(trial.tokens for item in results.variants for trial in item.trials if trial.setting == setting)
    searched = [(item, trials) for item in results.variants if (trials := item.trials_of(setting, tokens))]
    for index, (variant, trials) in enumerate(searched):
        _trials(axes, style_of(variant.name), trials, index)
    if all(trial.value > 0 for _, trials in searched for trial in trials):
        axes.set_xscale("log")
        log_ticks(axes.xaxis)
    axes.margins(y=0.12)
    low, high = axes.get_ylim()
    padding = max(0, LEAST_SPAN - (high - low)) / 2
    axes.set_ylim(low - padding, high + padding)
    name, budget = display_name(setting), format_count(tokens)
    axes.set(xlabel=f"{name}, {budget} tokens", ylabel="validation loss (nats per token)")
    legend(figure, [variant.name for variant, _ in searched])
    best = [(style_of(item.name).label, min(trials, key=lambda trial: trial.loss)) for item, trials in searched]
    values = ", ".join(f"{label} {trial.value:g} (loss {finite_or_diverged(trial.loss)})" for label, trial in best)
    return Chart(
        f"search-{slug(name)}",
        f"Search: {name}",
        f"Trials with {budget} tokens. A ring marks the best trial, a cross at the top a diverged trial.",
        f"Best {name} with {budget} tokens: {values}.",
        figure,
    )


@styled
def best_by_budget(results: Results, setting: str) -> Chart:
    """Chosen value of one setting against the budget of its search."""
    figure, axes = new_figure()
    searched, texts = [], []
    for variant in results.variants:
        found = [item for item in variant.chosen if variant.search_budget(setting, item.tokens) == item.tokens]
        if not found:
            continue
        style, values = style_of(variant.name), [item.settings[setting] for item in found]
        axes.plot([item.tokens for item in found], values, color=style.colour, marker=style.marker)
        searched.append(variant)
        texts.append(
            f"{style.label} "
            + ", ".join(f"{value:g} at {format_count(item.tokens)}" for item, value in zip(found, values, strict=True))
        )
    if min(axes.dataLim.intervaly) > 0:
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
    budget_ticks(axes, results.budgets)
    name = display_name(setting)
    axes.set(xlabel="tokens of the search", ylabel=f"best {name}")
    legend(figure, [variant.name for variant in searched])
    return Chart(
        f"best-{slug(name)}",
        f"Best {name} by budget",
        "The best trial of the search at each budget. Neighbouring values of a grid differ by a constant factor.",
        f"Best {name}: {'; '.join(texts)}.",
        figure,
    )


def _trials(axes: Any, style: SeriesStyle, trials: Sequence[Trial], index: int) -> None:
    """Draw the trials of one variant; ``index`` is its row in the marks of diverged trials."""
    finished = [trial for trial in trials if math.isfinite(trial.loss)]
    values, losses = [trial.value for trial in finished], [trial.loss for trial in finished]
    axes.plot(values, losses, color=style.colour, marker=style.marker)
    mark_diverged(axes, [trial.value for trial in trials if trial not in finished], style.colour, index)
    if finished:
        best = int(np.argmin(losses))
        axes.plot(values[best], losses[best], "o", ms=12, mfc="none", mec=style.colour, mew=1.2)


# Metrics and probes during the runs


@styled
def training_curves(results: Results, logs: Mapping[str, Lines]) -> Chart:
    """Smoothed training loss of each variant's longest run with the first seed."""
    figure, axes = new_figure()
    ends, tops = [], []
    for variant in _logged(results, logs):
        tokens, losses = _column(logs, variant, "tokens"), _smooth(_column(logs, variant, "loss"))
        style = style_of(variant.name)
        stride = math.ceil(len(tokens) / CURVE_POINTS)
        _line(axes, style, tokens[::stride], losses[::stride])
        ends.append(f"{style.label} {finite_or_diverged(float(losses[-1]))}")
        tops.append(losses[len(losses) // 10])
    axes.set_ylim(top=float(np.nanmax(tops)))  # the high losses of the first steps would flatten the rest
    axes.margins(x=0.02)
    token_axis(axes)
    axes.set(ylabel="training loss (nats per token)")
    legend(figure, [variant.name for variant in _logged(results, logs)])
    return Chart(
        "training-curves",
        "Loss during training",
        f"Smoothed loss of the training batches, one run with {format_count(results.budgets[-1])} tokens for each "
        "variant. The learning rate decays until the end, so only the final losses are comparable.",
        f"Training loss at the end: {', '.join(ends)}.",
        figure,
    )


@styled
def residual_by_layer(results: Results, logs: Mapping[str, Lines]) -> Chart:
    """Norm of the residual stream after each block, at three times during training."""
    figure, panels = new_figure(1, 3)
    ends = []
    for variant in _logged(results, logs):
        norms, style = _column(logs, variant, "residual_norm"), style_of(variant.name)
        for axes, norm in zip(panels, (norms[0], norms[len(norms) // 2], norms[-1]), strict=True):
            axes.plot(norm, color=style.colour, marker=style.marker, ms=3.5)
        ends.append(f"{style.label} {norms[-1][0]:.3g} to {norms[-1][-1]:.3g}")
    for axes, title in zip(panels, ("start", "middle", "end"), strict=True):
        axes.set_title(title)
        axes.set_yscale("log")
        integer_ticks(axes.xaxis)
    log_ticks(panels[0].yaxis)
    panels[0].set(ylabel="norm of the residual stream")
    panels[1].set(xlabel="after block (0: embedding)")
    legend(figure, [variant.name for variant in _logged(results, logs)])
    return Chart(
        "residual-by-layer",
        "Residual stream by depth",
        "Mean norm of the residual stream after the embedding and after each block, at three times during training.",
        f"At the end of training, after the embedding and after the last block: {', '.join(ends)}.",
        figure,
    )


@styled
def residual_by_time(results: Results, logs: Mapping[str, Lines]) -> Chart:
    """Norm of the residual stream after the last block, during training."""

    def final_norm(variant: Variant) -> Array:
        return _column(logs, variant, "residual_norm")[:, -1]

    figure, ends = _over_time(results, logs, final_norm, "norm after the last block", log=True)
    note = "Mean norm of the residual stream after the last block, which is the input of the head."
    return Chart("residual-by-time", "Residual stream over time", note, f"After the last block: {ends}.", figure)


@styled
def row_norms(results: Results, logs: Mapping[str, Lines]) -> Chart:
    """Mean, smallest and largest norm of the weight vectors, during training."""

    def norms(variant: Variant, key: str) -> Array:
        return np.array([line["row_norm"][key] for line in logs[variant.name]], float)

    figure, ends = _over_time(results, logs, lambda variant: norms(variant, "mean"), "norm of a weight vector")
    (axes,) = figure.axes
    for variant in _logged(results, logs):
        tokens, colour = _column(logs, variant, "tokens"), style_of(variant.name).colour
        axes.fill_between(tokens, norms(variant, "min"), norms(variant, "max"), color=colour, alpha=0.15, lw=0)
    note = "Norms of all weight vectors of a model. The line is the mean; the band is the range."
    return Chart("row-norms", "Weight vectors over time", note, f"Mean norm of a weight vector: {ends}.", figure)


@styled
def moment_variance(results: Results, logs: Mapping[str, Lines]) -> Chart:
    """Relative variance of Adam's first moment, during training."""
    figure, ends = _over_time(
        results, logs, lambda variant: _column(logs, variant, "moment_variance"), "relative variance"
    )
    note = "Noise in Adam's first moment, relative to its size: 0 is no noise, about 1 or more is mostly noise."
    return Chart("moment-variance", "Noise in the updates", note, f"Relative variance: {ends}.", figure)


@styled
def alphas(variant: Variant, lines: Lines) -> Chart:
    """Mean residual step size of each layer during training: attention on the left, MLP on the right."""
    from matplotlib.colors import LinearSegmentedColormap

    figure, panels = new_figure(1, 2)
    tokens = np.array([line["tokens"] for line in lines], float)
    values = np.array([line["alpha"] for line in lines], float)  # (times, layers, 2)
    layers = values.shape[1]
    shades = LinearSegmentedColormap.from_list("depth", ["#2578d1", "#9a7fb5", "#d98a1f"])(np.linspace(0, 1, layers))
    for sublayer, (axes, title) in enumerate(zip(panels, ("attention", "MLP"), strict=True)):
        for layer in range(layers):
            axes.plot(tokens, values[:, layer, sublayer], color=shades[layer], lw=1.3, label=f"layer {layer + 1}")
        axes.set_title(title)
        token_axis(axes, ticks=3)
    panels[0].set(ylabel="mean residual step alpha")
    handles = panels[0].get_lines()
    labelled = handles if layers <= 6 else [handles[0], handles[layers // 2], handles[-1]]
    figure.legend(handles=labelled, loc="outside upper left", ncols=min(4, len(labelled)), alignment="left")
    label = style_of(variant.name).label
    return Chart(
        f"alpha-{slug(variant.name)}",
        f"Residual steps of {label}",
        "How far each sublayer moves the residual stream towards its output: mean over dimensions, one line per layer.",
        f"{label}: mean alpha {values[0].mean():.3f} at the start, {values[-1].min():.3f} to {values[-1].max():.3f} "
        "across layers at the end.",
        figure,
    )


def _over_time(
    results: Results, logs: Mapping[str, Lines], values: Callable[[Variant], Array], label: str, log: bool = False
) -> tuple[Any, str]:
    """Draw one line per variant against tokens; return the figure and the last values as text."""
    figure, axes = new_figure()
    ends = []
    for variant in _logged(results, logs):
        style, y = style_of(variant.name), values(variant)
        _line(axes, style, _column(logs, variant, "tokens"), y)
        ends.append(f"{style.label} {y[-1]:.3g}")
    if log:
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
    token_axis(axes)
    axes.set(ylabel=label)
    legend(figure, [variant.name for variant in _logged(results, logs)])
    return figure, f"{', '.join(ends)} at the end"


def _line(axes: Any, style: SeriesStyle, x: Array, y: Array) -> None:
    """Draw a line of many points with about six markers."""
    axes.plot(x, y, color=style.colour, lw=1.3, marker=style.marker, ms=4, markevery=max(1, len(x) // 6))


def _logged(results: Results, logs: Mapping[str, Lines]) -> list[Variant]:
    return [variant for variant in results.variants if variant.name in logs]


def _column(logs: Mapping[str, Lines], variant: Variant, key: str) -> Array:
    """Return one value of every line as an array; null becomes NaN."""
    return np.array([line[key] for line in logs[variant.name]], float)


def _smooth(values: Array) -> Array:
    """Moving average over a window of 1/40 of the values; the window is cut off at the ends."""
    half = len(values) // 80 + 1
    return np.array([values[max(0, index - half) : index + half + 1].mean() for index in range(len(values))])


# Ablation


@styled
def forest(results: Results, differences: Sequence[Difference], is_significant: Sequence[bool]) -> Chart:
    """Difference in loss of each variant from the baseline, with its interval."""
    variants = results.variants[1:]
    figure, axes = new_figure(height=1.2 + 0.32 * len(variants))
    axes.set_xlim(_forest_limits(differences))
    for row, (difference, filled) in enumerate(zip(differences, is_significant, strict=True)):
        _forest_row(axes, row, difference, filled)
    axes.axvline(0, color=INK, lw=1)
    axes.set_yticks(range(len(variants)), [textwrap.fill(style_of(variant.name).label, 26) for variant in variants])
    axes.set_ylim(len(variants) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.set(xlabel=f"difference in loss from {style_of(results.baseline.name).label} (nats)")
    return Chart(
        "ablation",
        "Effect of each part",
        "Right of the line: higher loss than the default. Bars are 95% intervals without correction for several tests; "
        "filled points are significant after Holm's correction. Arrows mark values outside the axis.",
        "; ".join(
            f"{style_of(variant.name).label} {_signed(difference)}"
            for variant, difference in zip(variants, differences, strict=True)
        )
        + ".",
        figure,
    )


def _forest_limits(differences: Sequence[Difference]) -> tuple[float, float]:
    """Return the ends of the axis; variants far worse than most are left out, since they would flatten the others."""
    finite = [difference for difference in differences if math.isfinite(difference.mean)]
    typical = float(np.quantile([abs(difference.mean) for difference in finite] or [0], 0.8, method="lower"))
    inside = [item for item in finite if abs(item.mean) <= max(2 * LEAST_SPAN, 4 * typical)]
    ends = [end for item in inside for end in (item.mean, item.low, item.high) if not math.isnan(end)]
    low, high = min(0, *ends, 0), max(LEAST_SPAN, *ends, 0)
    padding = 0.08 * (high - low)
    return low - padding, high + padding


def _forest_row(axes: Any, row: int, difference: Difference, significant: bool) -> None:
    """Draw the point and interval of one variant, or a mark where it diverged or is outside the axis."""
    worse, better, neutral = "#d4320c", "#2578d1", "#777371"
    colour = neutral if not significant else worse if difference.mean > 0 else better
    low, high = axes.get_xlim()
    across = axes.get_yaxis_transform()  # x from 0 to 1 across the axes, y in data coordinates
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
