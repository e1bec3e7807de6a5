"""Display names, colours, markers and number formats; needs no matplotlib."""

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class SeriesStyle:
    """How a variant is called and drawn."""

    label: str
    colour: str
    marker: str


# Apart from each other for the colour-blind too, and against a light and a dark page; the baseline is grey.
STYLES = {
    "gpt+": SeriesStyle("GPT+", "#777371", "s"),
    "ngpt": SeriesStyle("nGPT", "#2578d1", "^"),
    "angpt": SeriesStyle("anGPT", "#d4320c", "o"),
    "gpt": SeriesStyle("GPT", "#ca5ba9", "D"),
    "ln-scaling": SeriesStyle("LN scaling", "#08ac7c", "v"),
    "dyt": SeriesStyle("DyT", "#ca8605", "P"),
    "gpt+-muon": SeriesStyle("GPT+ (Muon)", "#8168c8", "X"),
    "ngpt-muon": SeriesStyle("nGPT (Muon)", "#6f9a1f", "<"),
    "angpt-muon": SeriesStyle("anGPT (Muon)", "#17a2b8", "*"),
}


def style_of(name: str) -> SeriesStyle:
    """Label, colour and marker of a variant."""
    return STYLES.get(name, SeriesStyle(name, "#9a9f2b", "h"))


def format_count(number: float) -> str:
    """250K, 1.0M or 1.25M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= 0.9995 * size:
            text = f"{number / size:.3g}"
            return f"{text}.0{unit}" if len(text) == 1 else text + unit
    return f"{number:g}"


def display_name(setting: str) -> str:
    """A setting's name for a reader."""
    return {"lr": "learning rate", "muon_lr": "learning rate of Muon"}.get(setting, setting.rpartition(".")[2])


def slug(name: str) -> str:
    """For a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def time_unit(seconds: float) -> tuple[str, int]:
    """What to count so many seconds in, and how many of them it has."""
    return ("hours", 3600) if seconds > 4 * 3600 else ("minutes", 60) if seconds > 240 else ("seconds", 1)


def finite_or_diverged(value: float) -> str:
    """A loss with three decimals."""
    return f"{value:.3f}" if math.isfinite(value) else "diverged"
