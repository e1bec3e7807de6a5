"""What a fit reads: losses of runs, from folders of sweeps and comparisons or a table, or the optima of a table."""

import csv
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from antransformer.errors import DataError
from antransformer.results import comparison as results
from antransformer.results import sweep as sweep_results
from antransformer.results.comparison import Results, Variant
from antransformer.results.sweep import LARGEST, SMALLEST, Sweep

# Without which losses do not compare.
SHARED = {"data_digest": "data", "validation_tokens": "held-out windows", "context": "context"}


@dataclass(frozen=True)
class Observation:
    """The loss of one finished run.

    Attributes:
        architecture: or any other name of what has laws of its own.
        parameters: all learnable numbers.
        tokens: the run's budget.
        batch: tokens of one step.
        lr: peak learning rate.
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
    """The best batch, in whatever unit, and learning rate of one size."""

    architecture: str
    parameters: float
    batch: float
    lr: float


Row = TypeVar("Row", Observation, BestSettings)


@dataclass(frozen=True)
class Observations:
    """Runs to fit.

    Attributes:
        searches: runs that differ in learning rate and batch only, among which the best settings are looked for.
        runs: those whose loss counts. In a comparison they have settings and seeds of their own; in a sweep and in a
            table they are the same.
    """

    searches: tuple[Observation, ...]
    runs: tuple[Observation, ...]


def read_observations(paths: Sequence[Path]) -> Observations:
    """Folders of sweeps and comparisons, and tables, together.

    Raises:
        DataError: one of them can not be read, is an ablation, or is of other data than another.
    """
    searches: list[Observation] = []
    runs: list[Observation] = []
    folders: dict[Path, Sweep | Results] = {}
    for path in paths:
        if (path / sweep_results.FILE).is_file():
            folders[path] = sweep = Sweep.load(path)
            rows = swept(sweep)
            searches += rows
            runs += rows
        elif path.is_dir():
            if not (path / results.FILE).is_file():
                raise DataError(f"{path}: neither a finished sweep nor a finished comparison in it")
            folders[path] = compared = Results.load(path)
            if compared.kind == "ablate":
                raise DataError(f"{path} is an ablation, whose variants have one size: give comparisons")
            try:
                searches += _searched(compared)
                runs += _measured(compared)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path}: its results lack what a fit needs ({error})") from None
        else:
            rows = read_table(path, Observation)
            searches += rows
            runs += rows
    _check_shared(folders)
    return Observations(tuple(searches), tuple(runs))


def swept(sweep: Sweep) -> list[Observation]:
    """All runs of a sweep."""
    names = [field.name for field in fields(Observation)]
    return [Observation(**{name: getattr(run, name) for name in names}) for run in sweep.runs]


def _searched(results: Results) -> list[Observation]:
    return [
        _observation(variant, results, results.trial_tokens, trial.value, trial.loss)
        for variant in results.variants
        for trial in variant.trials
        if trial.setting == "lr"
    ]


def _measured(results: Results) -> list[Observation]:
    return [
        _observation(variant, results, run.tokens, variant.settings["lr"], run.loss)
        for variant in results.variants
        for run in variant.runs
    ]


def _observation(variant: Variant, results: Results, tokens: int, lr: float, loss: float) -> Observation:
    batch = variant.settings.get("batch_tokens", results.setup["batch_tokens"])
    name = variant.settings.get("architecture", variant.name)
    return Observation(name, *map(float, (variant.parameters, tokens, batch, lr, loss)))


def _check_shared(folders: Mapping[Path, Sweep | Results]) -> None:
    """Losses on different text are not of one law."""
    for first, path in itertools.pairwise(folders):
        for key, name in SHARED.items():
            if folders[first].setup.get(key) != folders[path].setup.get(key):
                raise DataError(f"{path} was measured on other {name} than {first}: fit each alone")


def column(rows: Iterable[Observation], name: str) -> NDArray[np.float64]:
    """One number of every row."""
    return np.array([getattr(row, name) for row in rows], float)


def read_table(path: Path, row_type: Callable[..., Row]) -> list[Row]:
    """The rows of a CSV file with a header, whose columns are named as the fields of ``row_type``; others are ignored.

    Raises:
        DataError: it is missing, empty, lacks a column, or holds what is no positive number.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file, skipinitialspace=True, strict=True)
            columns = [field.name for field in fields(row_type)]  # type: ignore[arg-type]
            missing = [name for name in columns if name not in (lines.fieldnames or ())]
            if missing:
                raise DataError(
                    f"{path}: no column named {' or '.join(missing)} (a header with {','.join(columns)} is needed)"
                )
            rows = [
                row_type(
                    **{name: _value(line, name, f"{path}: row {number} (line {lines.line_num})") for name in columns}
                )
                for number, line in enumerate(lines, start=1)
            ]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: no CSV file ({error})") from error
    if not rows:
        raise DataError(f"{path}: no rows under the header")
    return rows


def _value(line: Mapping[str, str | None], name: str, where: str) -> str | float:
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
