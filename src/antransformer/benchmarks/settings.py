"""Names and settings that all benchmarks share; independent of torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from antransformer.errors import ConfigError
from antransformer.models.config import ModelConfig

if TYPE_CHECKING:
    import torch

Mode = Literal["eager", "compiled"]
MODES: tuple[Mode, ...] = ("eager", "compiled")

# Fields of ModelConfig that give a model of any architecture its shape.
SHAPE = ("vocab_size", "width", "layers", "context", "head_dim", "mlp_ratio", "rotary_fraction", "rope_theta")
OUR_ARCHITECTURES = ("gpt+", "ngpt", "angpt")
VARIANTS = (*OUR_ARCHITECTURES, "qwen3", "x-transformers", "ngpt-pytorch")
MASKED_VARIANTS = tuple(f"{name}-masked" for name in OUR_ARCHITECTURES)  # with ``document_mask``
END_OF_TEXT = 0  # token that separates documents in random tokens
DOCUMENT_TOKENS = 256  # mean length of their documents


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of every benchmark.

    Attributes:
        model: shape of the models; its architecture is ignored.
        device: device to measure.
        dtype: dtype of matrix products; parameters are float32 except where a benchmark documents another dtype.
        rounds: number of timings of each variant.

    Raises:
        ConfigError: rounds is less than 1.
    """

    model: ModelConfig
    device: "torch.device"
    dtype: "torch.dtype"
    rounds: int = 15

    def __post_init__(self) -> None:
        require_positive(rounds=self.rounds)


def require_positive(**values: int) -> None:
    """Check that each value is at least 1.

    Raises:
        ConfigError: a value is smaller; the error names it.
    """
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")


def require_distinct(**values: Sequence[object]) -> None:
    """Check that each list has no value twice.

    Raises:
        ConfigError: a value is repeated; the error names the list and the value.
    """
    for name, items in values.items():
        repeated = [str(item) for index, item in enumerate(items) if item in items[:index]]
        if repeated:
            raise ConfigError(f"{name} needs different values, got {' '.join(repeated)} more than once")


def replace_architecture(model: ModelConfig, architecture: str) -> ModelConfig:
    """Config of the same shape with another architecture, whose own options have their defaults."""
    shape = {name: getattr(model, name) for name in SHAPE}
    return ModelConfig(**{**shape, "architecture": architecture})
