"""What an experiment measured: contenders, their trials and their finished runs, kept as ``results.json``."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from antransformer.errors import DataError

FILE = "results.json"
FORMAT = "antransformer-results"
VERSION = 1


@dataclass(frozen=True)
class Trial:
    """One run of a search for a setting.

    Attributes:
        setting: what was tried, ``lr`` or a knob of the architecture such as ``weight_decay``.
        value: its value.
        loss: validation loss in nats per token; infinite where the run diverged.
        folder: the run's folder inside the experiment's.
    """

    setting: str
    value: float
    loss: float
    folder: str


@dataclass(frozen=True)
class Run:
    """One run at the chosen settings.

    Attributes:
        tokens: its budget; the run is finished, its schedule ends there.
        seed: of weights and data order; equal seeds of two contenders see the same batches.
        loss: validation loss in nats per token; infinite where the run diverged.
        bits_per_byte: the same per byte of text.
        seconds_per_step: median over the run.
        folder: the run's folder inside the experiment's.
    """

    tokens: int
    seed: int
    loss: float
    bits_per_byte: float
    seconds_per_step: float
    folder: str


@dataclass(frozen=True)
class Contender:
    """What is compared: an architecture, or a variant of one, with the settings that were chosen for it."""

    name: str
    settings: dict[str, Any]
    parameters: int
    trials: tuple[Trial, ...]
    runs: tuple[Run, ...]

    @property
    def seconds_per_step(self) -> float:
        """Median over its runs; infinite where none came far enough to measure it."""
        known = [run.seconds_per_step for run in self.runs if math.isfinite(run.seconds_per_step)]
        return float(np.median(known)) if known else math.inf

    def losses(self, budgets: Sequence[int], seeds: Sequence[int]) -> NDArray[np.float64]:
        """Validation losses, (budgets, seeds)."""
        table = {(run.tokens, run.seed): run.loss for run in self.runs}
        return np.array([[table[budget, seed] for seed in seeds] for budget in budgets])


@dataclass(frozen=True)
class Results:
    """A whole experiment.

    Attributes:
        kind: ``compare`` or ``ablate``.
        setup: what all runs share, for people: command, versions, device, data, batch, threads, dates.
        budgets: tokens of the runs, ascending.
        seeds: of the runs.
        trial_tokens: tokens of the trials; 0 without trials.
        contenders: the first is the reference.
    """

    kind: str
    setup: dict[str, Any]
    budgets: tuple[int, ...]
    seeds: tuple[int, ...]
    trial_tokens: int
    contenders: tuple[Contender, ...]

    @property
    def reference(self) -> Contender:
        """What the others are compared with."""
        return self.contenders[0]

    def save(self, folder: Path) -> Path:
        """Write ``results.json``; an infinite loss is null there."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        for contender in content["contenders"]:
            for entry in (*contender["trials"], *contender["runs"]):
                entry.update({key: None for key, value in entry.items() if value == math.inf})
        path = folder / FILE
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
        return path

    @classmethod
    def load(cls, folder: Path) -> "Results":
        """Read ``results.json``.

        Raises:
            DataError: it is missing or damaged.
        """
        path = folder / FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT or content.pop("version") != VERSION:
                raise ValueError("another format or version")
            contenders = tuple(
                Contender(
                    **{
                        **entry,
                        "trials": tuple(Trial(**_finite_or_infinite(item)) for item in entry["trials"]),
                        "runs": tuple(Run(**_finite_or_infinite(item)) for item in entry["runs"]),
                    }
                )
                for entry in content.pop("contenders")
            )
            content |= {"budgets": tuple(content["budgets"]), "seeds": tuple(content["seeds"])}
            return cls(**content, contenders=contenders)
        except OSError as error:
            raise DataError(f"{folder}: no results of a comparison in it ({FILE}: {error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: damaged or of another release ({error})") from error


def _finite_or_infinite(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: math.inf if value is None else value for key, value in entry.items()}
