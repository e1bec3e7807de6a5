"""The operations of the method, and of the architectures compared with it, as pure functions of tensors.

Shapes: B batch, T tokens, S tokens that are looked at, d model width, f MLP width, n heads, h head width. Norms and
factors are computed in float32 and cast back to the activation's dtype, so that half-precision activations stay half
precision and the attention kernel stays fast.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from antransformer import factors, kernels

NORM_EPS = 1e-12  # only keeps a zero vector from becoming NaN; unit-norm activations never come near it


def normalize(x: Tensor) -> Tensor:
    """Exact L2 normalization over the last axis: x / ||x||, in x's shape and dtype (arXiv:2410.01131, eq. 1)."""
    precision = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precision)
    return x * length.clamp_min(NORM_EPS).reciprocal().to(x.dtype)


def linear(x: Tensor, weight: Tensor, scale: float | Tensor = 1.0, bias: Tensor | None = None) -> Tensor:
    """``scale * (weight x) + bias``, a number as part of the matrix product, a vector applied to the weight.

    Args:
        x: (..., fan_in).
        weight: (fan_out, fan_in).
        scale: a constant factor, or a vector (fan_out,) of one scale per output neuron.
        bias: (fan_out,), not scaled.

    Returns:
        (..., fan_out), of about unit norm for x of unit norm, rows of unit norm, ``factors.linear`` and no bias.

    >>> x, weight = normalize(torch.randn(100, 256)), normalize(torch.randn(1024, 256))
    >>> round(linear(x, weight, factors.linear(256, 1024)).norm(dim=-1).mean().item(), 1)
    1.0
    """
    if isinstance(scale, Tensor):
        weight = weight * scale.to(weight.dtype).unsqueeze(1)
    elif scale != 1.0:
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        y: Tensor = _ScaledProduct.apply(rows, weight, scale).view(*x.shape[:-1], len(weight))
        return y if bias is None else y + bias.to(y.dtype)
    return F.linear(x, weight, bias)


class _ScaledProduct(torch.autograd.Function):
    """scale * (x weight^T) of x (tokens, fan_in) and weight (fan_out, fan_in).

    The scale is the product's own, in both passes: no scaled copy of the weight is made, or kept.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, scale: float) -> Tensor:
        return _scaled_mm(x, weight.T, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        x, weight, ctx.scale = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        for_x = _scaled_mm(gradient, weight, ctx.scale) if ctx.needs_input_grad[0] else None
        for_weight = _scaled_mm(gradient.T, x, ctx.scale) if ctx.needs_input_grad[1] else None
        return for_x, for_weight, None


def _scaled_mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.addmm(a.new_zeros(1), a, b, beta=0, alpha=scale)


def mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] = F.silu,
    std: float = 0.5,
) -> Tensor:
    """Feed-forward map of unit norm: down (up x * activation(gate x)), or without a gate down activation(up x).

    What the activation gets has the standard deviation ``std``, and its factor is derived from that
    (arXiv:2505.22014, section 4.2, there for SiLU at 1/2).

    Args:
        x: (..., d), of about unit norm.
        up: (f, d), rows of unit norm.
        down: (d, f), rows of unit norm.
        gate: (f, d), rows of unit norm; None for a plain MLP.
        activation: elementwise.
        std: standard deviation of its input, positive.

    Returns:
        (..., d), of about unit norm.

    Raises:
        ValueError: see ``factors.activation``.

    >>> x = normalize(torch.randn(100, 256))
    >>> up, down = normalize(torch.randn(1024, 256)), normalize(torch.randn(256, 1024))
    >>> round(mlp(x, up, down, activation=torch.tanh, std=2.0).norm(dim=-1).mean().item(), 1)
    1.0
    """
    nu = mlp_factors(up.shape[1], up.shape[0], gate is not None, activation, std)
    if gate is None:
        return linear(activation(linear(x, up, nu.up)), down, nu.down)
    return linear(linear(x, up, nu.up) * activation(linear(x, gate, nu.gate)), down, nu.down)


class MLPFactors(NamedTuple):
    """Constants on the weights of an MLP."""

    up: float
    gate: float
    down: float


@lru_cache(maxsize=64)
def mlp_factors(width: int, hidden: int, gated: bool, activation: Callable[[Tensor], Tensor], std: float) -> MLPFactors:
    """What makes an MLP of unit norm; arguments and errors as in ``mlp``.

    Coordinates of ``W x`` have variance 1 / width, so that std * sqrt(width) gives the activation its input. With a
    gate nu_act rides on the up projection, which the hidden activations are linear in; without, on the down projection.
    """
    spread, nu_act = std * math.sqrt(width), factors.activation(activation, std)
    if gated:
        return MLPFactors(factors.linear(width, hidden) * nu_act, spread, factors.linear(hidden, width))
    return MLPFactors(spread, 1.0, factors.linear(hidden, width) * nu_act / math.sqrt(hidden))


def interpolate(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """Residual update of anGPT: (x + alpha (y - x)) * nu(alpha), elementwise (arXiv:2505.22014, section 4.2).

    Args:
        x: the residual stream (..., d), of about unit norm.
        y: the sublayer's output (..., d), of unit norm.
        alpha: (d,), how far each coordinate moves towards y.

    Returns:
        (..., d), of about unit norm where x and y are uncorrelated.

    >>> x, y = normalize(torch.randn(100, 256)), normalize(torch.randn(100, 256))
    >>> round(interpolate(x, y, torch.full((256,), 0.3)).norm(dim=-1).mean().item(), 1)
    1.0
    """
    nu = factors.residual(alpha)
    return x * ((1 - alpha) * nu).to(x.dtype) + y * (alpha * nu).to(y.dtype)


def interpolate_norm(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """``interpolate(x, norm(y), alpha)`` in one pass each way.

    Computed in float32 (float64 for float64), whatever the dtypes of x and y. There is no second derivative.

    Args:
        x: the residual stream (..., d), of about unit norm.
        y: the sublayer's output (..., d), of any norm.
        alpha: (d,), or (1,) for all coordinates.

    Returns:
        (..., d), in x's dtype.

    >>> x, y, alpha = normalize(torch.randn(100, 256)), torch.randn(100, 256), torch.full((256,), 0.3)
    >>> bool(interpolate_norm(x, y, alpha).isclose(interpolate(x, normalize(y), alpha), atol=1e-6).all())
    True
    """
    z: Tensor = _InterpolateNorm.apply(x, y, alpha)
    return z


class _InterpolateNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
        z, inverse = interpolate_norm_forward(x, y, alpha)
        ctx.save_for_backward(x, y, alpha, inverse)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return interpolate_norm_backward(gradient, *ctx.saved_tensors)


def interpolate_norm_forward(x: Tensor, y: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """``interpolate_norm`` and 1 / ||y||, (..., 1)."""
    if kernels.use_triton(x):
        from antransformer.kernels import interpolate_norm as kernel

        return kernel.forward(x, y, alpha)
    precision = torch.promote_types(x.dtype, torch.float32)
    inverse = torch.linalg.vector_norm(y, dim=-1, keepdim=True, dtype=precision).clamp_min(NORM_EPS).reciprocal()
    keep, move, _ = _shares(alpha.to(precision))
    return (y * inverse).mul_(move).add_(x * keep).to(x.dtype), inverse


def interpolate_norm_backward(
    gradient: Tensor, x: Tensor, y: Tensor, alpha: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y and alpha, each in its dtype."""
    if kernels.use_triton(x):
        from antransformer.kernels import interpolate_norm as kernel

        return kernel.backward(gradient, x, y, alpha, inverse)
    given, alpha = alpha, alpha.to(inverse.dtype)
    keep, move, cubed = _shares(alpha)
    unit, tokens = y * inverse, tuple(range(x.ndim - 1))
    along = gradient * unit
    # d keep = -alpha nu^3 d alpha, and d move = (1 - alpha) nu^3 d alpha
    for_alpha = cubed * ((1 - alpha) * along.sum(tokens) - alpha * (gradient * x).sum(tokens, dtype=inverse.dtype))
    for_y = (gradient * move).sub_(unit.mul_(along.mul_(move).sum(-1, keepdim=True))).mul_(inverse)
    return (gradient * keep).to(x.dtype), for_y.to(y.dtype), for_alpha.sum_to_size(given.shape).to(given.dtype)


def _shares(alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - alpha) nu and alpha nu, which x and y are multiplied by, and nu^3."""
    nu = factors.residual(alpha)
    return (1 - alpha) * nu, alpha * nu, nu**3


def interpolate_exact(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """Residual update of nGPT: norm(x + alpha (y - x)), elementwise alpha of shape (d,) (arXiv:2410.01131, eq. 10)."""
    return normalize(torch.lerp(x, y.to(x.dtype), alpha.to(x.dtype)))


class Rotary(NamedTuple):
    """Cosines and sines of the rotated part of each head, each (T, rotary_dim / 2) or (B, T, rotary_dim / 2)."""

    cos: Tensor
    sin: Tensor


def rotary_tables(positions: Tensor, rotary_dim: int, base: float) -> Rotary:
    """Angles position * base^(-2i / rotary_dim) for the ``rotary_dim`` (even) leading coordinates of each head.

    Args:
        positions: integer positions (T,), or (B, T) where sequences of a batch start at different positions.
        rotary_dim: how many coordinates of a head are rotated; the rest pass unchanged.
        base: wavelength base, 10,000 as a rule.

    Returns:
        Tables in float32.
    """
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32) / rotary_dim
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
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat([*turned, rest], dim=-1)


def split_heads(qkv: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection (B, T, n * 3 * h) into q, k, v of shape (B, T, n, h) each.

    The rows of the fused weight are ordered head by head, so that a block of its rows holds whole heads.
    """
    q, k, v = qkv.unflatten(-1, (-1, 3, head_dim)).unbind(-2)
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


class AttentionContext(NamedTuple):
    """Where the tokens of a batch stand, and what they may look at.

    Attributes:
        rotary: tables of their positions.
        mask: (B, 1, T, S), true where a token may look; None for a causal batch without padding.
        kv_cache: keys and values of the tokens before them, in generation.
    """

    rotary: Rotary
    mask: Tensor | None = None
    kv_cache: LayerCache | None = None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_scale: float | Tensor = 1.0,
    rotary: Rotary | None = None,
    causal: bool = False,
    window: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention on q and k of unit norm: softmax(score_scale * norm(q) norm(k)^T) v (arXiv:2505.22014, table 1).

    Args:
        q: (B, T, n, h), of any norm.
        k: (B, S, m, h), of any norm; n is a multiple of m: m = n is multi-head, m = 1 multi-query, and all between
            them grouped-query attention (arXiv:2305.13245).
        v: (B, S, m, h), each head of unit norm.
        score_scale: a number, or a learned tensor (1,); sqrt(h) gives scores of random directions unit variance.
        rotary: tables of the positions of q and k; None for none.
        causal: a token at position t sees positions up to t.
        window: and only those nearer than ``window`` to its own; None for no limit.
        mask: boolean, (T, S) or (B, 1 or n, T, S) or what broadcasts to it, true where a token may look as well.

    Returns:
        (B, T, n * h): heads concatenated. Of a token that sees r values alike, each head has norm 1 / sqrt(r); of one
        that looks at a single value, norm 1; of one that may look nowhere, norm 0.

    Raises:
        ValueError: the window is not positive.

    >>> x = normalize(torch.randn(2, 10, 4, 64))
    >>> y = attention(x, x, x, score_scale=8.0, causal=True)
    >>> y.shape, bool((y[:, 0].unflatten(-1, (4, 64)).norm(dim=-1) - 1 < 1e-6).all())  # the first sees only itself
    (torch.Size([2, 10, 256]), True)
    """
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    if window is not None or (causal and mask is not None):
        near = visible(q.shape[1], k.shape[1], causal, window, q.device)
        mask, causal = (near if mask is None else mask & near), False
    scale = score_scale.to(q.dtype) if isinstance(score_scale, Tensor) else score_scale
    return softmax_attention(normalize(q) * scale, normalize(k), v, mask, causal)


def visible(queries: int, keys: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Where a token may look, (T, S), true where it may; positions of both count from 0. Raises as ``attention``."""
    distance = torch.arange(queries, device=device).unsqueeze(1) - torch.arange(keys, device=device)
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is None:
        return seen
    if window < 1:
        raise ValueError(f"window must be at least 1, a token itself, got {window}")
    return seen & (distance.abs() < window)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float = 1.0
) -> Tensor:
    """softmax(scale * q k^T) v in torch's fused kernel; shapes as in ``attention``."""
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2).flatten(2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext, scale: float = 1.0) -> Tensor:
    """Causal softmax attention: softmax(scale * q k^T) v.

    Args:
        q, k, v: (B, T, n, h).
        ctx: mask and cache.
        scale: constant on the scores; a learnable one is multiplied into q by the caller, which keeps the fused kernel.

    Returns:
        (B, T, n * h), heads concatenated.
    """
    if ctx.kv_cache is not None:
        k, v = ctx.kv_cache.extend(k, v)
    # One new token sees all before it.
    return softmax_attention(q, k, v, ctx.mask, causal=ctx.mask is None and q.shape[1] > 1, scale=scale)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean next-token loss in nats of the logits ``weight hidden``, which are never whole in memory.

    They are made for some tokens at a time, together with the gradients, and found in the cache by each pass over them.
    Losses are computed in float32 (float64 for float64). There is no second derivative.

    Args:
        hidden: (B, T, d).
        weight: (V, d).
        targets: token ids (B, T).

    >>> hidden, weight = torch.randn(2, 10, 64), torch.randn(300, 64)
    >>> targets = torch.randint(300, (2, 10))
    >>> bool(cross_entropy(hidden, weight, targets).isclose(F.cross_entropy((hidden @ weight.T).mT, targets)))
    True
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    train = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), train)[0]


# Tokens whose logits are made at once. On a CPU the fastest of those tried; elsewhere a product of enough work.
CHUNK = {"cpu": 128}
LARGE_CHUNK = 2048


# As an operator of its own torch.compile takes it whole, where it would unroll the loop.
@torch.library.custom_op("antransformer::cross_entropy", mutates_args=())
def _cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss, and where ``train`` is true the gradients of the summed loss; else two tensors without meaning."""
    precision = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.zeros((), dtype=precision, device=hidden.device)
    for_hidden = torch.empty_like(hidden if train else hidden[:0])
    for_weight = torch.zeros_like(weight if train else weight[:0], dtype=precision)
    rows = CHUNK.get(hidden.device.type, LARGE_CHUNK)
    for start in range(0, len(hidden), rows):
        part, wanted = hidden[start : start + rows], targets[start : start + rows, None]
        scores = torch.log_softmax(part @ weight.T, -1, dtype=precision)
        total -= scores.gather(1, wanted).sum()
        if train:
            scores.exp_()
            scores.scatter_add_(1, wanted, scores.new_full(wanted.shape, -1.0))
            slope = scores.to(hidden.dtype)
            torch.mm(slope, weight, out=for_hidden[start : start + rows])
            if precision == weight.dtype:
                for_weight.addmm_(slope.T, part)
            else:
                for_weight.add_(slope.T @ part)
    return total / len(hidden), for_hidden, for_weight


@_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    precision = torch.promote_types(hidden.dtype, torch.float32)
    for_weight = torch.empty_like(weight if train else weight[:0], dtype=precision)
    return hidden.new_empty((), dtype=precision), torch.empty_like(hidden if train else hidden[:0]), for_weight


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtype = inputs[1].dtype


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("cross_entropy has no second derivative: leave create_graph out")
    for_hidden, for_weight = ctx.saved_tensors
    gradient = gradient / len(for_hidden)
    return (for_hidden * gradient).to(for_hidden.dtype), (for_weight * gradient).to(ctx.dtype), None, None


_cross_entropy.register_autograd(_backward, setup_context=_keep)
