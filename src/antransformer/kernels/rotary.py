"""Rotary embedding, also in a form that the compiler makes fast on a GPU (``functional.rotary_tables``, ``rotate``)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def tables(positions: Tensor, rotary_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines as in ``functional.rotary_tables``."""
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32) / rotary_dim
    angles = positions.to(torch.float32).unsqueeze(-1) * base**-exponent
    return angles.cos(), angles.sin()


# A custom operator, since the compiler would compute the tables again in every kernel that rotates queries or keys.
compiled_tables = torch.library.custom_op("antransformer::rotary_tables", tables, mutates_args=())


@compiled_tables.register_fake
def _(positions: Tensor, rotary_dim: int, base: float) -> tuple[Tensor, Tensor]:
    table = positions.new_empty(*positions.shape, len(range(0, rotary_dim, 2)), dtype=torch.float32)
    return table, torch.empty_like(table)


def has_pairs(x: Tensor, cos: Tensor) -> bool:
    """Whether ``rotate_pairs`` can rotate heads of this width."""
    half = cos.shape[-1]
    return half > 0 and x.shape[-1] % (2 * half) == 0


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Result of ``functional.rotate``, without a concatenation.

    The compiler evaluates all parts of a concatenation for every coordinate.
    """
    own, partner = (table.unsqueeze(-2) for table in pair_weights(cos, sin, x.shape[-1]))
    swapped = x.unflatten(-1, (-1, 2, cos.shape[-1])).flip(-2).flatten(-3)
    rotated: Tensor = x * own + swapped * partner
    return rotated.to(x.dtype)


@torch.library.custom_op("antransformer::rotary_pair_weights", mutates_args=())
def pair_weights(cos: Tensor, sin: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Weights (..., T, h) of each coordinate and of its partner: 1 and 0 from rotary_dim on."""
    rest = head_dim - 2 * cos.shape[-1]
    return F.pad(torch.cat([cos, cos], dim=-1), (0, rest), value=1.0), F.pad(torch.cat([-sin, sin], dim=-1), (0, rest))


@pair_weights.register_fake
def _(cos: Tensor, sin: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    table = cos.new_empty(*cos.shape[:-1], head_dim)
    return table, torch.empty_like(table)
