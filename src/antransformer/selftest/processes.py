"""Two processes against one: NCCL with a GPU for each, otherwise gloo with both on the same device."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from antransformer.data import Dataset
from antransformer.selftest.checkpoints import loss_on_cpu
from antransformer.selftest.checks import Check, Setup, at_most, largest
from antransformer.selftest.runs import CompiledReporter, corpus, losses, run_config
from antransformer.training import run_folder
from antransformer.training.config import TrainConfig
from antransformer.training.distributed.parallel import DistributedContext
from antransformer.training.trainer import Trainer

PROCESSES = 2
RUNS: dict[str, dict[str, Any]] = {
    "recipe paper": {"recipe": "paper"},
    "Muon in bfloat16": {"optimizer": "muon", "precision": "bfloat16"},  # compiled on a GPU
}
TIMEOUT = timedelta(minutes=4)  # of a collective operation, so that a rank that hangs is an error before the call ends


def replicated(setup: Setup, run: str) -> Iterator[Check]:
    """Data parallelism with all weights on both ranks (ddp); ``run`` is a name from ``RUNS``."""
    yield from _compare(setup, "ddp", run)


def sharded(setup: Setup, run: str) -> Iterator[Check]:
    """Weights and optimizer state sharded over the ranks (fsdp); ``run`` is a name from ``RUNS``."""
    if setup.device.type == "cuda" and _backend(setup.device) == "gloo":
        # torch's gloo reads GPU memory as host memory when it gathers a DTensor, and the process dies.
        yield Check(f"fsdp, 2 processes, {run}", "needs 2 GPUs")
        return
    yield from _compare(setup, "fsdp", run)


def _compare(setup: Setup, parallel: str, run: str) -> Iterator[Check]:
    dataset = corpus(setup)
    # Without a number, so that each rank has a GPU of its own.
    config = run_config(setup, dataset, parallel=parallel, device=setup.device.type, **RUNS[run])
    name, limit = f"{parallel}, 2 processes, {_backend(setup.device)}, {run}", 1e-3
    if config.precision != "float32":
        config, limit = replace(config, compile=setup.device.type == "cuda"), 2e-2
    yield from _compare_runs(setup, name, config, dataset, limit)


def _compare_runs(setup: Setup, name: str, config: TrainConfig, dataset: Dataset, limit: float) -> Iterator[Check]:
    """Compare the losses of one process and of two; in float32 the checkpoint of the two is loaded on a CPU as well."""
    with TemporaryDirectory(dir=setup.folder) as scratch:
        single, double = Path(scratch, "single"), Path(scratch, "double")
        for folder in (single, double):
            run_folder.create_run_folder(folder, config, dataset)
        Trainer(config, dataset, single, CompiledReporter()).run()
        arguments = (config, dataset.path, double, Path(scratch, "rendezvous"), setup.device.type)
        multiprocessing.spawn(_rank, arguments, PROCESSES)
        pairs = zip(losses(single), losses(double), strict=True)
        yield at_most(f"{name}: largest difference of the losses", largest(abs(a - b) for a, b in pairs), limit)
        if config.precision == "float32":
            yield loss_on_cpu(f"{name}: checkpoint loaded on a CPU", double, config, dataset)


def _backend(device: torch.device) -> str:
    several = device.type == "cuda" and torch.cuda.device_count() >= PROCESSES
    return "cpu:gloo,cuda:nccl" if several else "gloo"


def _rank(rank: int, config: TrainConfig, data: Path, folder: Path, rendezvous: Path, device: str) -> None:
    """Body of one of the processes."""
    backend = _backend(torch.device(device))
    # Ranks that share a GPU present themselves as two nodes, each with a device of number 0.
    shared = device == "cuda" and backend == "gloo"
    context = DistributedContext(rank, PROCESSES, 0 if shared else rank, 1 if shared else PROCESSES)
    if device == "cuda":
        torch.cuda.set_device(context.local_rank)
    else:
        torch.set_num_threads(1)
    url = f"file://{rendezvous}"
    dist.init_process_group(backend, init_method=url, rank=rank, world_size=PROCESSES, timeout=TIMEOUT)
    try:
        Trainer(config, Dataset.open(data), folder, CompiledReporter(), dist_ctx=context).run()
    finally:
        dist.destroy_process_group()
