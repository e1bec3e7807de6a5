"""Modules that hold the parameters of the method, as thin shells around ``functional``.

Shapes: B batch, T queries, S keys, d model width. Constant factors keep norms: for inputs of unit norm the outputs have
about unit norm. Constructors initialize the parameters, and ``reset_parameters`` initializes them again.
``antransformer.bind(model, optimizer)`` bounds the rows of every ``Linear``, ``Embedding`` and ``Head`` of a model.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antransformer import factors, functional
from antransformer.errors import ConfigError


class ScaledParameter(nn.Module):
    """Learnable vector s that Adam moves at a chosen relative speed.

    The parameter is a surrogate ``value`` with initial value ``scale``, and s = (init / scale) * value. A step of Adam
    has about the size of the learning rate, whatever the parameter. So s moves by (init / scale) * LR, and one learning
    rate serves matrices and scales alike (arXiv:2410.01131, section 2.5; arXiv:2505.22014, appendix F).

    Args:
        size: number of entries.
        init: initial value of s, not 0, which would have no gradient.
        scale: initial value of the surrogate, positive. A smaller scale lets s move faster.

    Raises:
        ConfigError: the scale is not positive, or the initial value is 0.

    >>> s = ScaledParameter(256, init=0.05, scale=0.03)
    >>> with torch.no_grad():
    ...     before, _, after = s(), s.value.add_(0.003), s()  # a step of Adam at lr 0.003 moves s by a tenth
    >>> round(before[0].item(), 3), round(after[0].item(), 3)
    (0.05, 0.055)
    """

    def __init__(self, size: int, init: float, scale: float) -> None:
        super().__init__()
        if not scale > 0:
            raise ConfigError(f"scale must be positive, got {scale}")
        if not init:
            raise ConfigError("the initial value must not be 0: s = (init / scale) * value would never change")
        self.init, self.scale = init, scale
        self.value = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set s to ``init``."""
        nn.init.constant_(self.value, self.scale)

    def forward(self) -> Tensor:
        """Vector s (size,), in the dtype of the parameter."""
        return self.value * (self.init / self.scale)

    def extra_repr(self) -> str:
        """Size, initial value and scale, for ``print(model)``."""
        return f"{len(self.value)}, init={self.init:g}, scale={self.scale:g}"


class AbsoluteParameter(ScaledParameter):
    """Learnable vector |s|, where s is that of ``ScaledParameter``; nGPT's alpha.

    The surrogate may become negative; the vector then grows again.
    """

    def forward(self) -> Tensor:
        """Vector |s| (size,), in the dtype of the parameter."""
        return super().forward().abs()


class Linear(nn.Module):
    """Linear map ``factor * (W x)`` with rows of W that start at unit norm and are bounded by it.

    Module form of ``functional.linear``. A bias starts at zero, is added unscaled and is bounded as one vector. The
    factor does not account for it: the square norm of the output becomes 1 + ||bias||^2, at most 2, and all outputs
    share a direction. So normalize the output exactly if there is a bias.

    Args:
        fan_in: width of the input.
        fan_out: width of the output.
        factor: constant factor of the output; None for ``factors.linear(fan_in, fan_out)``, which gives unit norm.
        bias: whether to add a bias.

    Raises:
        ValueError: no factor is given, and a width is not a positive integer.

    >>> y = Linear(256, 1024)(functional.normalize(torch.randn(100, 256)))
    >>> y.shape, round(y.norm(dim=-1).mean().item(), 1)
    (torch.Size([100, 1024]), 1.0)
    """

    def __init__(self, fan_in: int, fan_out: int, factor: float | None = None, bias: bool = False) -> None:
        super().__init__()
        self.factor = factors.linear(fan_in, fan_out) if factor is None else factor
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))
        self.bias = nn.Parameter(torch.empty(fan_out)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each row uniformly from the unit sphere."""
        unit_rows_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Map (..., fan_in) to (..., fan_out); ``scale`` (fan_out,) or (1,) is an additional scale of the outputs."""
        return functional.linear(x, self.weight, self.factor if scale is None else scale * self.factor, self.bias)

    def extra_repr(self) -> str:
        """Sizes, factor and bias, for ``print(model)``."""
        fan_out, fan_in = self.weight.shape
        return f"{fan_in}, {fan_out}, factor={self.factor:.4g}, bias={self.bias is not None}"


class Embedding(nn.Embedding):
    """Embedding of ids (...) as vectors (..., d) that start at unit norm and are bounded by it.

    Args:
        count: number of ids.
        width: model width d.

    >>> Embedding(1000, 256)(torch.tensor([[3, 14, 15]])).norm(dim=-1).round(decimals=4).tolist()
    [[1.0, 1.0, 1.0]]
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__(count, width)

    def reset_parameters(self) -> None:
        """Draw each vector uniformly from the unit sphere."""
        unit_rows_(self.weight)


class Head(Linear):
    """Output layer s * (W x) with a learnable scale s; module form of ``functional.linear``.

    W x is a cosine if x and the rows of W have unit norm; trained rows may be shorter. The scale s lets logits or
    values leave the range from -1 to 1.

    Args:
        width: model width d.
        outputs: number of classes or values.
        scale: see ``ScaledParameter``; s starts at 1.
        scalar: whether all outputs share one s; otherwise each has its own.

    >>> Head(256, 10)(functional.normalize(torch.randn(32, 256))).shape
    torch.Size([32, 10])
    """

    def __init__(self, width: int, outputs: int, scale: float = 0.03, scalar: bool = False) -> None:
        super().__init__(width, outputs, factor=1.0)
        self.output_scale = ScaledParameter(1 if scalar else outputs, 1.0, scale)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # the scale is a parameter here
        """Map (..., d) to (..., outputs)."""
        return super().forward(x, self.output_scale())


class Residual(nn.Module):
    """Interpolated residual update with its factor: (x + alpha (normalize(y) - x)) * nu(alpha).

    Module form of ``functional.interpolate_norm``.

    Args:
        width: model width d, the number of entries of alpha.
        alpha: initial value of alpha.
        scale: see ``ScaledParameter``.

    >>> x, y = functional.normalize(torch.randn(100, 256)), torch.randn(100, 256)
    >>> round(Residual(256, alpha=0.3)(x, y).norm(dim=-1).mean().item(), 1)
    1.0
    """

    def __init__(self, width: int, alpha: float = 0.05, scale: float = 0.03) -> None:
        super().__init__()
        self.alpha = ScaledParameter(width, alpha, scale)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Update the residual stream x (about unit norm) with the sublayer output y (any norm), both (..., width)."""
        return functional.interpolate_norm(x, y, self.alpha())


class ExactResidual(Residual):
    """Residual update of nGPT: an interpolation that is normalized exactly; arguments as for ``Residual``.

    alpha is an absolute value, as in the code by nGPT's authors.

    >>> x, y = functional.normalize(torch.randn(2, 100, 256))
    >>> round(ExactResidual(256, alpha=0.3)(x, x).norm(dim=-1).max().item(), 4)
    1.0
    """

    def __init__(self, width: int, alpha: float = 0.05, scale: float = 0.03) -> None:
        super().__init__(width, alpha, scale)
        self.alpha = AbsoluteParameter(width, alpha, scale)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Update the residual stream x with the sublayer output y (any norm), both (..., width)."""
        return functional.interpolate_exact(x, functional.normalize(y), self.alpha())


class MLP(nn.Module):
    """MLP with or without a gate, whose factors include the activation's; module form of ``functional.mlp``.

    Args:
        width: model width d.
        hidden: hidden width, 4 d by default.
        gated: down(up x * activation(gate x)) if true, down(activation(up x)) otherwise.
        activation: elementwise function, or a module without parameters.
        std: standard deviation of the pre-activations. A larger one makes the activation less linear.

    Raises:
        TypeError: the activation is not a function.
        ValueError: a width is not a positive integer, or ``std`` is not positive.

    >>> y = MLP(256, gated=False, activation=F.gelu)(functional.normalize(torch.randn(100, 256)))
    >>> round(y.norm(dim=-1).mean().item(), 1)
    1.0
    """

    def __init__(
        self,
        width: int,
        hidden: int | None = None,
        gated: bool = True,
        activation: Callable[[Tensor], Tensor] = F.silu,
        std: float = 0.5,
    ) -> None:
        super().__init__()
        if not callable(activation):
            raise TypeError(f"activation must be a function of tensors, such as F.gelu, got {activation!r}")
        hidden = 4 * width if hidden is None else hidden
        nu = functional.mlp_factors(width, hidden, gated, activation, std)
        self.width, self.activation = width, activation
        self.up_proj = Linear(width, hidden, nu.up)
        self.gate_proj = Linear(width, hidden, nu.gate) if gated else None
        self.down_proj = Linear(hidden, width, nu.down)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., d)."""
        y: Tensor
        if self.gate_proj is None:
            y = self.down_proj(self.activation(self.up_proj(x)))
        else:
            y = self.down_proj(self.up_proj(x) * self.activation(self.gate_proj(x)))
        return y


class Attention(nn.Module):
    """Self- or cross-attention on normalized q and k, with a learnable scale of the scores.

    Projections around ``functional.attention``. The output has unit norm where each token attends to a single other
    one, and norm 1 / sqrt(r) where it averages r of them. So normalize it exactly, as the blocks do.

    Args:
        width: model width d.
        heads: number of heads, of width d / heads.
        kv_heads: number of key and value heads, a divisor of ``heads``. The default is ``heads`` (multi-head); 1 gives
            multi-query attention.
        causal: whether a token attends only to itself and preceding tokens.
        window: attend only to tokens at a distance below ``window``; None for no limit.
        rotary: fraction of each head's width with rotary embedding, from 0 to 1. Positions count from 0 in both
            sequences of a cross-attention.
        out_scale: constant factor of the output; ``factors.attention(S)`` compensates uniform attention over S tokens.

    Raises:
        ConfigError: heads do not divide the width, kv_heads do not divide the heads, the rotary width is not even, or
            the window is not positive.

    >>> x, memory = functional.normalize(torch.randn(2, 10, 256)), functional.normalize(torch.randn(2, 7, 256))
    >>> Attention(256, heads=8, kv_heads=2, causal=True, rotary=0.5)(x).shape
    torch.Size([2, 10, 256])
    >>> Attention(256, heads=8)(x, memory).shape  # cross-attention
    torch.Size([2, 10, 256])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        causal: bool = False,
        window: int | None = None,
        rotary: float = 0.0,
        out_scale: float = 1.0,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or width % heads:
            raise ConfigError(f"heads must divide the width of {width}, got {heads}")
        if kv_heads < 1 or heads % kv_heads:
            raise ConfigError(f"kv_heads must divide the {heads} heads, got {kv_heads}")
        if window is not None and window < 1:
            raise ConfigError(f"window must be at least 1 (the token itself), got {window}")
        head_dim = width // heads
        self.rotary_dim = round(rotary * head_dim)
        if not 0 <= rotary <= 1 or self.rotary_dim % 2:
            raise ConfigError(
                f"rotary must be in [0, 1] and select an even number of a head's {head_dim} coordinates, got {rotary}"
            )
        self.width, self.head_dim, self.causal, self.window = width, head_dim, causal, window
        self.heads, self.kv_heads = heads, kv_heads
        nu_qkv = factors.linear(width, head_dim)  # gives each head unit norm, not their concatenation
        self.q_proj = Linear(width, width, nu_qkv)
        self.k_proj = Linear(width, kv_heads * head_dim, nu_qkv)
        self.v_proj = Linear(width, kv_heads * head_dim, nu_qkv)
        # Heads of unit norm concatenate to norm sqrt(heads).
        self.out_proj = Linear(width, width, out_scale / math.sqrt(heads))
        self.score_scale = nn.Parameter(torch.empty(1))  # one axis, since FSDP refuses parameters without
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scale so that scores of random unit vectors have unit variance."""
        nn.init.constant_(self.score_scale, math.sqrt(self.head_dim))

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend from x (B, T, d) to the memory; returns (B, T, d).

        Args:
            x: input of the queries.
            memory: input of the keys and values (B, S, d); None for self-attention.
            mask: boolean, broadcastable to (B, heads, T, S), true where a key is visible. Padding masks have the shape
                (B, 1, 1, S).
        """
        memory = x if memory is None else memory
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k, v = (proj(memory).unflatten(-1, (-1, self.head_dim)) for proj in (self.k_proj, self.v_proj))
        rotary = None
        if self.rotary_dim:
            positions = torch.arange(max(q.shape[1], k.shape[1]), device=x.device)
            rotary = functional.rotary_tables(positions, self.rotary_dim, base=10_000.0)
        y = functional.attention(q, k, v, self.score_scale, rotary, self.causal, self.window, mask)
        output: Tensor = self.out_proj(y)
        return output

    def extra_repr(self) -> str:
        """Heads, masks and rotary width, for ``print(model)``."""
        heads, rotary = f"heads={self.heads}, kv_heads={self.kv_heads}", f"{self.rotary_dim} of {self.head_dim}"
        return f"{heads}, causal={self.causal}, window={self.window}, rotary={rotary}"


@torch.no_grad()
def unit_rows_(weight: Tensor) -> Tensor:
    """Fill a weight (rows, width) in place with rows drawn uniformly from the unit sphere."""
    directions = weight.normal_().to(torch.promote_types(weight.dtype, torch.float32))  # a rounded norm is off by 0.4%
    return weight.copy_(functional.normalize(directions))
