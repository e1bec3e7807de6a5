"""Kernels against plain torch in float64, on a GPU or in Triton's interpreter on a CPU."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from antransformer import functional, kernels
from antransformer.bounds import Bound, project_
from antransformer.kernels import chunked_cross_entropy as chunked
from antransformer.kernels import rotary

pytest.importorskip("triton", reason="Triton is not installed: it comes with the extra [dev] on Linux")
kernel, bound, cross_entropy = (
    importlib.import_module(f"antransformer.kernels.{name}") for name in ("interpolate_norm", "bound", "cross_entropy")
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]


@pytest.fixture(autouse=True)
def nan_in_empty_tensors(monkeypatch):
    """Fills new empty tensors with NaN, to detect kernels that read them or leave elements unwritten."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, make=make, **kw: fill_with_nan(make(*args, **kw)))
    new = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kw: fill_with_nan(new(*args, **kw)))


def fill_with_nan(tensor):
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def assert_near(results, expected, tolerance):
    for result, exact in zip(results, expected, strict=True):
        scale = exact.abs().max().item()
        torch.testing.assert_close(result.double().cpu(), exact, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (2, 5, 64), (13, 3), (2, 3, 2, 130), (0, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("per_coordinate", [True, False])
def test_interpolate_norm_agrees_with_plain_torch(shape, dtype, tolerance, per_coordinate, monkeypatch):
    monkeypatch.setattr(kernel, "PROGRAMS", 5)
    x = F.normalize(random(*shape, seed=0), dim=-1).to(dtype)
    y, gradient = random(*shape, seed=1).to(dtype) * 3, random(*shape, seed=2).to(dtype)
    alpha = (0.3 * random(shape[-1] if per_coordinate else 1, seed=3)).to(dtype)
    z, inverse = kernel.forward(x, y, alpha)
    exact = [value.double().cpu() for value in (x, y, alpha)]  # where plain torch computes
    plain, plain_inverse = functional.interpolate_norm_forward(*exact)
    assert (z.dtype, z.shape, inverse.shape) == (dtype, x.shape, (*shape[:-1], 1))
    if not x.numel():
        assert kernel.backward(gradient, x, y, alpha, inverse)[2].tolist() == [0] * alpha.numel()
        return
    assert_near((z, inverse), (plain, plain_inverse), tolerance)
    grads = kernel.backward(gradient, x, y, alpha, inverse)
    assert [part.dtype for part in grads] == [dtype] * 3
    assert all(map(torch.equal, kernel.gradients_of_y_and_alpha(gradient, x, y, alpha, inverse), grads[1:]))
    assert_near(grads, functional.interpolate_norm_backward(gradient.double().cpu(), *exact, plain_inverse), tolerance)


def test_interpolate_norm_accepts_strided_inputs_and_two_dtypes():
    x, y, gradient = (random(6, 2, 33, seed=seed).transpose(0, 1).float() for seed in range(3))
    alpha = random(33, seed=3).float()
    z, inverse = kernel.forward(x, y.bfloat16(), alpha)
    exact = x.double().cpu(), y.bfloat16().double().cpu(), alpha.double().cpu()
    plain, plain_inverse = functional.interpolate_norm_forward(*exact)
    assert z.dtype == torch.float32
    assert_near((z,), (plain,), 1e-5)
    grads = kernel.backward(gradient, x, y.bfloat16(), alpha, inverse)
    assert [part.dtype for part in grads] == [torch.float32, torch.bfloat16, torch.float32]
    assert_near(grads, functional.interpolate_norm_backward(gradient.double().cpu(), *exact, plain_inverse), 1e-2)


def test_gradients_with_kernels_agree_with_finite_differences(monkeypatch):
    monkeypatch.setattr(kernels, "use_triton", lambda x: True)
    inputs = random(2, 6, seed=0), random(2, 6, seed=1), random(6, seed=2) * 0.1 + 0.2
    assert torch.autograd.gradcheck(functional.interpolate_norm, [value.requires_grad_() for value in inputs])


def test_zero_stays_zero():
    x, zero, alpha = random(2, 5, seed=0), torch.zeros(2, 5, device=DEVICE).double(), random(5, seed=1)
    exact = functional.interpolate_norm_forward(x.cpu(), zero.cpu(), alpha.cpu())[0]
    torch.testing.assert_close(kernel.forward(x, zero, alpha)[0].cpu(), exact)


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (40, 130), (0, 4)])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("strict", [True, False])
def test_projection_agrees_with_plain_torch_and_keeps_every_bit_inside(shape, dtype, tolerance, strict):
    before = (F.normalize(random(*shape, seed=0), dim=-1) * random(shape[0], 1, seed=1).exp()).to(dtype)
    before[shape[0] // 2 :][:1] = 0
    weight, plain = before.clone(), before.double().cpu()
    second = torch.cat([weight, weight])[1:].contiguous()
    bound.project_rows_([weight, second], strict)
    assert torch.equal(second, torch.cat([weight, weight])[1:])
    project_([Bound("weight", plain, strict=strict)])
    torch.testing.assert_close(weight.double().cpu(), plain, rtol=tolerance, atol=0)
    inside = before.double().norm(dim=1) <= (0 if strict else 1 - tolerance)
    assert torch.equal(weight[inside], before[inside])


def test_project_uses_the_kernel_for_contiguous_rows_only(monkeypatch):
    monkeypatch.setattr(kernels, "use_triton", lambda x: True)
    monkeypatch.setattr(bound, "project_rows_", lambda matrices, strict: [each.fill_(7) for each in matrices])
    rows, columns, vector = (torch.ones(3, 4), torch.ones(3, 4), torch.ones(4))
    project_([Bound("rows", rows), Bound("columns", columns, axis=0), Bound("vector", vector, axis=0)])
    assert (rows == 7).all()
    torch.testing.assert_close(columns, torch.full((3, 4), 3**-0.5))
    torch.testing.assert_close(vector, torch.full((4,), 0.5))
    transposed = torch.ones(4, 3).T
    project_([Bound("transposed", transposed)])
    torch.testing.assert_close(transposed, torch.full((3, 4), 0.5))


def test_project_starts_one_kernel_for_matrices_of_one_width_dtype_and_bound(monkeypatch):
    launches = []
    monkeypatch.setattr(kernels, "use_triton", lambda x: True)
    monkeypatch.setattr(bound, "project_rows_", lambda matrices, strict: launches.append((len(matrices), strict)))
    free, wide, half = torch.ones(3, 4), torch.ones(3, 8), torch.ones(3, 4).half()
    project_([Bound("", each) for each in (free, wide, free.clone(), half)] + [Bound("", free.clone(), strict=True)])
    assert sorted(launches) == [(1, False), (1, False), (1, True), (2, False)]


@pytest.mark.parametrize(("rotary_dim", "head_dim"), [(8, 8), (8, 16), (4, 12), (2, 8)])
def test_rotation_of_pairs_agrees_with_rotation_of_parts(rotary_dim, head_dim):
    tables = functional.rotary_tables(torch.arange(5), rotary_dim, 1e4)
    x = torch.randn(2, 5, 3, head_dim, dtype=torch.float64)
    assert rotary.has_pairs(x, tables.cos)
    torch.testing.assert_close(rotary.rotate_pairs(x, *tables), functional.rotate(x, tables))
    assert rotary.rotate_pairs(x.bfloat16(), *tables).dtype == torch.bfloat16


@pytest.mark.parametrize("vocab", [1, 5, 257, 4100])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_cross_entropy_agrees_with_plain_torch(vocab, dtype, tolerance):
    logits = (10 * random(6, vocab, seed=0)).to(dtype)
    targets = ((torch.arange(18, device=DEVICE) * (vocab - 1)) // 17)[::3]  # the last column of a batch has a stride
    exact = logits.double().cpu().requires_grad_()
    plain = F.cross_entropy(exact, targets.cpu(), reduction="none")
    plain.sum().backward()
    before = logits.clone()
    losses = cross_entropy.losses_and_gradients_(logits, targets, False)
    assert torch.equal(logits, before)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    assert_near([losses], [plain.detach()], min(tolerance, 1e-5))
    assert torch.equal(cross_entropy.losses_and_gradients_(logits, targets, True), losses)
    assert_near([logits], [exact.grad], tolerance)


def test_a_target_outside_the_vocabulary_gives_nan():
    targets = torch.tensor([-100, 5, 4, 0], device=DEVICE)
    losses = cross_entropy.losses_and_gradients_(random(4, 5, seed=0), targets, False)
    assert losses.isnan().tolist() == [True, True, False, False]


def test_chunked_cross_entropy_with_the_kernel_gives_the_same_loss_and_gradients(monkeypatch):
    monkeypatch.setitem(chunked.CHUNK, "cpu", 4)
    hidden, weight, targets = random(10, 8, seed=0), random(7, 8, seed=1), torch.arange(10, device=DEVICE) % 7
    monkeypatch.setattr(kernels, "use_triton", lambda x: False)
    plain = chunked.loss_and_gradients(hidden, weight, targets, True)
    monkeypatch.setattr(kernels, "use_triton", lambda x: True)
    assert_near(chunked.loss_and_gradients(hidden, weight, targets, True), [each.cpu() for each in plain], 1e-12)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from antransformer.kernels import bound, cross_entropy, interpolate_norm

float32 = triton.language.float32
for kernel in (interpolate_norm._forward, interpolate_norm._backward, bound._project, cross_entropy._losses):
    constants = {"BLOCK": 1024, "MIN_LENGTH": 1.0, "PRECISION": float32, "KIND": float32, "ROWS": 4, "VOCAB": 1500}
    constants = {name: value for name, value in {**constants, "TRAIN": True}.items() if name in kernel.arg_names}
    numbers = dict.fromkeys(("rows", "width", "programs"), "i32") | dict.fromkeys(constants, "constexpr")
    numbers |= {"targets": "*i64", "tiles": "*i64"}
    signature = {name: numbers.get(name, "*fp32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]))
"""


def test_kernels_compile_without_a_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(result.stdout.split()) == 4


def test_kernels_are_used_on_gpus_and_not_by_the_compiler():
    assert kernels.use_triton(torch.zeros(1, device=DEVICE)) == (DEVICE == "cuda")
