"""anGPT with every constant factor and scale inside its weights: the same function, cheaper to run.

Let the residual stream be x = c * t, elementwise, with c = 1 at the embedding. The update

    (x + alpha (y - x)) nu = a x + b y,    a = (1 - alpha) nu,  b = alpha nu,  y = norm(p)

becomes, with c' = c a, a plain sum t + (b / c') norm(p): an RMS norm with a gain, as GPT+ has before each sublayer.
Whatever reads the stream takes c into the columns of its weight, the head takes s_Z into its rows. What is left beside
GPT+'s operations is nothing; the final norm falls away.
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

TINY = 1e-30  # added to a mean square; keeps a zero vector zero


class FoldedBlock(nn.Module):
    """Attention and MLP, each followed by an RMS norm with gain and added to the stream."""

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

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """Stream (B, T, d) to the same."""
        q, k, v = split_heads(self.qkv_proj(x), self.head_dim)
        q, k = normalize(rotate(q, ctx.rotary)), normalize(rotate(k, ctx.rotary))
        y = self.out_proj(causal_attention(q, k, v, ctx, self.score_scale))
        x = x + F.rms_norm(y, x.shape[-1:], self.attention_gain, TINY)
        y = self.down_proj(self.up_proj(x) * F.silu(self.gate_proj(x)))
        return x + F.rms_norm(y, x.shape[-1:], self.mlp_gain, TINY)


class FoldedAnGPT(Decoder):
    """What ``fold`` makes: for inference, since its weights are no longer those that the bounds are about."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, FoldedBlock)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)

    def head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing is left beside the weight."""
        return hidden, self.lm_head.weight

    def bounds(self) -> list[Bound]:
        """None: the factors are in the weights."""
        return []

    def reset_parameters(self) -> None:
        """There is nothing to draw.

        Raises:
            TypeError: always; fold a model instead.
        """
        raise TypeError("a folded model is made from a trained one: fold(model)")


def folded_where_possible(model: Decoder) -> Decoder:
    """The folded model, or the same model where ``fold`` has none."""
    try:
        return fold(model)
    except (TypeError, ValueError):
        return model


@torch.no_grad()
def fold(model: Decoder) -> FoldedAnGPT:
    """The same function with all factors, s_Z and nu(alpha) inside the weights, in the model's dtype and device.

    Computed in float64 and rounded once: for a model in bfloat16 fold the float32 weights, then cast. An alpha of 1 has
    no folded form, since nothing of the stream would be left.

    Raises:
        TypeError: the model is no anGPT; GPT+ has no factors to fold, nGPT's exact norms can not be.
        ValueError: alphas are so near 1 that the folded stream would leave the dtype's range, or the model is an
            ablation.
    """
    if model.config.ablation not in (None, "none"):
        raise ValueError(f"only the unablated anGPT can be folded, not {model.config.ablation}")
    if type(model) is not AnGPT:  # a subclass may compute another function
        raise TypeError(f"only anGPT itself can be folded, not {type(model).__name__}")
    weight = model.embedding.weight
    with torch.device("meta"):
        folded = FoldedAnGPT(model.config)
    folded.to_empty(device=weight.device).to(weight.dtype)
    folded.embedding.weight.copy_(weight)
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
    """Take nu_qkv, nu_p and the stream's scale (d,) into the weights."""
    target.qkv_proj.weight.copy_(source.qkv_proj.weight * scale * source.qkv_proj.factor)
    target.out_proj.weight.copy_(source.out_proj.weight.double() * source.out_proj.factor)
    target.score_scale = float(source.score_scale)


def fold_mlp(source: MLP, target: FoldedBlock, scale: Tensor) -> None:
    """Take nu_uz, nu_act, the gate's scale, nu_d and the stream's scale (d,) into the weights."""
    target.up_proj.weight.copy_(source.up_proj.weight * scale * source.up_proj.factor)
    target.gate_proj.weight.copy_(source.gate_proj.weight * scale * source.gate_proj.factor)
    target.down_proj.weight.copy_(source.down_proj.weight.double() * source.down_proj.factor)


def fold_residual(alpha: Tensor, gain: Tensor, scale: Tensor) -> Tensor:
    """Set the gain (d,) of the norm that an interpolation became; returns the stream's scale behind it.

    Raises:
        ValueError: see ``fold``.
    """
    alpha = alpha.double()
    nu = factors.residual(alpha)
    after = scale * (1 - alpha) * nu
    if bool((after.abs() < torch.finfo(gain.dtype).tiny ** 0.5).any()):
        raise ValueError(f"an alpha is 1, or several near it, so the model can not be folded in {gain.dtype}")
    gain.copy_(alpha * nu / after / len(alpha) ** 0.5)  # an RMS norm has length sqrt(d)
    return after
