"""The speed of two parts of a training step: the loss behind the last block, and the optimizer with the bounds."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from antransformer import functional
from antransformer.benchmarks.models import replace_architecture
from antransformer.benchmarks.timing import Row, alternate, compare, peak_memory, seconds
from antransformer.bounds import bind
from antransformer.models import ModelConfig, build
from antransformer.training.config import resolve_config
from antransformer.training.optimizer import make_optimizer

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (B, T, d), weight (V, d), targets (B, T) to the mean loss


def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss of logits that are all there at once."""
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1).float(), targets.flatten())


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss in torch's own chunks (from 2.13 on), of a size that it chooses."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), options=options)


def losses() -> dict[str, Loss]:
    """Ways to compute the loss of a head, by name."""
    ways: dict[str, Loss] = {"whole": whole, "chunks": functional.cross_entropy}
    return {**ways, "torch's chunks": torch_chunked} if hasattr(F, "linear_cross_entropy") else ways


def bench_loss(
    shapes: list[ModelConfig], batch: int, rounds: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Row]:
    """Time loss and its gradients for so many sequences of the shapes' contexts, on random numbers of that dtype."""
    for shape in shapes:
        torch.manual_seed(0)
        hidden = torch.randn(batch, shape.context, shape.width, device=device, dtype=dtype, requires_grad=True)
        weight = torch.randn(shape.vocab_size, shape.width, device=device, dtype=dtype)
        weight = (weight / shape.width**0.5).requires_grad_()
        targets = torch.randint(shape.vocab_size, (batch, shape.context), device=device)

        def call(loss: Loss, hidden: Tensor = hidden, weight: Tensor = weight, targets: Tensor = targets) -> None:
            torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))

        calls = {name: partial(call, loss) for name, loss in losses().items()}
        times = alternate({name: partial(seconds, work, device) for name, work in calls.items()}, rounds)["all"]
        for row in compare({"vocabulary": shape.vocab_size}, times, batch * shape.context, "whole"):
            yield replace(row, memory=peak_memory(calls[row.variant], device))


def bench_optimizer(shape: ModelConfig, rounds: int, device: torch.device) -> Iterator[Row]:
    """Time steps of the optimizer with and without bounds, on gradients that stay the same."""
    for architecture in ("angpt", "ngpt"):
        calls = {}
        for name in ("optimizer", "with bounds"):
            torch.manual_seed(0)
            with device:
                model = build(replace_architecture(shape, architecture))
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter) / parameter.numel() ** 0.5
            optimizer = make_optimizer(model, resolve_config({"model": model.config.mapping()}, shape.vocab_size))
            if name == "with bounds":
                bind(model, optimizer)
            calls[name] = partial(seconds, optimizer.step, device)
        times = alternate(calls, rounds)["all"]
        yield from compare({"architecture": architecture}, times, model.parameter_count(), "optimizer")
