"""Train two models with equal tuning effort and print both learning curves; shared by the examples.

Each variant tries every learning rate of its own grid once, with the first seed. The rate with the lowest final
validation loss is then run with all seeds. Only these runs are evaluated on the test set.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import antransformer

BATCH = 100


@dataclass(frozen=True)
class Variant:
    """One side of the comparison.

    Attributes:
        name: label in the tables.
        make: function that builds the model, which maps inputs (B, ...) to logits (B, classes).
        lrs: learning rates to try.
        weight_decay: AdamW's decay of the weight matrices.
        warmup: fraction of the steps used for linear warm-up.
        bounded: whether weight rows are bounded by 1; replaces weight decay.
    """

    name: str
    make: Callable[[], nn.Module]
    lrs: Sequence[float]
    weight_decay: float = 0.0
    warmup: float = 0.0
    bounded: bool = False


@dataclass(frozen=True)
class Split:
    """Inputs (N, ...) and classes (N,) for training, for choosing the learning rate, and for the final report."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Run:
    """One training run: validation loss and accuracy after each epoch, and the test accuracy at the end."""

    losses: list[float]
    accuracies: list[float]
    test_accuracy: float


def split(inputs: Tensor, targets: Tensor, parts: tuple[float, float]) -> Split:
    """Split in a fixed random order; ``parts`` are the fractions for validation and test."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    first, second = (round(share * len(inputs)) for share in parts)
    validation, test, train = order.split([first, second, len(inputs) - first - second])
    return Split(*((inputs[part], targets[part]) for part in (train, validation, test)))


def train(variant: Variant, lr: float, seed: int, data: Split, epochs: int) -> Run:
    """Train one model with AdamW, linear warm-up and cosine decay to zero."""
    torch.manual_seed(seed)
    model = variant.make()
    matrices = [value for value in model.parameters() if value.ndim > 1]
    others = [value for value in model.parameters() if value.ndim < 2]
    groups = [{"params": matrices, "weight_decay": variant.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    if variant.bounded:
        antransformer.bind(model, optimizer)
    inputs, targets = data.train
    steps = epochs * (len(inputs) // BATCH)
    warmup = max(1, round(variant.warmup * steps))

    def share(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    losses, accuracies = [], []
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).split(BATCH)[: len(inputs) // BATCH]:
            F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        loss, accuracy = evaluate(model, *data.validation)
        losses.append(loss)
        accuracies.append(accuracy)
    return Run(losses, accuracies, evaluate(model, *data.test)[1])


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """Mean loss in nats, and accuracy between 0 and 1."""
    logits = model(inputs)
    return F.cross_entropy(logits, targets).item(), (logits.argmax(-1) == targets).float().mean().item()


def compare(variants: Sequence[Variant], data: Split, epochs: int, seeds: int) -> None:
    """Tune each variant, repeat the best with all seeds, and print the grid, both curves and the result."""
    torch.set_num_threads(1)  # models so small gain nothing from more
    start, results = time.perf_counter(), {}
    for variant in variants:
        size = sum(value.numel() for value in variant.make().parameters())
        print(f"{variant.name}: {size:,} parameters; learning rate and validation loss at the end:")
        tried = {lr: train(variant, lr, 0, data, epochs) for lr in variant.lrs}
        print("  " + ", ".join(f"{lr:g}: {run.losses[-1]:.3f}" for lr, run in tried.items()))
        best = min(tried, key=lambda lr: tried[lr].losses[-1])
        more = [train(variant, best, seed, data, epochs) for seed in range(1, seeds)]
        results[variant.name] = [tried[best], *more]
    print(f"\nvalidation loss and accuracy, means over {seeds} seeds")
    print("epoch" + "".join(f"{name:>24}" for name in results))
    for epoch in sorted({*range(0, epochs, max(1, epochs // 10)), epochs - 1}):
        cells = (
            f"{mean(run.losses[epoch] for run in runs):14.3f} {mean(run.accuracies[epoch] for run in runs):9.1%}"
            for runs in results.values()
        )
        print(f"{epoch + 1:5}" + "".join(cells))
    print()
    for name, runs in results.items():
        loss = torch.tensor([run.losses[-1] for run in runs])
        accuracy = torch.tensor([run.test_accuracy for run in runs])
        print(f"{name}: validation loss {spread(loss, '.3f')}, test accuracy {spread(accuracy, '.1%')}")
    print(f"{time.perf_counter() - start:.0f} s")


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean of some numbers."""
    return torch.tensor(list(values)).mean().item()


def spread(values: Tensor, form: str) -> str:
    """Mean and standard deviation over seeds."""
    deviation = f" ± {values.std().item():{form}}" if len(values) > 1 else ""
    return f"{values.mean().item():{form}}{deviation}"


def options(description: str, epochs: int) -> argparse.Namespace:
    """Parse the command line of an example."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args()
