"""The grid search that comparisons and sweeps share: values to try, and when to extend the grid."""

from collections.abc import Iterable, Mapping
from typing import Any

from antransformer.training.config import TrainConfig

EXTENSIONS = 4  # values that a search may try beyond its grid


def grid_powers(trials: int) -> Iterable[int]:
    """Exponents around 0: 3 gives -1, 0, 1."""
    return range(-(trials // 2), trials - trials // 2)


def extension(losses: Mapping[float, float], trials: int, ratio: float) -> list[float]:
    """The next value to try: one beyond the best where that lies at an edge, else nothing.

    Among equals the lowest is the best: where all diverged, the next one is lower.
    """
    best = min(losses, key=lambda value: (losses[value], value))
    if len(losses) >= trials + EXTENSIONS:
        return []
    if best == min(losses):
        return [best / ratio]
    return [best * ratio] if best == max(losses) else []


def neighbours(losses: Mapping[float, float], factor: float) -> list[float]:
    """The values so many times below and above the best."""
    best = min(losses, key=lambda value: losses[value])
    return [best / factor, best * factor]


def round_sig(value: float) -> float:
    """To three digits, as it is written and used."""
    return float(f"{value:.3g}")


def value_of(config: TrainConfig, setting: str) -> Any:
    """The value of a setting by its dotted name."""
    value: Any = config
    for part in setting.split("."):
        value = getattr(value, part)
    return value


def unflatten(setting: str, value: Any) -> dict[str, Any]:
    """``model.s_scale`` as ``{"model": {"s_scale": value}}``."""
    first, _, rest = setting.partition(".")
    return {first: unflatten(rest, value) if rest else value}
