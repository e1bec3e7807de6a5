"""Settings of runs by dotted name, such as ``model.s_scale``, and the complete settings of a run in an experiment."""

from collections.abc import Mapping
from typing import Any

from antransformer.training.config import TrainConfig, resolve_config

METRICS_LINES = 40  # lines of metrics, and probes, in each run


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level of dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def unflatten(setting: str, value: Any) -> dict[str, Any]:
    """Return one dotted setting as nested mappings: ``model.s_scale`` gives ``{"model": {"s_scale": value}}``."""
    first, _, rest = setting.partition(".")
    return {first: unflatten(rest, value) if rest else value}


def value_of(config: TrainConfig, setting: str) -> Any:
    """Return the value of a setting by its dotted name."""
    value: Any = config
    for part in setting.split("."):
        value = getattr(value, part)
    return value


def fill_defaults(settings: Mapping[str, Any], vocab_size: int) -> TrainConfig:
    """Return the complete settings of a run in an experiment: one validation, at the end, and few checkpoints."""
    steps = resolve_config(settings, vocab_size).steps
    intervals = {"log_every": max(1, steps // METRICS_LINES), "eval_every": steps, "keep_checkpoints": 1}
    return resolve_config({**settings, **intervals}, vocab_size)
