"""Growth of the time and memory of a training step with width, layers, context and batch.

An exponent p means that a quantity grows as size^p. The exponent of the time is compared with the
operation count's, the exponent of the memory with the prediction of ``training.cost_model.memory``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from antransformer.benchmarks.models import build_variants
from antransformer.benchmarks.settings import OUR_ARCHITECTURES, Mode, replace_architecture
from antransformer.benchmarks.timing import Benchmark, Row, alternate, make_rows, peak_memory, time_call
from antransformer.benchmarks.train_step import StepSettings, in_mode, make_step, state_bytes
from antransformer.figure_style import INK, new_figure, style
from antransformer.models import ModelConfig
from antransformer.reporting.figure import Chart, legend, log_ticks, styled
from antransformer.reporting.labels import style_of
from antransformer.training.cost_model.memory import Layout, estimate_memory
from antransformer.training.cost_model.throughput import flops_per_token

AXES = ("width", "layers", "context", "batch")
FACTORS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Growth:
    """Exponents of one variant along one axis.

    Attributes:
        mode: eager or compiled.
        axis: size that was varied.
        variant: name of the variant.
        time: measured exponent of the step time over all sizes.
        time_expected: exponent of the number of operations over all sizes.
        last_time: measured exponent of the step time over the last doubling.
        last_time_expected: exponent of the number of operations over the last doubling.
        memory: measured exponent of the peak memory.
        memory_expected: exponent of the memory model.
    """

    mode: str
    axis: str
    variant: str
    time: float
    time_expected: float
    last_time: float
    last_time_expected: float
    memory: float
    memory_expected: float


def bench_growth(settings: StepSettings, folder: Path, log: Callable[[str], None]) -> Benchmark:
    """Time training steps at several sizes along each axis, with all other sizes as in the settings.

    Args:
        settings: settings of the smallest sizes.
        folder: existing folder for one chart per mode.
        log: receives progress, skipped variants and the paths of charts.

    Returns:
        The benchmark ``step``, whose facts have the exponents as ``growth``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    style()  # fails before the measurements if matplotlib is missing
    rows = [row for mode in settings.modes for axis in AXES for row in _time_axis(settings, mode, axis, log)]
    for mode in settings.modes:
        # A variant that failed at a size has no exponents and no lines.
        failed = {row.variant for row in rows if row.problem and row.task["mode"] == mode}
        drawn = [row for row in rows if row.task["mode"] == mode and row.variant not in failed]
        if drawn:
            log(f"figure: {growth_chart(settings, drawn).save_png(folder)}")
    growth = [asdict(item) for item in exponents(settings, rows)]
    return Benchmark("step", {**settings.facts(rows[0].variant), "growth": growth}, rows)


def _time_axis(settings: StepSettings, mode: Mode, axis: str, log: Callable[[str], None]) -> list[Row]:
    """Rows of one axis; all sizes and variants are timed in one alternation."""
    by_size = {size: _resized(settings, axis, size) for size in _sizes(settings, axis)}
    log(f"{mode}, {axis} {', '.join(map(str, by_size))}")
    built = {
        size: build_variants(resized.variants, resized.model, resized.device, log) for size, resized in by_size.items()
    }
    setups = {size: in_mode(named, mode) for size, (named, _) in built.items()}
    steps = {
        (size, name): make_step(setup, by_size[size]) for size, named in setups.items() for name, setup in named.items()
    }
    timers = {f"{size} {name}": partial(time_call, step, settings.device) for (size, name), step in steps.items()}
    parts, failed = alternate(timers, settings.rounds, log)
    rows = []
    for size, resized in by_size.items():
        tokens = resized.batch * resized.model.context
        keys = {name: f"{size} {name}" for name in setups[size]}
        times = {name: parts["total"][key] for name, key in keys.items() if key not in failed}
        problems = built[size][1] | {name: failed[key] for name, key in keys.items() if key in failed}
        for row in make_rows(
            {"mode": mode, "axis": axis, "size": size}, times, tokens, problems=problems, strict=False
        ):
            if row.problem:
                rows.append(row)
                continue
            step_memory = peak_memory(steps[size, row.variant], resized.device)
            rows.append(replace(row, memory=step_memory + state_bytes(setups[size][row.variant])))
    return rows


def _sizes(settings: StepSettings, axis: str) -> list[int]:
    """Sizes along an axis: the size in the settings, times each of ``FACTORS``."""
    base = settings.batch if axis == "batch" else getattr(settings.model, axis)
    return [factor * base for factor in FACTORS]


def _resized(settings: StepSettings, axis: str, size: int) -> StepSettings:
    """Settings with another size along one axis."""
    if axis == "batch":
        return replace(settings, batch=size)
    return replace(settings, model=ModelConfig(**{**settings.model.mapping(), axis: size}))


def exponents(settings: StepSettings, rows: Sequence[Row]) -> list[Growth]:
    """Exponents of each mode, axis and variant, from rows measured with these settings."""
    grouped: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.task["mode"], row.task["axis"], row.variant), []).append(row)
    complete = {key: group for key, group in grouped.items() if not any(row.problem for row in group)}
    return [_exponents_of(settings, *key, group) for key, group in complete.items()]


def _exponents_of(settings: StepSettings, mode: str, axis: str, variant: str, rows: list[Row]) -> Growth:
    sizes = [row.task["size"] for row in rows]
    resized = [_resized(settings, axis, size) for size in sizes]
    seconds = [float(np.median(row.seconds)) for row in rows]
    operations = [_operations(item) for item in resized]
    return Growth(
        mode,
        axis,
        variant,
        time=exponent(sizes, seconds),
        time_expected=exponent(sizes, operations),
        last_time=exponent(sizes[-2:], seconds[-2:]),
        last_time_expected=exponent(sizes[-2:], operations[-2:]),
        memory=exponent(sizes, [row.memory or math.nan for row in rows]),
        memory_expected=exponent(sizes, [_modelled_bytes(item, variant) for item in resized]),
    )


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent p of y = c x^p, by least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _operations(settings: StepSettings) -> float:
    """FLOPs of one step."""
    return settings.batch * settings.model.context * flops_per_token(settings.model)


def _modelled_bytes(settings: StepSettings, variant: str) -> float:
    """Peak memory of a step according to the memory model; models of other libraries count as GPT+ of equal shape."""
    model = replace_architecture(settings.model, variant if variant in OUR_ARCHITECTURES else "gpt+")
    return estimate_memory(model, Layout(micro_batch_size=settings.batch), settings.dtype).total


@styled
def growth_chart(settings: StepSettings, rows: Sequence[Row]) -> Chart:
    """Time and memory of a step along each axis in one mode, with the growth of the number of operations."""
    figure, axes = new_figure(2, len(AXES), height=4.4, width=9.4, share="row")
    names = list(dict.fromkeys(row.variant for row in rows))
    dashed: dict[str, Any] = {"color": INK, "lw": 1, "label": "as the operation count"}
    for column, axis in enumerate(AXES):
        sizes = _sizes(settings, axis)
        time_panel, memory_panel = axes[0][column], axes[1][column]
        for name, width in zip(names, np.linspace(3.6, 1.4, len(names)), strict=True):
            group = [row for row in rows if (row.task["axis"], row.variant) == (axis, name)]
            milliseconds = [float(np.median(row.seconds)) * 1e3 for row in group]
            # Later lines are thinner, so that a line of equal values below them is seen.
            line = {"color": style_of(name).colour, "marker": style_of(name).marker, "lw": width, "ms": 3 + 1.5 * width}
            time_panel.plot(sizes, milliseconds, **line)
            memory_panel.plot(sizes, [(row.memory or 0) / 2**20 for row in group], **line)
            if name == names[0]:
                operations = np.array([_operations(_resized(settings, axis, size)) for size in sizes])
                (proportional,) = time_panel.plot(sizes, operations / operations[-1] * milliseconds[-1], "--", **dashed)
        for panel, unit in ((time_panel, "ms per step"), (memory_panel, "peak memory (MiB)")):
            _logarithmic(panel, sizes)
            panel.set(xlabel=axis, ylabel="" if column else unit)
    legend(figure, names, proportional)
    alt = "; ".join(
        f"{item.variant} {item.axis}: time {item.time:.2f}, expected {item.time_expected:.2f}, memory {item.memory:.2f}"
        for item in exponents(settings, rows)
    )
    caption = "Dashed: proportional to the number of operations, through the last point of the first variant."
    mode = rows[0].task["mode"]
    return Chart(f"growth-{mode}", f"Time and memory of a training step, {mode}", caption, f"Exponents: {alt}.", figure)


def _logarithmic(axes: Any, ticks: list[int]) -> None:
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    log_ticks(axes.yaxis)
