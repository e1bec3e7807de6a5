"""Estimate of the runs, tokens and hours that a sweep needs, from a few timed steps of every size."""

from collections.abc import Callable, Mapping

from antransformer.runs.queue import tokens_of
from antransformer.runs.timing import Estimate, Timer
from antransformer.sweeps.sweep import Cell, Sweeper


def estimate(sweeper: Sweeper, log: Callable[[str], None]) -> Estimate:
    """Time a few steps of each size, with its smallest batch, and compute what is left; writes no files.

    Args:
        sweeper: planned sweep.
        log: called with a line before each size is timed, which takes minutes for a large one.

    Raises:
        ConfigError, DataError: the folder holds other runs, as in ``RunQueue.finished``.
    """
    cells = sorted(sweeper.plan.grids, key=lambda cell: cell.batch)
    missing = {cell: counts for cell in cells if any(counts := sweeper.missing(cell))}
    timer = Timer(sweeper.queue, sweeper.dataset, log)
    totals = [_total(sweeper, timer, {cell: counts[end] for cell, counts in missing.items()}) for end in (0, 1)]
    runs, tokens, hours = zip(*totals, strict=True)
    return Estimate(runs, tokens, hours)


def _total(sweeper: Sweeper, timer: Timer, runs: Mapping[Cell, int]) -> tuple[int, int, float]:
    """Runs, tokens and hours for a number of runs of each cell."""
    tokens, seconds, longest = 0, 0.0, 0.0
    for cell, count in runs.items():
        config = sweeper.config(cell, sweeper.plan.grids[cell][0], 0)
        run_seconds = timer.run_seconds(f"{cell.architecture} {cell.size}", config)
        tokens, seconds = tokens + count * tokens_of(config), seconds + count * run_seconds
        longest = max(longest, run_seconds)
    return sum(runs.values()), tokens, timer.hours(seconds, longest)
