"""Names that changed since version 1 of the saved files.

Readers translate the names in saved files of version 1 (on the left of the tables). Options and YAML files of users are
not translated, since silently accepted old names would live forever; their errors give the new names.
"""

from collections.abc import Mapping
from typing import Any

MODEL = {"head_width": "head_dim", "rotary_base": "rope_theta"}
TRAINING = {
    "micro_batch": "micro_batch_size",
    "lr_final": "min_lr_ratio",
    "warmup": "warmup_fraction",
    "eps": "adam_eps",
    "clip": "grad_clip",
    "skip_nonfinite": "max_skipped_steps",
}
VALUES = {"parallel": {"replicate": "ddp", "shard": "fsdp", "hybrid": "hsdp"}}
REMOVED_MODEL = ("nu_p",)  # the exact norm after the output projection cancelled it
# The same with dotted names, such as model.head_width.
DOTTED = TRAINING | {f"model.{old}": f"model.{new}" for old, new in MODEL.items()}
REMOVED = tuple(f"model.{name}" for name in REMOVED_MODEL)
OPTIONS = {
    "--contenders": "--variants",
    "--knob-trials": "--tuning-trials",
    "--max-tokens": "--max-new-tokens",
    "--new": "--max-new-tokens",
    "--prompt": "--prompt-tokens",
    "--train-bpe": "--bpe-vocab-size",
    "--val": "--val-inputs",
    **{f"--{old.replace('_', '-')}": f"--{new.replace('_', '-')}" for old, new in DOTTED.items()},
}


def new_name(key: str) -> str:
    """Return ``: it is now X`` for an old name such as ``clip`` or ``model.head_width``, otherwise an empty text."""
    if key in DOTTED:
        return f": it is now {DOTTED[key]}"
    return ": it was removed, leave it out" if key in REMOVED else ""


def new_value(key: str, value: Any) -> str:
    """Return ``: it is now X`` for an old value of a setting, such as ``parallel`` shard, otherwise an empty text."""
    upgraded = _upgrade_value(key, value)
    return "" if upgraded is value else f": it is now {upgraded}"


def upgrade_model(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the fields of a ``ModelConfig`` of version 1."""
    return {MODEL.get(name, name): value for name, value in fields.items() if name not in REMOVED_MODEL}


def upgrade_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the settings of a run of version 1; model settings are nested under ``model``, if present."""
    upgraded = {TRAINING.get(name, name): _upgrade_value(name, value) for name, value in settings.items()}
    if isinstance(upgraded.get("model"), Mapping):
        upgraded["model"] = upgrade_model(upgraded["model"])
    return upgraded


def upgrade_flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rename settings of version 1 with dotted names, such as ``model.head_width``."""
    kept = {name: value for name, value in settings.items() if name not in REMOVED}
    return {DOTTED.get(name, name): _upgrade_value(name, value) for name, value in kept.items()}


def _upgrade_value(name: str, value: Any) -> Any:
    return VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value
