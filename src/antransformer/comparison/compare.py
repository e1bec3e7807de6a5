"""The plan of a comparison of architectures."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from antransformer.comparison.experiment import Plan, VariantSpec, derived_rates, learning_rates
from antransformer.comparison.variants import BUDGETS, OwnSettings
from antransformer.errors import ConfigError
from antransformer.models import registry
from antransformer.models.config import PAPER_VOCABULARY
from antransformer.settings import read_count
from antransformer.training.config import merge, resolve_config
from antransformer.training.defaults import WEIGHT_DECAY
from antransformer.training.recipes import with_recipe

# Settings of --quick: a comparison of two architectures, trained as published, takes about an hour on
# two cores: 22M to 25M tokens by plan, more if a best value is at an edge, at 0.5M to 0.73M tokens a minute.
QUICK: dict[str, Any] = {"recipe": "paper", "preset": "pico", "batch_tokens": 1024, "eval_tokens": 65_536}
QUICK_BUDGETS = (100_000, 200_000, 400_000)

# Adam's steps do not depend on the gradient's scale: this setting only divides the learning rate of the vectors.
VECTOR_SCALE = "model.s_scale"


def variant_specs(
    variants: Mapping[str, OwnSettings], common: Mapping[str, Any] | None = None, separate_rates: bool = False
) -> list[VariantSpec]:
    """Return the variants before their settings are tuned.

    Args:
        variants: settings by name; the first is the baseline.
        common: normalized settings of all runs.
        separate_rates: whether to search the learning rates of embedding, head and vectors too.

    Raises:
        ConfigError: two variants are the same.
    """
    specs: list[VariantSpec] = []
    same: dict[frozenset[tuple[str, str]], str] = {}
    for name, own in variants.items():
        settings = dict(own.settings)
        complete = with_recipe(merge(common or {}, settings))
        optimizer = complete["optimizer"]
        compared = {**complete, BUDGETS: own.by_budget}
        first = same.setdefault(frozenset((key, str(compared[key])) for key in compared if key != "recipe"), name)
        if first != name:
            raise ConfigError(f"{first} and {name} have the same settings: omit one of them")
        decays = complete.get("weight_decay") or WEIGHT_DECAY[settings["architecture"]]
        if complete.get("cautious_weight_decay") and not decays:
            settings["cautious_weight_decay"] = False
        searched = registry.get(settings["architecture"]).tuned_hyperparameters
        if separate_rates:
            searched = (*derived_rates(optimizer), *(setting for setting in searched if setting != VECTOR_SCALE))
        specs.append(VariantSpec(name, settings, learning_rates(optimizer), searched, own.by_budget, own.where))
    return specs


def budgets_of(tokens: int, budgets: Sequence[Any] = ()) -> tuple[int, ...]:
    """Return the budgets as ascending token counts; by default a quarter of ``tokens``, half of it, and all of it.

    Raises:
        ConfigError: a budget is not a positive token count, or is given twice.
    """
    if not budgets:
        if tokens < 1:
            raise ConfigError(f"--tokens must be at least 1, got {tokens}")
        return tokens // 4, tokens // 2, tokens
    text = " ".join(map(str, budgets))
    try:
        counts = sorted(int(read_count(value)) for value in budgets)
    except ValueError as error:
        raise ConfigError(f"--budgets must be counts of tokens such as 5M 10M 20M, got {text}") from error
    if counts[0] < 1:
        raise ConfigError(f"--budgets must be at least 1, got {text}")
    if len(set(counts)) != len(counts):
        raise ConfigError(f"--budgets has the same budget twice: {text}")
    return tuple(counts)


def common_settings(settings: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of all variants: the user's, and the baseline's batch size where the user gave none."""
    complete = resolve_config(merge(settings, baseline), PAPER_VOCABULARY)
    return {**settings, "batch_tokens": int(complete.batch_tokens)}


def full_trial(effort: Mapping[str, int], batch_tokens: int) -> dict[str, int]:
    """Return numbers of seeds and trials with ``trial_tokens`` rounded as ``full_batches`` does; raises its errors."""
    tokens = effort.get("trial_tokens", 0)
    return {**effort, "trial_tokens": full_batches([tokens], batch_tokens)[0] if tokens else 0}


def full_batches(budgets: Sequence[int], batch_tokens: int) -> tuple[int, ...]:
    """Round budgets down to full batches.

    Raises:
        ConfigError: a budget is less than one batch, or two budgets have the same number of batches.
    """
    trained = tuple(budget // batch_tokens * batch_tokens for budget in budgets)
    if min(trained) < 1:
        raise ConfigError(
            f"a budget of {min(budgets):,} tokens is less than one batch of {batch_tokens:,}: raise --tokens or "
            "--budgets, or lower --batch-tokens"
        )
    if len(set(trained)) != len(trained):
        raise ConfigError(f"two budgets have the same number of batches of {batch_tokens:,} tokens: {trained}")
    return trained


def plan(
    settings: Mapping[str, Any],
    variants: Mapping[str, OwnSettings],
    budgets: Sequence[int],
    separate_rates: bool = False,
    **effort: int,
) -> Plan:
    """Plan a comparison.

    Args:
        settings: settings of all runs.
        variants: settings by name; the first is the baseline.
        budgets: token counts, ascending.
        separate_rates: as in ``variant_specs``; needs two or more ``tuning_trials``.
        effort: numbers of seeds and trials, as in ``Plan``.

    Raises:
        ConfigError: as ``variant_specs``, ``full_batches`` and ``Plan``, too few trials for separate rates, or the
            settings of single budgets do not fit the budgets.
    """
    if separate_rates and effort.get("tuning_trials", 1) < 2:
        raise ConfigError("--separate-rates searches with --tuning-trials, which must be at least 2, got 1")
    specs = variant_specs(variants, settings, separate_rates)
    with specs[0].named_in_errors():
        # A setting of all budgets may need one of a single budget, as schedule wsd needs decay_fraction.
        at_budget = next(iter(specs[0].by_budget.values()), {})
        common = common_settings(settings, merge(specs[0].settings, at_budget))
    effort = full_trial(effort, common["batch_tokens"])
    trained = full_batches(budgets, common["batch_tokens"])
    specs = [_with_trained_budgets(spec, dict(zip(budgets, trained, strict=True))) for spec in specs]
    if effort.get("trial_tokens") and any(spec.by_budget for spec in specs):
        raise ConfigError("settings of single budgets and --trial-tokens exclude each other: omit one of them")
    return Plan("compare", common, specs, trained, **effort)


def _with_trained_budgets(spec: VariantSpec, trained: Mapping[int, int]) -> VariantSpec:
    """Return a variant whose settings of single budgets have the tokens that are trained, by the budgets' names."""
    if spec.by_budget and spec.by_budget.keys() != trained.keys():
        given, needed = (", ".join(f"{tokens:,}" for tokens in sorted(keys)) for keys in (spec.by_budget, trained))
        raise ConfigError(f"{spec.where}: {BUDGETS} has settings for {given} tokens, but the budgets are {needed}")
    return replace(spec, by_budget={trained[tokens]: settings for tokens, settings in spec.by_budget.items()})
