"""The model of memory against what is measured: `python tests/helpers/memory_tracker.py --help`.

Two measurements of a training step: torch's memory tracker, which runs it on tensors without values, alone or as one of
any number of processes that are not there; and the resident memory of a fresh process that really trains on the CPU.
"""

import argparse
import contextlib
import dataclasses
import resource
import subprocess
import sys
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
from antransformer.training.cost_model.memory import Layout, memory
from antransformer.training.device import autocast
from antransformer.training.distributed.parallel import (
    DistributedContext,
    checkpoint_blocks,
    make_mesh,
    shard,
    share_gradients,
)

CPU = torch.device("cpu")


def tracked(config, layout, precision):
    """Bytes at the peak of the second step, by torch's tracker."""
    with torch.device("meta"):
        model = build(config)
    if layout.checkpointing:
        checkpoint_blocks(model)
    if layout.devices > 1:
        dist.init_process_group("fake", rank=0, world_size=layout.devices, store=FakeStore())
        mesh = make_mesh(layout.way, DistributedContext(0, layout.devices, 0, min(layout.node, layout.devices)), CPU)
        mesh = mesh["replicate", "shard"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(weight.shape)))
        if layout.devices > 1:
            shard(model, mesh, precision)
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
                step(model, optimizer, tokens, layout.passes, precision, tracker.reset_mod_stats)
    if layout.devices > 1:
        dist.destroy_process_group()
    return tracker.get_tracker_snapshot("peak")[CPU]["Total"]


def step(model, optimizer, tokens, passes, precision, after=lambda: None):
    for number in range(1, passes + 1):
        share_gradients(model, number == passes)
        with autocast(CPU, precision):
            loss = model(tokens, tokens)
        loss.backward()
        del loss
        after()
    # One tensor at a time: to find out shapes DTensor makes whole ones without values, which the tracker would count.
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
    optimizer.step()
    optimizer.zero_grad()


def resident(config, layout, precision):
    """Bytes that three real steps add to the resident memory of this process, which is to be a fresh one."""
    small = dataclasses.replace(config, width=64, layers=1, vocab_size=64, context=16)
    train(small, layout, precision)  # libraries have been loaded and have their threads
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train(config, layout, precision)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def train(config, layout, precision):
    model = build(config)
    if layout.checkpointing:
        checkpoint_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    bind(model, optimizer)
    tokens = torch.randint(config.vocab_size, (layout.micro_batch_size, config.context))
    for _ in range(3):
        step(model, optimizer, tokens, layout.passes, precision)


def in_fresh_process(measure, *words):
    """One measurement, in bytes, and the model's answer."""
    command = [sys.executable, __file__, *map(str, words), "--measure", measure]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    measured, expected = result.stdout.split()
    return float(measured), float(expected)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=["tracked", "resident"], default="tracked")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--architecture", default="angpt")
    for name in ("width", "layers", "context", "vocab_size"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(ModelConfig, name))
    for item in dataclasses.fields(Layout):
        if item.name == "checkpointing":
            parser.add_argument("--checkpointing", action="store_true")
        elif item.name != "tensor":
            parser.add_argument("--" + item.name.replace("_", "-"), type=type(item.default), default=item.default)
    given = vars(parser.parse_args())
    layout = Layout(**{item.name: given[item.name] for item in dataclasses.fields(Layout) if item.name in given})
    model = {name: given[name] for name in ("architecture", "width", "layers", "context", "vocab_size")}
    precision = getattr(torch, given["precision"])
    config = ModelConfig(**model)
    measure = {"tracked": tracked, "resident": resident}[given["measure"]]
    with contextlib.redirect_stdout(sys.stderr):
        measured = measure(config, layout, precision)
    print(measured, memory(config, layout, precision).total)


if __name__ == "__main__":
    main()
