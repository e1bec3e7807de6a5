"""Folding: anGPT with all constant factors and learned scales multiplied into its weights, for faster inference.

Write the residual stream as x = c * t, elementwise, with c = 1 at the embedding. The update

    (x + alpha (y - x)) nu = a x + b y,    a = (1 - alpha) nu,  b = alpha nu,  y = norm(p)

divided by c' = c a becomes a plain sum, t + (b / c') norm(p). This is an RMS norm with a gain, the same operation that
GPT+ has before each sublayer. Weights that read the residual stream absorb c in their columns, and the head absorbs s_Z
in its rows. The folded model has no operations that GPT+ does not have, and no final norm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antransformer import factors
from antransformer.bounds import Bound
from antransformer.functional import AttentionContext, causal_attention, normalize, rotate, split_heads
from antransformer.models import Decoder
from antransformer.models.angpt import MLP, AnGPT, Attention, Block
from antransformer.models.config import ModelConfig

TINY = 1e-30  # epsilon of the RMS norms: too small to change a result, but it keeps a zero vector zero


class FoldedBlock(nn.Module):
    """Attention and MLP, each followed by an RMS norm with gain and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_hidden
        self.head_dim = config.head_dim
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.score_scale = 1.0
        self.attention_gain = nn.Parameter(torch.empty(width))
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.mlp_gain = nn.Parameter(torch.empty(width))

    def get_extra_state(self) -> Tensor:
        """Return the score scale (), which is a number outside the parameters."""
        return torch.tensor(self.score_scale, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Set the score scale from a ``state_dict``."""
        self.score_scale = float(state)

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """Map the residual stream (B, T, d) to the residual stream after the block (B, T, d)."""
        q, k, v = split_heads(self.qkv_proj(x), self.head_dim)
        # The norm of q and k depends on the input, so it cannot be folded.
        q, k = normalize(rotate(q, ctx.rotary)), normalize(rotate(k, ctx.rotary))
        y = self.out_proj(causal_attention(q, k, v, ctx, self.score_scale))
        x = x + F.rms_norm(y, x.shape[-1:], self.attention_gain, TINY)
        y = self.down_proj(self.up_proj(x) * F.silu(self.gate_proj(x)))
        return x + F.rms_norm(y, x.shape[-1:], self.mlp_gain, TINY)


class FoldedAnGPT(Decoder):
    """Model that ``fold`` returns. It is for inference only: the bounds do not hold for folded weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, FoldedBlock)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)

    def head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return (hidden, weight) such that logits = hidden @ weight.T; s_Z is in the weight."""
        return hidden, self.lm_head.weight

    def bounds(self) -> list[Bound]:
        """Return an empty list: folded weights have no bounds."""
        return []

    def reset_parameters(self) -> None:
        """Raise TypeError: folded weights come from a trained model, not from an initialization."""
        raise TypeError("a folded model has no initialization: fold a trained model with fold(model)")


def folded_where_possible(model: Decoder) -> Decoder:
    """Return the folded model, or the model itself if ``fold`` does not support it, such as an ablation."""
    try:
        return fold(model)
    except (TypeError, ValueError):
        return model


@torch.no_grad()
def fold(model: Decoder) -> FoldedAnGPT:
    """Return an equivalent model with all factors, s_Z and nu(alpha) in its weights, on the same device, same dtype.

    Products are computed in float64 and rounded once. For a model in bfloat16, fold the float32 weights and cast the
    result. An alpha of 1 cannot be folded, since nothing would remain of the residual stream.

    Raises:
        TypeError: the model is not an anGPT. GPT+ has no factors to fold, and the exact norms of nGPT depend on the
            input.
        ValueError: the model is an ablation, or alphas so close to 1 that the folded residual stream would overflow.
    """
    if model.config.ablation not in (None, "none"):
        raise ValueError(f"only the unablated anGPT can be folded, not {model.config.ablation}")
    if type(model) is not AnGPT:  # a subclass may compute another function
        raise TypeError(f"only anGPT itself can be folded, not {type(model).__name__}")
    weight = model.embedding.weight
    with torch.device("meta"):
        folded = FoldedAnGPT(model.config)
    folded.to_empty(device=weight.device).to(weight.dtype)
    folded.end_of_text = model.end_of_text
    folded.embedding.weight.copy_(weight)
    # c of the module's docstring. It stays in float64, since it is a product over all layers.
    scale = torch.ones(model.config.width, dtype=torch.float64, device=weight.device)
    for source, target in zip(model.blocks, folded.blocks, strict=True):
        assert isinstance(source, Block) and isinstance(target, FoldedBlock)
        fold_attention(source.attention, target, scale)
        scale = fold_residual(source.attention_residual.alpha(), target.attention_gain, scale)
        fold_mlp(source.mlp, target, scale)
        scale = fold_residual(source.mlp_residual.alpha(), target.mlp_gain, scale)
    folded.lm_head.weight.copy_(model.lm_head.weight * model.logit_scale().double().unsqueeze(1) * scale)
    return folded.eval()


def fold_attention(source: Attention, target: FoldedBlock, scale: Tensor) -> None:
    """Multiply nu_qkv, nu_p and the scale (d,) of the residual stream into the weights."""
    # Multiplying by the float64 scale promotes the product; copy_ rounds it to the target's dtype.
    target.qkv_proj.weight.copy_(source.qkv_proj.weight * scale * source.qkv_proj.factor)
    # This weight reads attention outputs, not the residual stream, so the scale does not apply.
    target.out_proj.weight.copy_(source.out_proj.weight.double() * source.out_proj.factor)
    target.score_scale = float(source.score_scale)


def fold_mlp(source: MLP, target: FoldedBlock, scale: Tensor) -> None:
    """Multiply nu_uz, nu_act, the gate's scale, nu_d and the scale (d,) of the residual stream into the weights."""
    target.up_proj.weight.copy_(source.up_proj.weight * scale * source.up_proj.factor)
    target.gate_proj.weight.copy_(source.gate_proj.weight * scale * source.gate_proj.factor)
    target.down_proj.weight.copy_(source.down_proj.weight.double() * source.down_proj.factor)


def fold_residual(alpha: Tensor, gain: Tensor, scale: Tensor) -> Tensor:
    """Set the gain (d,) of the norm that replaces an interpolation; return the residual stream's scale after it.

    Raises:
        ValueError: as ``fold``.
    """
    alpha = alpha.double()
    nu = factors.residual(alpha)
    new_scale = scale * (1 - alpha) * nu
    # Scales shrink from layer to layer, and the folded residual stream grows as 1 / scale. The square root leaves half
    # of the dtype's exponent range as a margin for weights and activations.
    if bool((new_scale.abs() < torch.finfo(gain.dtype).tiny ** 0.5).any()):
        raise ValueError(f"one alpha is 1 or several are close to 1, so the model cannot be folded in {gain.dtype}")
    gain.copy_(alpha * nu / new_scale / len(alpha) ** 0.5)  # an RMS norm has length sqrt(d), normalize has length 1
    return new_scale
