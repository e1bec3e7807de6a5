"""Checks of the self-test, and what every part of it is given."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from antransformer import kernels
from antransformer.models import ModelConfig
from antransformer.models.config import PAPER_VOCABULARY, preset_sizes


class Unfinished(Exception):
    """A check needs more time than the call has; the next call continues it."""


@dataclass(frozen=True)
class Check:
    """One figure.

    Attributes:
        name: what was checked.
        figure: the measured value as text.
        limit: the condition that it must meet as text, empty for a figure that is only reported.
        passed: whether it meets the condition; None without a condition.
    """

    name: str
    figure: str
    limit: str = ""
    passed: bool | None = None


@dataclass(frozen=True)
class Setup:
    """Device, files and time of a self-test, passed to every function of a part.

    Attributes:
        device: device under test.
        folder: folder for files of the parts, kept between calls.
        deadline: value of ``time.monotonic()`` at which the call should have ended; infinite without a limit.
        log: receives lines of progress.
    """

    device: torch.device
    folder: Path
    deadline: float
    log: Callable[[str], None]

    @property
    def miniature(self) -> bool:
        """Whether sizes are as small as possible: on every device but CUDA."""
        return self.device.type != "cuda"

    def model(self, preset: str, architecture: str = "angpt") -> ModelConfig:
        """Model of a preset with the paper's vocabulary and context; in miniature two small layers."""
        if self.miniature:
            return ModelConfig(architecture=architecture, vocab_size=97, width=64, layers=2, context=32, head_dim=32)
        sizes: dict[str, Any] = {"vocab_size": PAPER_VOCABULARY, **preset_sizes(preset)}
        return ModelConfig(architecture=architecture, **sizes)


Checks = Callable[..., Iterator[Check]]  # of the setup, and of further arguments


def triton_kernels(enabled: bool) -> AbstractContextManager[object]:
    """While entered, Triton kernels are used where they can be, or not at all."""
    return nullcontext() if enabled else mock.patch.object(kernels, "use_triton", lambda tensor: False)


def at_most(name: str, value: float, limit: float) -> Check:
    """Check that a value is at most a limit; NaN fails."""
    return Check(name, f"{value:.3g}", f"<= {limit:g}", bool(value <= limit))


def failed(name: str, reason: str) -> Check:
    """Failed check of something that must not raise."""
    return Check(name, reason, "no error", False)


def only_on_cuda(name: str) -> Check:
    """Figure that takes too long, or does not exist, in miniature."""
    return Check(name, "only on a CUDA device")


def equal(name: str, holds: bool) -> Check:
    """Check that two results are equal."""
    return Check(name, "equal" if holds else "different", "equal", holds)


def largest(values: Iterable[float]) -> float:
    """Largest of one or more values; NaN if one of them is NaN, which ``max`` can skip."""
    return float(torch.tensor([*values], dtype=torch.float64).max())


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute difference, divided by the largest absolute value of ``exact``; computed on the CPU."""
    exact = exact.detach().cpu().double()
    difference = (result.detach().cpu().double() - exact).abs().max()
    return float(difference / exact.abs().max().clamp_min(1e-30))
