"""Results of a diagnosis: plain data, independent of torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Names of the maps whose factors are measured.
LEGEND = (
    "q, k, v: heads of the attention input; p: attention output; u, z: MLP up and gate; act: u * SiLU(z); d: MLP down; "
    "nu_A, nu_M: nu(alpha) of attention and MLP"
)
# Words for the same maps.
MAPS = {
    "q": "query",
    "k": "key",
    "v": "value",
    "p": "attention\noutput",
    "u": "MLP up",
    "z": "MLP gate",
    "act": "MLP\nactivation",
    "d": "MLP down",
    "nu_A": "attention\nresidual",
    "nu_M": "MLP\nresidual",
}
# An exact normalization follows all other maps and cancels their factors.
EFFECTIVE = ("z", "nu_A", "nu_M")
NEAR_BOUND = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over tokens."""

    mean: float
    std: float


@dataclass(frozen=True)
class FactorError:
    """A factor of one layer compared with the factor that the measured norms need.

    Attributes:
        factor: factor in use.
        needed: factor that gives the output norm its expected root mean square.
        error: factor / needed - 1; positive if the factor is too large.
        spread: standard deviation over mean of ||output|| / ||input||; 0 if the norm concentrates perfectly.
    """

    factor: float
    needed: float
    error: float
    spread: float


@dataclass(frozen=True)
class Diagnosis:
    """Measurements of one model; ``dataclasses.asdict`` converts them to JSON types.

    Attributes:
        architecture: architecture of the model.
        tokens: number of tokens of text that were measured.
        residual_norm: norm of the residual stream on ``text`` and on ``repeated`` tokens, after the embedding and after
            each block.
        repeated_ids: repeated token ids, one sequence each: the most frequent ones of the text.
        repeated_length: number of repetitions.
        norm_ratio: ||output|| / ||input|| of ``block``, ``attention`` and ``mlp`` on text, by layer, as far as a block
            has them. The input of a sublayer is measured after its norm layer, if it has one; its output before any
            norm and residual.
        factors: errors by map (see ``LEGEND``), kind of input (``random``, ``text``) and layer; empty for
            a model without constant factors.
        alpha: mean of alpha by layer, as [attention, MLP]; None for a model without residual interpolation.
        alpha_start: alpha at initialization.
        bound: bound of the weight vectors: ``at most 1``, ``exactly 1`` or ``none``.
        row_norm: norms of all weight vectors: ``mean``, ``min``, ``max``, ``near_bound`` (fraction at ``NEAR_BOUND`` or
            more), and a histogram as ``edges`` and ``counts``.
    """

    architecture: str
    tokens: int
    residual_norm: dict[str, list[Spread]]
    repeated_ids: list[int]
    repeated_length: int
    norm_ratio: dict[str, list[Spread]]
    factors: dict[str, dict[str, list[FactorError]]]
    alpha: list[list[float]] | None
    alpha_start: float | None
    bound: str
    row_norm: dict[str, Any]


def mean_abs_error(layers: Iterable[FactorError]) -> float:
    """Mean absolute error over layers."""
    errors = [abs(layer.error) for layer in layers]
    return sum(errors) / len(errors)
