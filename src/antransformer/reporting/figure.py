"""How the charts of a report look: colours, names of variants, axes; needs the extra ``analysis``.

A variant has one colour and one marker in all charts.
"""

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec, Protocol

from antransformer.extras import require
from antransformer.reporting.labels import (
    format_count,
    style_of,
)

# The colours of everything but data: for a light page, and what takes their place in an SVG on a dark one.
INK, GRID, PAPER = "#20242a", "#dde1e6", "#fdfdfe"
DARK = {INK: "#e3e6ea", GRID: "#3a4049", PAPER: "#191c21"}

SIZE = (4.7, 3.3)  # inches; text of 9 points is legible on a phone, where a chart is 340 pixels wide
RC_PARAMS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.3,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 9.3,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.fontsize": 9.3,
    "legend.title_fontsize": 11,
    "figure.titlesize": 11,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.fonttype": "path",  # the same letters in every browser
}

NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Chart:
    """A picture, and what is said beside it.

    Attributes:
        name: of its file, without the ending.
        title: a few words.
        note: how to read it.
        alt: what it shows, in words and numbers.
        figure: matplotlib's, without the title.
    """

    name: str
    title: str
    note: str
    alt: str
    figure: Any

    def svg(self) -> str:
        """As SVG that follows the light or dark setting of the page around it."""
        text = io.StringIO()
        with style({"svg.hashsalt": self.name}):  # the same results give the same bytes
            self.figure.savefig(text, format="svg", transparent=True, metadata=NO_METADATA)
        drawn = text.getvalue()
        drawn = drawn[drawn.index("<svg") :]
        names = {colour: f"--c{index}" for index, colour in enumerate(DARK)}
        for colour, name in names.items():
            drawn = drawn.replace(colour, f"var({name})")
        light = "".join(f"{name}:{colour};" for colour, name in names.items())
        dark = "".join(f"{name}:{DARK[colour]};" for colour, name in names.items())
        theme = f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
        return drawn.replace('<style type="text/css">', f'<style type="text/css">{theme}', 1)

    def save_png(self, folder: Path) -> Path:
        """Write ``folder/NAME.png``; the title goes into the figure, to stay."""
        path = folder / f"{self.name}.png"
        with style():
            for above in self.figure.legends:
                above.set_title(self.title)
            if not self.figure.legends:
                self.figure.suptitle(self.title)
            self.figure.savefig(path, dpi=200, facecolor="white")
        return path


P = ParamSpec("P")


def style(more: Mapping[Any, Any] | None = None) -> Any:
    """Matplotlib's settings for our charts, as a context."""
    return require("matplotlib", "analysis").rc_context({**RC_PARAMS, **(more or {})})


def styled(draw: Callable[P, Chart]) -> Callable[P, Chart]:
    """Draws within ``style``."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Chart:
        with style():
            return draw(*args, **kwargs)

    return styled


def new_figure(
    rows: int = 1,
    columns: int = 1,
    height: float = SIZE[1],
    width: float = SIZE[0],
    share: Literal["all", "row"] = "all",
) -> tuple[Any, Any]:
    """A figure, as wide as the page where nothing else is said, and its axes, which ``share`` the y axis or not."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, sharey=share)


class Named(Protocol):
    """What has a look: a variant, or its fit."""

    @property
    def name(self) -> str:
        """As ``look`` takes it."""


def legend(figure: Any, variants: Sequence[Named]) -> None:
    """Above the axes, where no line runs through it."""
    from matplotlib.lines import Line2D

    drawn = [style_of(variant.name) for variant in variants]
    handles = [Line2D([], [], color=item.colour, marker=item.marker, label=item.label) for item in drawn]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(3, len(handles)), alignment="left")


def mark_diverged(axes: Any, x: Iterable[float], colour: str, place: int) -> None:
    """Diverged runs, at the top edge; those of several variants below each other."""
    for at in x:
        axes.plot(at, 0.98 - 0.06 * place, "x", color=colour, ms=7, mew=1.8, transform=axes.get_xaxis_transform())


def budget_ticks(axes: Any, budgets: Sequence[int]) -> None:
    """A logarithmic axis with the budgets on it."""
    axes.set_xscale("log")
    shown = [budgets[0]]
    for budget in budgets:
        if (budget / shown[-1]) ** 8 > budgets[-1] / budgets[0]:  # labels need room
            shown.append(budget)
    axes.set_xticks(shown, [format_count(budget) for budget in shown])
    axes.minorticks_off()
    axes.set_xlim(budgets[0] / 1.2, budgets[-1] * 1.2)


def token_axis(axes: Any, ticks: int = 5) -> None:
    """A linear axis of tokens."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: format_count(value))
    axes.set(xlabel="tokens")


def whole_ticks(axis: Any) -> None:
    """Whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(4, integer=True))


def log_ticks(axis: Any, unit: str = "") -> None:
    """Plain numbers, enough of them: a logarithmic axis here often spans less than a decade.

    Of three panels in a row each has room for fewer.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    narrow = axis.axis_name == "x" and axis.axes.get_gridspec().ncols > 2
    most, each = (3, [1, 3]) if narrow else (6, [1, 2, 5])  # numbers in all, and in a decade
    subs = each if len(each) * decades < 1.1 * most else [1]
    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10]) if decades < 0.9 else LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}{unit}")
