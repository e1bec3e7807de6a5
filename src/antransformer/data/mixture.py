"""Datasets that mix several data folders, with one mixture for the whole run or a second one for its end."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from antransformer.data.dataset import Dataset
from antransformer.data.mixture_spec import Part, absolute, format_mixture, parse_mixture, parse_stage
from antransformer.errors import ConfigError, DataError

PERIOD = 10_000  # positions with fixed numbers of windows of each source; weights are rounded to its inverse


def quotas(weights: Sequence[float]) -> NDArray[np.int64]:
    """Number of positions of each source in a period: weights times ``PERIOD``, rounded to that sum, at least 1.

    Raises:
        ConfigError: there are more sources than positions.
    """
    if len(weights) > PERIOD:
        raise ConfigError(f"a mixture has at most {PERIOD:,} sources, got {len(weights):,}")
    exact = np.asarray(weights) / np.sum(weights) * PERIOD
    counts: NDArray[np.int64] = np.maximum(1, np.floor(exact)).astype(np.int64)
    # The largest remainders get what is left; what is too much is taken from the largest quotas.
    order = np.argsort(counts - exact, kind="stable")
    for index in order[: max(0, PERIOD - counts.sum())]:
        counts[index] += 1
    while counts.sum() > PERIOD:
        counts[counts.argmax()] -= 1
    return counts


@dataclass(frozen=True)
class Mixture(Dataset):
    """Several datasets of one tokenizer; ``open_mixture`` makes one.

    The attributes of ``Dataset`` describe the first source, except for ``max_token``, the largest of all.

    Attributes:
        parts: all sources by label; sources of the first stage come first.
        stages: weights of all sources in each stage, 0 for a source that is not used.
        share: fraction of the run before the second stage; None if there is only one.
        spec: the mixture as text, without the second stage.
    """

    parts: Mapping[str, Dataset]
    stages: tuple[tuple[float, ...], ...]
    share: float | None
    spec: str

    @property
    def sources(self) -> Mapping[str, Dataset]:
        """Datasets of the mixture, by label."""
        return self.parts

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the sources in the first stage; their sum is 1."""
        return self.stages[0]

    @property
    def name(self) -> str:
        """Value of the setting ``data`` that opens the first stage."""
        return self.spec

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of all sources and the mixtures; independent of paths."""
        stages = [quotas([weight for weight in weights if weight]).tolist() for weights in self.stages]
        used = [[index for index, weight in enumerate(weights) if weight] for weights in self.stages]
        content = [[source.digest for source in self.parts.values()], stages, used, self.share]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def open_mixture(data: str, data_from: str | None, open_source: Callable[[str], Dataset]) -> Dataset:
    """Open the data of a run.

    Args:
        data: setting ``data``: a single source, or a mixture.
        data_from: setting ``data_from``: the mixture of a second stage.
        open_source: opens a folder or built-in data.

    Returns:
        The dataset of a single source, or a ``Mixture``.

    Raises:
        ConfigError: the text of a mixture is wrong.
        DataError: a source cannot be opened, sources have different tokenizers, or two hold the same tokens.
    """
    mixtures, share = [parse_mixture(data)], None
    if data_from is None and len(mixtures[0]) == 1:
        return open_source(mixtures[0][0].source)
    if data_from is not None:
        share, second = parse_stage(data_from)
        mixtures.append(second)
    paths = list(dict.fromkeys(absolute(part.source) for parts in mixtures for part in parts))
    sources = [open_source(path) for path in paths]
    for source in sources[1:]:
        _require_compatible(sources[0], source)
    _require_different(sources)
    first = {item.name: getattr(sources[0], item.name) for item in fields(Dataset)}
    return Mixture(
        **{**first, "max_token": max(source.max_token for source in sources)},
        parts=dict(zip(_labels(paths), sources, strict=True)),
        stages=tuple(_weights(parts, paths) for parts in mixtures),
        share=share,
        spec=format_mixture([Part(absolute(part.source), part.weight) for part in mixtures[0]]),
    )


def _weights(parts: Sequence[Part], paths: Sequence[str]) -> tuple[float, ...]:
    """Weights of all sources in one mixture, divided by their sum."""
    weights, total = {absolute(part.source): part.weight for part in parts}, sum(part.weight for part in parts)
    return tuple(weights.get(path, 0.0) / total for path in paths)


def _labels(paths: Sequence[str]) -> list[str]:
    """Short names of the sources: the names of their folders where those differ, otherwise the paths."""
    names = [Path(path).name for path in paths]
    return [name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)]


def _require_compatible(first: Dataset, other: Dataset) -> None:
    if first.tokenizer().encoding_rules() != other.tokenizer().encoding_rules():
        raise DataError(
            f"{first.path} and {other.path} have different tokenizers: prepare one with --tokenizer and the "
            "tokenizer.json of the other"
        )


def _require_different(sources: Sequence[Dataset]) -> None:
    known: dict[str, Path] = {}
    for source in sources:
        other = known.setdefault(source.digest, source.path)
        if other != source.path:
            raise DataError(f"{other} and {source.path} hold the same tokens: give only one of them")
