"""The model of the time of a step: communication volume and expected MFU."""

from dataclasses import replace

import pytest
import torch

from antransformer.models import ModelConfig
from antransformer.training.cost_model.memory import Layout
from antransformer.training.cost_model.throughput import GPUS, comm_volume, expected_mfu, peak_flops
from antransformer.training.defaults import parameter_count
from helpers.pages import ROOT

SMALL = ModelConfig(width=256, layers=4, context=128, vocab_size=1024)
LARGE = ModelConfig(width=1536, layers=36)


def test_comm_volume():
    parameters = parameter_count(SMALL)
    tokens = 8 * SMALL.context
    single = comm_volume(SMALL, Layout(micro_batch_size=8))
    assert (single.shard, single.replicate, single.tensor) == (0, 0, 0)
    ddp = comm_volume(SMALL, Layout("ddp", 8, micro_batch_size=8))
    assert (ddp.shard, ddp.tensor) == (0, 0)
    assert ddp.replicate == 2 * 4 * parameters * 7 / 8  # an all-reduce is a reduce-scatter and an all-gather
    fsdp = comm_volume(SMALL, Layout("fsdp", 8, micro_batch_size=8, grad_accum_steps=3))
    assert fsdp.replicate == 0 and fsdp.shard == (3 * 2 * 2 + 4) * parameters * 7 / 8
    split = comm_volume(SMALL, Layout("fsdp", 8, tensor_parallel=8, micro_batch_size=8))
    assert split.tensor == 4 * 4 * (2 * tokens * 256 * 2) * 7 / 8  # four all-reduces in each of four layers


def test_a_slow_network_lowers_the_mfu():
    gpu = GPUS["h100"]
    layout = Layout("fsdp", 64, 8, micro_batch_size=8)
    fast, slow = (expected_mfu(LARGE, layout, gpu, network) for network in (50e9, 1e9))
    assert slow < 0.5 * fast < fast < 0.4
    assert expected_mfu(LARGE, replace(layout, strategy="hsdp"), gpu, 1e9) > slow
    recomputed = expected_mfu(LARGE, replace(layout, checkpointing=True), gpu, 50e9)
    assert recomputed == pytest.approx(0.75 * fast, rel=0.05)


@pytest.mark.parametrize(
    ("device_name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA RTX A1000", None),
        ("Tesla T4", None),
    ],
)
def test_peak_flops_of_a_device_name(device_name, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: device_name)
    expected = GPUS[gpu].peak_flops if gpu else None
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == expected
    assert peak_flops(torch.device("cuda"), torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_the_page_about_planning_lists_every_gpu():
    text = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in GPUS)
