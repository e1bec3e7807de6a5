"""Estimate of the runs, tokens and hours that a comparison or an ablation needs."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

from antransformer.comparison.experiment import TRIAL_SEED, Experiment
from antransformer.files import read_json
from antransformer.runs.timing import Estimate, RunCount, Timer
from antransformer.runs.worker import RESULT_FILE


def estimate(experiment: Experiment, log: Callable[[str], None]) -> Estimate:
    """Time a few steps of each architecture, and compute what is left; writes no files.

    A finished run in the folder counts by its variant and budget, as a trial or a measured run by its seed. Its values
    are not checked, since those that a search will try depend on its results.
    """
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
