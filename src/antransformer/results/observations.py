"""Inputs of a scaling-law fit: losses of runs from sweeps, comparisons or CSV tables, and optima from CSV tables."""

import csv
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from antransformer.errors import DataError
from antransformer.files import require_file
from antransformer.results import comparison as comparison_results
from antransformer.results import sweep as sweep_results
from antransformer.results.comparison import Results, Variant, architecture_of
from antransformer.results.folder import RUNS
from antransformer.results.records import LARGEST, SMALLEST
from antransformer.results.sweep import Sweep
from antransformer.training import run_folder
from antransformer.training.config import LEGACY_DEFAULTS
from antransformer.training.defaults import horizon_factor

# Losses are comparable only where these values of ``setup`` are equal; the error message names them so.
SHARED = {"data_digest": "data", "validation_tokens": "validation windows", "context": "context length"}
# A law is of runs with the same values of these. Other settings depend on the size by default, or are searched.
TRAINING = (
    "optimizer",
    "separate_rates",
    "schedule",
    "decay_fraction",
    "min_lr_ratio",
    "ema",
    "precision",
    "document_mask",
)


@dataclass(frozen=True)
class Observation:
    """Loss of one finished run.

    Attributes:
        architecture: architecture's name, or any other name whose runs get their own laws.
        parameters: number of learnable parameters.
        tokens: tokens of the run.
        batch: tokens of one step.
        lr: peak learning rate at the length of the run.
        loss: validation loss in nats per token; infinite where the run diverged.
    """

    architecture: str
    parameters: float
    tokens: float
    batch: float
    lr: float
    loss: float


@dataclass(frozen=True)
class BestSettings:
    """Best batch size, in any one unit, and best learning rate of one model size."""

    architecture: str
    parameters: float
    batch: float
    lr: float


Row = TypeVar("Row", Observation, BestSettings)


@dataclass(frozen=True)
class Observations:
    """Runs to fit.

    Attributes:
        searches: runs that differ in learning rate and batch size only; the best settings are interpolated from them.
        runs: runs whose losses are fitted. For a sweep or a table these are the searches; for a comparison they are
            the measured runs, which have other seeds than its trials.
        training: values of ``TRAINING`` that all runs of an architecture have, as far as the results record them.
        separate: architectures to which a comparison gave several learning rates. Its trials are not in ``searches``,
            since ``lr`` was the rate of a part of the model.
        scaled: architectures with runs whose rates are scaled to their width: ``lr`` is the rate of another width.
    """

    searches: tuple[Observation, ...]
    runs: tuple[Observation, ...]
    training: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    separate: frozenset[str] = frozenset()
    scaled: frozenset[str] = frozenset()


def read_observations(paths: Sequence[Path]) -> Observations:
    """Read sweep folders, comparison folders and CSV tables into one set of observations.

    Raises:
        ConfigError: the config of a run cannot be read.
        DataError: a path cannot be read, is given twice, is an ablation, or was measured on other data or trained with
            other settings than another path.
    """
    searches: list[Observation] = []
    runs: list[Observation] = []
    folders: dict[Path, Sweep | Results] = {}
    trained: list[tuple[Path, str, Mapping[str, Any]]] = []  # path, architecture and settings of a run
    separate: set[str] = set()
    scaled: set[str] = set()
    seen: set[str] = set()
    for path in paths:
        real_path = os.path.realpath(path)  # Path.resolve raises on a loop of links
        if real_path in seen:
            raise DataError(f"{path} is given twice: its runs would count twice")
        seen.add(real_path)
        if (path / sweep_results.FILE).is_file():
            folders[path] = sweep = Sweep.load(path)
            rows = sweep_observations(sweep)
            searches += rows
            runs += rows
            scaled |= _scaled_by_width(sweep)
            trained += ((path, *settings) for settings in _sweep_settings(sweep, path))
        elif path.is_dir():
            folders[path] = comparison = _load_comparison(path)
            settings_of = {item.name: _variant_settings(item, comparison, path) for item in comparison.variants}
            try:
                searches += _trial_observations(comparison, settings_of)
                runs += _run_observations(comparison, settings_of)
                scaled |= {architecture_of(item) for item in comparison.variants if _is_scaled(settings_of[item.name])}
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path / comparison_results.FILE} lacks a value that a fit needs ({error})") from None
            separate |= {architecture_of(item) for item in comparison.variants if _has_separate_rates(item)}
            trained += ((path, architecture_of(item), settings_of[item.name]) for item in comparison.variants)
        else:
            rows = read_table(path, Observation)
            searches += rows
            runs += rows
    _check_shared(folders)
    training = _check_training(trained)
    return Observations(tuple(searches), tuple(runs), training, frozenset(separate), frozenset(scaled))


def _load_comparison(path: Path) -> Results:
    if not (path / comparison_results.FILE).is_file():
        raise DataError(f"{path} has no {sweep_results.FILE} and no {comparison_results.FILE}")
    comparison = Results.load(path)
    if comparison.kind == "ablate":
        raise DataError(f"{path} is an ablation, whose variants have one size: give sweeps or comparisons")
    return comparison


def _scaled_by_width(sweep: Sweep) -> set[str]:
    """Architectures with runs whose rates are scaled from another width."""
    rules = sweep.setup.get("lr_width")  # such as "angpt 128"; results of an earlier release have none
    if not isinstance(rules, list):
        return set()
    sizes = {(run.architecture, run.width) for run in sweep.runs}
    return {name for name, width in sizes if f"{name} {width}" not in rules and f"{name} 0" not in rules}


def _is_scaled(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get("lr_width")) and settings["lr_width"] != settings["model"]["width"]


def _sweep_settings(sweep: Sweep, path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Architecture and settings of one run of each cell: a later call may have added cells on another machine."""
    cells = {(run.architecture, run.size, run.tokens, run.batch): run.folder for run in sweep.runs}
    optimizer = sweep.setup.get("optimizer")
    return [(name, _run_settings(path / RUNS / run, optimizer, False)) for (name, *_), run in cells.items()]


def _variant_settings(variant: Variant, results: Results, path: Path) -> dict[str, Any]:
    """Settings of one run of a variant."""
    optimizer = results.setup.get("optimizers", {}).get(variant.name)
    separate = "embed_lr" in _searched_or_given(variant)
    return _run_settings(path / RUNS / variant.runs[0].folder, optimizer, separate)


def _run_settings(folder: Path, optimizer: str | None, separate_rates: bool) -> dict[str, Any]:
    """Settings of a run: those in its folder, unless that was deleted, and those that the results record."""
    settings: dict[str, Any] = {}
    if (folder / run_folder.CONFIG_FILE).is_file():
        settings = {**LEGACY_DEFAULTS, "decay_fraction": None, **run_folder.saved_settings(folder)}
    if settings.get("precision") == "auto":  # an earlier release did not save what it chose
        del settings["precision"]
    return {**settings, **({"optimizer": optimizer} if optimizer else {}), "separate_rates": separate_rates}


def _check_training(trained: Iterable[tuple[Path, str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the settings of each architecture; raises DataError if its runs differ in one of ``TRAINING``."""
    known: dict[str, dict[str, Any]] = {}
    for path, architecture, settings in trained:
        for name in (name for name in TRAINING if name in settings):
            value = settings[name]
            first = known.setdefault(architecture, {}).setdefault(name, value)
            if first != value:
                raise DataError(
                    f"{path} trains {architecture} with {name} {value}, other runs with {first}: one law does not hold "
                    "for both, so fit them separately"
                )
    return known


def sweep_observations(sweep: Sweep) -> list[Observation]:
    """Return every run of a sweep as an observation."""
    names = [field.name for field in fields(Observation)]
    return [Observation(**{name: getattr(run, name) for name in names}) for run in sweep.runs]


def _trial_observations(results: Results, settings_of: Mapping[str, Mapping[str, Any]]) -> list[Observation]:
    return [
        _observation(variant, results, trial.tokens, trial.value, trial.loss, settings_of[variant.name])
        for variant in results.variants
        if not _has_separate_rates(variant)
        for tokens in dict.fromkeys(trial.tokens for trial in variant.trials)
        for trial in variant.trials_of("lr", tokens)
    ]


def _has_separate_rates(variant: Variant) -> bool:
    return any(name.endswith("_lr") for name in _searched_or_given(variant))


def _searched_or_given(variant: Variant) -> set[str]:
    return {trial.setting for trial in variant.trials} | {name for item in variant.chosen for name in item.given}


def _run_observations(results: Results, settings_of: Mapping[str, Mapping[str, Any]]) -> list[Observation]:
    return [
        _observation(
            variant, results, run.tokens, variant.settings_at(run.tokens)["lr"], run.loss, settings_of[variant.name]
        )
        for variant in results.variants
        for run in variant.runs
    ]


def _observation(
    variant: Variant, results: Results, tokens: int, lr: float, loss: float, settings: Mapping[str, Any]
) -> Observation:
    batch = variant.settings.get("batch_tokens", results.setup["batch_tokens"])
    # With a horizon that the user gave, lr is the rate of a shorter run.
    factor = horizon_factor(settings.get("lr_horizon", 0), tokens // batch, settings.get("horizon_exponent", 0.0))
    return Observation(architecture_of(variant), *map(float, (variant.parameters, tokens, batch, lr * factor, loss)))


def _check_shared(folders: Mapping[Path, Sweep | Results]) -> None:
    """Raise DataError where two folders were measured on different text: one law cannot hold for both."""
    for first, path in itertools.pairwise(folders):
        for key, name in SHARED.items():
            if folders[first].setup.get(key) != folders[path].setup.get(key):
                raise DataError(f"{path} has another {key} ({name}) than {first}: fit them separately")


def column(rows: Iterable[Observation], name: str) -> NDArray[np.float64]:
    """Return one field of every row as an array."""
    return np.array([getattr(row, name) for row in rows], float)


def read_table(path: Path, row_type: Callable[..., Row]) -> list[Row]:
    """Read a CSV file with a header; columns that are not fields of ``row_type`` are ignored.

    Raises:
        DataError: the file is missing or empty, lacks a column, or has a value that is not a positive number.
    """
    try:
        require_file(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file, skipinitialspace=True, strict=True)
            columns = [field.name for field in fields(row_type)]  # type: ignore[arg-type]
            missing = [name for name in columns if name not in (lines.fieldnames or ())]
            if missing:
                raise DataError(
                    f"{path}: the header has no column {' or '.join(missing)}: it must have {','.join(columns)}"
                )
            repeated = [name for name in columns if list(lines.fieldnames or ()).count(name) > 1]
            if repeated:
                raise DataError(f"{path}: the header has several columns {' and '.join(repeated)}: keep one of each")
            rows = [
                row_type(
                    **{name: _value(line, name, f"{path}: row {number} (line {lines.line_num})") for name in columns}
                )
                for number, line in enumerate(lines, start=1)
            ]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV file ({error})") from error
    if not rows:
        raise DataError(f"{path}: no rows below the header")
    return rows


def _value(line: Mapping[str, str | None], name: str, where: str) -> str | float:
    """Return one field of a row; ``where`` begins the error message."""
    text = (line[name] or "").strip()
    if name == "architecture":
        if not text:
            raise DataError(f"{where}: the architecture is empty")
        return text
    try:
        value = float(text)
    except ValueError:
        raise DataError(f"{where}: {name} must be a number, got '{text}'") from None
    if not SMALLEST < value < LARGEST and not (value == math.inf and name == "loss"):
        raise DataError(f"{where}: {name} must be above 0 and finite, got {text}")
    return value
