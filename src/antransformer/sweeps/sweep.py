"""Grid search for the best learning rate of every architecture, size, number of tokens and batch.

The grid follows arXiv:2505.22014, section 5.3: learning rates are spaced by factors of 10^(1/3) around the default, and
the grid is extended while the best is at an edge. All architectures get the same sizes, tokens, batches and number of
learning rates, each around its own default.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from antransformer.data import Dataset
from antransformer.diagnostics.coord_check import CoordCheck, coord_check
from antransformer.errors import ConfigError
from antransformer.models import ModelConfig, registry
from antransformer.results.sweep import Sweep, SweepRun
from antransformer.runs.provenance import provenance
from antransformer.runs.queue import Job, RunQueue, RunResult
from antransformer.runs.search import EXTENSIONS, GridSearch, extension, grid_powers, mean_loss, round_sig
from antransformer.runs.settings import fill_defaults, flatten
from antransformer.settings import nearest
from antransformer.training.config import MUTABLE_ON_RESUME, TrainConfig, merge, resolve_config
from antransformer.training.data import check_data
from antransformer.training.defaults import parameter_count
from antransformer.training.learning_rates import given_rate

LR_RATIO = 10 ** (1 / 3)


@dataclass(frozen=True)
class Cell:
    """One combination with its own best learning rate; ``size`` is a name, such as ``nano`` or ``nano-w64``."""

    architecture: str
    size: str
    tokens: int
    batch: int


@dataclass(frozen=True)
class SweepPlan:
    """Runs of a sweep.

    Attributes:
        grids: initial learning rates of each cell.
        settings: settings of each cell, without learning rate and seed.
        shared: settings of all cells that affect results, by their dotted names.
        trials: number of learning rates of an initial grid; None if the user gave them, and grids are not extended.
        seeds: number of seeds for each learning rate.
        by_width: whether the sizes differ only in width; the grids are then the same for all sizes.
    """

    grids: Mapping[Cell, tuple[float, ...]]
    settings: Mapping[Cell, Mapping[str, Any]]
    shared: Mapping[str, Any]
    trials: int | None
    seeds: int
    by_width: bool

    def next_rates(self, cell: Cell, losses: Mapping[float, float]) -> list[float]:
        """Learning rates to try next, given the losses so far: the rest of the grid, or one extension, or nothing."""
        missing = [rate for rate in self.grids[cell] if rate not in losses]
        if missing or self.trials is None:
            return missing
        return [round_sig(rate) for rate in extension(losses, self.trials, LR_RATIO)]

    def max_rates(self, cell: Cell) -> int:
        """Number of learning rates with all extensions."""
        return len(self.grids[cell]) + (0 if self.trials is None else EXTENSIONS)


def plan(
    settings: Mapping[str, Any],
    vocab_size: int,
    architectures: Sequence[str],
    sizes: Sequence[str],
    widths: Sequence[int] = (),
    batches: Sequence[int] = (),
    lrs: Sequence[float] = (),
    tokens: Sequence[int] = (),
    ratios: Sequence[float] = (),
    trials: int = 5,
    seeds: int = 1,
) -> SweepPlan:
    """Plan a sweep over all combinations.

    Args:
        settings: settings of all runs.
        vocab_size: vocabulary size of the data.
        architectures: names. ``ratios`` count the parameters of the first one, so that all train on the same tokens.
        sizes: presets. All get the longest context among them, because losses at different contexts do not compare.
        widths: widths to try with the only preset. Its batch, learning rates and ``lr_width`` then hold for all widths.
        batches: tokens per step (default: the default of the first architecture at each size).
        lrs: learning rates to try (default: ``trials`` values around the default, extended at an edge).
        tokens: training tokens, rounded down to whole steps of the largest batch.
        ratios: tokens per parameter, instead of ``tokens``.
        trials: number of learning rates of an initial grid.
        seeds: number of seeds for each learning rate.

    Raises:
        ConfigError: a batch is repeated, or a run is shorter than one batch.
    """
    context = max(ModelConfig.preset(name).context for name in sizes)
    shared = merge({"model": {"context": context}}, settings)
    grids: dict[Cell, tuple[float, ...]] = {}
    settings_of: dict[Cell, dict[str, Any]] = {}
    for preset in sizes:
        defaults = {
            name: resolve_config(merge(shared, {"preset": preset, "model": {"architecture": name}}), vocab_size)
            for name in architectures
        }
        first = defaults[architectures[0]]
        # The configs round a batch to whole sequences.
        configs = [resolve_config({**shared, "preset": preset, "batch_tokens": batch}, vocab_size) for batch in batches]
        batch_sizes = [config.batch_tokens for config in configs or [first]]
        _require_distinct("batch_tokens", batches, batch_sizes)
        for width in widths or [first.model.width]:
            size = preset if not widths else f"{preset}-w{width}"
            sized = merge(shared, {"preset": preset, "model": {"width": width}})
            model = resolve_config(merge(sized, {"model": {"architecture": architectures[0]}}), vocab_size).model
            budgets = [round(ratio * parameter_count(model)) for ratio in ratios] or tokens
            budgets = _round_to_batches(budgets, max(batch_sizes), size)
            for budget, name, batch in product(budgets, architectures, batch_sizes):
                cell = Cell(name, size, budget, batch)
                length = {"tokens": budget, "batch_tokens": batch}
                settings_of[cell] = {
                    **merge(sized, {"model": {"architecture": name}}),
                    **length,
                    "lr_width": defaults[name].lr_width,
                }
                default = resolve_config(
                    {**merge(shared, {"preset": preset, "model": {"architecture": name}}), **length}, vocab_size
                )
                grid = [round_sig(given_rate(default, "lr") * LR_RATIO**power) for power in grid_powers(trials)]
                grids[cell] = tuple(lrs or grid)
    kept = {key: value for key, value in flatten(shared).items() if key not in MUTABLE_ON_RESUME - {"eval_tokens"}}
    return SweepPlan(grids, settings_of, kept, None if lrs else trials, seeds, bool(widths))


def check_choices(
    architectures: Sequence[str], sizes: Sequence[str], widths: Sequence[int], lrs: Sequence[float]
) -> None:
    """Check the values to try before data is opened, which may take minutes to prepare.

    Raises:
        ConfigError: there is no architecture or size, an architecture is unknown, a value is repeated, or widths are
            combined with several sizes.
    """
    if not architectures or not sizes:
        raise ConfigError("a sweep needs one of architectures and one of sizes at least")
    for name in architectures:
        if name not in registry.names():
            known = nearest(name, registry.names()) or f": choose from {', '.join(registry.names())}"
            raise ConfigError(f"unknown architecture {name!r}{known}")
    for option, values in {"architectures": architectures, "sizes": sizes, "widths": widths}.items():
        _require_distinct(option, values, values)
    _require_distinct("lrs", lrs, [f"{lr:g}" for lr in lrs])  # the precision of run names
    if widths and len(sizes) > 1:
        raise ConfigError(f"widths needs one size, whose depth it keeps: choose one of sizes {' '.join(sizes)}")


def _require_distinct(option: str, given: Sequence[Any], values: Sequence[Any]) -> None:
    if len(set(values)) != len(values):
        raise ConfigError(f"{option} repeats a value: {' '.join(map(str, given))}")


def _round_to_batches(tokens: Iterable[int], batch: int, size: str) -> list[int]:
    """Tokens rounded down to whole batches."""
    rounded = [count // batch * batch for count in tokens]
    if not all(rounded):
        raise ConfigError(
            f"{size}: {min(tokens):,} tokens are less than one batch of {batch:,}: use a smaller batch_tokens"
        )
    if len(set(rounded)) != len(rounded):
        raise ConfigError(f"{size}: two numbers of tokens are the same number of batches of {batch:,}")
    return rounded


class Sweeper:
    """Runs a sweep.

    Args:
        plan: runs of the sweep.
        dataset: verified data.
        queue: queue that trains them.
        stage: callback that receives the name of each stage when it starts.

    Raises:
        ConfigError: a setting of any run is wrong.
        DataError: the data does not fit the models.
    """

    def __init__(self, plan: SweepPlan, dataset: Dataset, queue: RunQueue, stage: Callable[[str], None]) -> None:
        self.plan, self.dataset, self.queue, self.stage = plan, dataset, queue, stage
        for cell, grid in plan.grids.items():  # fail before the first run, not after hours
            check_data(self.config(cell, grid[0], 0), dataset)

    def config(self, cell: Cell, lr: float, seed: int) -> TrainConfig:
        """Complete settings of one run of a cell."""
        return fill_defaults({**self.plan.settings[cell], "seed": seed, "lr": lr}, self.dataset.vocab_size)

    def jobs(self, cell: Cell, lr: float) -> list[Job]:
        """Jobs of one learning rate, one for each seed; each name identifies the run within the sweep."""
        name = f"{cell.architecture}-{cell.size}-{cell.tokens}-b{cell.batch}-lr{lr:g}"
        return [Job(f"{name}-seed{seed}", self.config(cell, lr, seed)) for seed in range(self.plan.seeds)]

    def missing(self, cell: Cell) -> tuple[int, int]:
        """Minimum and maximum number of unfinished runs of a cell; raises the errors of ``RunQueue.finished``."""
        losses: dict[float, float] = {}
        while rates := self.plan.next_rates(cell, losses):
            outcomes = {rate: [self.queue.finished(job) for job in self.jobs(cell, rate)] for rate in rates}
            unfinished = sum(outcome is None for seeds in outcomes.values() for outcome in seeds)
            if unfinished:
                extensions = self.plan.max_rates(cell) - len(losses) - len(rates)
                return unfinished, unfinished + extensions * self.plan.seeds
            losses |= {rate: mean_loss(outcome for outcome in seeds if outcome) for rate, seeds in outcomes.items()}
        return 0, 0

    def run(self, earlier: Sweep | None = None) -> Sweep:
        """Search every cell, given the sweep in the same folder; raises the errors of ``RunQueue.run``."""
        started = time.monotonic()
        search = GridSearch(self.queue, self.jobs)
        self.stage("grid")
        search.run_grids(self.plan.grids, self.plan.next_rates, lambda: self.stage("grid extensions"))
        runs = tuple(
            self.sweep_run(cell, rate, seed, outcome)
            for cell, rates in search.results.items()
            for rate, seeds in sorted(rates.items())
            for seed, outcome in enumerate(seeds)
        )
        ended = [outcome for rates in search.results.values() for seeds in rates.values() for outcome in seeds]
        checks = self.coordinates(earlier.coord_check if earlier else ()) if self.plan.by_width else ()
        return Sweep(self.setup(time.monotonic() - started, ended), runs, checks)

    def coordinates(self, earlier: Sequence[CoordCheck]) -> tuple[CoordCheck, ...]:
        """Activations of every architecture and size, at its middle learning rate and smallest batch.

        Args:
            earlier: those of an earlier sweep with the same data and shared settings, which are not measured again.
        """
        self.stage("activations")
        cells = {(cell.architecture, cell.size): cell for cell in sorted(self.plan.grids, key=lambda cell: -cell.batch)}
        middle = {cell: grid[len(grid) // 2] for cell, grid in self.plan.grids.items()}
        checks: list[CoordCheck] = []
        for cell in cells.values():
            config = replace(self.config(cell, middle[cell], 0), device=self.queue.devices[0])
            model, conditions = config.model, (config.preset, config.batch_tokens, config.lr)
            known = [
                check for check in earlier if (check.architecture, check.width) == (model.architecture, model.width)
            ]
            checks += [check for check in known if check.conditions == conditions] or coord_check(config, self.dataset)
        return tuple(checks)

    def sweep_run(self, cell: Cell, lr: float, seed: int, outcome: RunResult) -> SweepRun:
        """Record of a finished run."""
        return SweepRun(
            architecture=cell.architecture,
            size=cell.size,
            width=self.config(cell, lr, seed).model.width,
            parameters=outcome.parameters,
            tokens=cell.tokens,
            batch=cell.batch,
            lr=lr,
            seed=seed,
            loss=outcome.loss,
            bits_per_byte=outcome.bits_per_byte,
            seconds_per_step=outcome.seconds_per_step,
            folder=outcome.name,
        )

    def setup(self, seconds: float, outcomes: Iterable[RunResult]) -> dict[str, Any]:
        """Facts about all runs for the report: provenance, settings, context, seeds and lr_width."""
        cell, grid = next(iter(self.plan.grids.items()))
        config = self.config(cell, grid[0], 0)
        return {
            **provenance(self.dataset, self.queue, seconds, outcomes),
            "settings": dict(self.plan.shared),
            "context": config.model.context,
            "head_dim": config.model.head_dim,
            "optimizer": config.optimizer,
            "validation_tokens": int(config.eval_tokens),
            "seeds": self.plan.seeds,
            "lr_width": sorted(
                {f"{cell.architecture} {settings['lr_width']}" for cell, settings in self.plan.settings.items()}
            ),
        }
