"""What is looked at while a model trains, at the cost of one forward pass over a few sequences.

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

MOMENTS = {"exp_avg", "exp_avg_sq", "step"}


@torch.no_grad()
def probe(model: Decoder, optimizer: Optimizer, tokens: Tensor) -> dict[str, Any]:
    """Norms, steps and noise of a model in training, ready for JSON.

    Args:
        model: in whatever mode it is; it stays so.
        optimizer: the one that steps it.
        tokens: ids (B, T), on the model's device.

    Returns:
        ``residual_norm``: mean over tokens after the embedding and after each block, layers + 1 numbers
        (arXiv:2505.22014, figure 1). ``row_norm``: mean, min and max over all weight vectors. ``alpha``: see
        ``layer_alphas``. ``moment_variance``: see there.
    """
    rows = row_norms(model)
    return {
        "residual_norm": torch.stack([length(x).mean() for x in stream(model, tokens)]).tolist(),
        "row_norm": {"mean": float(rows.mean()), "min": float(rows.min()), "max": float(rows.max())},
        "alpha": layer_alphas(model),
        "moment_variance": moment_variance(optimizer),
    }


def stream(model: Decoder, tokens: Tensor) -> Iterator[Tensor]:
    """The residual stream after the embedding and after each block: layers + 1 tensors (B, T, d), one by one."""
    x = model.embed(tokens)
    yield x
    ctx = model.attention_context(tokens, None)
    for block in model.blocks:
        x = block(x, ctx)
        yield x


def length(x: Tensor) -> Tensor:
    """L2 norm over the last axis, in float32."""
    return torch.linalg.vector_norm(x.float(), dim=-1)


@torch.no_grad()
def row_norms(model: Decoder) -> Tensor:
    """Norms of all weight vectors: the bounded ones, or the rows of all matrices where the model has no bounds."""
    return torch.cat([norms(bound).flatten() for bound in weight_vectors(model)])


@torch.no_grad()
def layer_alphas(model: Decoder) -> list[list[float]] | None:
    """Mean residual step of each layer, [attention's, MLP's]; None for a model without."""
    layers = [
        [float(part.alpha().mean()) for part in block.children() if isinstance(part, Residual)]
        for block in model.blocks
    ]
    return layers if any(layers) else None


@torch.no_grad()
def moment_variance(optimizer: Optimizer) -> float | None:
    """Relative variance of Adam's first moment: how much of what steers the update is noise.

    With bias-corrected moments m and v, over all coordinates: c_t * sum(max(v - m^2, 0)) / sum(m^2). v - m^2 is the
    variance of one gradient, and c_t = sum w_i^2 / (sum w_i)^2 = (1 - b1) / (1 + b1) * (1 + b1^t) / (1 - b1^t) is what
    an average with Adam's weights w_i keeps of it after t steps. 0: all gradients were alike. About 1 or above: the
    first moment is noise. After a single step v = m^2, which says nothing.

    The paper draws such a quantity without printing its formula (arXiv:2505.22014, figure P.1); this one is ours.

    Returns:
        The ratio; None before the first step, and for an optimizer that does not keep both moments.
    """
    noise = signal = 0.0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if not state.keys() >= MOMENTS:
                continue
            (beta1, beta2), t = group["betas"], float(state["step"])
            m, v = state["exp_avg"] / (1 - beta1**t), state["exp_avg_sq"] / (1 - beta2**t)
            kept = (1 - beta1) / (1 + beta1) * (1 + beta1**t) / (1 - beta1**t)
            noise += kept * float((v - m.square()).clamp_min(0).sum())
            signal += float(m.square().sum())
    return noise / signal if signal else None


PROBE_TOKENS = 1024
