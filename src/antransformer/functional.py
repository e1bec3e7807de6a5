"""The operations of the three architectures, as pure functions of tensors.

Shapes: B batch, T tokens, d model width, n heads, h head width. Norms and factors are computed in float32 and cast back
to the activation's dtype, so that half-precision activations stay half precision and the attention kernel stays fast.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from antransformer import factors

NORM_EPS = 1e-12  # only keeps a zero vector from becoming NaN; unit-norm activations never come near it


def norm(x: Tensor) -> Tensor:
    """Exact L2 normalization over the last axis: x / ||x||, in x's shape and dtype (arXiv:2410.01131, eq. 1)."""
    precision = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precision)
    return x * length.clamp_min(NORM_EPS).reciprocal().to(x.dtype)


def linear(x: Tensor, weight: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """``scale * (weight x)`` with the scale applied to the weight, which has fewer elements than the result.

    Args:
        x: (..., fan_in).
        weight: (fan_out, fan_in).
        scale: a constant factor, or a vector (fan_out,) of one scale per output neuron.

    Returns:
        (..., fan_out).
    """
    if isinstance(scale, Tensor):
        weight = weight * scale.to(weight.dtype).unsqueeze(1)
    elif scale != 1.0:
        weight = weight * scale
    return F.linear(x, weight)


def interpolate(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """Residual update of anGPT: (x + alpha (y - x)) * nu(alpha), elementwise (arXiv:2505.22014, section 4.2).

    Args:
        x: the residual stream (..., d), of about unit norm.
        y: the sublayer's output (..., d), of unit norm.
        alpha: (d,), how far each coordinate moves towards y.
    """
    nu = factors.residual(alpha)
    return x * ((1 - alpha) * nu).to(x.dtype) + y * (alpha * nu).to(y.dtype)


def interpolate_exact(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """Residual update of nGPT: norm(x + alpha (y - x)), elementwise alpha of shape (d,) (arXiv:2410.01131, eq. 10)."""
    return norm(torch.lerp(x, y.to(x.dtype), alpha.to(x.dtype)))


class Rotary(NamedTuple):
    """Cosines and sines of the rotated part of each head, each (T, rotated / 2) or (B, T, rotated / 2)."""

    cos: Tensor
    sin: Tensor


def rotary_tables(positions: Tensor, rotated: int, base: float) -> Rotary:
    """Angles position * base^(-2i / rotated) for the ``rotated`` (even) leading coordinates of each head.

    Args:
        positions: integer positions (T,), or (B, T) where sequences of a batch begin at different places.
        rotated: how many coordinates of a head are rotated; the rest pass unchanged.
        base: wavelength base, 10,000 as a rule.

    Returns:
        Tables in float32.
    """
    exponent = torch.arange(0, rotated, 2, device=positions.device, dtype=torch.float32) / rotated
    angles = positions.to(torch.float32).unsqueeze(-1) * base**-exponent
    return Rotary(angles.cos(), angles.sin())


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotary position embedding on the leading part of each head (arXiv:2104.09864; halves paired as in GPT-NeoX).

    Args:
        x: queries or keys (B, T, n, h).
        rotary: tables of T positions; coordinates past their width are left as they are.
    """
    half = rotary.cos.shape[-1]
    cos, sin = (table.unsqueeze(-2).to(x.dtype) for table in rotary)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def split_heads(qkv: Tensor, head_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection (B, T, n * 3 * h) into q, k, v of shape (B, T, n, h) each.

    The rows of the fused weight are ordered head by head, so that a block of its rows holds whole heads.
    """
    q, k, v = qkv.unflatten(-1, (-1, 3, head_width)).unbind(-2)
    return q, k, v


class LayerCache(NamedTuple):
    """Room for the keys and values of one layer, (B, capacity, n, h) each, and how many positions are filled."""

    k: Tensor
    v: Tensor
    length: int

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new positions behind the filled ones; returns all keys and values so far."""
        steps = k.shape[1]
        self.k.narrow(1, self.length, steps).copy_(k)
        self.v.narrow(1, self.length, steps).copy_(v)
        return self.k.narrow(1, 0, self.length + steps), self.v.narrow(1, 0, self.length + steps)


class Places(NamedTuple):
    """Where the tokens of a batch stand, and what they may look at.

    Attributes:
        rotary: tables of their positions.
        mask: (B, 1, T, S), true where a token may look; None for a causal batch without padding.
        cache: keys and values of the tokens before them, in generation.
    """

    rotary: Rotary
    mask: Tensor | None = None
    cache: LayerCache | None = None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, places: Places, scale: float = 1.0) -> Tensor:
    """Causal softmax attention: softmax(scale * q k^T) v.

    Args:
        q, k, v: (B, T, n, h).
        places: mask and cache.
        scale: constant on the scores; a learnable one is multiplied into q by the caller, which keeps the fused kernel.

    Returns:
        (B, T, n * h), heads concatenated.
    """
    if places.cache is not None:
        k, v = places.cache.extend(k, v)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=places.mask,
        is_causal=places.mask is None and q.shape[1] > 1,  # one new token sees all before it
        scale=scale,
    )
    return y.transpose(1, 2).flatten(2)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean next-token loss in nats, computed in float32.

    Args:
        logits: (B, T, V).
        targets: token ids (B, T).
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
