"""Norms, residual steps and gradient noise, measured during training at the cost of one small forward pass.

Nothing here changes the model, the optimizer or a random state.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from antransformer.bounds import norms
from antransformer.models import Decoder
from antransformer.nn import Residual
from antransformer.training.metrics import weight_vectors

PROBE_TOKENS = 1024
ADAM_STATE = {"exp_avg", "exp_avg_sq", "step"}


@torch.no_grad()
def probe(model: Decoder, optimizer: Optimizer, tokens: Tensor) -> dict[str, Any]:
    """Measure a model during training; the result can be written as JSON.

    Args:
        model: model in training or evaluation mode.
        optimizer: optimizer of the model.
        tokens: token ids (B, T) on the model's device.

    Returns:
        residual_norm: mean norm of the residual stream after the embedding and after each block, layers + 1 values
            (arXiv:2505.22014, figure 1).
        row_norm: mean, min and max over all weight vectors.
        alpha: result of ``layer_alphas``.
        moment_variance: result of ``moment_variance``.
    """
    rows = row_norms(model)
    return {
        "residual_norm": torch.stack([l2_norm(x).mean() for x in residual_stream(model, tokens)]).tolist(),
        "row_norm": {"mean": float(rows.mean()), "min": float(rows.min()), "max": float(rows.max())},
        "alpha": layer_alphas(model),
        "moment_variance": moment_variance(optimizer),
    }


def residual_stream(model: Decoder, tokens: Tensor) -> Iterator[Tensor]:
    """Yield the residual stream after the embedding and after each block: layers + 1 tensors (B, T, d)."""
    x = model.embed(tokens)
    yield x
    ctx = model.attention_context(tokens, None)
    for block in model.blocks:
        x = block(x, ctx)
        yield x


def l2_norm(x: Tensor) -> Tensor:
    """L2 norm over the last axis, computed in float32."""
    norms: Tensor = torch.linalg.vector_norm(x.float(), dim=-1)
    return norms


@torch.no_grad()
def row_norms(model: Decoder) -> Tensor:
    """Norms of all weight vectors: the bounded ones, or the rows of all matrices of a model without bounds."""
    return torch.cat([norms(bound).flatten() for bound in weight_vectors(model)])


@torch.no_grad()
def layer_alphas(model: Decoder) -> list[list[float]] | None:
    """Mean of alpha for each layer as [attention, MLP]; None for a model without residual interpolation."""
    layers = [
        [float(part.alpha().mean()) for part in block.children() if isinstance(part, Residual)]
        for block in model.blocks
    ]
    return layers if any(layers) else None


@torch.no_grad()
def moment_variance(optimizer: Optimizer) -> float | None:
    """Relative variance of Adam's first moment: the fraction of the update that is gradient noise.

    With bias-corrected moments m and v, summed over all coordinates: c_t * sum(max(v - m^2, 0)) / sum(m^2). Here
    v - m^2 estimates the variance of one gradient. Averaging with Adam's weights w_i over t steps reduces it by
    c_t = sum w_i^2 / (sum w_i)^2 = (1 - b1) / (1 + b1) * (1 + b1^t) / (1 - b1^t).

    The value is 0 if all gradients were equal, and about 1 or more if the first moment is mostly noise. After a single
    step v = m^2, so the value is 0 and has no meaning. Figure P.1 of arXiv:2505.22014 shows a similar quantity, whose
    formula is not printed there.

    Returns:
        The ratio; None before the first step, and for an optimizer that does not keep both moments.
    """
    noise = signal = 0.0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if not state.keys() >= ADAM_STATE:
                continue
            (beta1, beta2), t = group["betas"], float(state["step"])
            m, v = state["exp_avg"] / (1 - beta1**t), state["exp_avg_sq"] / (1 - beta2**t)
            variance_factor = (1 - beta1) / (1 + beta1) * (1 + beta1**t) / (1 - beta1**t)
            noise += variance_factor * float((v - m.square()).clamp_min(0).sum())
            signal += float(m.square().sum())
    return noise / signal if signal else None
