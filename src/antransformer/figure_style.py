"""Matplotlib style of every figure: colours, sizes, axes; needs matplotlib, which is imported on first use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from antransformer.extras import require

# Colours of everything except data on a light page, and their replacements in an SVG on a dark page.
INK, GRID, PAPER = "#20242a", "#dde1e6", "#fdfdfe"
DARK = {INK: "#e3e6ea", GRID: "#3a4049", PAPER: "#191c21"}
SERIES = ("#2578d1", "#d4320c", "#08ac7c", "#8168c8")  # lines that are not variants, in order

SIZE = (4.7, 3.3)  # inches; makes text of 9 points legible on a phone, where a chart is 340 pixels wide
DPI = 200
RC_PARAMS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # shipped with matplotlib, so the same on every machine
    "font.size": 9.3,
    "text.parse_math": False,  # a name may contain dollar signs
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.linewidth": 0.6,
    "axes.prop_cycle": f"cycler('color', {list(SERIES)})",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
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
    "svg.fonttype": "path",  # same letters in every browser
}


def style(more: Mapping[Any, Any] | None = None, extra: str = "analysis") -> Any:
    """Context manager that applies these settings of matplotlib, and additional ones.

    Raises:
        MissingExtraError: matplotlib is not installed; the message names ``extra``.
    """
    require("matplotlib.figure", extra)
    return require("matplotlib", extra).rc_context({**RC_PARAMS, **(more or {})})


def new_figure(
    rows: int = 1,
    columns: int = 1,
    height: float = SIZE[1],
    width: float = SIZE[0],
    share: Literal["all", "row"] = "all",
) -> tuple[Any, Any]:
    """Create a figure and its axes.

    Args:
        rows, columns: number of panels.
        height, width: size in inches.
        share: panels that share a y axis.

    Returns:
        The matplotlib figure, and its axes as ``Figure.subplots`` returns them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, sharey=share)


def save(figure: Any, path: Path) -> None:
    """Write a figure on white paper; the suffix selects the format. Call it within ``style``."""
    figure.savefig(path, dpi=DPI, facecolor="white")


def reference_line(axes: Any, value: float, axis: Literal["x", "y"] = "y", label: str | None = None) -> None:
    """Draw a dashed line at a value that measurements are compared with."""
    draw = axes.axhline if axis == "y" else axes.axvline
    draw(value, color=INK, lw=1, ls="--", label=label)
