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

    A finished run in the folder counts by its variant and budget, as a trial or a measured run by its seed. Its values
    are not checked, since those that a search will try depend on its results.
    """
    plan, timer = experiment.plan, Timer(experiment.queue, experiment.dataset, log)
    finished = finished_runs(experiment)
    totals = []
    for most in (False, True):
        runs, tokens, seconds, longest = 0, 0, 0.0, 0.0
        for state in experiment.states:
            for budget, planned in plan.runs_of(state.spec.name, most).items():
                config = experiment.config(state, budget, TRIAL_SEED)
                left = dict.fromkeys(plan.run_seeds(), 1) if budget in plan.budgets else {}
                left[TRIAL_SEED] = planned - len(left)
                count = sum(max(0, runs - finished[state.spec.name, budget, seed]) for seed, runs in left.items())
                if not count:
                    continue
                one = timer.run_seconds(f"{config.model.architecture} {config.optimizer}", config)
                runs, tokens, seconds = runs + count, tokens + count * tokens_of(config), seconds + count * one
                longest = max(longest, one)
        totals.append((runs, tokens, timer.hours(seconds, longest)))
    runs_, tokens_, hours = zip(*totals, strict=True)
    return Estimate(runs_, tokens_, hours)


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
