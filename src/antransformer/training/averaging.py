"""Exponential moving average of the weights of a run.

After n steps the average is sum_k decay**k w[n-k] / sum_k decay**k over k < n. The denominator corrects the bias of the
first steps, as in Adam: without it, the initial weights would count as much as 1/(1 - decay) steps.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from antransformer.bounds import project_
from antransformer.models import Decoder
from antransformer.training.distributed.parallel import local_shard, reshard


class WeightAverage:
    """Exponential moving average of a model's weights, in float32 and sharded as the model.

    A mean of vectors in the unit ball is inside it. Strict bounds are restored after each update.

    Args:
        model: model on its device, with its initial weights.
        window: time constant in steps; decay = 1 - 1/window.

    Attributes:
        weights: averaged weights by parameter name.
        updates: number of averaged steps.
    """

    def __init__(self, model: Decoder, window: float) -> None:
        # Tensors instead of torch's AveragedModel, which copies the module: FSDP2 does not support that.
        self.model, self.decay, self.updates = model, 1 - 1 / max(1.0, window), 0
        self.parameters = dict(model.named_parameters())
        self.weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        averaged = {id(parameter): self.weights[name] for name, parameter in self.parameters.items()}
        self.strict_bounds = [
            replace(bound, parameter=averaged[id(bound.parameter)]) for bound in model.bounds() if bound.strict
        ]

    def update(self) -> None:
        """Include the current weights, in one pass and without communication, except for strict bounds of columns."""
        self.updates += 1
        step_weight = (1 - self.decay) / (1 - self.decay**self.updates)
        averaged, current = zip(*self._local_pairs(), strict=True)
        get_ema_multi_avg_fn(1 - step_weight)(averaged, current, self.updates)
        project_(self.strict_bounds)

    def state_dict(self) -> dict[str, Tensor]:
        """State of the model with its averaged weights, of tied weights too; buffers are the model's own."""
        averaged = {id(parameter): self.weights[name] for name, parameter in self.parameters.items()}
        named = self.model.named_parameters(remove_duplicate=False)
        return {**self.model.state_dict(), **{name: averaged[id(parameter)] for name, parameter in named}}

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """While entered, the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for averaged, current in self._local_pairs():
            copy = current.clone()
            current.copy_(averaged)
            averaged.copy_(copy)
        reshard(self.model)  # FSDP may still hold gathered copies of the former weights

    def _local_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """This rank's shards of (averaged, current) weights."""
        return [(local_shard(self.weights[name]), local_shard(value)) for name, value in self.parameters.items()]
