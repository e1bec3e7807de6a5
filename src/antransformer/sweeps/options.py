"""Check the options of a sweep: the values to try, and the folder to write to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from antransformer.data import Dataset
from antransformer.errors import ConfigError
from antransformer.models.config import preset_sizes
from antransformer.results.sweep import FILE, Sweep
from antransformer.settings import Count, convert
from antransformer.sweeps.sweep import SweepPlan
from antransformer.training.defaults import TOKENS_PER_PARAMETER

WIDTH_TOKENS = 2_000_000  # of every run if only the width differs


def grid_options(
    sizes: Sequence[str],
    widths: Sequence[Any] = (),
    batch_tokens: Sequence[Any] = (),
    lrs: Sequence[Any] = (),
    lr_trials: int | None = None,
    tokens: Sequence[Any] = (),
    tokens_per_param: Sequence[Any] = (),
) -> dict[str, Any]:
    """Return the values to try as keyword arguments of ``sweeps.sweep.plan``; values may be text, such as ``2.5M``.

    Raises:
        ConfigError: a size is unknown, a value has the wrong type, or two options exclude each other.
    """
    for name in sizes:  # an unknown size is refused before the default data is prepared, which takes minutes
        preset_sizes(name)
    rates = [] if list(lrs) == ["auto"] else positive("lrs", lrs, float)
    run_tokens = positive("tokens", tokens, Count)
    ratios = positive("tokens_per_param", tokens_per_param, float)
    if run_tokens and ratios:
        raise ConfigError("tokens and tokens_per_param exclude each other: give one of them")
    if rates and lr_trials:
        raise ConfigError("lr_trials needs lrs auto: omit one of them")
    if not run_tokens and not ratios:
        run_tokens, ratios = ([WIDTH_TOKENS], []) if widths else ([], [TOKENS_PER_PARAMETER])
    return {
        "widths": positive("widths", widths, int),
        "batches": positive("batch_tokens", batch_tokens, Count),
        "lrs": rates,
        "tokens": run_tokens,
        "ratios": ratios,
        "trials": lr_trials or 5,
    }


def positive(option: str, values: Sequence[Any], kind: type) -> list[Any]:
    """Return the values of an option as numbers above 0.

    Raises:
        ConfigError: a value is not such a number.
    """
    numbers = [convert(value, kind, option) for value in values]
    if any(number <= 0 for number in numbers):
        raise ConfigError(f"{option} must be above 0, got {' '.join(map(str, values))}")
    return numbers


def earlier_sweep(folder: Path, dataset: Dataset, plan: SweepPlan) -> Sweep | None:
    """Return the sweep in the folder, which this one extends, or None for a new folder.

    Raises:
        ConfigError: it was made with other data or settings.
        DataError: its file is damaged.
    """
    if not (folder / FILE).is_file():
        return None
    earlier = Sweep.load(folder)
    if earlier.setup.get("data_digest") != dataset.digest:
        raise ConfigError(f"{folder} holds a sweep of other data than {dataset.name}: choose another --out")
    saved, current = earlier.setup.get("settings", {}), plan.shared
    for key in sorted({*saved, *current}):
        old, new = (settings.get(key, "the default") for settings in (saved, current))
        if old != new:
            raise ConfigError(f"{folder} was made with {key} {old}, not {new}: choose another --out")
    return earlier
