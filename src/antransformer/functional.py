"""Operations of the method, and of the architectures compared with it, as pure functions of tensors.

Shapes: B batch, T queries, S keys, d model width, f MLP width, n heads, h head width. Norms and factors are computed in
float32 and cast back to the activation's dtype. So half-precision activations stay half precision, which the fast
attention kernels need.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask

from antransformer import factors, kernels
from antransformer.kernels import chunked_cross_entropy, cpu_attention, document_attention
from antransformer.kernels import rotary as rotary_kernels

NORM_EPS = 1e-12  # a vector of at most this norm counts as zero; norms of activations are never this small


def normalize(x: Tensor) -> Tensor:
    """Exact L2 normalization over the last axis: x / ||x||, in the shape and dtype of x (arXiv:2410.01131, eq. 1).

    A zero vector stays zero, with zero gradient. In float16 the norm of x must be at most 16,384.
    """
    eps = max(NORM_EPS, 1 / torch.finfo(x.dtype).max)  # 1.5e-5 in float16, whose largest number is 65504
    precision = torch.promote_types(x.dtype, torch.float32)
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precision)
    return x * inverse_norm(length, eps).to(x.dtype)


def inverse_norm(length: Tensor, eps: float) -> Tensor:
    """1 / length, or 0 where the length is at most ``eps``; 1 / eps would multiply the gradient of a zero vector."""
    return length.clamp_min(eps).reciprocal().masked_fill(length <= eps, 0)


def linear(x: Tensor, weight: Tensor, scale: float | Tensor = 1.0, bias: Tensor | None = None) -> Tensor:
    """Scaled linear map ``scale * (weight x) + bias``.

    A constant scale is part of the matrix product; a vector is multiplied into the weight.

    Args:
        x: input (..., fan_in).
        weight: weight (fan_out, fan_in).
        scale: constant factor, or a vector (fan_out,) with one scale for each output or (1,) with one for all.
        bias: bias (fan_out,), not scaled.

    Returns:
        Tensor (..., fan_out). Its norm is about 1 if x and the rows of the weight have unit norm, the scale is
        ``factors.linear(fan_in, fan_out)`` and there is no bias.

    >>> x, weight = normalize(torch.randn(100, 256)), normalize(torch.randn(1024, 256))
    >>> round(linear(x, weight, factors.linear(256, 1024)).norm(dim=-1).mean().item(), 1)
    1.0
    """
    if isinstance(scale, Tensor):
        weight = weight * scale.to(weight.dtype).unsqueeze(1)
    elif scale != 1.0:
        if kernels.is_autocast(x):  # as torch's own products
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # numel() would not be symbolic in torch.export
        y: Tensor = _ScaledProduct.apply(rows, weight, scale).view(*x.shape[:-1], len(weight))
        return y if bias is None else y + bias.to(y.dtype)
    return F.linear(x, weight, bias)


class _ScaledProduct(torch.autograd.Function):
    """Product scale * (x weight^T) of x (tokens, fan_in) and weight (fan_out, fan_in), forward and backward.

    The scale is the alpha of the matrix product, so no scaled copy of the weight is made or saved for backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(x, weight)
        return _scaled_mm(x, weight.T, scale)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x = _scaled_mm(grad_output, weight, ctx.scale) if ctx.needs_input_grad[0] else None
        grad_weight = _scaled_mm(grad_output.T, x, ctx.scale) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def _scaled_mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    # beta=0 ignores the first argument, which addmm requires. Compiled products may multiply it by 0.
    ignored = a.new_zeros(1) if torch.compiler.is_compiling() else a.new_empty(1)
    return torch.addmm(ignored, a, b, beta=0, alpha=scale)


def mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] = F.silu,
    std: float = 0.5,
) -> Tensor:
    """Normalized MLP: down (up x * activation(gate x)), or down activation(up x) without a gate.

    Pre-activations are scaled to the standard deviation ``std``, for which the factor of the activation is derived
    (arXiv:2505.22014, section 4.2: SiLU at 1/2). This breaks the graph of ``torch.compile``, unlike ``nn.MLP``.

    Args:
        x: input (..., d), about unit norm.
        up: weight (f, d), rows of unit norm.
        down: weight (d, f), rows of unit norm.
        gate: weight (f, d), rows of unit norm; None for an MLP without a gate.
        activation: elementwise function.
        std: standard deviation of the pre-activations, positive.

    Returns:
        Tensor (..., d), about unit norm.

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
    """Constant factors of the three linear maps of an MLP; ``gate`` is 1 for an MLP without a gate."""

    up: float
    gate: float
    down: float


@lru_cache(maxsize=64, typed=True)  # 64.0 is no width, though equal to 64
def mlp_factors(width: int, hidden: int, gated: bool, activation: Callable[[Tensor], Tensor], std: float) -> MLPFactors:
    """Factors that give an MLP about unit norm; arguments and errors as in ``mlp``."""
    # Coordinates of W x have variance 1 / width, so this factor gives pre-activations the standard deviation std.
    to_std, nu_act = std * math.sqrt(width), factors.activation(activation, std)
    if gated:  # the hidden activations are linear in the up projection, so nu_act can be part of its factor
        return MLPFactors(factors.linear(width, hidden) * nu_act, to_std, factors.linear(hidden, width))
    return MLPFactors(to_std, 1.0, factors.linear(hidden, width) * nu_act / math.sqrt(hidden))


def interpolate(x: Tensor, y: Tensor, alpha: float | Tensor) -> Tensor:
    """Residual update of anGPT: (x + alpha (y - x)) * nu(alpha), elementwise (arXiv:2505.22014, section 4.2).

    Args:
        x: residual stream (..., d), about unit norm.
        y: sublayer output (..., d), unit norm.
        alpha: step size (d,) of each coordinate towards y, or one number.

    Returns:
        Residual stream (..., d), about unit norm if x and y are uncorrelated.

    >>> x, y = normalize(torch.randn(100, 256)), normalize(torch.randn(100, 256))
    >>> round(interpolate(x, y, torch.full((256,), 0.3)).norm(dim=-1).mean().item(), 1)
    1.0
    """
    nu = factors.residual(alpha)
    x_weight, y_weight = (1 - alpha) * nu, alpha * nu
    if isinstance(x_weight, Tensor) and isinstance(y_weight, Tensor):
        x_weight, y_weight = x_weight.to(x.dtype), y_weight.to(y.dtype)
    return x * x_weight + y * y_weight


def interpolate_norm(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """Fused ``interpolate(x, normalize(y), alpha)``, in one pass forward and one backward.

    Computed in float32 (float64 for float64) whatever the dtypes of x and y. There is no second derivative.

    Args:
        x: residual stream (..., d), about unit norm.
        y: sublayer output (..., d), any norm.
        alpha: step size (d,), or (1,) for all coordinates.

    Returns:
        Residual stream (..., d), in the dtype of x.

    Raises:
        ValueError: x and y have different shapes, or alpha another number of coordinates.

    >>> x, y, alpha = normalize(torch.randn(100, 256)), torch.randn(100, 256), torch.full((256,), 0.3)
    >>> bool(interpolate_norm(x, y, alpha).isclose(interpolate(x, normalize(y), alpha), atol=1e-6).all())
    True
    """
    # The kernels read y and alpha at the coordinates of x.
    if x.shape != y.shape or alpha.ndim != 1 or (len(alpha) != 1 and len(alpha) != x.shape[-1]):
        shapes = f"{tuple(x.shape)}, {tuple(y.shape)} and {tuple(alpha.shape)}"
        raise ValueError(f"x and y must have one shape, and alpha one number or one per coordinate, got {shapes}")
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
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return interpolate_norm_backward(grad_output, *ctx.saved_tensors)


def interpolate_norm_forward(x: Tensor, y: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Result of ``interpolate_norm``, and 1 / ||y|| (..., 1), or 0 for a zero vector, which backward needs."""
    if kernels.use_triton(x):
        from antransformer.kernels import interpolate_norm as kernel

        return kernel.forward(x, y, alpha)
    precision = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    inverse = inverse_norm(torch.linalg.vector_norm(y, dim=-1, keepdim=True, dtype=precision), NORM_EPS)
    x_weight, y_weight, _ = _interpolation_weights(alpha.to(precision))
    z, other = (y * inverse).mul_(y_weight), x * x_weight
    # torch.compile of torch 2.11 gives zero gradients if the result of an autograd function is the result of an
    # operation in place, or of a conversion to the dtype that it already has. Without the compiler, in place is faster.
    z = z + other if torch.compiler.is_compiling() else z.add_(other)
    return z if z.dtype == x.dtype else z.to(x.dtype), inverse


def interpolate_norm_backward(
    grad_output: Tensor, x: Tensor, y: Tensor, alpha: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y and alpha, each in the dtype of its tensor; ``inverse`` is 1 / ||y||."""
    if kernels.use_triton(x):
        from antransformer.kernels import interpolate_norm as kernel

        return kernel.backward(grad_output, x, y, alpha, inverse)
    a = alpha.to(inverse.dtype)
    x_weight, y_weight, nu = _interpolation_weights(a)
    if kernels.is_compiled_for_gpu(x):  # the gradient of x is fused with its neighbours
        return (grad_output * x_weight).to(x.dtype), *_gradients_of_y_and_alpha(grad_output, x, y, alpha, inverse)
    unit, by_token = y * inverse, (inverse.numel(), x.shape[-1])
    product, grad_times_x = grad_output * unit, grad_output * x
    # d x_weight / d alpha = -alpha nu^3, and d y_weight / d alpha = (1 - alpha) nu^3.
    along_y = product.reshape(by_token).sum(0)
    along_x = grad_times_x.reshape(by_token).sum(0, dtype=inverse.dtype)
    grad_alpha = nu**3 * ((1 - a) * along_y - a * along_x)
    # The gradient through y / ||y|| has no component along y.
    radial = product.mul_(y_weight).sum(-1, keepdim=True)
    grad_y = (grad_output * y_weight).sub_(unit.mul_(radial)).mul_(inverse)
    grad_alpha = grad_alpha.sum_to_size(alpha.shape).to(alpha.dtype)
    return (grad_output * x_weight).to(x.dtype), grad_y.to(y.dtype), grad_alpha


# A custom operator, since the compiler would read the rows once for each gradient.
@torch.library.custom_op("antransformer::interpolate_norm_backward", mutates_args=())
def _gradients_of_y_and_alpha(
    grad_output: Tensor, x: Tensor, y: Tensor, alpha: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    from antransformer.kernels import interpolate_norm as kernel

    return kernel.gradients_of_y_and_alpha(grad_output, x, y, alpha, inverse)


@_gradients_of_y_and_alpha.register_fake
def _(grad_output: Tensor, x: Tensor, y: Tensor, alpha: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), torch.empty_like(alpha)


def _interpolation_weights(alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (1 - alpha) nu of x and alpha nu of y, and nu."""
    nu = factors.residual(alpha)
    return (1 - alpha) * nu, alpha * nu, nu


def interpolate_exact(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """Residual update of nGPT: normalize(x + alpha (y - x)), with alpha (d,) (arXiv:2410.01131, eq. 10)."""
    return normalize(torch.lerp(x, y.to(x.dtype), alpha.to(x.dtype)))


class Rotary(NamedTuple):
    """Cosines and sines of the rotary angles, each (T, rotary_dim / 2) or (B, T, rotary_dim / 2)."""

    cos: Tensor
    sin: Tensor


def rotary_tables(positions: Tensor, rotary_dim: int, base: float) -> Rotary:
    """Cosines and sines of the angles position * base^(-2i / rotary_dim), in float32.

    Args:
        positions: integer positions (T,), or (B, T) if the sequences of a batch start at different positions.
        rotary_dim: number of leading coordinates of each head that are rotated, even.
        base: wavelength base, usually 10,000.
    """
    make = rotary_kernels.compiled_tables if kernels.is_compiled_for_gpu(positions) else rotary_kernels.tables
    return Rotary(*make(positions, rotary_dim, base))


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotary position embedding of the leading coordinates of each head (arXiv:2104.09864).

    Coordinate i is paired with i + rotary_dim / 2, as in GPT-NeoX.

    Args:
        x: queries or keys (B, T, n, h).
        rotary: tables for T positions. Coordinates from rotary_dim on are unchanged.
    """
    if kernels.is_compiled_for_gpu(x) and rotary_kernels.has_pairs(x, rotary.cos):
        return rotary_kernels.rotate_pairs(x, *rotary)
    half = rotary.cos.shape[-1]
    cos, sin = (table.unsqueeze(-2).to(x.dtype) for table in rotary)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    rotated = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat([*rotated, rest], dim=-1)


def split_heads(qkv: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection (B, T, n * 3 * h) into q, k and v (B, T, n, h)."""
    # Rows of the fused weight are ordered head by head, so tensor parallelism can split them between heads.
    q, k, v = qkv.unflatten(-1, (-1, 3, head_dim)).unbind(-2)
    return q, k, v


class LayerCache(NamedTuple):
    """Buffers (B, capacity, n, h) for the keys and values of one layer, and the number of filled positions."""

    k: Tensor
    v: Tensor
    length: int

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, T, n, h) after the filled positions; return all keys and values so far."""
        steps = k.shape[1]
        self.k.narrow(1, self.length, steps).copy_(k)
        self.v.narrow(1, self.length, steps).copy_(v)
        return self.k.narrow(1, 0, self.length + steps), self.v.narrow(1, 0, self.length + steps)


class AttentionContext(NamedTuple):
    """Positions of the tokens of a batch, and the keys visible to each.

    Attributes:
        rotary: rotary tables of the positions, which count from the first token of a document if ``starts`` is set.
        mask: boolean (B, 1, T, S), true where a key is visible, or FlexAttention's block mask of it; None for a causal
            batch without padding.
        kv_cache: keys and values of the preceding tokens during generation.
        starts: position (B, T) of the first token of each token's document, if attention must not cross documents.
            The mask is then ``document_attention.document_mask(starts)``.
    """

    rotary: Rotary
    mask: Tensor | BlockMask | None = None
    kv_cache: LayerCache | None = None
    starts: Tensor | None = None


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
    """Attention with normalized q, k: softmax(score_scale * normalize(q) normalize(k)^T) v (arXiv:2505.22014, table 1).

    Args:
        q: queries (B, T, n, h), any norm.
        k: keys (B, S, m, h), any norm. n is a multiple of m: m = n is multi-head attention, m = 1 multi-query, and
            values between them grouped-query (arXiv:2305.13245).
        v: values (B, S, m, h), each head of unit norm.
        score_scale: number, or learned tensor (1,). sqrt(h) gives scores of random directions unit variance.
        rotary: rotary tables for q and k, of at least max(T, S) positions; None for no rotary embedding.
        causal: whether position t attends only to positions up to t.
        window: attend only to positions at a distance below ``window``; None for no limit.
        mask: boolean, true where a key is visible, broadcastable to (B, n, T, S): two axes are (T, S), and a padding
            mask is (B, 1, 1, S). It is combined with ``causal`` and ``window``.

    Returns:
        Concatenated heads (B, T, n * h). A head that averages r independent values has norm 1 / sqrt(r). A head that
        attends to a single value has norm 1. A query with no visible key gives 0.

    Raises:
        ValueError: the window is not positive, or the mask is not boolean or has another shape.

    >>> x = normalize(torch.randn(2, 10, 4, 64))
    >>> y = attention(x, x, x, score_scale=8.0, causal=True)
    >>> y.shape, bool((y[:, 0].unflatten(-1, (4, 64)).norm(dim=-1) - 1 < 1e-6).all())  # token 0 sees only itself
    (torch.Size([2, 10, 256]), True)
    """
    if rotary is not None:
        q, k = (rotate(x, Rotary(*(table[..., : x.shape[1], :] for table in rotary))) for x in (q, k))
    if mask is not None:
        shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        fits = all(size in (1, full) for size, full in zip(reversed(mask.shape), reversed(shape), strict=False))
        if mask.dtype != torch.bool or mask.ndim > len(shape) or not fits:
            got = f"{mask.dtype} {tuple(mask.shape)}"
            raise ValueError(f"mask must be boolean and broadcastable to (B, n, T, S) = {shape}, got {got}")
        mask = torch.atleast_2d(mask)  # torch's attention takes no mask of fewer axes
    if window is not None or (causal and mask is not None):
        positional = visibility_mask(q.shape[1], k.shape[1], causal, window, q.device)
        mask, causal = (positional if mask is None else mask & positional), False
    scale = score_scale.to(q.dtype) if isinstance(score_scale, Tensor) else score_scale
    q, k = normalize(q) * scale, normalize(k)
    if mask is None:
        return softmax_attention(q, k, v, causal=causal)
    # A query without any key sees all keys here, since cuDNN's gradients can be NaN otherwise (pytorch/pytorch#196678).
    hidden = ~mask.any(-1, keepdim=True)
    y: Tensor = softmax_attention(q, k, v, mask | hidden).unflatten(-1, (q.shape[2], -1)).transpose(1, 2)
    return y.masked_fill(hidden, 0).transpose(1, 2).flatten(2)


def visibility_mask(queries: int, keys: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Boolean mask (T, S), true where a key is visible; positions count from 0. ValueError: the window is below 1."""
    distance = torch.arange(queries, device=device).unsqueeze(1) - torch.arange(keys, device=device)
    mask = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is None:
        return mask
    if window < 1:
        raise ValueError(f"window must be at least 1 (the token itself), got {window}")
    return mask & (distance.abs() < window)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float = 1.0
) -> Tensor:
    """Attention softmax(scale * q k^T) v by torch's fused kernel; shapes as in ``attention``."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2).flatten(2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext, scale: float = 1.0) -> Tensor:
    """Causal softmax attention: softmax(scale * q k^T) v.

    Args:
        q: queries (B, T, n, h).
        k: keys (B, T, n, h).
        v: values (B, T, n, h).
        ctx: mask and key-value cache. New keys and values are appended to the cache.
        scale: constant factor of the scores. Multiply a learnable one into q, since the fused kernel takes constants.

    Returns:
        Concatenated heads (B, T, n * h).
    """
    if ctx.kv_cache is not None:
        k, v = ctx.kv_cache.extend(k, v)
    if isinstance(ctx.mask, BlockMask):
        return document_attention.attention(q, k, v, ctx.mask, scale).flatten(2)
    # Not one expression: if the number of tokens is symbolic, so is its comparison, and the fused kernel takes a bool.
    causal = ctx.mask is None
    if q.shape[1] == 1:  # a single new token sees all preceding ones
        causal = False
    if causal and (ctx.starts is not None or cpu_attention.is_supported(q, k)):
        return cpu_attention.causal(q, k, v, scale, ctx.starts).flatten(2)
    return softmax_attention(q, k, v, ctx.mask, causal, scale)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean next-token loss in nats of the logits ``hidden @ weight.T``, computed in chunks.

    Logits are computed for a few tokens at a time together with their gradients, so the full (tokens, V) matrix is
    never materialized. Losses are in float32 (float64 for float64). There is no second derivative.

    Args:
        hidden: final hidden states (..., d).
        weight: output weight (V, d).
        targets: token ids (...) from 0 to V - 1; there is no id, such as -100, that is ignored.

    Raises:
        ValueError: hidden states and targets have different shapes.
        RuntimeError: a target is out of range. A kernel on a GPU gives NaN instead.

    >>> hidden, weight = torch.randn(2, 10, 64), torch.randn(300, 64)
    >>> targets = torch.randint(300, (2, 10))
    >>> bool(cross_entropy(hidden, weight, targets).isclose(F.cross_entropy((hidden @ weight.T).mT, targets)))
    True
    """
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must have the shape {tuple(hidden.shape[:-1])}, got {tuple(targets.shape)}")
    if kernels.is_autocast(hidden):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    train = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    tokens = hidden.reshape(-1, hidden.shape[-1])
    loss: Tensor = chunked_cross_entropy.loss_and_gradients(tokens, weight, targets.flatten(), train)[0]
    return loss
