"""Transformers in a compact space: scalar normalization factors and bounded weight rows.

The approximately normalized transformer (arXiv:2505.22014), as a library and as the command ``antransformer``.
"""

from antransformer import blocks, bounds, factors, functional, nn
from antransformer.bounds import Bound, bind, normalize_
from antransformer.derive import derive
from antransformer.interop.register import register_when_imported
from antransformer.models import ModelConfig, build
from antransformer.version import __version__

__all__ = [
    "Bound",
    "ModelConfig",
    "__version__",
    "bind",
    "blocks",
    "bounds",
    "build",
    "derive",
    "factors",
    "functional",
    "nn",
    "normalize_",
]

register_when_imported()  # our models, with transformers, by whoever imports that
