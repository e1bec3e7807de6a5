"""An experiment: several variants, tuned with equal effort, then trained at each budget with each seed.

All variants share the data, the order of batches, the batch size, the budgets and the validation windows. A search
tries the same number of values for each variant, spaced by the same factor around the variant's own default. Trials
have their own seed, so that no measured run was selected for a lucky seed.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from antransformer.comparison.statistics import SENSITIVITY_FACTOR
from antransformer.data import Dataset
from antransformer.errors import ConfigError
from antransformer.results.comparison import Results, Run, Trial, Variant
from antransformer.runs.provenance import provenance
from antransformer.runs.queue import Job, RunQueue, RunResult
from antransformer.runs.search import GridSearch, extension, grid_powers, neighbours, round_sig
from antransformer.runs.settings import fill_defaults, flatten, unflatten, value_of
from antransformer.training.config import TrainConfig, merge
from antransformer.training.trainer import check_data

LR_RATIO = 2.0  # between neighbouring learning rates of a grid
HYPERPARAMETER_RATIO = 3.0  # between neighbouring values of any other setting
TRIAL_SEED = 0


@dataclass(frozen=True)
class VariantSpec:
    """A variant before its settings are tuned.

    Attributes:
        name: unique name.
        settings: the variant's settings; they override the common settings.
        hyperparameter: dotted name of the setting that is tuned after the learning rate, such as ``model.s_scale``.
    """

    name: str
    settings: Mapping[str, Any]
    hyperparameter: str


@dataclass(frozen=True)
class Plan:
    """Plan of an experiment.

    Attributes:
        kind: ``compare`` or ``ablate``.
        common: settings of all runs.
        specs: variants; the first is the baseline.
        budgets: tokens of the measured runs, ascending.
        seeds: number of seeds at each budget.
        lr_trials: number of learning rates to try for each variant; 1 keeps the default.
        tuning_trials: number of values to try for each variant's hyperparameter; 1 keeps the default.
        trial_tokens: budget of the trials; 0 selects the middle budget, which favours neither short nor long runs.

    Raises:
        ConfigError: a number is below 1.
    """

    kind: str
    common: Mapping[str, Any]
    specs: Sequence[VariantSpec]
    budgets: Sequence[int]
    seeds: int = 3
    lr_trials: int = 1
    tuning_trials: int = 1
    trial_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("seeds", "lr_trials", "tuning_trials"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name.replace('_', ' ')} must be at least 1, got {getattr(self, name)}")
        if not self.trial_tokens:
            object.__setattr__(self, "trial_tokens", self.budgets[(len(self.budgets) - 1) // 2])

    def run_seeds(self) -> tuple[int, ...]:
        """Seeds of the measured runs; the seed of the trials is not among them."""
        return tuple(range(TRIAL_SEED + 1, TRIAL_SEED + 1 + self.seeds))


@dataclass
class VariantState:
    """A variant during the experiment: its tuned settings by dotted name, and the trials behind them."""

    spec: VariantSpec
    tuned: dict[str, Any] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)


class Experiment:
    """Runs a plan.

    Args:
        plan: the plan.
        dataset: verified data.
        queue: executes the runs.
        stage: called with a short name at the start of each stage.

    Raises:
        ConfigError: a setting of any run is wrong.
        DataError: the data does not fit the models.
    """

    def __init__(self, plan: Plan, dataset: Dataset, queue: RunQueue, stage: Callable[[str], None]) -> None:
        self.plan, self.dataset, self.queue, self.stage = plan, dataset, queue, stage
        self.states = [VariantState(spec) for spec in plan.specs]
        for state in self.states:  # a wrong setting must fail now, not after hours of runs
            for tokens in (plan.trial_tokens, *plan.budgets):
                check_data(self.config(state, tokens, TRIAL_SEED), dataset)

    def run(self) -> Results:
        """Tune all variants, then run every budget with every seed; raises the errors of ``RunQueue.run``."""
        started = time.monotonic()
        self.tune()
        self.stage("measured runs")
        # Variants alternate, so that other load on the machine slows all of them alike.
        jobs = {
            (state.spec.name, tokens, seed): self.job(state, tokens, seed)
            for tokens in self.plan.budgets
            for seed in self.plan.run_seeds()
            for state in self.states
        }
        results = self.queue.run(jobs.values())
        by_variant: dict[str, list[tuple[int, int, RunResult]]] = {}
        for (name, tokens, seed), job in jobs.items():
            by_variant.setdefault(name, []).append((tokens, seed, results[job.name]))
        return Results(
            kind=self.plan.kind,
            setup=self.setup(time.monotonic() - started, results.values()),
            budgets=tuple(self.plan.budgets),
            seeds=self.plan.run_seeds(),
            trial_tokens=self.plan.trial_tokens if any(state.trials for state in self.states) else 0,
            variants=tuple(self.variant(state, by_variant[state.spec.name]) for state in self.states),
        )

    def tune(self) -> None:
        """Search the learning rates and then each variant's hyperparameter, skipping a search with only one trial."""
        plan = self.plan
        if plan.lr_trials > 1:
            self.stage(f"learning rates, {plan.trial_tokens:,} tokens")
            for setting in ("lr", "muon_lr"):
                settings = {spec.name: setting for spec in plan.specs}
                self.search(settings, plan.lr_trials, LR_RATIO, SENSITIVITY_FACTOR)
        if plan.tuning_trials > 1:
            self.stage(f"hyperparameters, {plan.trial_tokens:,} tokens")
            settings = {spec.name: spec.hyperparameter for spec in plan.specs}
            self.search(settings, plan.tuning_trials, HYPERPARAMETER_RATIO)

    def search(
        self, settings: Mapping[str, str], trials: int, ratio: float, neighbour_factor: float | None = None
    ) -> None:
        """Choose one setting for each variant by the loss of trial runs, all of which have the seed of the trials.

        Args:
            settings: dotted name of the setting by variant; variants whose value is None have no such setting.
            trials: number of values of the grid.
            ratio: factor between neighbouring values.
            neighbour_factor: after the search, also try the best value divided and multiplied by this factor, which
                shows how much a badly chosen value costs.
        """
        tokens = self.plan.trial_tokens
        states = {state.spec.name: state for state in self.states}
        defaults = {
            name: value_of(self.config(state, tokens, TRIAL_SEED), settings[name]) for name, state in states.items()
        }
        grids = {
            name: [default * ratio**power for power in grid_powers(trials)]
            for name, default in defaults.items()
            if default is not None
        }

        def jobs_of(name: str, value: float) -> list[Job]:
            return [self.job(states[name], tokens, TRIAL_SEED, {settings[name]: round_sig(value)})]

        search = GridSearch(self.queue, jobs_of)
        search.run_grids(grids, lambda name, losses: extension(losses, trials, ratio))
        if neighbour_factor and grids:
            search.run({name: neighbours(search.losses(name), neighbour_factor) for name in grids})
        for name in grids:
            losses, setting = search.losses(name), settings[name]
            states[name].trials += [
                Trial(setting, round_sig(value), losses[value], search.results[name][value][0].name)
                for value in sorted(losses)
            ]
            states[name].tuned[setting] = round_sig(min(losses, key=lambda value: losses[value]))

    def config(
        self, state: VariantState, tokens: int, seed: int, settings: Mapping[str, Any] | None = None
    ) -> TrainConfig:
        """Return the complete settings of a run; ``settings`` by dotted name override the tuned ones."""
        merged = merge(self.plan.common, state.spec.settings)
        for setting, value in {**state.tuned, **(settings or {})}.items():
            merged = merge(merged, unflatten(setting, value))
        return fill_defaults({**merged, "tokens": tokens, "seed": seed}, self.dataset.vocab_size)

    def job(self, state: VariantState, tokens: int, seed: int, settings: Mapping[str, Any] | None = None) -> Job:
        """Return a run whose name lists all settings that may differ within a variant."""
        config = self.config(state, tokens, seed, settings)
        default_config = self.config(VariantState(state.spec), tokens, seed)
        parts = [state.spec.name, str(tokens), f"lr{config.lr:g}"]
        if config.muon_lr is not None:
            parts.append(f"muon{config.muon_lr:g}")
        hyperparameter = state.spec.hyperparameter
        value = value_of(config, hyperparameter)
        if value != value_of(default_config, hyperparameter):
            parts.append(f"{hyperparameter.rpartition('.')[2]}{value:g}")
        keep = seed == self.plan.run_seeds()[0] and tokens == max(self.plan.budgets)
        return Job("-".join([*parts, f"seed{seed}"]), config, keep)

    def variant(self, state: VariantState, runs: Sequence[tuple[int, int, RunResult]]) -> Variant:
        """Return a variant with its measured runs, each given as tokens, seed and result."""
        return Variant(
            name=state.spec.name,
            settings=self.reported_settings(state),
            parameters=runs[0][2].parameters,
            trials=tuple(state.trials),
            runs=tuple(
                Run(tokens, seed, result.loss, result.bits_per_byte, result.seconds_per_step, result.name)
                for tokens, seed, result in runs
            ),
        )

    def reported_settings(self, state: VariantState) -> dict[str, Any]:
        """Return the variant's own settings and those that are often tuned, by dotted name."""
        config = self.config(state, self.plan.budgets[-1], TRIAL_SEED)
        names = dict.fromkeys(("lr", "muon_lr", "warmup_fraction", "weight_decay", state.spec.hyperparameter))
        values = {name: value_of(config, name) for name in names}
        return flatten(state.spec.settings) | {name: value for name, value in values.items() if value is not None}

    def setup(self, seconds: float, results: Iterable[RunResult]) -> dict[str, Any]:
        """Return what all runs share, for the report; ``seconds`` is the wall time of this call."""
        config = self.config(self.states[0], self.plan.budgets[-1], TRIAL_SEED)
        return {
            **provenance(self.dataset, self.queue, seconds, results),
            "preset": config.preset,
            "width": config.model.width,
            "layers": config.model.layers,
            "context": config.model.context,
            "batch_tokens": config.batch_tokens,
            "validation_tokens": int(config.eval_tokens),
            "lr_trials": self.plan.lr_trials,
            "tuning_trials": self.plan.tuning_trials,
        }
