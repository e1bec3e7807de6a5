"""The memory model: its terms, and its agreement with measurements."""

from dataclasses import replace

import pytest
import torch

from antransformer.kernels.chunked_cross_entropy import CHUNK, LARGE_CHUNK
from antransformer.models import ModelConfig
from antransformer.training.cost_model.memory import Layout, block_parameters, estimate_memory, saved_activations
from antransformer.training.defaults import parameter_count
from helpers.memory_tracker import in_fresh_process

SMALL = ModelConfig(width=256, layers=4, context=128, vocab_size=1024)
SIZE = ("--width", 128, "--layers", 3, "--context", 64, "--vocab-size", 512)
HALF = torch.bfloat16


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--architecture", "angpt"), marks=pytest.mark.slow),
        ("--devices", 16, "--strategy", "hsdp", "--grad-accum-steps", 2, "--architecture", "gpt+"),
        pytest.param(("--devices", 4, "--strategy", "fsdp", "--checkpointing"), marks=pytest.mark.slow),
        pytest.param(("--devices", 4, "--strategy", "ddp", "--checkpointing"), marks=pytest.mark.slow),
        pytest.param(("--precision", "float32", "--grad-accum-steps", 2), marks=pytest.mark.slow),
        pytest.param(("--checkpointing", "--architecture", "gpt+"), marks=pytest.mark.slow),
    ],
)
def test_the_model_agrees_with_torchs_memory_tracker(options):
    measured, expected = in_fresh_process("tracked", *SIZE, "--micro-batch-size", 4, *options)
    assert expected == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
def test_the_model_agrees_with_the_memory_of_a_real_process(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # glibc returns freed tensors to the system at once
    options = ["--precision", "float32", "--width", 512, "--layers", 6, "--context", 512, "--vocab-size", 8192]
    measured, expected = in_fresh_process("resident", *options, "--micro-batch-size", 4)
    # The model counts a GPU's chunk of logits. A CPU's chunk is smaller, and has a copy.
    expected -= (LARGE_CHUNK - 2 * CHUNK["cpu"]) * 4 * 8192
    assert expected == pytest.approx(measured, rel=0.1)


def test_memory_of_one_device():
    memory = estimate_memory(SMALL, Layout(micro_batch_size=8), HALF)
    assert memory.parameters == 4 * parameter_count(SMALL) and memory.optimizer == 2 * memory.parameters
    double_batch = estimate_memory(SMALL, Layout(micro_batch_size=16), HALF)
    assert double_batch.activations == 2 * memory.activations
    double_vocabulary = replace(SMALL, vocab_size=2 * SMALL.vocab_size)
    assert estimate_memory(double_vocabulary, Layout(micro_batch_size=8), HALF).logits > memory.logits
    # Logits are computed in chunks, never for all tokens at once.
    all_logits = 64 * SMALL.context * SMALL.vocab_size * 4
    assert estimate_memory(SMALL, Layout(micro_batch_size=64), HALF).logits < all_logits


def test_each_way_to_distribute_saves_memory():
    single = estimate_memory(SMALL, Layout(micro_batch_size=8), HALF)
    fsdp = estimate_memory(SMALL, Layout("fsdp", 64, micro_batch_size=8), HALF)
    hsdp = estimate_memory(SMALL, Layout("hsdp", 64, micro_batch_size=8), HALF)
    assert fsdp.parameters == single.parameters / 64 and hsdp.parameters == single.parameters / 8
    # With accumulation every device keeps the gradients of all parameters.
    accumulated = estimate_memory(SMALL, Layout("fsdp", 64, micro_batch_size=8, grad_accum_steps=2), HALF)
    assert accumulated.gradients == single.parameters and not fsdp.gradients
    # Tensor parallelism splits activations, except for those with the width of the residual stream.
    split = estimate_memory(SMALL, Layout("fsdp", 64, tensor_parallel=4, micro_batch_size=8), HALF)
    assert fsdp.activations / 4 < split.activations < fsdp.activations
    recomputed = estimate_memory(SMALL, Layout("fsdp", 64, checkpointing=True, micro_batch_size=8), HALF)
    assert recomputed.activations < fsdp.activations / 3 and recomputed.weight_copies < fsdp.weight_copies / 3


def test_block_parameters_add_up():
    block, root = block_parameters(SMALL)
    assert block * 4 + root == parameter_count(SMALL)


def test_factors_need_no_copies_of_weights():
    block, _ = block_parameters(SMALL)
    assert saved_activations(SMALL, HALF, distributed=True)[0].fixed < 0.02 * block
    assert saved_activations(SMALL, torch.float32, distributed=False)[0].fixed < 0.02 * block


def test_batch_size_of_a_layout():
    layout = Layout("hsdp", 64, tensor_parallel=4, micro_batch_size=3, grad_accum_steps=5)
    assert (layout.data_parallel_size, layout.shards, layout.batch_size) == (16, 2, 16 * 3 * 5)
