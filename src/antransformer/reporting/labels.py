"""Display names, colours, markers and number formats of reports; independent of matplotlib."""

import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from antransformer.errors import ConfigError
from antransformer.models.registry import get
from antransformer.training.optimizer_registry import OPTIMIZERS
from antransformer.training.recipes import variant_settings


@dataclass(frozen=True)
class SeriesStyle:
    """Label, colour and marker of one variant, the same in every chart."""

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
    "gpt+-normuon": ("#a0695a", "H"),
    "ngpt-normuon": ("#a3b18a", "d"),
    "angpt-normuon": ("#5b6ee1", ">"),
}
# A variant with a recipe: mixed with black or white by this fraction, and a letter as marker.
RECIPE_STYLES = {"paper": ("#000000", 0.35, "$P$"), "best": ("#ffffff", 0.3, "$B$")}
# For all other names, chosen by the name so that a variant looks the same in every chart.
FALLBACK = (("#9a9f2b", "h"), ("#b5651d", "p"), ("#5f7a8a", "d"), ("#a23b72", ">"), ("#3f8f5f", "8"))

RATES = {
    "lr": "learning rate",
    "embed_lr": "learning rate of the embedding",
    "head_lr": "learning rate of the head",
    "vector_lr": "learning rate of the vectors",
    **{spec.lr_setting: f"learning rate of {spec.label}" for spec in reversed(OPTIMIZERS.values()) if spec.lr_setting},
}


def style_of(name: str) -> SeriesStyle:
    """Label, colour and marker of a variant: an architecture, with or without suffixes, or another name."""
    settings = variant_settings(name)
    try:
        label = get(settings["architecture"]).label
    except ConfigError:  # an ablation, or an architecture that is not installed here
        label = name
    else:
        suffixes = [settings["recipe"]] if "recipe" in settings else []
        suffixes += [OPTIMIZERS[settings["optimizer"]].label] if "optimizer" in settings else []
        label += f" ({', '.join(suffixes)})" if suffixes else ""
    recipe = settings.pop("recipe", None)
    plain = "-".join(settings.values())
    fallback = FALLBACK[zlib.crc32(plain.encode()) % len(FALLBACK)]
    colour, marker = COLOURS_AND_MARKERS.get(plain, fallback)
    if recipe in RECIPE_STYLES:
        other, fraction, marker = RECIPE_STYLES[recipe]
        colour = _mixed(colour, other, fraction)
    return SeriesStyle(label, colour, marker)


def _mixed(colour: str, other: str, fraction: float) -> str:
    """Return a colour with a fraction of another, both as #rrggbb."""
    pairs = [(int(colour[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + fraction * (b - a)):02x}" for a, b in pairs)


def format_count(number: float) -> str:
    """Format a count with three significant digits and a unit, such as 250K, 1.0M or 1.25M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= 0.9995 * size:  # 999.5K rounds to 1.0M
            text = f"{number / size:.3g}"
            return f"{text}.0{unit}" if len(text) == 1 else text + unit
    return f"{number:g}"


def format_value(value: Any) -> str:
    """Format the value of a setting: integers with separators, six digits of other numbers, lists with commas."""
    if isinstance(value, list | tuple):
        return ", ".join(map(format_value, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {format_value(item)}" for name, item in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def finite_or_diverged(value: float) -> str:
    """Format a loss or a time with three decimals; NaN and infinity become ``diverged``."""
    return f"{value:.3f}" if math.isfinite(value) else "diverged"


def display_name(setting: str) -> str:
    """Display name of a setting, without the name of its group."""
    return RATES.get(setting, setting.rpartition(".")[2])


def slug(name: str) -> str:
    """Lower-case form of a name for use in file names."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def time_unit(seconds: float) -> tuple[str, int]:
    """Unit that suits a duration, and the length of that unit in seconds."""
    return ("hours", 3600) if seconds > 4 * 3600 else ("minutes", 60) if seconds > 240 else ("seconds", 1)
