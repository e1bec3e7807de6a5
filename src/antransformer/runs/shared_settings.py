"""Settings that all runs of a comparison, an ablation or a sweep share."""

from collections.abc import Mapping, Sequence
from typing import Any

from antransformer.errors import ConfigError

# All other settings are chosen by the experiment: per variant, per budget or per seed.
TRAINING = (
    "data",
    "preset",
    "batch_tokens",
    "micro_batch_size",
    "recipe",
    "optimizer",
    "lr_width",
    "lr_horizon",
    "horizon_exponent",
    "schedule",
    "decay_fraction",
    "min_lr_ratio",
    "cautious_weight_decay",
    "beta1",
    "beta2",
    "adam_eps",
    "grad_clip",
    "ema",
    "shuffle",
    "document_mask",
    "eval_tokens",
    "precision",
    "compile",
)
MODEL = ("width", "layers", "context", "head_dim", "mlp_ratio", "vocab_size", "rotary_fraction", "rope_theta")
# A sweep has its own options for sizes and batches, and tries exact learning rates.
SWEEP_TRAINING = tuple(
    name for name in TRAINING if name not in ("preset", "batch_tokens", "lr_horizon", "horizon_exponent")
)
SWEEP_MODEL = tuple(name for name in MODEL if name != "width")


def require_shared(settings: Mapping[str, Any], training: Sequence[str], model: Sequence[str]) -> None:
    """Raise ``ConfigError`` for a normalized setting that the runs of an experiment do not share."""
    names = [name for name in settings if name != "model" and name not in training]
    names += [f"model.{name}" for name in settings.get("model", {}) if name not in model]
    if names:
        raise ConfigError(f"{names[0]} cannot be set for all runs of an experiment: omit it")
