"""Display names, colours, markers and number formats; needs no matplotlib."""

import math
import re
import zlib
from dataclasses import dataclass

from antransformer.errors import ConfigError
from antransformer.models.registry import get


@dataclass(frozen=True)
class SeriesStyle:
    """How a variant is called and drawn."""

    label: str
    colour: str
    marker: str


# Colours distinct for colour-blind readers and on light and dark pages. The baseline is grey.
COLOURS_AND_MARKERS = {
    "gpt+": ("#777371", "s"),
    "ngpt": ("#2578d1", "^"),
    "angpt": ("#d4320c", "o"),
    "gpt": ("#ca5ba9", "D"),
    "ln-scaling": ("#08ac7c", "v"),
    "dyt": ("#ca8605", "P"),
    "gpt+-muon": ("#8168c8", "X"),
    "ngpt-muon": ("#6f9a1f", "<"),
    "angpt-muon": ("#17a2b8", "*"),
}
# For all other names, chosen by the name so that a variant looks the same in every chart.
FALLBACK = (("#9a9f2b", "h"), ("#b5651d", "p"), ("#5f7a8a", "d"), ("#a23b72", ">"), ("#3f8f5f", "8"))


def style_of(name: str) -> SeriesStyle:
    """Label, colour and marker of a variant: an architecture, one with the suffix ``-muon``, or any other name."""
    architecture = name.removesuffix("-muon")
    try:
        label = get(architecture).label + (" (Muon)" if architecture != name else "")
    except ConfigError:  # an ablation, or an architecture that is not installed here
        label = name
    fallback = FALLBACK[zlib.crc32(name.encode()) % len(FALLBACK)]
    return SeriesStyle(label, *COLOURS_AND_MARKERS.get(name, fallback))


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
