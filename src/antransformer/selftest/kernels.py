"""Triton kernels and FP8 products against plain torch in float64 on the CPU, where no kernel is used."""

import os
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from antransformer import functional, kernels
from antransformer import nn as bounded
from antransformer.bounds import Bound, project_
from antransformer.selftest.checks import Check, Setup, at_most, equal, largest, relative_error
from antransformer.training import float8

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SHAPES = ((1, 2), (3, 7), (2, 5, 64), (13, 3), (2, 3, 2, 130))
LARGE_SHAPES = ((4, 256, 768), (3, 100, 1000), (2, 64, 4096))
VOCABULARIES = (5, 257, 4100, 50_304)


def interpolate_norm(setup: Setup) -> Iterator[Check]:
    """Residual interpolation, forward and backward, in float32 and bfloat16."""
    kernel = _module(setup, "interpolate_norm")
    if kernel is None:
        yield Check("interpolate_norm", "Triton is not installed")
        return
    for dtype, tolerance in TOLERANCES.items():
        kind = str(dtype).removeprefix("torch.")
        forward, backward = list[float](), list[float]()
        for shape in _shapes(setup):
            x = F.normalize(_random(setup, shape, 0), dim=-1).to(dtype)
            y, gradient = (3 * _random(setup, shape, 1)).to(dtype), _random(setup, shape, 2).to(dtype)
            alpha = (0.3 * _random(setup, shape[-1:], 3)).to(dtype)
            z, inverse = kernel.forward(x, y, alpha)
            exact = x.double().cpu(), y.double().cpu(), alpha.double().cpu()
            plain, plain_inverse = functional.interpolate_norm_forward(*exact)
            forward += [relative_error(z, plain), relative_error(inverse, plain_inverse)]
            gradients = kernel.backward(gradient, x, y, alpha, inverse)
            plain_gradients = functional.interpolate_norm_backward(gradient.double().cpu(), *exact, plain_inverse)
            backward += map(relative_error, gradients, plain_gradients)
        yield at_most(f"interpolate_norm forward, {kind}: error", largest(forward), tolerance)
        yield at_most(f"interpolate_norm backward, {kind}: error", largest(backward), tolerance)


def projection(setup: Setup) -> Iterator[Check]:
    """Projection of rows, into the ball and onto the sphere."""
    kernel = _module(setup, "bound")
    if kernel is None:
        yield Check("projection", "Triton is not installed")
        return
    for dtype, tolerance in TOLERANCES.items():
        kind = str(dtype).removeprefix("torch.")
        for strict in (False, True):
            errors, untouched = list[float](), True
            for shape in _shapes(setup):
                lengths = _random(setup, (shape[0], *[1] * (len(shape) - 1)), 1).exp()
                before = (F.normalize(_random(setup, shape, 0), dim=-1) * lengths).flatten(0, -2).to(dtype)
                weight, plain = before.clone(), before.double().cpu()
                kernel.project_rows_([weight], strict)
                project_([Bound("weight", plain, strict=strict)])
                errors.append(relative_error(weight, plain))
                inside = before.double().norm(dim=1) <= (0 if strict else 1 - tolerance)
                untouched &= torch.equal(weight[inside], before[inside])
            name = f"projection{' onto the sphere' if strict else ''}, {kind}"
            yield at_most(f"{name}: error", largest(errors), tolerance)
            if not strict:
                yield equal(f"{name}: rows inside", untouched)


def cross_entropy(setup: Setup) -> Iterator[Check]:
    """Losses of logits, and their gradients in place."""
    kernel = _module(setup, "cross_entropy")
    if kernel is None:
        yield Check("cross_entropy", "Triton is not installed")
        return
    for dtype, tolerance in TOLERANCES.items():
        losses, gradients = list[float](), list[float]()
        for vocab in VOCABULARIES[:-1] if setup.miniature else VOCABULARIES:
            logits = (10 * _random(setup, (5, vocab), 0)).to(dtype)
            targets = (torch.arange(15, device=setup.device) * (vocab - 1) // 14)[::3]  # not contiguous
            exact = logits.double().cpu().requires_grad_()
            plain = F.cross_entropy(exact, targets.cpu(), reduction="none")
            plain.sum().backward()
            losses.append(relative_error(kernel.losses_and_gradients_(logits, targets, True), plain))
            assert exact.grad is not None
            gradients.append(relative_error(logits, exact.grad))
        kind = str(dtype).removeprefix("torch.")
        yield at_most(f"cross-entropy, {kind}: error of the loss", largest(losses), TOLERANCES[torch.float32])
        yield at_most(f"cross-entropy, {kind}: error of the gradient", largest(gradients), tolerance)


def fp8(setup: Setup) -> Iterator[Check]:
    """torch's FP8 matrix product and an FP8 linear layer, against the simulation on a CPU."""
    device = setup.device
    if float8.is_missing(device):
        yield Check("FP8 product", "the device has no FP8")
        return
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        a, used = float8.compress(_random(setup, (64, 128), 0).float(), kind, None)
        b, _ = float8.compress(_random(setup, (128, 32), 1).float(), torch.float8_e4m3fn, None)
        result = float8.scaled_product(a, b, used, torch.bfloat16)
        yield at_most(
            f"FP8 product, {str(kind).removeprefix('torch.')}: error",
            relative_error(result, a.cpu().double() @ b.cpu().double() * float(used)),
            1e-2,
        )
    results = [_fp8_layer(place) for place in (device, torch.device("cpu"))]
    for name, result, expected in zip(("output", "input gradient", "weight gradient"), *results, strict=True):
        # One rounding to FP8 that falls on the other side changes an element by up to an eighth.
        yield at_most(f"FP8 layer, {name}: error", relative_error(result, expected), 5e-2)


def _fp8_layer(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = bounded.Linear(128, 64)
    torch.nn.init.normal_(layer.weight, std=128**-0.5)
    x = F.normalize(torch.randn(32, 128), dim=-1)
    layer.__class__ = float8.StaticLinear
    assert isinstance(layer, float8.StaticLinear)
    layer.scales = float8.unit_scales(128, 64, 128)
    layer.to(device)
    x = x.to(device).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x)
    (y.float() ** 2).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    return y, x.grad, layer.weight.grad


def _module(setup: Setup, name: str) -> ModuleType | None:
    """Module of a kernel. On a CPU, Triton's interpreter runs it, and without Triton it is None.

    Raises:
        ImportError: Triton is missing on a CUDA device, where the package would run without its kernels.
    """
    if setup.device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
    if setup.miniature and not kernels.has_triton():
        return None
    return import_module(f"antransformer.kernels.{name}")


def _shapes(setup: Setup) -> tuple[tuple[int, ...], ...]:
    return SHAPES if setup.miniature else SHAPES + LARGE_SHAPES


def _random(setup: Setup, shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal float64 values that do not depend on the device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(setup.device)
