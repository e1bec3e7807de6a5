"""The ablation suite of anGPT, which measures what each part of the method contributes (arXiv:2505.22014, section 5.4).

Each variant changes one thing in the default settings, as its name says. The first variant is the default.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from antransformer.comparison.compare import common_settings, full_batches, full_trial
from antransformer.comparison.experiment import Plan, VariantSpec, learning_rates
from antransformer.errors import ConfigError
from antransformer.models.ablations import ABLATIONS
from antransformer.models.config import PAPER_VOCABULARY
from antransformer.models.registry import get
from antransformer.settings import nearest
from antransformer.training.config import resolve_config
from antransformer.training.recipes import with_recipe

DEFAULT = "default"


def suite(width: int) -> dict[str, dict[str, Any]]:
    """Return the settings of every variant by name; ``width`` is the model's, on which one variant depends."""
    options = {
        "gate-none": {"gate_scale": "none"},
        "gate-sqrt-mlp": {"gate_scale": "sqrt_mlp"},
        "s-scale-0.01": {"s_scale": 0.01},
        "s-scale-0.1": {"s_scale": 0.1},
        "s-scale-sqrt-width": {"s_scale": width**-0.5},
        "alpha-init-0.02": {"alpha_init": 0.02},
        "alpha-init-0.15": {"alpha_init": 0.15},
    }
    recipe: dict[str, dict[str, Any]] = {
        "warm-up": {"warmup_fraction": 0.1},
        "weight-decay": {"weight_decay": 0.1},
        "warm-up-and-decay": {"warmup_fraction": 0.1, "weight_decay": 0.1},
        "no-bounds-decay": {"weight_decay": 0.1, "model": {"ablation": "no-bounds"}},
    }
    parts = {name: {"model": {"ablation": name}} for name in ABLATIONS}
    return {DEFAULT: {}, **parts, **{name: {"model": option} for name, option in options.items()}, **recipe}


# One line for each variant of ``suite``, for ``ablate --list``.
DESCRIPTIONS = {
    DEFAULT: "anGPT with its default settings",
    "constant-x0.5": "constant factors halved",
    "constant-x2": "constant factors doubled",
    "constant-none": "no constant factors",
    "all-x0.5": "constant factors and nu(alpha) halved",
    "all-x2": "constant factors and nu(alpha) doubled",
    "all-none": "no factors",
    "residual-none": "interpolation without nu(alpha)",
    "no-lerp": "residual sum (x + y) / sqrt(2) in place of the interpolation",
    "scalar-alpha": "one alpha for all coordinates of a sublayer",
    "strict": "norms of weight rows exactly 1",
    "model-axis": "bounds along the model axis, as in nGPT",
    "no-bounds": "norms of weight rows not bounded",
    "gate-none": "no factor before the gate's SiLU",
    "gate-sqrt-mlp": "factor sqrt(MLP width) before the gate's SiLU",
    "s-scale-0.01": "s_scale 0.01: alpha and s_Z learn faster than by default",
    "s-scale-0.1": "s_scale 0.1: alpha and s_Z learn more slowly than by default",
    "s-scale-sqrt-width": "s_scale 1/sqrt(width)",
    "alpha-init-0.02": "alpha initialized to 0.02",
    "alpha-init-0.15": "alpha initialized to 0.15",
    "warm-up": "learning-rate warm-up over 10% of the run",
    "weight-decay": "weight decay 0.1",
    "warm-up-and-decay": "learning-rate warm-up over 10% of the run and weight decay 0.1",
    "no-bounds-decay": "weight decay 0.1 in place of the bounds",
}


def variant_specs(width: int, only: Sequence[str], optimizer: str) -> list[VariantSpec]:
    """Return the default and the variants whose names match a pattern; without patterns, the full suite.

    Raises:
        ConfigError: a pattern matches no variant, or all patterns match only the default.
    """
    variants = suite(width)
    for pattern in only:
        if not fnmatch.filter(variants, pattern):
            raise ConfigError(
                f"unknown ablation {pattern!r}{nearest(pattern, variants) or ': choose from ' + ', '.join(variants)}"
            )
    chosen = [name for name in variants if not only or any(fnmatch.fnmatch(name, pattern) for pattern in only)]
    if set(chosen) == {DEFAULT}:
        raise ConfigError(f"--only {' '.join(only)} selects no variant to compare with the default")
    rates, hyperparameters = learning_rates(optimizer), get("angpt").tuned_hyperparameters
    return [
        VariantSpec(name, {"architecture": "angpt", **variants[name]}, rates, hyperparameters)
        for name in dict.fromkeys([DEFAULT, *chosen])
    ]


def plan(settings: Mapping[str, Any], only: Sequence[str], budgets: Sequence[int], **effort: int) -> Plan:
    """Plan the suite or a part of it.

    Args:
        settings: settings of all runs.
        only: patterns as in ``variant_specs``.
        budgets: token counts, ascending.
        effort: numbers of seeds and trials, as in ``Plan``.

    Raises:
        ConfigError: as ``variant_specs``, ``full_batches`` and ``Plan``.
    """
    common = common_settings(settings, {"architecture": "angpt"})
    width = resolve_config({**common, "architecture": "angpt"}, PAPER_VOCABULARY).model.width
    budgets = full_batches(budgets, common["batch_tokens"])
    specs = variant_specs(width, only, with_recipe(settings)["optimizer"])
    return Plan("ablate", common, specs, budgets, **full_trial(effort, common["batch_tokens"]))
