"""Muon for the weight matrices inside the blocks, AdamW for all other parameters.

Muon (https://kellerjordan.github.io/posts/muon) orthogonalizes the momentum of each matrix. The update is scaled by
sqrt(max(1, fan_out / fan_in)), so each row of it has a length of about the learning rate. anGPT's rows have norm 1:
there the learning rate is the angle in radians by which each row rotates. Embedding and head use AdamW, as the authors
of Muon recommend.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from antransformer.models import Decoder
from antransformer.training.config import TrainConfig
from antransformer.training.distributed.parallel import full_tensor, shard_like
from antransformer.training.learning_rates import peak_rates
from antransformer.training.optimizer import CombinedOptimizer, build_adamw, run_closure, split_parameters

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients by the authors of Muon, for five steps


def build_muon(model: Decoder, config: TrainConfig) -> Optimizer:
    """Muon for the weight matrices inside the blocks (learning rate ``muon_lr``), AdamW for all other parameters."""
    blocks = split_parameters(model).blocks
    fused = [blocks.pop(name) for name in list(blocks) if name.endswith("qkv_proj.weight")]
    groups = [{"params": list(blocks.values())}, {"params": fused, "head_dim": config.model.head_dim}]
    muon = Muon(groups, lr=peak_rates(config).blocks, weight_decay=config.weight_decay)
    return CombinedOptimizer(build_adamw(model, config, include_blocks=False), muon)


class Muon(Optimizer):
    """Muon that orthogonalizes q, k and v of a fused projection separately.

    Other matrices are treated as by ``torch.optim.Muon``.

    Args:
        params: matrices, or groups of matrices. A group with ``head_dim`` holds fused projections, whose rows are
            ordered as in ``functional.split_heads``.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        momentum: coefficient of the Nesterov momentum.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "head_dim": None})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. A sharded matrix is gathered once."""
        loss = run_closure(closure)
        for group in self.param_groups:
            lr, momentum, head_dim = group["lr"], group["momentum"], group["head_dim"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                # Singular vectors depend on all rows, so the full matrix is needed.
                direction = full_tensor(weight.grad.lerp(state["momentum_buffer"], momentum))
                update = newton_schulz(direction) if head_dim is None else orthogonalize_qkv(direction, head_dim)
                weight.mul_(1 - lr * group["weight_decay"]).sub_(shard_like(update, weight), alpha=lr)
        return loss


def newton_schulz(matrix: Tensor) -> Tensor:
    """Approximate the nearest (fan_out, fan_in) matrix with equal singular values and rows of about unit length.

    Five Newton-Schulz steps in bfloat16 bring the singular values to between 0.7 and 1.2, which is close enough.
    """
    fan_out, fan_in = matrix.shape
    x = matrix.bfloat16() if fan_out <= fan_in else matrix.bfloat16().T  # the smaller Gram matrix costs less
    x = x / x.norm().clamp_min(1e-7)  # the iteration converges for singular values of at most 1
    first, second, third = NEWTON_SCHULZ
    for _ in range(5):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=second, alpha=third), x, beta=first)
    return (x if fan_out <= fan_in else x.T).to(matrix.dtype) * math.sqrt(max(1, fan_out / fan_in))


def orthogonalize_qkv(matrix: Tensor, head_dim: int) -> Tensor:
    """Apply ``newton_schulz`` to q, k and v of a fused (3 * heads * head_dim, fan_in) matrix separately."""
    # Together the three would share one set of directions, and the largest would take most of the step.
    parts = matrix.unflatten(0, (-1, 3, head_dim)).unbind(1)
    updates = [newton_schulz(part.flatten(0, 1)).unflatten(0, (-1, head_dim)) for part in parts]
    return torch.stack(updates, dim=1).flatten(0, 2)
