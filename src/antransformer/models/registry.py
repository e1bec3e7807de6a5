"""Registry of architectures: what the package has to know about each, by name. Importable without torch.

Each model file declares an ``Architecture`` and has one line in ``BUILT_IN``. Other packages declare theirs as an entry
point, which worker processes find too:

    [project.entry-points."antransformer.architectures"]
    my-gpt = "my_package.my_gpt:ARCHITECTURE"
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from antransformer.errors import ConfigError

# Module paths and not modules, so that listing the names imports no torch.
BUILT_IN = {
    "angpt": "antransformer.models.angpt",
    "ngpt": "antransformer.models.ngpt",
    "gpt+": "antransformer.models.gpt_plus",
    "gpt": "antransformer.models.gpt",
    "ln-scaling": "antransformer.models.ln_scaling",
    "dyt": "antransformer.models.dyt",
}
ENTRY_POINTS = "antransformer.architectures"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Declaration of an architecture.

    Attributes:
        name: value of ``--architecture``.
        label: display name in charts and reports.
        description: one line for the model card.
        cls: subclass of ``models.decoder.Decoder``, called with a ``ModelConfig``.
        options: the options of ``ModelConfig`` that it has, with their defaults; a default that depends on the sizes is
            a function of the config.
        arxiv: number of the paper.
        defaults_like: architecture whose default learning rate, batch, warm-up and weight decay it uses, as far as
            ``training.defaults`` has none of its own.
        tuned_hyperparameters: settings that ``compare`` tunes after the learning rates, in this order.
        tensor_parallel: axis along which the weights of each module, by its name, are split over the ranks; empty where
            tensor parallelism is not supported.
        hf_export: whether ``interop.modeling_antransformer`` implements it for transformers.
        document_mask: whether it can be trained with ``document_mask``, since its blocks call ``functional.rotate`` and
            ``functional.causal_attention`` with their context.
    """

    name: str
    label: str
    description: str
    cls: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    arxiv: str | None = None
    defaults_like: str = "gpt+"
    tuned_hyperparameters: tuple[str, ...] = ("weight_decay",)
    tensor_parallel: Mapping[str, int] = field(default_factory=dict)
    hf_export: bool = False
    document_mask: bool = False


_loaded: dict[str, Architecture] = {}


def names() -> list[str]:
    """Names of all architectures: built in, registered in this process, and declared by installed packages."""
    return list(dict.fromkeys((*BUILT_IN, *_loaded, *_declared())))


def get(name: str) -> Architecture:
    """Architecture of a name; its module is imported at the first call.

    Raises:
        ConfigError: the name is unknown, or its entry point cannot be loaded.
    """
    if name not in _loaded:
        if name in BUILT_IN:
            _loaded[name] = import_module(BUILT_IN[name]).ARCHITECTURE
        elif name in _declared():
            _loaded[name] = _load(_declared()[name])
        else:
            raise ConfigError(f"unknown architecture {name!r}: choose from {', '.join(names())}")
    return _loaded[name]


def register(architecture: Architecture) -> Architecture:
    """Add an architecture in this process only; ``compare`` and ``sweep`` train in others, which read entry points.

    Raises:
        ConfigError: the name is taken.
    """
    if architecture.name in names():
        raise ConfigError(f"an architecture named {architecture.name!r} exists: choose another name")
    _loaded[architecture.name] = architecture
    return architecture


@cache
def _declared() -> dict[str, EntryPoint]:
    """Entry points by name; cached, since finding them reads the metadata of every installed package."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def _load(point: EntryPoint) -> Architecture:
    try:
        architecture = point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"architecture {point.name}: entry point {point.value} cannot be loaded: {error}") from error
    if not isinstance(architecture, Architecture) or architecture.name != point.name:
        raise ConfigError(f"architecture {point.name}: entry point {point.value} must be an Architecture of this name")
    return architecture
