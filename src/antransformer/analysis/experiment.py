"""An experiment: several contenders, tuned with the same effort, then run at each budget with each seed.

Everybody has the same data, order of batches, batch size, tokens and validation windows. A search tries the same number
of values in the same ratios around each contender's own default, and goes on while the best lies at an edge. Trials
have a seed of their own, so that no measured run was chosen for its luck.
"""

import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from antransformer import __version__
from antransformer.analysis.jobs import Job, Outcome, Queue, flat
from antransformer.analysis.results import Contender, Results, Run, Trial
from antransformer.analysis.statistics import SENSITIVITY_FACTOR
from antransformer.data import Dataset
from antransformer.errors import ConfigError
from antransformer.training.config import TrainConfig, merge, resolve
from antransformer.training.trainer import check_data

LR_RATIO = 2.0
KNOB_RATIO = 3.0
EXTENSIONS = 4  # values that a search may try beyond its grid
TRIAL_SEED = 0
LINES = 40  # metrics lines and probes of a run


@dataclass(frozen=True)
class Entrant:
    """A contender before the experiment.

    Attributes:
        name: unique.
        settings: what it sets over the common settings.
        knob: a setting of its own, such as ``weight_decay`` or ``model.s_scale``, that may be searched as the
            learning rate is.
    """

    name: str
    settings: Mapping[str, Any]
    knob: str


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        kind: ``compare`` or ``ablate``.
        common: settings of all runs.
        entrants: the first is the reference.
        budgets: tokens of the measured runs.
        seeds: how many seeds a budget.
        lr_trials: values of the learning rate to try for each entrant; 1 keeps the default.
        knob_trials: the same for each entrant's own knob, at the learning rate found.
        trial_tokens: budget of the trials; 0 stands for the middle one of the budgets, so that what is best there
            serves the shorter and the longer runs of everyone alike.

    Raises:
        ConfigError: a number is below 1.
    """

    kind: str
    common: Mapping[str, Any]
    entrants: Sequence[Entrant]
    budgets: Sequence[int]
    seeds: int = 3
    lr_trials: int = 1
    knob_trials: int = 1
    trial_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("seeds", "lr_trials", "knob_trials"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name.replace('_', ' ')} must be at least 1, got {getattr(self, name)}")
        if not self.trial_tokens:
            object.__setattr__(self, "trial_tokens", self.budgets[(len(self.budgets) - 1) // 2])

    def run_seeds(self) -> tuple[int, ...]:
        """Seeds of the measured runs: all but that of the trials."""
        return tuple(range(TRIAL_SEED + 1, TRIAL_SEED + 1 + self.seeds))


@dataclass
class _State:
    """What is known of one entrant so far."""

    entrant: Entrant
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

    def __init__(self, plan: Plan, dataset: Dataset, queue: Queue, stage: Callable[[str], None]) -> None:
        self.plan, self.dataset, self.queue, self.stage = plan, dataset, queue, stage
        self.states = [_State(entrant) for entrant in plan.entrants]
        for state in self.states:  # refuse what can not run before hours are spent on the rest
            for tokens in (plan.trial_tokens, *plan.budgets):
                check_data(self.config(state, tokens, TRIAL_SEED), dataset)

    def run(self) -> Results:
        """Search, then measure; raises as ``Queue.run``."""
        plan, started = self.plan, time.monotonic()
        if plan.lr_trials > 1:
            self.stage(f"learning rates, {plan.trial_tokens:,} tokens")
            self.search(lambda entrant: "lr", plan.lr_trials, LR_RATIO, off=SENSITIVITY_FACTOR)
            self.search(lambda entrant: "muon_lr", plan.lr_trials, LR_RATIO, off=SENSITIVITY_FACTOR)
        if plan.knob_trials > 1:
            self.stage(f"each one's own knob, {plan.trial_tokens:,} tokens")
            self.search(lambda entrant: entrant.knob, plan.knob_trials, KNOB_RATIO)
        self.stage("measured runs")
        jobs = {  # contenders side by side, so that what else the machine does slows them alike
            (state.entrant.name, tokens, seed): self.job(state, tokens, seed)
            for tokens in plan.budgets
            for seed in plan.run_seeds()
            for state in self.states
        }
        outcomes = self.queue.run(jobs.values())
        runs = {key: self.measured(key[1], key[2], outcomes[job.name]) for key, job in jobs.items()}
        contenders = tuple(
            Contender(
                name=state.entrant.name,
                settings=self.shown(state),
                parameters=outcomes[jobs[state.entrant.name, plan.budgets[0], plan.run_seeds()[0]].name].parameters,
                trials=tuple(state.trials),
                runs=tuple(run for key, run in runs.items() if key[0] == state.entrant.name),
            )
            for state in self.states
        )
        searched = plan.lr_trials > 1 or plan.knob_trials > 1
        return Results(
            kind=plan.kind,
            setup=self.setup(time.monotonic() - started, outcomes.values()),
            budgets=tuple(plan.budgets),
            seeds=plan.run_seeds(),
            trial_tokens=plan.trial_tokens if searched else 0,
            contenders=contenders,
        )

    def search(self, setting_of: Callable[[Entrant], str], trials: int, ratio: float, off: float | None = None) -> None:
        """Choose a setting for every entrant that has it, by the loss of runs with the seed of the trials.

        With ``off`` the values so many times below and above the best are tried at last, which tells how much it costs
        to miss it.
        """
        centers = {}
        for state in self.states:
            center = value_of(self.config(state, self.plan.trial_tokens, TRIAL_SEED), setting_of(state.entrant))
            if center is not None:
                centers[state.entrant.name] = center
        states = [state for state in self.states if state.entrant.name in centers]
        grids = {name: [center * ratio**power for power in grid_powers(trials)] for name, center in centers.items()}
        wanted = {name: list(grid) for name, grid in grids.items()}
        found: dict[str, dict[float, tuple[Job, Outcome]]] = {name: {} for name in grids}
        while any(wanted.values()):
            jobs = {
                (state.entrant.name, value): self.job(
                    state, self.plan.trial_tokens, TRIAL_SEED, {setting_of(state.entrant): rounded(value)}
                )
                for state in states
                for value in wanted[state.entrant.name]
            }
            outcomes = self.queue.run(jobs.values())
            for (name, value), job in jobs.items():
                found[name][value] = job, outcomes[job.name]
            losses = {name: {value: end.loss for value, (_, end) in tried.items()} for name, tried in found.items()}
            wanted = {name: extension(tried, trials, ratio) for name, tried in losses.items()}
            if off and not any(wanted.values()):
                wanted, off = {name: around(tried, off) for name, tried in losses.items()}, None
        for state in states:
            tried, setting = found[state.entrant.name], setting_of(state.entrant)
            state.trials += [
                Trial(setting, rounded(value), outcome.loss, job.name)
                for value, (job, outcome) in sorted(tried.items())
            ]
            state.chosen[setting] = rounded(min(tried, key=lambda value: tried[value][1].loss))

    def config(self, state: _State, tokens: int, seed: int, settings: Mapping[str, Any] | None = None) -> TrainConfig:
        """Complete settings of one run."""
        own = merge(self.plan.common, state.entrant.settings)
        for setting, value in {**state.chosen, **(settings or {})}.items():
            own = merge(own, nested(setting, value))
        return complete({**own, "tokens": tokens, "seed": seed}, self.dataset.vocab_size)

    def job(self, state: _State, tokens: int, seed: int, settings: Mapping[str, Any] | None = None) -> Job:
        """One run; its name holds what distinguishes it."""
        config, default = self.config(state, tokens, seed, settings), self.config(_State(state.entrant), tokens, seed)
        parts = [state.entrant.name, str(tokens), f"lr{config.lr:g}"]
        if config.muon_lr is not None:
            parts.append(f"muon{config.muon_lr:g}")
        knob = state.entrant.knob
        if value_of(config, knob) != value_of(default, knob):
            parts.append(f"{knob.rpartition('.')[2]}{value_of(config, knob):g}")
        keep = seed == self.plan.run_seeds()[0] and tokens == max(self.plan.budgets)
        return Job("-".join([*parts, f"seed{seed}"]), config, keep)

    def measured(self, tokens: int, seed: int, outcome: Outcome) -> Run:
        """A finished run as a result."""
        return Run(tokens, seed, outcome.loss, outcome.bits_per_byte, outcome.seconds_per_step, outcome.name)

    def shown(self, state: _State) -> dict[str, Any]:
        """The settings of an entrant that a reader wants to see."""
        config = self.config(state, self.plan.budgets[-1], TRIAL_SEED)
        names = dict.fromkeys(("lr", "muon_lr", "warmup", "weight_decay", state.entrant.knob))
        shown = {name: value_of(config, name) for name in names}
        return flat(state.entrant.settings) | {name: value for name, value in shown.items() if value is not None}

    def setup(self, seconds: float, outcomes: Iterable[Outcome]) -> dict[str, Any]:
        """What all runs share, for the report; runs that were made elsewhere, or otherwise, are said."""
        config = self.config(self.states[0], self.plan.budgets[-1], TRIAL_SEED)
        return {
            **made_with(self.dataset, self.queue, seconds, outcomes),
            "preset": config.preset,
            "width": config.model.width,
            "layers": config.model.layers,
            "context": config.model.context,
            "batch_tokens": config.batch_tokens,
            "validation_tokens": int(config.eval_tokens),
            "lr_trials": self.plan.lr_trials,
            "knob_trials": self.plan.knob_trials,
        }


def made_with(dataset: Dataset, queue: Queue, seconds: float, outcomes: Iterable[Outcome]) -> dict[str, Any]:
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


def complete(settings: Mapping[str, Any], vocab_size: int) -> TrainConfig:
    """``resolve`` for a run that is only looked at when it is done, with its metrics and probes along the way."""
    steps = resolve(settings, vocab_size).steps
    every = {"log_every": max(1, steps // LINES), "eval_every": steps, "keep_checkpoints": 1}
    return resolve({**settings, **every}, vocab_size)


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


def around(losses: Mapping[float, float], factor: float) -> list[float]:
    """The values so many times below and above the best."""
    best = min(losses, key=lambda value: losses[value])
    return [best / factor, best * factor]


def rounded(value: float) -> float:
    """To three digits, as it is written and used."""
    return float(f"{value:.3g}")


def value_of(config: TrainConfig, setting: str) -> Any:
    """The value of a setting by its dotted name."""
    value: Any = config
    for part in setting.split("."):
        value = getattr(value, part)
    return value


def nested(setting: str, value: Any) -> dict[str, Any]:
    """``model.s_scale`` as ``{"model": {"s_scale": value}}``."""
    first, _, rest = setting.partition(".")
    return {first: nested(rest, value) if rest else value}
