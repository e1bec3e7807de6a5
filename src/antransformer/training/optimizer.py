"""The optimizer of a run: Adam for everything, or Muon for the blocks' matrices and Adam for the rest.

Muon (https://kellerjordan.github.io/posts/muon) steps along the orthogonalized momentum. torch's "original" adjustment
of its rate, sqrt(max(1, fan_out / fan_in)), gives every row of the step a length of about the rate: for the rows of
anGPT, which have norm 1, the rate is the angle in radians by which each turns. Embedding and head stay with Adam, as
Muon's authors have it, and q, k and v are orthogonalized together, as the one matrix that they are here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from antransformer.models import Decoder
from antransformer.training.config import TrainConfig


class Together(Optimizer):
    """Optimizers of different parameters as one: their groups in a row, and one state that they share."""

    def __init__(self, *parts: Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self._share()

    def _share(self) -> None:
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.state, part.param_groups, start = self.state, self.param_groups[start:end], end

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's, which puts a new state in the place of the old."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step each part, on the gradients that one call of the closure leaves."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def moments_of(group: dict[str, Any]) -> tuple[str, ...]:
    """Names of what an optimizer keeps for each parameter of a group."""
    return ("step", "exp_avg", "exp_avg_sq") if "betas" in group else ("momentum_buffer",)


def make_optimizer(model: Decoder, config: TrainConfig) -> Optimizer:
    """The optimizer that the config names, with decoupled weight decay on the matrices where the config has some.

    Each group knows the peak of its learning rate as ``initial_lr``.
    """
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    inner = [matrices.pop(name) for name in list(matrices) if config.optimizer == "muon" and name.startswith("blocks.")]
    decayed = list(matrices.values())
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=decayed[0].device.type in ("cpu", "cuda"),
    )
    optimizer: Optimizer = adam
    if config.muon_lr is not None:
        optimizer = Together(adam, torch.optim.Muon(inner, lr=config.muon_lr, weight_decay=config.weight_decay))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer
