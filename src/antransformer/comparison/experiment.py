"""An experiment: several variants, tuned with equal effort, then trained at each budget with each seed.

All variants share the data, the order of batches, the batch size, the budgets and the validation windows. Settings are
searched at every budget, one after another. A search tries the same number of values for each variant, spaced by the
same factor. At the shortest budget the values are around the variant's own default, and a second pass searches all
settings again around the choice of the first. At a longer budget they are around the choice of the next shorter one.
Trials have their own seed, so that no measured run was selected for a lucky seed.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from antransformer.comparison.statistics import SENSITIVITY_FACTOR
from antransformer.data import Dataset
from antransformer.errors import ConfigError
from antransformer.reporting.labels import display_name
from antransformer.results.comparison import ChosenSettings, Results, Run, Trial, Variant
from antransformer.runs.provenance import provenance
from antransformer.runs.queue import Job, RunQueue, RunResult
from antransformer.runs.search import EXTENSIONS, GridSearch, best_value, extension, grid_powers, neighbours, round_sig
from antransformer.runs.settings import fill_defaults, flatten, unflatten, value_of
from antransformer.training.config import TrainConfig, merge
from antransformer.training.data import check_data
from antransformer.training.learning_rates import given_rate
from antransformer.training.optimizer_registry import OPTIMIZERS
from antransformer.training.run_folder import CONFIG_FILE

LR_RATIO = 2.0  # between neighbouring learning rates of a grid
HYPERPARAMETER_RATIO = 3.0  # between neighbouring values of any other setting
SEPARATE_RATES = ("embed_lr", "head_lr", "vector_lr")  # derived from lr unless they are searched
RATE_SETTINGS = ("lr", *SEPARATE_RATES, "lr_horizon", "horizon_exponent")
TRIAL_SEED = 0


@dataclass(frozen=True)
class VariantSpec:
    """A variant before its settings are tuned.

    Attributes:
        name: unique name.
        settings: the variant's settings; they override the common settings.
        rates: learning rates that are searched first, in this order.
        hyperparameters: dotted names of the settings that are searched after them, such as ``model.s_scale``.
        by_budget: further settings of the variant at each budget, by its tokens; they override ``settings``.
        where: source of the variant's settings for messages; empty if its name alone gives them.
    """

    name: str
    settings: Mapping[str, Any]
    rates: tuple[str, ...]
    hyperparameters: tuple[str, ...]
    by_budget: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    where: str = ""

    @contextlib.contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Add ``where`` to the message of a ConfigError."""
        try:
            yield
        except ConfigError as error:
            raise ConfigError(f"{self.where}: {error}" if self.where else error) from error

    @property
    def given(self) -> frozenset[str]:
        """Dotted names of the settings that are given for this variant, which are not searched."""
        return frozenset(self.settings_of(*self.by_budget))

    def settings_of(self, *budgets: int) -> dict[str, Any]:
        """Settings by dotted name; where budgets differ, the last one decides."""
        settings = flatten(self.settings)
        for tokens in budgets:
            settings |= flatten(self.by_budget.get(tokens, {}))
        return settings

    def searched(self, settings: Sequence[str]) -> tuple[str, ...]:
        """Return the settings that are not given."""
        return tuple(name for name in settings if name not in self.given)


def learning_rates(optimizer: str) -> tuple[str, ...]:
    """Return the settings with the learning rates of an optimizer: ``lr``, and its own rate if it has one."""
    own = OPTIMIZERS[optimizer].lr_setting
    return ("lr", own) if own else ("lr",)


def derived_rates(optimizer: str) -> tuple[str, ...]:
    """Return the settings that take parameters out of ``lr``, so that each part of the model has its own rate.

    ``lr`` stays the rate of the block matrices or, with an optimizer that has its own rate for these, of the vectors.
    """
    return tuple(rate for rate in SEPARATE_RATES if rate != "vector_lr" or not OPTIMIZERS[optimizer].lr_setting)


@dataclass(frozen=True)
class Round:
    """Search for one setting of each variant at one budget.

    Attributes:
        settings: dotted name of the setting by variant, without the variants that have no such setting.
        trials: number of values of the grid.
        ratio: factor between neighbouring values.
        neighbour_factor: after the search, also try the best value divided and multiplied by this factor, which shows
            how much a badly chosen value costs.
        pass_number: 1, or 2 in the second pass over the settings of the shortest budget.
    """

    settings: Mapping[str, str]
    trials: int
    ratio: float
    neighbour_factor: float | None = None
    pass_number: int = 1


@dataclass(frozen=True)
class Plan:
    """Plan of an experiment.

    Attributes:
        kind: ``compare`` or ``ablate``.
        common: settings of all runs.
        specs: variants; the first is the baseline.
        budgets: tokens of the measured runs, ascending.
        seeds: number of seeds at each budget.
        lr_trials: number of values to try for each learning rate of a variant; 1 keeps the defaults.
        tuning_trials: number of values to try for each hyperparameter of a variant; 1 keeps the defaults.
        trial_tokens: budget of the only search, whose choice holds at all budgets; 0 searches at every budget.

    Raises:
        ConfigError: a number is below 1, or a searched setting is given for all runs.
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
        given = flatten(self.common)
        _require_horizon(given.keys())
        for spec in self.specs:
            with spec.named_in_errors():
                _require_horizon(given.keys() | spec.given)
        for setting in (name for part in self._one_pass() for name in part.settings.values()):
            if setting in given:
                raise ConfigError(f"{setting} is searched for each variant and cannot be set for all runs: omit it")

    def run_seeds(self) -> tuple[int, ...]:
        """Seeds of the measured runs; the seed of the trials is not among them."""
        return tuple(range(TRIAL_SEED + 1, TRIAL_SEED + 1 + self.seeds))

    def search_budget(self, tokens: int) -> int:
        """Budget of the search that chooses the settings of the runs at ``tokens``."""
        return self.trial_tokens or tokens

    def search_budgets(self) -> list[int]:
        """Budgets of all searches, ascending."""
        return sorted({self.search_budget(tokens) for tokens in self.budgets})

    def rounds(self, tokens: int) -> list[Round]:
        """Searches at one search budget, in order: learning rates, then hyperparameters.

        The shortest budget has two passes: the best value of a setting depends on those searched after it.
        """
        once = list(self._one_pass())
        if len(once) < 2 or tokens != self.search_budgets()[0]:
            return once
        first = [replace(part, neighbour_factor=None) for part in once]
        return first + [replace(part, pass_number=2) for part in once]

    def _one_pass(self) -> Iterator[Round]:
        if self.lr_trials > 1:
            for settings in _by_position({spec.name: spec.searched(spec.rates) for spec in self.specs}):
                yield Round(settings, self.lr_trials, LR_RATIO, SENSITIVITY_FACTOR)
        if self.tuning_trials > 1:
            for settings in _by_position({spec.name: spec.searched(spec.hyperparameters) for spec in self.specs}):
                yield Round(settings, self.tuning_trials, HYPERPARAMETER_RATIO)

    def runs_of(self, name: str, most: bool = False) -> dict[int, int]:
        """Return the fewest runs of a variant at each budget, or the most.

        With the fewest, the second pass confirms the values of the first, so its grids have run before, except that of
        ``lr``: in the first pass the separate rates follow it. With the most, no value is confirmed, and every grid is
        extended as far as it may be.
        """
        spec = next(spec for spec in self.specs if spec.name == name)
        separate = not {*SEPARATE_RATES}.isdisjoint(spec.searched(spec.hyperparameters))
        counts: Counter[int] = Counter()
        for tokens in self.search_budgets():
            for index, part in enumerate(part for part in self.rounds(tokens) if name in part.settings):
                if part.pass_number == 1 or most or (separate and part.settings[name] == "lr"):
                    # After the first round, the middle of a grid is the best trial of the round before.
                    counts[tokens] += part.trials - (index > 0)
                counts[tokens] += (2 if part.neighbour_factor else 0) + (EXTENSIONS if most else 0)
        counts.update(dict.fromkeys(self.budgets, self.seeds))
        return dict(counts)


def _require_horizon(names: Set[str]) -> None:
    """Raise ``ConfigError`` if the names of settings hold ``horizon_exponent`` without ``lr_horizon``."""
    if "horizon_exponent" in names and "lr_horizon" not in names:
        raise ConfigError("horizon_exponent needs lr_horizon here, since searched rates are exact: set both or none")


def _by_position(settings: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str]]:
    """Yield the first setting of each variant, then the second, and so on; variants drop out after their last."""
    for index in range(max(map(len, settings.values()), default=0)):
        yield {variant: names[index] for variant, names in settings.items() if index < len(names)}


@dataclass
class VariantState:
    """A variant during the experiment: settings by dotted name for each search budget, and the trials behind them."""

    spec: VariantSpec
    tuned: dict[int, dict[str, Any]] = field(default_factory=dict)
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
        self.trial_results: list[RunResult] = []
        self.defaults: dict[str, TrainConfig] = {}  # before any search, for the names of runs
        for state in self.states:  # a wrong setting must fail now, not after hours of runs
            for tokens in {*plan.search_budgets(), *plan.budgets}:
                with state.spec.named_in_errors():
                    self.defaults[state.spec.name] = self.config(state, tokens, TRIAL_SEED)
                check_data(self.defaults[state.spec.name], dataset)

    def require_own_runs(self) -> None:
        """Check the runs of an earlier call in the same folder, one of each variant and budget.

        Raises:
            ConfigError: a run has other settings, apart from those that are searched.
        """
        for state in self.states:
            searched = {*RATE_SETTINGS, *state.spec.rates, *state.spec.hyperparameters, "seed"} - state.spec.given
            for tokens in {*self.plan.search_budgets(), *self.plan.budgets}:
                earlier = sorted(self.queue.root.glob(f"{state.spec.name}-{tokens}-*/{CONFIG_FILE}"))
                if earlier:
                    config = self.config(state, tokens, TRIAL_SEED)
                    self.queue.require_settings(earlier[0].parent, config, except_for=searched)

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
            setup=self.setup(time.monotonic() - started, [*self.trial_results, *results.values()]),
            budgets=tuple(self.plan.budgets),
            seeds=self.plan.run_seeds(),
            variants=tuple(self.variant(state, by_variant[state.spec.name]) for state in self.states),
        )

    def tune(self) -> None:
        """Run all searches, from the shortest budget to the longest."""
        shorter = 0
        for tokens in self.plan.search_budgets():
            for state in self.states:
                state.tuned[tokens] = dict(state.tuned.get(shorter, {}))
            shorter = tokens
            for part in self.plan.rounds(tokens):
                names = dict.fromkeys(map(display_name, part.settings.values()))
                again = ", second pass" if part.pass_number == 2 else ""
                self.stage(f"search at {tokens:,} tokens{again}: {', '.join(names)}")
                self.search(tokens, part)

    def search(self, tokens: int, part: Round) -> None:
        """Choose one setting for each variant by the loss of trial runs, all of which have the seed of the trials."""
        settings, states = part.settings, {state.spec.name: state for state in self.states}
        centers = {
            name: self.current(self.config(states[name], tokens, TRIAL_SEED), setting)
            for name, setting in settings.items()
        }
        # Grids are spaced by factors, so a setting whose default is 0 has no grid and keeps its default.
        grids = {
            name: [center * part.ratio**power for power in grid_powers(part.trials)]
            for name, center in centers.items()
            if center
        }

        def rounded(name: str, value: float) -> float:
            # The centre is run as it is: rounded, an exact default would be another run.
            return value if value == centers[name] else round_sig(value)

        def jobs_of(name: str, value: float) -> list[Job]:
            return [self.job(states[name], tokens, TRIAL_SEED, {settings[name]: rounded(name, value)})]

        search = GridSearch(self.queue, jobs_of)
        search.run_grids(grids, lambda name, losses: extension(losses, part.trials, part.ratio))
        if part.neighbour_factor and grids:
            around = {name: neighbours(search.losses(name), part.neighbour_factor) for name in grids}
            # One of them may be better than the best of the grid, which is then at an edge again.
            trials = part.trials + 2
            search.run_grids(around, lambda name, losses: extension(losses, trials, part.ratio))
        for name in grids:
            losses, setting = search.losses(name), settings[name]
            self.trial_results += [result for results in search.results[name].values() for result in results]
            folders = {value: search.results[name][value][0].name for value in losses}
            states[name].trials += [
                Trial(setting, rounded(name, value), losses[value], folders[value], tokens, part.pass_number)
                for value in sorted(losses)
            ]
            states[name].tuned[tokens][setting] = rounded(name, best_value(losses))

    def current(self, config: TrainConfig, setting: str) -> Any:
        """Return the value of a setting; for a separate rate that is not set, the rate that it is derived from."""
        value = value_of(config, setting)
        return config.lr if value is None and setting in SEPARATE_RATES else value

    def config(
        self, state: VariantState, tokens: int, seed: int, settings: Mapping[str, Any] | None = None
    ) -> TrainConfig:
        """Return the complete settings of a run; ``settings`` by dotted name override the tuned ones.

        Default learning rates are scaled to the length of the run here, so that they equal rates that a search gives.
        """
        merged = merge(merge(self.plan.common, state.spec.settings), state.spec.by_budget.get(tokens, {}))
        tuned = state.tuned.get(self.plan.search_budget(tokens), {})
        for setting, value in {**tuned, **(settings or {})}.items():
            merged = merge(merged, unflatten(setting, value))
        config = fill_defaults({**merged, "tokens": tokens, "seed": seed}, self.dataset.vocab_size)
        # A separate rate equal to lr gives the run without that rate, which must not be repeated under another name.
        same: dict[str, Any] = {rate: None for rate in SEPARATE_RATES if value_of(config, rate) == config.lr}
        config = replace(config, **same)
        if "lr_horizon" in merged:
            return config
        defaults = state.spec.searched(state.spec.rates)
        rates: dict[str, Any] = {rate: round_sig(given_rate(config, rate)) for rate in defaults}
        return replace(config, lr_horizon=0, horizon_exponent=0.0, **rates)

    def job(self, state: VariantState, tokens: int, seed: int, settings: Mapping[str, Any] | None = None) -> Job:
        """Return a run whose name lists all settings that may differ within a variant."""
        config, spec = self.config(state, tokens, seed, settings), state.spec
        parts = [spec.name, str(tokens)]
        parts += [f"{rate.removesuffix('_lr')}{value_of(config, rate):g}" for rate in spec.rates]
        for setting in spec.hyperparameters:
            value = value_of(config, setting)
            if value != value_of(self.defaults[spec.name], setting):
                parts.append(f"{setting.rpartition('.')[2]}{value:g}")
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
            chosen=tuple(self.chosen_settings(state, tokens) for tokens in self.plan.budgets),
        )

    def chosen_settings(self, state: VariantState, tokens: int) -> ChosenSettings:
        """Return the learning rates, the searched settings and those given by budget of the runs at a budget."""
        spec, trial_tokens, config = state.spec, self.plan.search_budget(tokens), self.config(state, tokens, TRIAL_SEED)
        by_budget = [name for name in spec.given if name in flatten(spec.by_budget.get(tokens, {}))]
        rates = [rate for rate in SEPARATE_RATES if rate in spec.given]
        names = dict.fromkeys((*spec.rates, *rates, *state.tuned.get(trial_tokens, {}), *sorted(by_budget)))
        settings = {name: self.current(config, name) for name in names}
        given = tuple(name for name in names if name in spec.given)
        return ChosenSettings(tokens, trial_tokens if state.trials else 0, settings, given)

    def reported_settings(self, state: VariantState) -> dict[str, Any]:
        """Return the variant's own settings and those that are often tuned, by dotted name."""
        spec, config = state.spec, self.config(state, self.plan.budgets[-1], TRIAL_SEED)
        names = dict.fromkeys((*spec.rates, "warmup_fraction", "weight_decay", *spec.hyperparameters))
        values = {name: self.current(config, name) for name in names}
        own = spec.settings_of(self.plan.budgets[-1])
        return own | {name: value for name, value in values.items() if value is not None}

    def setup(self, seconds: float, results: Iterable[RunResult]) -> dict[str, Any]:
        """Return what all runs share, for the report; ``seconds`` is the wall time of this call."""
        configs = {state.spec.name: self.config(state, self.plan.budgets[-1], TRIAL_SEED) for state in self.states}
        config = configs[self.states[0].spec.name]
        return {
            **provenance(self.dataset, self.queue, seconds, results),
            "preset": config.preset,
            "width": config.model.width,
            "layers": config.model.layers,
            "context": config.model.context,
            "batch_tokens": config.batch_tokens,
            "optimizers": {name: config.optimizer for name, config in configs.items()},
            "recipes": {name: config.recipe for name, config in configs.items()},
            "validation_tokens": int(config.eval_tokens),
            "lr_trials": self.plan.lr_trials,
            "tuning_trials": self.plan.tuning_trials,
        }
