"""Variants of a comparison: names of architectures, or settings for each variant from a YAML file or a mapping."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from antransformer.errors import ConfigError
from antransformer.models import registry
from antransformer.runs import shared_settings
from antransformer.runs.settings import flatten
from antransformer.settings import nearest, read_count, shown
from antransformer.training.config import normalize_settings
from antransformer.training.config_files import read_yaml
from antransformer.training.recipes import variant_settings

BUDGETS = "budgets"  # key of the settings that hold at one budget only
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-_.")  # of run folders

# Settings of the data and of validation, which all variants share.
SHARED = ("data", "preset", "batch_tokens", "shuffle", "document_mask", "eval_tokens")
RATES = ("lr", "embed_lr", "head_lr", "vector_lr", "muon_lr")
TRAINING = (
    *(name for name in shared_settings.TRAINING if name not in SHARED),
    *RATES,
    "warmup_fraction",
    "weight_decay",
    "activation_checkpointing",
)
SHARED_MODEL = ("vocab_size", "context")
# A variant has the same model and the same kinds of learning rates at every budget.
SAME_AT_EVERY_BUDGET = ("recipe", "optimizer")
SAME_MODEL_AT_EVERY_BUDGET = ("architecture", "width", "layers", "head_dim", "mlp_ratio")


@dataclass(frozen=True)
class OwnSettings:
    """Settings that the user gives for one variant.

    Attributes:
        settings: normalized settings at all budgets, with ``architecture`` at the top level.
        by_budget: normalized settings that hold at one budget only, by its tokens; they override ``settings``.
        where: source of the settings for messages; empty if the name alone gives them.
    """

    settings: Mapping[str, Any]
    by_budget: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    where: str = field(default="", compare=False)


def named_variants(names: Sequence[str]) -> dict[str, OwnSettings]:
    """Return variants without settings of their own, except the suffixes of their names.

    Args:
        names: architectures with suffixes, as in ``variant_settings``.

    Raises:
        ConfigError: an architecture is unknown, two names are equal, or there are fewer than two.
    """
    for name in names:
        _require_architecture(variant_settings(name)["architecture"])
    if len(set(names)) != len(names) or len(names) < 2:
        raise ConfigError(f"--architectures needs two or more different names, got {' '.join(names) or 'none'}")
    return {name: OwnSettings(variant_settings(name)) for name in names}


def read_variants(source: str | Path | Mapping[str, Any]) -> dict[str, OwnSettings]:
    """Return variants with their settings.

    Args:
        source: YAML file, or a mapping from the names of variants to settings as in a config of ``train``. Without
            ``architecture``, the name is that of an architecture, with suffixes as in ``variant_settings``. The key
            ``budgets`` maps budgets, such as ``2.5M``, to settings at this budget only.

    Raises:
        ConfigError: the file cannot be read, a name or a setting is wrong, all variants share the setting, or there
            are fewer than two variants.
    """
    where, content = ("variants", source) if isinstance(source, Mapping) else (str(source), read_yaml(Path(source)))
    if len(content) < 2:
        raise ConfigError(f"{where} needs two or more variants, got {', '.join(map(str, content)) or 'none'}")
    return {name: _own_settings(name, values, where) for name, values in content.items()}


def _own_settings(name: Any, values: Any, where: str) -> OwnSettings:
    # The name begins those of run folders and is part of the summary.
    if not isinstance(name, str) or not name[:1].isalnum() or not NAME_CHARACTERS.issuperset(name):
        raise ConfigError(f"{where}: the name of a variant has letters, digits and + - _ . only, got {shown(name)}")
    where = f"{where}: {name}"
    settings = dict(_mapping(values, where))
    budgets = _mapping(settings.pop(BUDGETS, None), f"{where}: {BUDGETS}")
    normalized = _normalized(settings, where, TRAINING, SHARED_MODEL)
    by_budget: dict[int, Mapping[str, Any]] = {}
    for budget, at_budget in budgets.items():
        tokens = _tokens(budget, f"{where}: {BUDGETS}")
        if tokens in by_budget:
            raise ConfigError(f"{where}: {BUDGETS} has {tokens:,} tokens twice")
        training = [setting for setting in TRAINING if setting not in SAME_AT_EVERY_BUDGET]
        model = (*SHARED_MODEL, *SAME_MODEL_AT_EVERY_BUDGET)
        place = f"{where}: {BUDGETS}: {budget}"
        by_budget[tokens] = _normalized(_mapping(at_budget, place), place, training, model)
    _require_same_names(by_budget, normalized, where)
    return OwnSettings(_with_name(name, normalized, where), by_budget, where)


def _mapping(values: Any, where: str) -> Mapping[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a mapping of settings, got {shown(values)}")
    return values


def _tokens(budget: Any, where: str) -> int:
    try:
        return int(read_count(budget))
    except ValueError as error:
        raise ConfigError(f"{where} must have counts of tokens such as 5M as keys, got {shown(budget)}") from error


def _normalized(
    settings: Mapping[str, Any], where: str, training: Sequence[str], shared_model: Sequence[str]
) -> dict[str, Any]:
    """Return normalized settings; refuse all that are not in ``training``, and shared settings of the model."""
    normalized = normalize_settings(settings, where)
    for name in normalized:
        if name != "model" and name not in training:
            raise ConfigError(f"{where}: {name} is the same in all runs: omit it here")
    for name in normalized.get("model", {}):
        if name in shared_model:
            raise ConfigError(f"{where}: model.{name} is the same in all runs: omit it here")
    return normalized


def _require_same_names(by_budget: Mapping[int, Mapping[str, Any]], always: Mapping[str, Any], where: str) -> None:
    """Refuse a setting that is given at one budget but not at another, where it would be searched or a default."""
    for tokens, settings in by_budget.items():
        for other, others in by_budget.items():
            for name in flatten(settings).keys() - flatten(others).keys() - flatten(always).keys():
                raise ConfigError(f"{where}: {name} is set at {tokens:,} tokens, but not at {other:,}: set both")


def _with_name(name: str, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings with ``architecture`` at the top level, and those that the name implies."""
    model = dict(settings.get("model", {}))
    given = {**settings, **({"architecture": model.pop("architecture")} if "architecture" in model else {})}
    implied = variant_settings(name)
    if "architecture" in given:
        _require_architecture(given["architecture"], f"{where}: ")
    if "architecture" not in given or implied["architecture"] in registry.names():
        _require_architecture(implied["architecture"], f"{where}: no architecture is given, and ")
        for key, value in implied.items():
            if given.get(key, value) != value:
                raise ConfigError(f"{where} is the name of a variant with {key} {value}, got {given[key]}: rename it")
        given = {**given, **implied}
    return {**given, "model": model} if model else {key: value for key, value in given.items() if key != "model"}


def _require_architecture(name: str, start: str = "") -> None:
    known = registry.names()
    if name not in known:
        hint = nearest(name, known) or ": choose from " + ", ".join(known)
        raise ConfigError(f"{start}unknown architecture {name!r}{hint}")
