"""Results of comparisons whose losses follow a formula."""

import math

import numpy as np

from antransformer.results.comparison import ChosenSettings, Results, Run, Variant

BUDGETS = (250_000, 500_000, 1_000_000)
SEEDS = (1, 2, 3)


def loss_at(tokens, speed=1.0):
    """A loss that falls as a power of the tokens, of a variant that needs 1 / ``speed`` of the tokens."""
    return 1.35 + 28 * (tokens * speed) ** -0.27


def variant(name, speed, budgets=BUDGETS, seeds=SEEDS, noise=0.004, diverged=(), trials=()):
    """Return a variant with the baseline's loss at ``speed`` times the tokens, plus noise."""
    generator = np.random.default_rng(sum(name.encode()))
    runs = []
    for budget in budgets:
        for seed in seeds:
            loss = loss_at(budget, speed) + 0.01 * math.sin(seed) + noise * generator.normal()
            loss = math.inf if (budget, seed) in diverged else loss
            seconds = 0.05 + 0.002 * len(name) if math.isfinite(loss) else math.inf
            runs.append(Run(budget, seed, loss, loss / 2, seconds, f"{name[:5]}-{budget}-{seed}"))
    settings = {"lr": 0.004, "warmup_fraction": 0.0, "architecture": name}
    return Variant(name, settings, 2_100_000 + len(name), tuple(trials), tuple(runs), chosen(budgets, trials))


def chosen(budgets, trials=(), **settings):
    """Return the settings of the runs: the best trial of each budget, or of the only search, or a default."""
    found = []
    for tokens in budgets:
        searches = {trial.tokens for trial in trials}
        search = tokens if tokens in searches else next(iter(searches), 0)
        values = {"lr": 0.004, **settings}
        for setting in {trial.setting for trial in trials}:
            at = [trial for trial in trials if (trial.setting, trial.tokens) == (setting, search)]
            values[setting] = min(at, key=lambda trial: trial.loss).value
        found.append(ChosenSettings(tokens, search, values))
    return tuple(found)


def experiment(*variants, budgets=BUDGETS, seeds=SEEDS, kind="compare", **setup):
    """Return the results of an experiment with these variants; the first is the baseline."""
    setup = {"command": "antransformer compare --quick", "batch_tokens": 2048, "torch": "2.13", **setup}
    return Results(kind, setup, budgets, seeds, variants)
