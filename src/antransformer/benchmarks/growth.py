"""Growth: how the time and the memory of a training step rise with width, layers, context and batch.

An exponent p says that something grows as size^p. That of the time stands beside the one that the count of operations
asks for over the same sizes, that of the memory beside the one of ``training.memory``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from antransformer.benchmarks.models import OURS, make, replace_architecture
from antransformer.benchmarks.timing import Mode, Row, alternate, compare, peak_memory, seconds
from antransformer.benchmarks.train_step import Settings, compiled, held, steps
from antransformer.models import ModelConfig
from antransformer.reporting.figure import INK, Chart, legend, log_ticks, new_figure, style, styled
from antransformer.reporting.labels import style_of
from antransformer.training.cost_model.memory import Layout, estimate_memory
from antransformer.training.cost_model.throughput import flops_per_token

AXES = ("width", "layers", "context", "batch")
FACTORS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Growth:
    """Exponents of one variant along one axis: over all sizes, and over the last doubling.

    Attributes:
        mode, axis, name: of what.
        time, end: measured, of the seconds of a step.
        asked, end_asked: of its operations.
        memory, memory_asked: of the bytes at the peak, measured and modelled.
    """

    mode: str
    axis: str
    name: str
    time: float
    asked: float
    end: float
    end_asked: float
    memory: float
    memory_asked: float


def bench_sweep(settings: Settings, note: Callable[[str], None]) -> list[Row]:
    """Time all variants at each size along each axis, the other sizes as in the settings.

    Raises:
        MissingExtraError: matplotlib, which draws it, is not installed.
    """
    style()
    return [row for mode in settings.modes for axis in AXES for row in along(settings, mode, axis, note)]


def along(settings: Settings, mode: Mode, axis: str, note: Callable[[str], None]) -> list[Row]:
    """The rows of one axis, of which all sizes and variants take turns."""
    shapes = {size: at(settings, axis, size) for size in sizes(settings, axis)}
    note(f"{mode}, {axis} {', '.join(map(str, shapes))}")
    made = {size: make(it.variants, it.model, it.device, note) for size, it in shapes.items()}
    calls, fixed = {}, {}
    for size, trainees in made.items():
        for name, trainee in compiled(trainees, mode).items():
            calls[f"{size} {name}"] = steps(trainee, shapes[size])
            fixed[f"{size} {name}"] = trainee
    timers = {key: partial(seconds, call, settings.device) for key, call in calls.items()}
    times = alternate(timers, settings.rounds)["all"]
    rows = []
    for size, it in shapes.items():
        tokens = it.batch * it.model.context
        mine = {name: times[f"{size} {name}"] for name in made[size]}
        for row in compare({"mode": mode, "axis": axis, "size": size}, mine, tokens, next(iter(mine))):
            key = f"{size} {row.variant}"
            rows.append(replace(row, memory=peak_memory(calls[key], it.device) + held(fixed[key])))
    return rows


def sizes(settings: Settings, axis: str) -> list[int]:
    """From that of the settings on, doubled."""
    base = settings.batch if axis == "batch" else getattr(settings.model, axis)
    return [factor * base for factor in FACTORS]


def at(settings: Settings, axis: str, size: int) -> Settings:
    """The settings with one size changed."""
    if axis == "batch":
        return replace(settings, batch=size)
    return replace(settings, model=ModelConfig(**{**settings.model.mapping(), axis: size}))


def growths(settings: Settings, rows: Sequence[Row]) -> list[Growth]:
    """Exponents of all that was measured by ``bench_sweep`` with these settings."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.task["mode"], row.task["axis"], row.variant), []).append(row)
    return [
        _growth(key, mine, [at(settings, row.task["axis"], row.task["size"]) for row in mine])
        for key, mine in found.items()
    ]


def _growth(key: tuple[str, str, str], rows: list[Row], shapes: list[Settings]) -> Growth:
    size = [row.task["size"] for row in rows]
    taken = [float(np.median(row.seconds)) for row in rows]
    asked = [operations(it) for it in shapes]
    needed = [modelled(it, key[2]) for it in shapes]
    return Growth(
        *key,
        time=exponent(size, taken),
        asked=exponent(size, asked),
        end=exponent(size[-2:], taken[-2:]),
        end_asked=exponent(size[-2:], asked[-2:]),
        memory=exponent(size, [row.memory or math.nan for row in rows]),
        memory_asked=exponent(size, needed),
    )


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """p of y = c x^p, by least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def operations(settings: Settings) -> float:
    """Of a step."""
    return settings.batch * settings.model.context * flops_per_token(settings.model)


def modelled(settings: Settings, variant: str) -> float:
    """Bytes of a step; a library's model counts as GPT+, whose shape it has."""
    model = replace_architecture(settings.model, variant if variant in OURS else "gpt+")
    return estimate_memory(model, Layout(micro_batch_size=settings.batch), settings.precision).total


@styled
def growth_chart(settings: Settings, rows: Sequence[Row]) -> Chart:
    """Seconds and memory of a step along each axis, in one mode; dashed, what the operations of the first would do."""
    figure, axes = new_figure(2, len(AXES), height=4.4, width=9.4, share="row")
    names = list(dict.fromkeys(row.variant for row in rows))
    for column, axis in enumerate(AXES):
        mine = [row for row in rows if row.task["axis"] == axis]
        for name in names:
            of_name = [row for row in mine if row.variant == name]
            size = [row.task["size"] for row in of_name]
            drawn = style_of(name)
            for place, y in enumerate(
                (
                    [float(np.median(row.seconds)) * 1e3 for row in of_name],
                    [(row.memory or 0) / 2**20 for row in of_name],
                )
            ):
                axes[place][column].plot(size, y, color=drawn.colour, marker=drawn.marker)
                if place == 0 and name == names[0]:
                    asked = np.array([operations(at(settings, axis, it)) for it in size])
                    axes[0][column].plot(size, asked / asked[-1] * y[-1], "--", color=INK, lw=1)
        for place, unit in enumerate(("ms a step", "MiB")):
            _logarithmic(axes[place][column], sizes(settings, axis))
            axes[place][column].set(xlabel=axis, ylabel="" if column else unit)
    legend(figure, [_Name(name) for name in names])
    each = "; ".join(
        f"{it.name} {it.axis}: time {it.time:.2f} where {it.asked:.2f} is asked for, memory {it.memory:.2f}"
        for it in growths(settings, rows)
    )
    note = "Dashed: in proportion to the operations, through the first variant's last point."
    return Chart(f"growth-{rows[0].task['mode']}", "Growth of a training step", note, f"Exponents: {each}.", figure)


@dataclass(frozen=True)
class _Name:
    name: str


def _logarithmic(axes: Any, ticks: list[int]) -> None:
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    log_ticks(axes.yaxis)
