"""Architectures against each other: the plan of a comparison."""

from collections.abc import Mapping, Sequence
from typing import Any

from antransformer.comparison.experiment import Plan, VariantSpec
from antransformer.errors import ConfigError
from antransformer.models import registry
from antransformer.models.config import PAPER_VOCABULARY
from antransformer.settings import nearest, read_count
from antransformer.training.config import resolve_config
from antransformer.training.optimizer_registry import split_variant

# What --quick chooses: the whole comparison of two architectures in under 20 minutes on two cores.
QUICK: dict[str, Any] = {"preset": "pico", "batch_tokens": 1024, "eval_tokens": 65_536}
QUICK_BUDGETS = (200_000, 400_000, 800_000)


def variant_specs(names: Sequence[str], optimizer: str = "adam") -> list[VariantSpec]:
    """One for each architecture, such as ``angpt``, or ``angpt-muon`` for one that is trained with Muon.

    Args:
        names: the first is the baseline.
        optimizer: of those whose name says none.

    Raises:
        ConfigError: unknown, named twice, or fewer than two.
    """
    known = registry.names()
    for name in names:
        if split_variant(name)[0] not in known:
            raise ConfigError(
                f"unknown architecture {name!r}{nearest(name, known) or ': choose from ' + ', '.join(known)}"
            )
    if len(set(names)) != len(names) or len(names) < 2:
        raise ConfigError(f"--architectures needs two or more different ones, got {' '.join(names) or 'none'}")
    made = []
    for name in names:
        architecture, own_optimizer = split_variant(name)
        settings = {"architecture": architecture, **({"optimizer": own_optimizer} if own_optimizer else {})}
        hyperparameter = registry.get(architecture).hyperparameter(settings.get("optimizer", optimizer))
        made.append(VariantSpec(name, settings, hyperparameter))
    return made


def budgets_of(tokens: int, given: Sequence[Any] = ()) -> tuple[int, ...]:
    """The budgets given, ascending, or a quarter, a half and the whole of ``tokens``.

    Raises:
        ConfigError: one is no count of tokens, or is named twice.
    """
    if not given:
        return tokens // 4, tokens // 2, tokens
    try:
        budgets = sorted(int(read_count(value)) for value in given)
    except ValueError as error:
        raise ConfigError(f"--budgets must be counts of tokens such as 5M 10M 20M, got {' '.join(given)}") from error
    if len(set(budgets)) != len(budgets):
        raise ConfigError(f"--budgets names the same budget twice: {' '.join(given)}")
    return tuple(budgets)


def common_settings(settings: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """What all variants share: the user's settings, and where these leave it open the baseline's default batch."""
    complete = resolve_config({**settings, **baseline}, PAPER_VOCABULARY)
    return {**settings, "batch_tokens": int(complete.batch_tokens)}


def whole_batches(budgets: Sequence[int], batch_tokens: int) -> tuple[int, ...]:
    """The tokens that runs of these budgets are trained on.

    Raises:
        ConfigError: a budget is less than one batch, or two come to the same.
    """
    trained = tuple(budget // batch_tokens * batch_tokens for budget in budgets)
    if not all(trained):
        raise ConfigError(
            f"a budget of {min(budgets):,} tokens is less than one batch of {batch_tokens:,}: raise --tokens or "
            "--budgets, or lower --batch-tokens"
        )
    if len(set(trained)) != len(trained):
        raise ConfigError(f"two budgets come to the same number of batches of {batch_tokens:,} tokens: {trained}")
    return trained


def plan(settings: Mapping[str, Any], architectures: Sequence[str], budgets: Sequence[int], **effort: int) -> Plan:
    """A comparison of architectures, the first being the baseline; ``effort`` as in ``Plan``.

    Raises:
        ConfigError: see ``variant`` and ``Plan``.
    """
    variants = variant_specs(architectures, settings.get("optimizer", "adam"))
    common = common_settings(settings, variants[0].settings)
    return Plan("compare", common, variants, whole_batches(budgets, common["batch_tokens"]), **effort)
