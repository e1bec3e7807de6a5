"""A sweep: the best learning rate of every size, number of tokens and batch, searched in a grid.

The grid is the paper's (arXiv:2505.22014, section 5.3): learning rates in factors of 10^(1/3) around the fitted value,
and further while the best lies at an edge. Every architecture has the same sizes, tokens, batches and number of
learning rates, each around its own default.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from antransformer.comparison.experiment import fill_defaults, provenance
from antransformer.data import Dataset
from antransformer.diagnostics.coord_check import CoordCheck, coord_check
from antransformer.errors import ConfigError
from antransformer.models import ModelConfig, registry
from antransformer.results.sweep import Sweep, SweepRun
from antransformer.runs.queue import Job, RunQueue, RunResult, flatten
from antransformer.runs.search import EXTENSIONS, extension, grid_powers, round_sig
from antransformer.settings import nearest
from antransformer.training.config import MUTABLE_ON_RESUME, TrainConfig, merge, resolve_config
from antransformer.training.defaults import parameter_count
from antransformer.training.trainer import check_data

LR_RATIO = 10 ** (1 / 3)


@dataclass(frozen=True)
class Cell:
    """What has a best learning rate of its own; ``size`` is a name, such as ``nano`` or ``nano-w64``."""

    architecture: str
    size: str
    tokens: int
    batch: int


@dataclass(frozen=True)
class SweepPlan:
    """What to run.

    Attributes:
        grids: the learning rates to try first, of each cell.
        settings: of each cell, without learning rate and seed.
        shared: those of all cells that change what is computed, by their dotted names.
        trials: how many learning rates a grid has; None where they were given, and are not extended.
        seeds: how many a learning rate.
        by_width: whether the sizes differ in their width alone, in which case the grids are the same for all.
    """

    grids: Mapping[Cell, tuple[float, ...]]
    settings: Mapping[Cell, Mapping[str, Any]]
    shared: Mapping[str, Any]
    trials: int | None
    seeds: int
    by_width: bool

    def further(self, cell: Cell, losses: Mapping[float, float]) -> list[float]:
        """The learning rates to try next, after these: the rest of the grid, one beyond an edge, or none."""
        missing = [rate for rate in self.grids[cell] if rate not in losses]
        if missing or self.trials is None:
            return missing
        return [round_sig(rate) for rate in extension(losses, self.trials, LR_RATIO)]

    def most(self, cell: Cell) -> int:
        """How many learning rates may be tried in the end."""
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
    """A sweep over all combinations.

    Args:
        settings: what all runs share.
        vocab_size: of the data.
        architectures: the first one's parameters count for ``ratios``, so that all have the same tokens.
        sizes: presets. All get the longest context among them, without which their losses would not compare.
        widths: in place of the only preset's; batch, learning rates and the width that these are for then are the
            preset's for all widths.
        batches: tokens of a step; by default that of the first architecture at the size.
        lrs: the learning rates to try; by default ``trials`` of them around the default, extended at an edge.
        tokens: of the runs; whole batches of the largest are taken.
        ratios: tokens a parameter, in place of ``tokens``.

    Raises:
        ConfigError: a name is unknown, something is given twice, several sizes have widths, or a run is shorter than a
            batch.
    """
    for name in architectures:
        if name not in registry.names():
            known = nearest(name, registry.names()) or f": choose from {', '.join(registry.names())}"
            raise ConfigError(f"unknown architecture {name!r}{known}")
    for option, values in {"--architectures": architectures, "--sizes": sizes, "--widths": widths}.items():
        _different(option, values, values)
    _different("--lrs", lrs, [f"{lr:g}" for lr in lrs])  # as runs are named
    if widths and len(sizes) > 1:
        raise ConfigError(f"--widths changes one size, whose depth it keeps: choose one of --sizes {' '.join(sizes)}")
    context = max(ModelConfig.preset(name).context for name in sizes)
    shared = merge({"model": {"context": context}}, settings)
    grids: dict[Cell, tuple[float, ...]] = {}
    every: dict[Cell, dict[str, Any]] = {}
    for preset in sizes:
        usual = {
            name: resolve_config(merge(shared, {"preset": preset, "model": {"architecture": name}}), vocab_size)
            for name in architectures
        }
        first = usual[architectures[0]]
        steps = [resolve_config({**shared, "preset": preset, "batch_tokens": it}, vocab_size) for it in batches] or [
            first
        ]
        chosen = [config.batch_tokens for config in steps]
        _different("--batch-tokens", batches, chosen)
        for width in widths or [first.model.width]:
            size = preset if not widths else f"{preset}-w{width}"
            own = merge(shared, {"preset": preset, "model": {"width": width}})
            model = resolve_config(merge(own, {"model": {"architecture": architectures[0]}}), vocab_size).model
            wanted = [round(ratio * parameter_count(model)) for ratio in ratios] or tokens
            for cell_tokens in _whole(wanted, max(chosen), size):
                for name in architectures:
                    for batch in chosen:
                        cell = Cell(name, size, cell_tokens, batch)
                        every[cell] = {
                            **merge(own, {"model": {"architecture": name}}),
                            "tokens": cell_tokens,
                            "batch_tokens": batch,
                            "lr_width": usual[name].lr_width,
                        }
                        center = usual[name].lr
                        auto = [round_sig(center * LR_RATIO**power) for power in grid_powers(trials)]
                        grids[cell] = tuple(lrs or auto)
    kept = {key: value for key, value in flatten(shared).items() if key not in MUTABLE_ON_RESUME - {"eval_tokens"}}
    return SweepPlan(grids, every, kept, None if lrs else trials, seeds, bool(widths))


def _different(option: str, given: Sequence[Any], values: Sequence[Any]) -> None:
    if len(set(values)) != len(values):
        raise ConfigError(f"{option} names the same twice: {' '.join(map(str, given))}")


def _whole(tokens: Iterable[int], batch: int, size: str) -> list[int]:
    """Tokens in whole batches."""
    whole = [count // batch * batch for count in tokens]
    if not all(whole):
        raise ConfigError(f"{size}: {min(tokens):,} tokens are less than one batch of {batch:,}: lower --batch-tokens")
    if len(set(whole)) != len(whole):
        raise ConfigError(f"{size}: two numbers of tokens come to the same number of batches of {batch:,}")
    return whole


class Sweeper:
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

    def __init__(self, plan: SweepPlan, dataset: Dataset, queue: RunQueue, stage: Callable[[str], None]) -> None:
        self.plan, self.dataset, self.queue, self.stage = plan, dataset, queue, stage
        for cell, grid in plan.grids.items():  # refuse what can not run before hours are spent on the rest
            check_data(self.config(cell, grid[0], 0), dataset)

    def config(self, cell: Cell, lr: float, seed: int) -> TrainConfig:
        """Complete settings of one run."""
        return fill_defaults({**self.plan.settings[cell], "lr": lr, "seed": seed}, self.dataset.vocab_size)

    def jobs(self, cell: Cell, lr: float) -> list[Job]:
        """A run for each seed; its name holds what distinguishes it."""
        name = f"{cell.architecture}-{cell.size}-{cell.tokens}-b{cell.batch}-lr{lr:g}"
        return [Job(f"{name}-seed{seed}", self.config(cell, lr, seed)) for seed in range(self.plan.seeds)]

    def missing(self, cell: Cell) -> tuple[int, int]:
        """How many runs of a cell are not done yet, at least and at most; raises as ``Queue.finished``."""
        losses: dict[float, float] = {}
        while wanted := self.plan.further(cell, losses):
            found = {rate: [self.queue.finished(job) for job in self.jobs(cell, rate)] for rate in wanted}
            least = sum(outcome is None for outcomes in found.values() for outcome in outcomes)
            if least:
                later = self.plan.most(cell) - len(losses) - len(wanted)
                return least, least + later * self.plan.seeds
            losses |= {rate: _mean_loss(outcome for outcome in outcomes if outcome) for rate, outcomes in found.items()}
        return 0, 0

    def run(self) -> Sweep:
        """Search every cell; raises as ``Queue.run``."""
        started = time.monotonic()
        found: dict[Cell, dict[float, list[RunResult]]] = {cell: {} for cell in self.plan.grids}
        self.stage("grid")
        while wanted := self._wanted(found):
            jobs = {place: self.jobs(*place) for place in wanted}
            outcomes = self.queue.run(job for seeds in jobs.values() for job in seeds)
            for (cell, rate), seeds in jobs.items():
                found[cell][rate] = [outcomes[job.name] for job in seeds]
            self.stage("beyond the edges")
        runs = tuple(
            self.measured(cell, rate, seed, outcome)
            for cell, rates in found.items()
            for rate, seeds in sorted(rates.items())
            for seed, outcome in enumerate(seeds)
        )
        ended = [outcome for rates in found.values() for seeds in rates.values() for outcome in seeds]
        return Sweep(
            self.setup(time.monotonic() - started, ended), runs, self.coordinates() if self.plan.by_width else ()
        )

    def coordinates(self) -> tuple[CoordCheck, ...]:
        """Of every architecture and size, at the middle of its grid and the smallest batch."""
        self.stage("activations")
        cells = {(cell.architecture, cell.size): cell for cell in sorted(self.plan.grids, key=lambda cell: -cell.batch)}
        middle = {cell: grid[len(grid) // 2] for cell, grid in self.plan.grids.items()}
        configs = [replace(self.config(cell, middle[cell], 0), device=self.queue.devices[0]) for cell in cells.values()]
        return tuple(found for config in configs for found in coord_check(config, self.dataset))

    def _wanted(self, found: Mapping[Cell, Mapping[float, Sequence[RunResult]]]) -> list[tuple[Cell, float]]:
        return [
            (cell, rate)
            for cell, rates in found.items()
            for rate in self.plan.further(cell, {tried: _mean_loss(seeds) for tried, seeds in rates.items()})
        ]

    def measured(self, cell: Cell, lr: float, seed: int, outcome: RunResult) -> SweepRun:
        """A finished run as a result."""
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
        """What all runs share, for the report."""
        cell, grid = next(iter(self.plan.grids.items()))
        config = self.config(cell, grid[0], 0)
        return {
            **provenance(self.dataset, self.queue, seconds, outcomes),
            "settings": dict(self.plan.shared),
            "context": config.model.context,
            "head_dim": config.model.head_dim,
            "validation_tokens": int(config.eval_tokens),
            "seeds": self.plan.seeds,
            "lr_width": sorted({f"{it.architecture} {own['lr_width']}" for it, own in self.plan.settings.items()}),
        }


def _mean_loss(seeds: Iterable[RunResult]) -> float:
    return float(np.mean([outcome.loss for outcome in seeds]))
