"""Recipes: named sets of training settings that apply where the user gives no value; importable without torch."""

from collections.abc import Mapping
from typing import Any

from antransformer.training.optimizer_registry import OPTIMIZERS

RECIPES: dict[str, dict[str, Any]] = {
    # As published (arXiv:2505.22014, section 5): the learning rate depends on the model's size only.
    "paper": {
        "optimizer": "adam",
        "schedule": "cosine",
        "min_lr_ratio": 0.01,
        "ema": 0.0,
        "lr_horizon": 0,
    },
    # The lowest loss of what was measured (docs/results.md). Its rates, by architecture, and their horizons are in
    # training/optimizer_registry.py and training/defaults.py.
    "best": {
        "optimizer": "muon",
        "schedule": "cosine",
        "min_lr_ratio": 0.01,
        "ema": 0.0,
    },
}
DEFAULT_RECIPE = "best"


def with_recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Normalized settings, completed by those of their recipe."""
    return {**RECIPES[settings.get("recipe", DEFAULT_RECIPE)], **settings}


def variant_settings(name: str) -> dict[str, str]:
    """Settings of the name of a variant: an architecture, with a recipe and an optimizer as suffixes.

    ``angpt`` gives the architecture only, ``angpt-paper-muon`` also the recipe paper and the optimizer muon.
    """
    settings: dict[str, str] = {}
    while True:
        rest, _, suffix = name.rpartition("-")
        kind = "optimizer" if suffix in OPTIMIZERS else "recipe" if suffix in RECIPES else ""
        if not kind or kind in settings:
            return {"architecture": name, **settings}
        settings[kind], name = suffix, rest
