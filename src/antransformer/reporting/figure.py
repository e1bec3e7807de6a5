"""Charts of reports: a figure with its texts, legends, axes; need the extra ``analysis``."""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

from antransformer.figure_style import DARK, save, style
from antransformer.reporting.labels import format_count, style_of

# A date in the file would make equal charts differ.
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Chart:
    """A figure with the texts that accompany it on the page.

    Attributes:
        name: file name without its extension.
        title: heading of a few words.
        caption: how to read the figure.
        alt: content of the figure in words and numbers, for screen readers.
        figure: matplotlib figure without a title.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Any

    def svg(self) -> str:
        """SVG text that follows the light or dark setting of the browser; equal figures give equal bytes."""
        buffer = io.StringIO()
        with style({"svg.hashsalt": self.name}):  # ids in the file are random otherwise
            self.figure.savefig(buffer, format="svg", transparent=True, metadata=NO_METADATA)
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        variables = {colour: f"--c{index}" for index, colour in enumerate(DARK)}
        for colour, variable in variables.items():
            text = text.replace(colour, f"var({variable})")
        light = "".join(f"{variable}:{colour};" for colour, variable in variables.items())
        dark = "".join(f"{variable}:{DARK[colour]};" for colour, variable in variables.items())
        theme = f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
        return text.replace('<style type="text/css">', f'<style type="text/css">{theme}', 1)

    def save_png(self, folder: Path) -> Path:
        """Write ``folder/NAME.png`` with the title inside the figure, and return its path."""
        path = folder / f"{self.name}.png"
        with style():
            for figure_legend in self.figure.legends:  # the legend is where a suptitle would be
                figure_legend.set_title(self.title)
            if not self.figure.legends:
                self.figure.suptitle(self.title)
            save(self.figure, path)
        return path


P = ParamSpec("P")


def styled(draw: Callable[P, Chart]) -> Callable[P, Chart]:
    """Decorate a function that draws a chart, so that it draws within ``style``."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Chart:
        with style():
            return draw(*args, **kwargs)

    return styled


def legend(figure: Any, names: Iterable[str], *lines: Any) -> None:
    """Add a legend of variants, by name, and of other lines that have a label, above the axes, so it covers no data."""
    from matplotlib.lines import Line2D

    styles = map(style_of, names)
    handles = [Line2D([], [], color=item.colour, marker=item.marker, label=item.label) for item in styles]
    handles += lines
    figure.legend(handles=handles, loc="outside upper left", ncols=min(3, len(handles)), alignment="left")


def mark_diverged(axes: Any, x: Iterable[float], colour: str, row: int) -> None:
    """Mark diverged runs with crosses at the top edge of the axes; each variant has its own ``row``."""
    for value in x:
        axes.plot(value, 0.98 - 0.06 * row, "x", color=colour, ms=7, mew=1.8, transform=axes.get_xaxis_transform())


def budget_ticks(axes: Any, budgets: Sequence[int]) -> None:
    """Make the x axis logarithmic, with a tick at each budget whose label has room."""
    axes.set_xscale("log")
    ticks = [budgets[0]]
    for budget in budgets:
        if (budget / ticks[-1]) ** 8 > budgets[-1] / budgets[0]:  # a label takes about an eighth of the axis
            ticks.append(budget)
    axes.set_xticks(ticks, [format_count(budget) for budget in ticks])
    axes.minorticks_off()
    axes.set_xlim(budgets[0] / 1.2, budgets[-1] * 1.2)


def token_axis(axes: Any, ticks: int = 5) -> None:
    """Make the x axis a linear axis of tokens."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: format_count(value))
    axes.set(xlabel="tokens")


def integer_ticks(axis: Any) -> None:
    """Restrict the ticks of an axis to at most five integers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(4, integer=True))


def log_ticks(axis: Any, unit: str = "") -> None:
    """Label a logarithmic axis with plain numbers, even where it spans less than a decade.

    The x axes of three or more panels in a row get fewer ticks, since they are narrow.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    narrow = axis.axis_name == "x" and axis.axes.get_gridspec().ncols > 2
    max_ticks, per_decade = (3, [1, 3]) if narrow else (6, [1, 2, 5])
    subs = per_decade if len(per_decade) * decades < 1.1 * max_ticks else [1]
    # Powers of ten alone would leave an axis of less than a decade without two labels.
    linear = MaxNLocator(max_ticks, steps=[1, 2, 5, 10])
    axis.set_major_locator(linear if decades < 0.9 else LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}{unit}")
