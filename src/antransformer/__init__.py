"""Approximately normalized transformers (arXiv:2505.22014): a library, a trainer and the command ``antransformer``.

Public names are imported on first access (PEP 562), so ``import antransformer`` is fast and does not import torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from antransformer.interop.register import register_when_imported
from antransformer.version import __version__

if TYPE_CHECKING:
    from antransformer import blocks, bounds, data, factors, functional, inference, models, nn
    from antransformer.api.checkpoints import evaluate, export, generate, load, serve
    from antransformer.api.experiments import ablate, compare
    from antransformer.api.scaling import fit, plan, sweep
    from antransformer.api.training import prepare, train, verify
    from antransformer.bounds import Bound, bind, normalize_
    from antransformer.derive import derive
    from antransformer.models import ModelConfig, build

# Public name -> the module that defines it; a submodule is defined by the package itself.
_SOURCES = {
    **dict.fromkeys(("blocks", "bounds", "data", "factors", "functional", "inference", "models", "nn"), ""),
    **dict.fromkeys(("evaluate", "export", "generate", "load", "serve"), "api.checkpoints"),
    **dict.fromkeys(("ablate", "compare"), "api.experiments"),
    **dict.fromkeys(("fit", "plan", "sweep"), "api.scaling"),
    **dict.fromkeys(("prepare", "train", "verify"), "api.training"),
    **dict.fromkeys(("Bound", "bind", "normalize_"), "bounds"),
    "derive": "derive",
    **dict.fromkeys(("ModelConfig", "build"), "models"),
}

__all__ = [
    "Bound",
    "ModelConfig",
    "__version__",
    "ablate",
    "bind",
    "blocks",
    "bounds",
    "build",
    "compare",
    "data",
    "derive",
    "evaluate",
    "export",
    "factors",
    "fit",
    "functional",
    "generate",
    "inference",
    "load",
    "models",
    "nn",
    "normalize_",
    "plan",
    "prepare",
    "serve",
    "sweep",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_SOURCES[name] or name}")
    value = getattr(module, name) if _SOURCES[name] else module
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package, in which ``derive`` is the function although a submodule has the same name."""

    def __setattr__(self, name: str, value: object) -> None:
        # Importing a submodule binds it to its name in the package; ``__getattr__`` must find the function instead.
        if not (isinstance(value, ModuleType) and _SOURCES.get(name)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
register_when_imported()  # transformers finds our models, whoever imports it
