"""The ablations of anGPT as one named suite: what each part of the method is worth (arXiv:2505.22014, section 5.4).

A variant has the settings of the default but for what its name says; the first is the default itself.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from antransformer.comparison.compare import common_settings, whole_batches
from antransformer.comparison.experiment import Plan, VariantSpec
from antransformer.errors import ConfigError
from antransformer.models.ablations import ABLATIONS
from antransformer.models.config import PAPER_VOCABULARY
from antransformer.models.registry import get
from antransformer.settings import nearest
from antransformer.training.config import resolve_config

DEFAULT = "default"


def suite(width: int) -> dict[str, dict[str, Any]]:
    """Settings of every variant of a model of this width, by name."""
    options = {
        "gate-none": {"gate_scale": "none"},
        "gate-sqrt-mlp": {"gate_scale": "sqrt_mlp"},
        "s-scale-0.01": {"s_scale": 0.01},
        "s-scale-0.1": {"s_scale": 0.1},
        "s-scale-sqrt-width": {"s_scale": width**-0.5},
        "alpha-init-0.02": {"alpha_init": 0.02},
        "alpha-init-0.15": {"alpha_init": 0.15},
    }
    recipe = {
        "warm-up": {"warmup_fraction": 0.1},
        "weight-decay": {"weight_decay": 0.1},
        "warm-up-and-decay": {"warmup_fraction": 0.1, "weight_decay": 0.1},
    }
    parts = {name: {"model": {"ablation": name}} for name in ABLATIONS if name != "none"}
    return {DEFAULT: {}, **parts, **{name: {"model": option} for name, option in options.items()}, **recipe}


def variant_specs(width: int, only: Sequence[str] = ()) -> list[VariantSpec]:
    """The default and the variants that match one of the patterns, all of them without a pattern.

    Raises:
        ConfigError: a pattern matches none.
    """
    variants = suite(width)
    for pattern in only:
        if not fnmatch.filter(variants, pattern):
            raise ConfigError(
                f"no ablation is named {pattern}{nearest(pattern, variants) or ': they are ' + ', '.join(variants)}"
            )
    chosen = [name for name in variants if not only or any(fnmatch.fnmatch(name, pattern) for pattern in only)]
    if set(chosen) == {DEFAULT}:
        raise ConfigError(f"--only {' '.join(only)} leaves nothing to compare with the default")
    names, hyperparameter = dict.fromkeys([DEFAULT, *chosen]), get("angpt").hyperparameter("adam")
    return [VariantSpec(name, {"architecture": "angpt", **variants[name]}, hyperparameter) for name in names]


def plan(settings: Mapping[str, Any], only: Sequence[str], budgets: Sequence[int], **effort: int) -> Plan:
    """The suite, or a part of it, as an experiment; ``effort`` as in ``Plan``.

    Raises:
        ConfigError: see ``variant`` and ``Plan``.
    """
    common = common_settings(settings, {"architecture": "angpt"})
    width = resolve_config({**common, "architecture": "angpt"}, PAPER_VOCABULARY).model.width
    budgets = whole_batches(budgets, common["batch_tokens"])
    return Plan("ablate", common, variant_specs(width, only), budgets, **effort)
