"""Results of a comparison or an ablation, stored in ``results.json``: variants, trials and finished runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from antransformer.renamed import upgrade_flat
from antransformer.results.records import load_record, save_record

FILE = "results.json"
FORMAT = "antransformer-results"
VERSION = 5


@dataclass(frozen=True)
class Trial:
    """One run of a search for a setting.

    Attributes:
        setting: dotted name, such as ``lr`` or ``model.s_scale``.
        value: value of the setting.
        loss: validation loss in nats per token; infinite where the run diverged.
        folder: name of the run folder inside the experiment's ``runs``.
        tokens: budget of the search.
        pass_number: pass over all settings at this budget; each starts at the choice of the one before.
    """

    setting: str
    value: float
    loss: float
    folder: str
    tokens: int
    pass_number: int = 1


@dataclass(frozen=True)
class Run:
    """One measured run at the chosen settings.

    Attributes:
        tokens: token budget; the learning-rate schedule ends there.
        seed: seed of the weights and of the data order; equal seeds give two variants the same batches.
        loss: validation loss in nats per token; infinite where the run diverged.
        bits_per_byte: validation loss in bits per byte of text.
        seconds_per_step: median over the steps.
        folder: name of the run folder inside the experiment's ``runs``.
    """

    tokens: int
    seed: int
    loss: float
    bits_per_byte: float
    seconds_per_step: float
    folder: str


@dataclass(frozen=True)
class ChosenSettings:
    """Learning rates and searched settings of the runs at one budget.

    Attributes:
        tokens: budget of the runs.
        trial_tokens: budget of the search that chose the settings; 0 without a search.
        settings: values by dotted name.
        given: names of those that the user gave for this variant; they were not searched.
    """

    tokens: int
    trial_tokens: int
    settings: dict[str, Any]
    given: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """A variant and its runs.

    Attributes:
        name: unique name.
        settings: settings of the longest runs by dotted name.
        parameters: number of learnable parameters.
        trials: runs of the searches, at one budget or at every budget.
        runs: measured runs.
        chosen: settings of the runs at each budget.
    """

    name: str
    settings: dict[str, Any]
    parameters: int
    trials: tuple[Trial, ...]
    runs: tuple[Run, ...]
    chosen: tuple[ChosenSettings, ...]

    @property
    def seconds_per_step(self) -> float:
        """Median over the runs; infinite where all runs diverged before a measurement."""
        seconds = [run.seconds_per_step for run in self.runs if math.isfinite(run.seconds_per_step)]
        return float(np.median(seconds)) if seconds else math.inf

    def losses(self, budgets: Sequence[int], seeds: Sequence[int]) -> NDArray[np.float64]:
        """Return the validation losses, shape (budgets, seeds)."""
        table = {(run.tokens, run.seed): run.loss for run in self.runs}
        return np.array([[table[budget, seed] for seed in seeds] for budget in budgets])

    def trials_of(self, setting: str, tokens: int) -> list[Trial]:
        """Return the trials of one setting in the last pass at one search budget, in the order of their values."""
        trials = [trial for trial in self.trials if (trial.setting, trial.tokens) == (setting, tokens)]
        last = max((trial.pass_number for trial in trials), default=1)
        return sorted((trial for trial in trials if trial.pass_number == last), key=lambda trial: trial.value)

    def best_at_edge(self, setting: str, tokens: int) -> bool:
        """Whether the best of several values of a setting at a search budget is the lowest or highest that ran."""
        trials = self.trials_of(setting, tokens)
        best = min(trials, key=lambda trial: trial.loss).value
        return len(trials) > 1 and best in (trials[0].value, trials[-1].value)

    def settings_at(self, tokens: int) -> dict[str, Any]:
        """Return the settings of the runs at one budget by dotted name."""
        return self.settings | self._chosen_at(tokens).settings

    def search_budget(self, setting: str, tokens: int) -> int:
        """Return the budget of the search that chose a setting for the runs at ``tokens``; 0 if it was not searched."""
        trial_tokens = self._chosen_at(tokens).trial_tokens
        searched = any((trial.setting, trial.tokens) == (setting, trial_tokens) for trial in self.trials)
        return trial_tokens if searched else 0

    def has_given_rates(self, tokens: int) -> bool:
        """Whether a learning rate of the runs at one budget was given for this variant."""
        return any(name == "lr" or name.endswith("_lr") for name in self._chosen_at(tokens).given)

    def _chosen_at(self, tokens: int) -> ChosenSettings:
        return {item.tokens: item for item in self.chosen}[tokens]


def architecture_of(variant: Variant) -> str:
    """Name of a variant's architecture."""
    name: str = variant.settings.get("architecture", variant.name)
    return name


@dataclass(frozen=True)
class Results:
    """Results of an experiment.

    Attributes:
        kind: ``compare`` or ``ablate``.
        setup: values that all runs share, shown in the report: command, versions, machines, data, batch size, date.
        budgets: tokens of the runs, ascending.
        seeds: seeds of the runs.
        variants: the first is the baseline.

    Raises:
        ValueError: fewer than two variants, a missing run, missing settings of a budget, or unordered budgets.
    """

    kind: str
    setup: dict[str, Any]
    budgets: tuple[int, ...]
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]

    def __post_init__(self) -> None:
        if self.kind not in ("compare", "ablate"):
            raise ValueError(f"kind cannot be {self.kind!r}")
        if not self.budgets or list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError(f"budgets must ascend, got {self.budgets}")
        if not self.seeds or len(self.variants) < 2:
            raise ValueError("seeds or variants are missing")
        expected = {(budget, seed) for budget in self.budgets for seed in self.seeds}
        for variant in self.variants:
            if not expected <= {(run.tokens, run.seed) for run in variant.runs}:
                raise ValueError(f"runs of {variant.name} are missing")
            if not set(self.budgets) <= {item.tokens for item in variant.chosen}:
                raise ValueError(f"settings of {variant.name} at a budget are missing")

    @property
    def baseline(self) -> Variant:
        """The variant that the others are compared with."""
        return self.variants[0]

    def save(self, folder: Path) -> None:
        """Write ``results.json``; an infinite loss becomes null."""
        save_record(self, folder / FILE, FORMAT, VERSION)

    @classmethod
    def load(cls, folder: Path) -> "Results":
        """Read ``results.json`` of this or an earlier release.

        Raises:
            DataError: the file is missing or damaged.
        """
        return load_record(cls, folder / FILE, FORMAT, VERSION, UPGRADES)


def _upgrade_1(content: dict[str, Any]) -> None:
    """Version 1 had another key for the variants, and settings had the names on the left in ``renamed.py``."""
    content["variants"] = content.pop("contenders")
    for entry in content["variants"]:
        entry["settings"] = upgrade_flat(entry["settings"])


def _upgrade_2(content: dict[str, Any]) -> None:
    """Up to version 2, one search at ``trial_tokens`` chose the settings of all budgets."""
    trial_tokens = content.pop("trial_tokens")
    for entry in content["variants"]:
        settings, trials = entry["settings"], entry["trials"]
        names = {"lr", "muon_lr", *(trial["setting"] for trial in trials)}
        chosen = {name: value for name, value in settings.items() if name in names}
        entry["chosen"] = [
            {"tokens": tokens, "trial_tokens": trial_tokens if trials else 0, "settings": chosen}
            for tokens in content["budgets"]
        ]
        entry["trials"] = [{**trial, "tokens": trial_tokens} for trial in trials]


def _upgrade_3(content: dict[str, Any]) -> None:
    """Up to version 3, every search had one pass."""
    for entry in content["variants"]:
        entry["trials"] = [{"pass_number": 1, **trial} for trial in entry["trials"]]


def _upgrade_4(content: dict[str, Any]) -> None:
    """Up to version 4, no settings were given for one variant."""
    for entry in content["variants"]:
        entry["chosen"] = [{"given": [], **chosen} for chosen in entry["chosen"]]


UPGRADES = {1: _upgrade_1, 2: _upgrade_2, 3: _upgrade_3, 4: _upgrade_4}
