"""Text of the settings ``data`` and ``data_from``: the sources of a mixture, with their weights."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from antransformer.errors import ConfigError

EXAMPLE = "web:0.7 code:0.3"
SMALLEST, LARGEST = 1e-9, 1e9  # weights, so that none is 0 after division by their sum


@dataclass(frozen=True)
class Part:
    """One source of a mixture.

    Attributes:
        source: folder of prepared data, or the name of built-in data.
        weight: positive number of training windows in proportion to the other sources.
    """

    source: str
    weight: float = 1.0


def parse_mixture(text: str, setting: str = "data") -> tuple[Part, ...]:
    """Read ``web:0.7 code:0.2 'my books:0.1'``, or the name of a single source.

    An existing folder is a single source, whatever its name.

    Args:
        text: shell words; weights may have any sum.
        setting: name of the setting, for messages.

    Raises:
        ConfigError: a weight is missing or out of range, or a source is given twice.
    """
    if _exists(text):
        return (Part(text),)
    try:
        words = shlex.split(text)
    except ValueError:
        words = [text]
    pairs = [_split(word) for word in words]
    if not pairs or (len(pairs) == 1 and pairs[0][1] is None):
        return (Part(words[0] if text.startswith(("'", '"')) and words else text),)
    parts = []
    for word, (source, weight) in zip(words, pairs, strict=True):
        if weight is None and source and len(pairs) > 1 and _exists(source):
            raise ConfigError(f"{setting}: {source} has no weight: give every source one, such as {EXAMPLE}")
        if weight is None or not source:
            raise ConfigError(
                f"{setting}: folder {text!r} does not exist, and {word!r} is not part of a mixture such as {EXAMPLE}"
            )
        if not SMALLEST <= weight <= LARGEST:
            raise ConfigError(
                f"{setting}: the weight of {source} must be from {SMALLEST:g} to {LARGEST:g}, got {weight:g}"
            )
        parts.append(Part(source, weight))
    names = [absolute(part.source) for part in parts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{setting}: {twice} is given twice: give each source once")
    return tuple(parts)


def parse_stage(text: str) -> tuple[float, tuple[Part, ...]]:
    """Read ``0.8 web:0.5 code:0.5``: the fraction of the run before a mixture, and the mixture.

    Raises:
        ConfigError: the fraction is not between 0 and 1, or the mixture is wrong or missing.
    """
    first, *rest = text.split(maxsplit=1)[:2] or [""]
    try:
        share = float(first)
    except ValueError:
        share = 0.0
    if not 0 < share < 1 or not rest:
        raise ConfigError(
            f"data_from must be a fraction of the run between 0 and 1, then data, such as 0.8 {EXAMPLE}, got {text!r}"
        )
    return share, parse_mixture(rest[0], "data_from")


def format_mixture(parts: Sequence[Part]) -> str:
    """Inverse of ``parse_mixture``: shell words, or the name of a single source."""
    if len(parts) == 1:
        return parts[0].source
    return " ".join(shlex.quote(f"{part.source}:{repr(part.weight).removesuffix('.0')}") for part in parts)


def absolute(source: str) -> str:
    """Absolute path of an existing file or folder; the name of built-in data as it is."""
    return os.path.realpath(source) if _exists(source) else source


def absolute_mixture(text: str) -> str:
    """The setting ``data`` with absolute paths."""
    return format_mixture([Part(absolute(part.source), part.weight) for part in parse_mixture(text)])


def absolute_stage(text: str) -> str:
    """The setting ``data_from`` with absolute paths."""
    share, parts = parse_stage(text)
    mixture = format_mixture([Part(absolute(part.source), part.weight) for part in parts])
    return f"{share!r} {mixture}"


def _exists(source: str) -> bool:
    try:
        return Path(source).exists()
    except OSError:  # a name that is too long
        return False


def _split(word: str) -> tuple[str, float | None]:
    """Source and weight of one word of a mixture; without a weight, None."""
    source, colon, weight = word.rpartition(":")
    try:
        return (source, float(weight)) if colon else (word, None)
    except ValueError:
        return word, None
