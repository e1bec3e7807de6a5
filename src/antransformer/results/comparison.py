"""What an experiment measured: variants, their trials and their finished runs, kept as ``results.json``."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from antransformer.errors import DataError
from antransformer.files import read_json, replace_text
from antransformer.renamed import upgrade_flat

FILE = "results.json"
FORMAT = "antransformer-results"
VERSION = 2


@dataclass(frozen=True)
class Trial:
    """One run of a search for a setting.

    Attributes:
        setting: what was tried, ``lr`` or a hyperparameter of the architecture such as ``weight_decay``.
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
        seed: of weights and data order; equal seeds of two variants see the same batches.
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
class Variant:
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
        variants: the first is the baseline.
    """

    kind: str
    setup: dict[str, Any]
    budgets: tuple[int, ...]
    seeds: tuple[int, ...]
    trial_tokens: int
    variants: tuple[Variant, ...]

    @property
    def baseline(self) -> Variant:
        """What the others are compared with."""
        return self.variants[0]

    def save(self, folder: Path) -> Path:
        """Write ``results.json``; an infinite loss is null there."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        for variant in content["variants"]:
            for entry in (*variant["trials"], *variant["runs"]):
                entry.update({key: None for key, value in entry.items() if value == math.inf})
        path = folder / FILE
        replace_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
        return path

    def _require_whole(self) -> None:
        """Raise ValueError where a run is missing, or is none."""
        counts = (*self.budgets, *self.seeds, self.trial_tokens, *(item.parameters for item in self.variants))
        runs = [run for item in self.variants for run in item.runs]
        trials = [trial for item in self.variants for trial in item.trials]
        numbers = [value for run in runs for value in (run.loss, run.bits_per_byte, run.seconds_per_step)]
        numbers += [value for trial in trials for value in (trial.value, trial.loss)]
        names = [self.kind, *(item.name for item in self.variants)]
        names += [run.folder for run in runs] + [trial.folder for trial in trials]
        wanted = {(budget, seed) for budget in self.budgets for seed in self.seeds}
        if (
            self.kind not in ("compare", "ablate")
            or not all(type(count) is int and 0 <= count < 2**63 for count in counts)
            or not all(map(_is_number, numbers))
            or not all(isinstance(name, str) and ".." not in name for name in names)
            or not isinstance(self.setup, dict)
            or not wanted
            or len(self.variants) < 2
            or list(self.budgets) != sorted(set(self.budgets) - {0})
            or not all(wanted <= {(run.tokens, run.seed) for run in item.runs} for item in self.variants)
        ):
            raise ValueError("its runs are not those of an experiment")

    @classmethod
    def load(cls, folder: Path) -> "Results":
        """Read ``results.json``.

        Raises:
            DataError: it is missing or damaged.
        """
        path = folder / FILE
        try:
            content = read_json(path)
            version = content.pop("version")
            if content.pop("format") != FORMAT or version not in (1, VERSION):
                raise ValueError("another format or version")
            if version == 1:
                content["variants"] = content.pop("contenders")
                for entry in content["variants"]:
                    entry["settings"] = upgrade_flat(entry["settings"])
            variants = tuple(
                Variant(
                    **{
                        **entry,
                        "trials": tuple(Trial(**_finite_or_infinite(item)) for item in entry["trials"]),
                        "runs": tuple(Run(**_finite_or_infinite(item)) for item in entry["runs"]),
                    }
                )
                for entry in content.pop("variants")
            )
            content |= {"budgets": tuple(content["budgets"]), "seeds": tuple(content["seeds"])}
            results = cls(**content, variants=variants)
            results._require_whole()
            return results
        except OSError as error:
            raise DataError(f"{folder}: no results of a comparison in it ({FILE}: {error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: damaged or of another release ({error})") from error


def _is_number(value: Any) -> bool:
    return (type(value) in (int, float) and 0 <= value < math.inf) or value == math.inf


def _finite_or_infinite(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: math.inf if value is None else value for key, value in entry.items()}
