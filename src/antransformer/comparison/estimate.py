"""Estimate of the runs, tokens and hours that a comparison or an ablation needs."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from antransformer.comparison.experiment import TRIAL_SEED, Experiment
from antransformer.files import read_json
from antransformer.runs.queue import Job, RunQueue, RunResult
from antransformer.runs.timing import Estimate, RunCount, Timer
from antransformer.runs.worker import RESULT_FILE


def estimate(experiment: Experiment, log: Callable[[str], None]) -> Estimate:
    """Time a few steps of each architecture, unless the experiment is finished, and compute what is left.

    Writes no files. A finished run in the folder counts by its variant and budget, as a trial or a measured run by its
    seed. Its values are not checked, since those that a search will try depend on its results.

    Raises:
        ConfigError, DataError: the folder holds other runs, as in ``RunQueue.finished``.
    """
    if is_finished(experiment):
        return Estimate((0, 0), (0, 0), (0.0, 0.0))
    plan, timer = experiment.plan, Timer(experiment.queue, experiment.dataset, log)
    finished = finished_runs(experiment)

    def left(most: bool) -> Iterator[RunCount]:
        for state in experiment.states:
            for budget, planned in plan.runs_of(state.spec.name, most).items():
                config = experiment.config(state, budget, TRIAL_SEED)
                by_seed = dict.fromkeys(plan.run_seeds(), 1) if budget in plan.budgets else {}
                by_seed[TRIAL_SEED] = planned - len(by_seed)
                runs = sum(max(0, count - finished[state.spec.name, budget, seed]) for seed, count in by_seed.items())
                if runs:
                    yield RunCount(f"{config.model.architecture} {config.optimizer}", config, runs)

    return timer.estimate([list(left(most)) for most in (False, True)])


class _UnfinishedError(Exception):
    """A run has no result yet."""


class _FinishedRuns(RunQueue):
    """A queue that has the results of an earlier call and executes nothing."""

    def run(self, jobs: Iterable[Job]) -> dict[str, RunResult]:
        results = {}
        for job in jobs:
            result = self.finished(job)
            if result is None:
                raise _UnfinishedError
            results[job.name] = result
        return results


def is_finished(experiment: Experiment) -> bool:
    """Whether an earlier call has finished all runs; raises the errors of ``RunQueue.finished``."""
    queue = experiment.queue
    earlier = _FinishedRuns(queue.root, queue.dataset, queue.devices, queue.progress)
    try:
        Experiment(experiment.plan, experiment.dataset, earlier, lambda stage: None).run()
    except _UnfinishedError:
        return False
    return True


def finished_runs(experiment: Experiment) -> Counter[tuple[str, int, int]]:
    """Number of finished runs in the folder of an experiment, by variant, budget and seed."""
    finished: Counter[tuple[str, int, int]] = Counter()
    names = {
        (f"{state.spec.name}-{budget}-", f"-seed{seed}"): (state.spec.name, budget, seed)
        for state in experiment.states
        for budget in {*experiment.plan.budgets, *experiment.plan.search_budgets()}
        for seed in (TRIAL_SEED, *experiment.plan.run_seeds())
    }
    for path in experiment.queue.root.glob(f"*/{RESULT_FILE}"):
        with contextlib.suppress(OSError, ValueError):  # the queue reports damaged results
            read_json(path)
            name = path.parent.name
            finished.update(key for (start, end), key in names.items() if name.startswith(start) and name.endswith(end))
    return finished
