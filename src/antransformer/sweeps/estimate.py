"""Estimate of the runs, tokens and hours that a sweep needs, from a few timed steps of every size."""

from collections.abc import Callable

from antransformer.runs.timing import Estimate, RunCount, Timer
from antransformer.sweeps.sweep import Sweeper


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

    def left(end: int) -> list[RunCount]:
        counts = {cell: both[end] for cell, both in missing.items() if both[end]}
        configs = {cell: sweeper.config(cell, sweeper.plan.grids[cell][0], 0) for cell in counts}
        return [RunCount(f"{cell.architecture} {cell.size}", configs[cell], runs) for cell, runs in counts.items()]

    return timer.estimate([left(0), left(1)])
