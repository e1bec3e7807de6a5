"""Compares the memory model with measurements of a training step; prints both in bytes.

tracked: torch's memory tracker runs the step on fake tensors, in one process or as one of many simulated ranks.
resident: a fresh process trains on the CPU, and its resident memory is measured.

    python tests/helpers/memory_tracker.py --devices 8 --strategy fsdp --width 1280 --layers 36 --micro-batch-size 4
"""

import argparse
import contextlib
import dataclasses
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from antransformer.bounds import bind
from antransformer.models import ModelConfig, build
from antransformer.training.cost_model.memory import Layout, estimate_memory
from antransformer.training.device import autocast
from antransformer.training.distributed.parallel import (
    DistributedContext,
    apply_activation_checkpointing,
    apply_fsdp,
    make_mesh,
    set_gradient_sync,
)

CPU = torch.device("cpu")


def tracked(config, layout, precision):
    """Return the peak bytes of the second step, by torch's tracker."""
    with torch.device("meta"):
        model = build(config)
    if layout.checkpointing:
        apply_activation_checkpointing(model)
    if layout.devices > 1:
        dist.init_process_group("fake", rank=0, world_size=layout.devices, store=FakeStore())
        dist_ctx = DistributedContext(0, layout.devices, 0, min(layout.gpus_per_node, layout.devices))
        mesh = make_mesh(layout.strategy, dist_ctx, CPU)["replicate", "shard"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(weight.shape)))
        if layout.devices > 1:
            apply_fsdp(model, mesh, precision)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        bind(model, optimizer)
        tokens = torch.zeros(layout.micro_batch_size, config.context, dtype=torch.long)
        if layout.devices > 1:
            tracker = FSDPMemTracker(model, optimizer)
            tracker.track_inputs((tokens,))
        else:
            tracker = MemTracker()
            tracker.track_external(model, optimizer)
        with tracker, mock.patch("antransformer.models.decoder.check_tokens"):
            for _ in range(2):
                step(model, optimizer, tokens, layout.grad_accum_steps, precision, tracker.reset_mod_stats)
    if layout.devices > 1:
        dist.destroy_process_group()
    return tracker.get_tracker_snapshot("peak")[CPU]["Total"]


def step(model, optimizer, tokens, grad_accum_steps, precision, after_backward=lambda: None):
    for number in range(1, grad_accum_steps + 1):
        set_gradient_sync(model, number == grad_accum_steps)
        with autocast(CPU, precision):
            loss = model(tokens, tokens)
        loss.backward()
        del loss
        after_backward()
    # Not foreach: to infer shapes, DTensor would allocate full fake tensors, which the tracker would count.
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
    optimizer.step()
    optimizer.zero_grad()


def resident(config, layout, precision):
    """Return the bytes that three real steps add to the resident memory of this process, which must be a fresh one."""
    small = dataclasses.replace(config, width=64, layers=1, vocab_size=64, context=16)
    train(small, layout, precision)  # loads libraries and starts their threads
    before = peak_memory()
    train(config, layout, precision)
    return peak_memory() - before


def peak_memory():
    """Peak of the resident memory in bytes; getrusage's peak would contain the memory of the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def train(config, layout, precision):
    model = build(config)
    if layout.checkpointing:
        apply_activation_checkpointing(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    bind(model, optimizer)
    tokens = torch.randint(config.vocab_size, (layout.micro_batch_size, config.context))
    for _ in range(3):
        step(model, optimizer, tokens, layout.grad_accum_steps, precision)


def in_fresh_process(measure, *options):
    """Return measured and modelled bytes."""
    command = [sys.executable, __file__, *map(str, options), "--measure", measure]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    measured, expected = result.stdout.split()
    return float(measured), float(expected)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=["tracked", "resident"], default="tracked")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--architecture", default="angpt")
    for name in ("width", "layers", "context", "vocab_size"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(ModelConfig, name))
    for item in dataclasses.fields(Layout):
        if item.name == "checkpointing":
            parser.add_argument("--checkpointing", action="store_true")
        elif item.name != "tensor_parallel":  # not measured here
            parser.add_argument("--" + item.name.replace("_", "-"), type=type(item.default), default=item.default)
    options = vars(parser.parse_args())
    layout = Layout(**{item.name: options[item.name] for item in dataclasses.fields(Layout) if item.name in options})
    model = {name: options[name] for name in ("architecture", "width", "layers", "context", "vocab_size")}
    precision = getattr(torch, options["precision"])
    config = ModelConfig(**model)
    measure = {"tracked": tracked, "resident": resident}[options["measure"]]
    with contextlib.redirect_stdout(sys.stderr):
        measured = measure(config, layout, precision)
    print(measured, estimate_memory(config, layout, precision).total)


if __name__ == "__main__":
    main()
