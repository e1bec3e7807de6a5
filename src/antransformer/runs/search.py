"""Grid search over one setting, shared by comparisons and sweeps: values to try, and when to extend the grid."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np

from antransformer.runs.queue import Job, RunQueue, RunResult

EXTENSIONS = 4  # values that a search may add to its grid

Key = TypeVar("Key", bound=Hashable)


class GridSearch(Generic[Key]):
    """Runs a grid of values for each key; grids are extended one value at a time, all keys in the same round.

    Args:
        queue: executes the runs.
        jobs_of: returns the runs of a key at a value, one for each seed.

    Attributes:
        results: results of the runs by key and value, one for each seed.
    """

    def __init__(self, queue: RunQueue, jobs_of: Callable[[Key, float], Sequence[Job]]) -> None:
        self.queue, self.jobs_of = queue, jobs_of
        self.results: dict[Key, dict[float, list[RunResult]]] = {}

    def run(self, values: Mapping[Key, Iterable[float]]) -> None:
        """Run some values of each key; raises the errors of ``RunQueue.run``."""
        jobs = {(key, value): self.jobs_of(key, value) for key, chosen in values.items() for value in chosen}
        results = self.queue.run(job for seeds in jobs.values() for job in seeds)
        for (key, value), seeds in jobs.items():
            self.results.setdefault(key, {})[value] = [results[job.name] for job in seeds]

    def run_grids(
        self,
        grids: Mapping[Key, Iterable[float]],
        extend: Callable[[Key, Mapping[float, float]], Sequence[float]],
        before_extension: Callable[[], None] = lambda: None,
    ) -> None:
        """Run the grids, and then further values until ``extend`` returns none for any key.

        Args:
            grids: first values of each key.
            extend: returns the values to add, given a key and its mean losses by value.
            before_extension: called before each round of added values.
        """
        values = {key: list(grid) for key, grid in grids.items()}
        while values:
            self.run(values)
            values = {key: added for key in grids if (added := list(extend(key, self.losses(key))))}
            if values:
                before_extension()

    def losses(self, key: Key) -> dict[float, float]:
        """Return the mean loss over seeds at each value, in the order in which values were run."""
        return {value: mean_loss(results) for value, results in self.results[key].items()}


def mean_loss(results: Iterable[RunResult]) -> float:
    """Mean loss over seeds; infinite where one run diverged."""
    return float(np.mean([result.loss for result in results]))


def grid_powers(trials: int) -> range:
    """Exponents around 0 of a grid with this number of values: 3 gives -1, 0, 1; 2 gives -1, 0."""
    return range(-(trials // 2), trials - trials // 2)


def best_value(losses: Mapping[float, float]) -> float:
    """Return the value with the lowest loss, of equal ones the lowest value: all trials may diverge."""
    return min(losses, key=lambda value: (losses[value], value))


def extension(losses: Mapping[float, float], trials: int, ratio: float) -> list[float]:
    """Return the value beyond the best one where that is at an edge of the grid, else no value.

    At most ``EXTENSIONS`` values are added to a grid of ``trials``.
    """
    best = best_value(losses)
    if len(losses) >= trials + EXTENSIONS:
        return []
    if best == min(losses):
        return [best / ratio]
    return [best * ratio] if best == max(losses) else []


def neighbours(losses: Mapping[float, float], factor: float) -> list[float]:
    """Return the best value divided and multiplied by ``factor``."""
    best = best_value(losses)
    return [best / factor, best * factor]


def round_sig(value: float) -> float:
    """Round to three significant digits: values are run exactly as run names and reports print them."""
    return float(f"{value:.3g}")
