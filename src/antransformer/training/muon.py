"""Muon and NorMuon for the weight matrices inside the blocks, AdamW for all other parameters.

Muon (https://kellerjordan.github.io/posts/muon) orthogonalizes the momentum of each matrix. The update is scaled by
sqrt(max(1, fan_out / fan_in)), so each row of it has a length of about the learning rate. anGPT's rows have norm 1:
there the learning rate is the angle in radians by which each row rotates. Embedding and head use AdamW, as the authors
of Muon recommend.

Rows of an orthogonalized tall matrix differ in length. NorMuon (arXiv:2510.05491) divides each row by a running root
mean square, and keeps the Frobenius norm of the update. So every row of anGPT rotates by about the learning rate.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from antransformer.errors import ConfigError
from antransformer.models import Decoder
from antransformer.training.config import TrainConfig
from antransformer.training.device import multiplies_bfloat16
from antransformer.training.distributed.parallel import full_tensor, shard_like
from antransformer.training.learning_rates import peak_rates
from antransformer.training.optimizer import (
    CombinedOptimizer,
    build_adamw,
    decay_cautiously_,
    run_closure,
    split_parameters,
)

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients by the authors of Muon, for five steps
NORMUON_BETA2 = 0.95  # by the authors of NorMuon
TINY = 1e-10  # keeps a row or a matrix of zeros from becoming NaN


def build_muon(model: Decoder, config: TrainConfig, beta2: float | None = None) -> Optimizer:
    """Muon for the weight matrices inside the blocks (learning rate ``muon_lr``), AdamW for all other parameters.

    Raises:
        ConfigError: a weight inside the blocks is not a matrix.
    """
    blocks = split_parameters(model).blocks
    other = next((name for name, weight in blocks.items() if weight.ndim != 2), None)
    if other is not None:
        raise ConfigError(f"Muon trains matrices, and {other} has {blocks[other].ndim} axes: use --optimizer adam")
    # Others of this name, of grouped queries for example, are matrices as any other.
    rows = 3 * config.model.width
    fused = [blocks.pop(n) for n, weight in [*blocks.items()] if n.endswith("qkv_proj.weight") and len(weight) == rows]
    groups = [{"params": list(blocks.values())}, {"params": fused, "head_dim": config.model.head_dim}]
    muon = Muon(
        groups,
        lr=peak_rates(config).blocks,
        weight_decay=config.weight_decay,
        cautious=config.cautious_weight_decay,
        beta2=beta2,
    )
    return CombinedOptimizer(build_adamw(model, config, include_blocks=False), muon)


def build_normuon(model: Decoder, config: TrainConfig) -> Optimizer:
    """NorMuon for the weight matrices inside the blocks (learning rate ``muon_lr``), AdamW for all other parameters."""
    return build_muon(model, config, NORMUON_BETA2)


class Muon(Optimizer):
    """Muon or NorMuon that orthogonalizes q, k and v of a fused projection separately.

    Muon treats other matrices as ``torch.optim.Muon`` does.

    Args:
        params: matrices, or groups of matrices. A group with ``head_dim`` holds fused projections, whose rows are
            ordered as in ``functional.split_heads``.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        momentum: coefficient of the Nesterov momentum.
        cautious: whether to decay only coordinates that the update moves towards zero (``decay_cautiously_``).
        beta2: coefficient of the running mean square of each row for NorMuon; None for Muon.

    Raises:
        ValueError: the learning rate is negative, or a parameter is not a matrix.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        cautious: bool = False,
        beta2: float | None = None,
    ) -> None:
        options = {"weight_decay": weight_decay, "momentum": momentum, "cautious": cautious, "beta2": beta2}
        if lr < 0:
            raise ValueError(f"the learning rate must be at least 0, got {lr}")
        super().__init__(params, {"lr": lr, **options, "head_dim": None})
        shapes = [tuple(weight.shape) for group in self.param_groups for weight in group["params"]]
        other = next((shape for shape in shapes if len(shape) != 2), None)
        if other is not None:
            raise ValueError(f"Muon trains matrices, and one parameter has shape {other}: give it to another optimizer")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. A sharded matrix is gathered once."""
        loss = run_closure(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    update = shard_like(self._update(weight, group), weight)
                    decay = group["lr"] * group["weight_decay"]
                    if group["cautious"]:
                        decay_cautiously_(weight, update, decay)
                    else:
                        weight.mul_(1 - decay)
                    weight.sub_(update, alpha=group["lr"])
        return loss

    def _update(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the complete update of a matrix for a learning rate of 1, and update its state."""
        assert weight.grad is not None
        state, momentum, head_dim, beta2 = self.state[weight], group["momentum"], group["head_dim"], group["beta2"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad)
        state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
        # Singular vectors depend on all rows, so the full matrix is needed.
        direction = full_tensor(weight.grad.lerp(state["momentum_buffer"], momentum))
        update = map_parts(newton_schulz, head_dim, direction)
        if beta2 is None:
            return update
        # Every rank has the full update, so it holds the moments of all rows: they are small, and need no collective.
        mean_square = update.square().mean(1, keepdim=True)
        second_moment = state.setdefault("second_moment", torch.zeros_like(mean_square))
        second_moment.lerp_(mean_square, 1 - beta2)
        return map_parts(normalize_rows, head_dim, update, second_moment)


def newton_schulz(matrix: Tensor) -> Tensor:
    """Approximate the nearest (fan_out, fan_in) matrix with equal singular values and rows of about unit length.

    Five Newton-Schulz steps in bfloat16 bring the singular values to between 0.7 and 1.2, which is close enough. They
    are in float32 on a device without instructions for bfloat16: on such a processor its products are 17 to 60 times
    as slow.
    """
    fan_out, fan_in = matrix.shape
    x = matrix.bfloat16() if multiplies_bfloat16(matrix.device.type) else matrix.float()
    x = x if fan_out <= fan_in else x.T  # the smaller Gram matrix costs less
    x = x / x.norm().clamp_min(1e-7)  # the iteration converges for singular values of at most 1
    first, second, third = NEWTON_SCHULZ
    for _ in range(5):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=second, alpha=third), x, beta=first)
    return (x if fan_out <= fan_in else x.T).to(matrix.dtype) * math.sqrt(max(1, fan_out / fan_in))


def normalize_rows(update: Tensor, second_moment: Tensor) -> Tensor:
    """Divide rows of an update (fan_out, fan_in) by the root of their moments (fan_out, 1); keep its Frobenius norm."""
    normalized = update / second_moment.sqrt().clamp_min(TINY)
    # The moments are biased towards zero in the first steps. A common factor cancels here.
    rescaled: Tensor = normalized * (update.norm() / normalized.norm().clamp_min(TINY))
    return rescaled


def map_parts(function: Callable[..., Tensor], head_dim: int | None, *matrices: Tensor) -> Tensor:
    """Apply a function of matrices to q, k and v of fused (3 * heads * head_dim, ...) matrices separately.

    Without ``head_dim`` the matrices are not fused, and the function is applied to them as they are.
    """
    if head_dim is None:
        return function(*matrices)
    # Together the three would share one set of directions, and the largest would take most of the step.
    parts = zip(*(matrix.unflatten(0, (-1, 3, head_dim)).unbind(1) for matrix in matrices), strict=True)
    updates = [function(*(part.flatten(0, 1) for part in of_one)).unflatten(0, (-1, head_dim)) for of_one in parts]
    return torch.stack(updates, dim=1).flatten(0, 2)
