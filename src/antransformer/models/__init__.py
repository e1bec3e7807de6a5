"""Architectures, their configuration and their registry; ``config`` and ``registry`` are importable without torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from antransformer.models.config import PRESETS, ModelConfig
    from antransformer.models.decoder import Cache, Decoder
    from antransformer.models.factory import build

__all__ = ["PRESETS", "Cache", "Decoder", "ModelConfig", "build"]

_MODULES = {
    "Cache": "decoder",
    "Decoder": "decoder",
    "ModelConfig": "config",
    "PRESETS": "config",
    "build": "factory",
}


def __getattr__(name: str) -> Any:
    """Import the module of a public name when the name is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
