"""Transformers in a compact space: scalar normalization factors and bounded weight rows.

The approximately normalized transformer (arXiv:2505.22014), as a library and as the command ``antransformer``.
"""

from antransformer import blocks, bounds, factors, functional, nn
from antransformer.analysis.derive import derive
from antransformer.bounds import Bound, bind, normalize_
from antransformer.interop.register import register_when_imported
from antransformer.models import ModelConfig, build

__version__ = "0.1.0"
__all__ = [
    "Bound",
    "ModelConfig",
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
