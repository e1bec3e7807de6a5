"""Estimate of the runs, tokens and hours that a comparison or an ablation needs."""

import contextlib
from collections import Counter
from collections.abc import Callable

from antransformer.comparison.experiment import TRIAL_SEED, Experiment
from antransformer.files import read_json
from antransformer.runs.queue import tokens_of
from antransformer.runs.timing import Estimate, Timer
from antransformer.runs.worker import RESULT_FILE


def estimate(experiment: Experiment, log: Callable[[str], None]) -> Estimate:
    """Time a few steps of each architecture, and compute what is left; writes no files.

    A finished run in the folder counts by its variant and budget, since the values that a search will try depend on its
    results.
    """
    plan, timer = experiment.plan, Timer(experiment.queue, experiment.dataset, log)
    finished = finished_runs(experiment)
    totals = []
    for most in (False, True):
        runs, tokens, seconds, longest = 0, 0, 0.0, 0.0
        for state in experiment.states:
            for budget, planned in plan.runs_of(state.spec.name, most).items():
                config = experiment.config(state, budget, TRIAL_SEED)
                count = max(0, planned - finished[state.spec.name, budget])
                if not count:
                    continue
                one = timer.run_seconds(f"{config.model.architecture} {config.optimizer}", config)
                runs, tokens, seconds = runs + count, tokens + count * tokens_of(config), seconds + count * one
                longest = max(longest, one)
        totals.append((runs, tokens, timer.hours(seconds, longest)))
    runs_, tokens_, hours = zip(*totals, strict=True)
    return Estimate(runs_, tokens_, hours)


def finished_runs(experiment: Experiment) -> Counter[tuple[str, int]]:
    """Number of finished runs in the folder of an experiment, by variant and budget."""
    finished: Counter[tuple[str, int]] = Counter()
    names = {
        f"{state.spec.name}-{budget}-": (state.spec.name, budget)
        for state in experiment.states
        for budget in {*experiment.plan.budgets, *experiment.plan.search_budgets()}
    }
    for path in experiment.queue.root.glob(f"*/{RESULT_FILE}"):
        with contextlib.suppress(OSError, ValueError):  # the queue reports damaged results
            read_json(path)
            finished.update(key for start, key in names.items() if path.parent.name.startswith(start))
    return finished
