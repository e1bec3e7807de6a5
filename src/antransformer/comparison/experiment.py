"""An experiment: several variants, tuned with the same effort, then run at each budget with each seed.

Everybody has the same data, order of batches, batch size, tokens and validation windows. A search tries the same number
of values in the same ratios around each variant's own default, and goes on while the best lies at an edge. Trials
have a seed of their own, so that no measured run was chosen for its luck.
"""

import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from antransformer.comparison.statistics import SENSITIVITY_FACTOR
from antransformer.data import Dataset
from antransformer.errors import ConfigError
from antransformer.results.comparison import Results, Run, Trial, Variant
from antransformer.runs.queue import Job, RunQueue, RunResult, flatten
from antransformer.runs.search import extension, grid_powers, neighbours, round_sig, unflatten, value_of
from antransformer.training.config import TrainConfig, merge, resolve_config
from antransformer.training.trainer import check_data
from antransformer.version import __version__

LR_RATIO = 2.0
HYPERPARAMETER_RATIO = 3.0
TRIAL_SEED = 0
LINES = 40  # metrics lines and probes of a run


@dataclass(frozen=True)
class VariantSpec:
    """A variant before the experiment.

    Attributes:
        name: unique.
        settings: what it sets over the common settings.
        hyperparameter: a setting of its own, such as ``weight_decay`` or ``model.s_scale``, that may be searched as the
            learning rate is.
    """

    name: str
    settings: Mapping[str, Any]
    hyperparameter: str


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        kind: ``compare`` or ``ablate``.
        common: settings of all runs.
        variant: the first is the baseline.
        budgets: tokens of the measured runs.
        seeds: how many seeds a budget.
        lr_trials: values of the learning rate to try for each variant; 1 keeps the default.
        tuning_trials: the same for each variant's own hyperparameter, at the learning rate found.
        trial_tokens: budget of the trials; 0 stands for the middle one of the budgets, so that what is best there
            serves the shorter and the longer runs of everyone alike.

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
        """Seeds of the measured runs: all but that of the trials."""
        return tuple(range(TRIAL_SEED + 1, TRIAL_SEED + 1 + self.seeds))


@dataclass
class _State:
    """What is known of one variant so far."""

    spec: VariantSpec
    chosen: dict[str, Any] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)


class Experiment:
    """Runs a plan.

    Args:
        plan: what to run.
        dataset: verified data.
        queue: does the runs.
        stage: called with a few words at the start of each stage.

    Raises:
        ConfigError: a setting is wrong, for any of the runs.
        DataError: the data does not fit the models.
    """

    def __init__(self, plan: Plan, dataset: Dataset, queue: RunQueue, stage: Callable[[str], None]) -> None:
        self.plan, self.dataset, self.queue, self.stage = plan, dataset, queue, stage
        self.states = [_State(spec) for spec in plan.specs]
        for state in self.states:  # refuse what can not run before hours are spent on the rest
            for tokens in (plan.trial_tokens, *plan.budgets):
                check_data(self.config(state, tokens, TRIAL_SEED), dataset)

    def run(self) -> Results:
        """Search, then measure; raises as ``Queue.run``."""
        plan, started = self.plan, time.monotonic()
        if plan.lr_trials > 1:
            self.stage(f"learning rates, {plan.trial_tokens:,} tokens")
            self.search(lambda spec: "lr", plan.lr_trials, LR_RATIO, off=SENSITIVITY_FACTOR)
            self.search(lambda spec: "muon_lr", plan.lr_trials, LR_RATIO, off=SENSITIVITY_FACTOR)
        if plan.tuning_trials > 1:
            self.stage(f"each one's own hyperparameter, {plan.trial_tokens:,} tokens")
            self.search(lambda spec: spec.hyperparameter, plan.tuning_trials, HYPERPARAMETER_RATIO)
        self.stage("measured runs")
        jobs = {  # variants side by side, so that what else the machine does slows them alike
            (state.spec.name, tokens, seed): self.job(state, tokens, seed)
            for tokens in plan.budgets
            for seed in plan.run_seeds()
            for state in self.states
        }
        outcomes = self.queue.run(jobs.values())
        runs = {key: self.measured(key[1], key[2], outcomes[job.name]) for key, job in jobs.items()}
        variants = tuple(
            Variant(
                name=state.spec.name,
                settings=self.shown(state),
                parameters=outcomes[jobs[state.spec.name, plan.budgets[0], plan.run_seeds()[0]].name].parameters,
                trials=tuple(state.trials),
                runs=tuple(run for key, run in runs.items() if key[0] == state.spec.name),
            )
            for state in self.states
        )
        searched = plan.lr_trials > 1 or plan.tuning_trials > 1
        return Results(
            kind=plan.kind,
            setup=self.setup(time.monotonic() - started, outcomes.values()),
            budgets=tuple(plan.budgets),
            seeds=plan.run_seeds(),
            trial_tokens=plan.trial_tokens if searched else 0,
            variants=variants,
        )

    def search(
        self, setting_of: Callable[[VariantSpec], str], trials: int, ratio: float, off: float | None = None
    ) -> None:
        """Choose a setting for every variant that has it, by the loss of runs with the seed of the trials.

        With ``off`` the values so many times below and above the best are tried at last, which tells how much it costs
        to miss it.
        """
        centers = {}
        for state in self.states:
            center = value_of(self.config(state, self.plan.trial_tokens, TRIAL_SEED), setting_of(state.spec))
            if center is not None:
                centers[state.spec.name] = center
        states = [state for state in self.states if state.spec.name in centers]
        grids = {name: [center * ratio**power for power in grid_powers(trials)] for name, center in centers.items()}
        wanted = {name: list(grid) for name, grid in grids.items()}
        found: dict[str, dict[float, tuple[Job, RunResult]]] = {name: {} for name in grids}
        while any(wanted.values()):
            jobs = {
                (state.spec.name, value): self.job(
                    state, self.plan.trial_tokens, TRIAL_SEED, {setting_of(state.spec): round_sig(value)}
                )
                for state in states
                for value in wanted[state.spec.name]
            }
            outcomes = self.queue.run(jobs.values())
            for (name, value), job in jobs.items():
                found[name][value] = job, outcomes[job.name]
            losses = {name: {value: end.loss for value, (_, end) in tried.items()} for name, tried in found.items()}
            wanted = {name: extension(tried, trials, ratio) for name, tried in losses.items()}
            if off and not any(wanted.values()):
                wanted, off = {name: neighbours(tried, off) for name, tried in losses.items()}, None
        for state in states:
            tried, setting = found[state.spec.name], setting_of(state.spec)
            state.trials += [
                Trial(setting, round_sig(value), outcome.loss, job.name)
                for value, (job, outcome) in sorted(tried.items())
            ]
            state.chosen[setting] = round_sig(min(tried, key=lambda value: tried[value][1].loss))

    def config(self, state: _State, tokens: int, seed: int, settings: Mapping[str, Any] | None = None) -> TrainConfig:
        """Complete settings of one run."""
        own = merge(self.plan.common, state.spec.settings)
        for setting, value in {**state.chosen, **(settings or {})}.items():
            own = merge(own, unflatten(setting, value))
        return fill_defaults({**own, "tokens": tokens, "seed": seed}, self.dataset.vocab_size)

    def job(self, state: _State, tokens: int, seed: int, settings: Mapping[str, Any] | None = None) -> Job:
        """One run; its name holds what distinguishes it."""
        config, default = self.config(state, tokens, seed, settings), self.config(_State(state.spec), tokens, seed)
        parts = [state.spec.name, str(tokens), f"lr{config.lr:g}"]
        if config.muon_lr is not None:
            parts.append(f"muon{config.muon_lr:g}")
        hyperparameter = state.spec.hyperparameter
        if value_of(config, hyperparameter) != value_of(default, hyperparameter):
            parts.append(f"{hyperparameter.rpartition('.')[2]}{value_of(config, hyperparameter):g}")
        keep = seed == self.plan.run_seeds()[0] and tokens == max(self.plan.budgets)
        return Job("-".join([*parts, f"seed{seed}"]), config, keep)

    def measured(self, tokens: int, seed: int, outcome: RunResult) -> Run:
        """A finished run as a result."""
        return Run(tokens, seed, outcome.loss, outcome.bits_per_byte, outcome.seconds_per_step, outcome.name)

    def shown(self, state: _State) -> dict[str, Any]:
        """The settings of an variant that a reader wants to see."""
        config = self.config(state, self.plan.budgets[-1], TRIAL_SEED)
        names = dict.fromkeys(("lr", "muon_lr", "warmup_fraction", "weight_decay", state.spec.hyperparameter))
        shown = {name: value_of(config, name) for name in names}
        return flatten(state.spec.settings) | {name: value for name, value in shown.items() if value is not None}

    def setup(self, seconds: float, outcomes: Iterable[RunResult]) -> dict[str, Any]:
        """What all runs share, for the report; runs that were made elsewhere, or otherwise, are said."""
        config = self.config(self.states[0], self.plan.budgets[-1], TRIAL_SEED)
        return {
            **provenance(self.dataset, self.queue, seconds, outcomes),
            "preset": config.preset,
            "width": config.model.width,
            "layers": config.model.layers,
            "context": config.model.context,
            "batch_tokens": config.batch_tokens,
            "validation_tokens": int(config.eval_tokens),
            "lr_trials": self.plan.lr_trials,
            "tuning_trials": self.plan.tuning_trials,
        }


def provenance(dataset: Dataset, queue: RunQueue, seconds: float, outcomes: Iterable[RunResult]) -> dict[str, Any]:
    """Command, versions, machine and data of runs, for a report."""
    return {
        "command": shlex.join(["antransformer", *sys.argv[1:]]),
        "antransformer": __version__,
        "python": platform.python_version(),
        "made_on": sorted({outcome.machine for outcome in outcomes}),
        "workers": len(queue.devices),
        "data": str(dataset.path),
        "data_digest": dataset.digest,
        "tokenizer": f"{dataset.tokenizer_name}, {dataset.vocab_size} ids",
        "date": time.strftime("%Y-%m-%d"),
        "minutes_of_the_last_call": round(seconds / 60, 1),
    }


def fill_defaults(settings: Mapping[str, Any], vocab_size: int) -> TrainConfig:
    """``resolve`` for a run that is only looked at when it is done, with its metrics and probes along the way."""
    steps = resolve_config(settings, vocab_size).steps
    every = {"log_every": max(1, steps // LINES), "eval_every": steps, "keep_checkpoints": 1}
    return resolve_config({**settings, **every}, vocab_size)
