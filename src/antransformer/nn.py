"""Thin modules around ``functional``: what holds a parameter of the method.

Shapes: B batch, T tokens, S tokens that are looked at, d model width. A vector of unit norm goes in and one of about
unit norm comes out, which is what the constant factors are for. All are initialised when made, and again by
``reset_parameters``. ``antransformer.bind(model, optimizer)`` bounds the rows of every ``Linear``, ``Embedding`` and
``Head`` in any model.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antransformer import factors, functional
from antransformer.errors import ConfigError


class ScaledParameter(nn.Module):
    """A learnable vector s that Adam moves at a chosen relative speed.

    Stored as a surrogate ``value`` that starts at ``scale``; s = (init / scale) * value. Adam's step has about the size
    of the learning rate whatever the parameter's, so s moves by (init / scale) * LR: one global learning rate serves
    matrices and scales alike (arXiv:2410.01131, section 2.5; arXiv:2505.22014, appendix F).

    Args:
        size: number of entries.
        init: the value that s starts from.
        scale: size of the surrogate, positive; the smaller, the faster s moves.

    Raises:
        ConfigError: the scale is not positive.

    >>> s = ScaledParameter(256, init=0.05, scale=0.03)
    >>> with torch.no_grad():
    ...     before, _, after = s(), s.value.add_(0.003), s()  # a step of Adam at this rate moves it by a tenth
    >>> round(before[0].item(), 3), round(after[0].item(), 3)
    (0.05, 0.055)
    """

    def __init__(self, size: int, init: float, scale: float) -> None:
        super().__init__()
        if not scale > 0:
            raise ConfigError(f"scale must be positive, got {scale}")
        self.init, self.scale = init, scale
        self.value = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Put s back at ``init``."""
        nn.init.constant_(self.value, self.scale)

    def forward(self) -> Tensor:
        """The vector s, (size,), in the parameter's dtype."""
        return self.value * (self.init / self.scale)

    def extra_repr(self) -> str:
        """Size and start, for ``print(model)``."""
        return f"{len(self.value)}, init={self.init:g}, scale={self.scale:g}"


class Linear(nn.Module):
    """``factor * (W x)``, rows of W starting at unit norm and bounded by it: twin of ``functional.linear``.

    A bias is added unscaled, starts at zero and is bounded as one vector. The factor holds without it: the output's
    square norm becomes 1 + ||bias||^2, at most 2, and all outputs share a direction. Put an exact norm behind it.

    Args:
        fan_in: width of the input.
        fan_out: width of the output.
        factor: the constant that brings the output to the wanted norm; None derives the one for unit norm,
            ``factors.linear(fan_in, fan_out)``.
        bias: whether there is one.

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
        """(..., fan_in) to (..., fan_out), with a learned scale (fan_out,) of each output where one is given."""
        return functional.linear(x, self.weight, self.factor if scale is None else scale * self.factor, self.bias)

    def extra_repr(self) -> str:
        """Shape and factor, for ``print(model)``."""
        fan_out, fan_in = self.weight.shape
        return f"{fan_in}, {fan_out}, factor={self.factor:.4g}, bias={self.bias is not None}"


class Embedding(nn.Embedding):
    """Vectors of unit norm for ids (...), bounded by it: (..., d). Its function is torch's, ``F.embedding``.

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
    """Readout: s * (W x) with a learnable s for each output, twin of ``functional.linear`` with a vector.

    W x lies between -1 and 1, a cosine; s makes logits, or values, of the size that the loss wants.

    Args:
        width: model width d.
        outputs: number of classes or values.
        scale: see ``ScaledParameter``; s starts at 1.

    >>> Head(256, 10)(functional.normalize(torch.randn(32, 256))).shape
    torch.Size([32, 10])
    """

    def __init__(self, width: int, outputs: int, scale: float = 0.03) -> None:
        super().__init__(width, outputs, factor=1.0)
        self.output_scale = ScaledParameter(outputs, 1.0, scale)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # its scale is its own
        """(..., d) to (..., outputs)."""
        return super().forward(x, self.output_scale())


class Residual(nn.Module):
    """Interpolated residual update with its factor: (x + alpha (norm(y) - x)) * nu(alpha).

    Twin of ``functional.interpolate_norm``.

    Args:
        width: model width d; alpha has one entry a coordinate.
        alpha: its initial value.
        scale: see ``ScaledParameter``.

    >>> x, y = functional.normalize(torch.randn(100, 256)), torch.randn(100, 256)
    >>> round(Residual(256, alpha=0.3)(x, y).norm(dim=-1).mean().item(), 1)
    1.0
    """

    def __init__(self, width: int, alpha: float = 0.05, scale: float = 0.03) -> None:
        super().__init__()
        self.alpha = ScaledParameter(width, alpha, scale)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual stream x, of about unit norm, and sublayer output y, of any, both (..., width)."""
        return functional.interpolate_norm(x, y, self.alpha())


class ExactResidual(Residual):
    """nGPT's residual update: the same interpolation, normalized exactly; arguments as for ``Residual``.

    >>> x, y = functional.normalize(torch.randn(2, 100, 256))
    >>> round(ExactResidual(256, alpha=0.3)(x, x).norm(dim=-1).max().item(), 4)
    1.0
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual stream x and sublayer output y, of any norm, both (..., width)."""
        return functional.interpolate_exact(x, functional.normalize(y), self.alpha())


class MLP(nn.Module):
    """Feed-forward map, gated or plain, with the factor of its activation derived: twin of ``functional.mlp``.

    Args:
        width: model width d.
        hidden: hidden width, 4 d by default.
        gated: down(up x * activation(gate x)) if true, down(activation(up x)) otherwise.
        activation: elementwise, a function or a module without parameters.
        std: standard deviation of what the activation gets: the larger, the less linear it is.

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
        hidden = hidden or 4 * width
        nu = functional.mlp_factors(width, hidden, gated, activation, std)
        self.width, self.activation = width, activation
        self.up_proj = Linear(width, hidden, nu.up)
        self.gate_proj = Linear(width, hidden, nu.gate) if gated else None
        self.down_proj = Linear(hidden, width, nu.down)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to (..., d)."""
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.up_proj(x) * self.activation(self.gate_proj(x)))


class Attention(nn.Module):
    """Self- or cross-attention on q and k of unit norm with a learnable scale on the scores.

    Projections around its twin ``functional.attention``. The output has unit norm where each token looks at a single
    other, and shrinks to 1 / sqrt(r) where it averages r of them: put an exact norm behind it, as the blocks do.

    Args:
        width: model width d.
        heads: number of heads, of width d / heads.
        kv_heads: number of key and value heads, a divisor of ``heads``; ``heads`` by default (multi-head), 1 is
            multi-query attention.
        causal: a token sees itself and those before it.
        window: a token sees itself and those nearer than ``window``; None for no limit.
        rotary: share of each head's width with rotary embedding, 0 for none, 1 for all. Positions count from 0 in both
            sequences of a cross-attention.
        out_scale: a constant on the output; ``factors.attention(S)`` undoes dense attention over S tokens.

    Raises:
        ConfigError: heads do not divide the width, or kv_heads the heads; the rotary part is no even width; the window
            is not positive.

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
            raise ConfigError(f"window must be at least 1, a token itself, got {window}")
        head = width // heads
        self.rotary_dim = round(rotary * head)
        if not 0 <= rotary <= 1 or self.rotary_dim % 2:
            raise ConfigError(f"rotary must be in [0, 1] and an even part of a head of width {head}, got {rotary}")
        self.width, self.head_dim, self.causal, self.window = width, head, causal, window
        to_heads = factors.linear(width, head)  # each head has unit norm
        self.q_proj = Linear(width, width, to_heads)
        self.k_proj = Linear(width, kv_heads * head, to_heads)
        self.v_proj = Linear(width, kv_heads * head, to_heads)
        self.out_proj = Linear(width, width, out_scale / math.sqrt(heads))
        self.score_scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scores of random unit vectors get unit variance."""
        nn.init.constant_(self.score_scale, math.sqrt(self.head_dim))

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, T, d) to (B, T, d).

        Args:
            x: what looks.
            memory: what is looked at (B, S, d), if it is not x.
            mask: boolean, broadcast to (B, heads, T, S), true where a token may look; for padding (B, 1, 1, S).
        """
        memory = x if memory is None else memory
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k, v = (proj(memory).unflatten(-1, (-1, self.head_dim)) for proj in (self.k_proj, self.v_proj))
        rotary = None
        if self.rotary_dim:
            positions = torch.arange(max(q.shape[1], k.shape[1]), device=x.device)
            rotary = functional.rotary_tables(positions, self.rotary_dim, base=10_000.0)
        y = functional.attention(q, k, v, self.score_scale, rotary, self.causal, self.window, mask)
        return self.out_proj(y)

    def extra_repr(self) -> str:
        """Heads and what they see, for ``print(model)``."""
        heads, kv_heads = (len(proj.weight) // self.head_dim for proj in (self.q_proj, self.k_proj))
        rotary = f"{self.rotary_dim} of {self.head_dim}"
        return f"heads={heads}, kv_heads={kv_heads}, causal={self.causal}, window={self.window}, rotary={rotary}"


@torch.no_grad()
def unit_rows_(weight: Tensor) -> Tensor:
    """Fill with rows drawn uniformly from the unit sphere, in place."""
    return weight.normal_().copy_(functional.normalize(weight))
