"""What the tests of parallelism start with torchrun: one run after the other, as each of its processes.

python -m torch.distributed.run --nproc-per-node N tests/helpers/parallel_worker.py CORPUS FOLDER NAME...
"""

import copy
import errno
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from antransformer.blocks import EncoderBlock
from antransformer.bounds import norms, project_
from antransformer.data import Dataset
from antransformer.errors import DivergedError, RunStoppedError, WriteError
from antransformer.models import ModelConfig, build
from antransformer.nn import MLP, Attention, Embedding, Head
from antransformer.training import run_folder as run
from antransformer.training.checkpointing import checkpoint
from antransformer.training.config import resolve_config
from antransformer.training.distributed import parallel
from antransformer.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent.parent))  # started as a script, in a process of its own

from helpers.messages import mentions
from helpers.small import SMALL, Notes, Watch, local

ARCHITECTURES = ("angpt", "gpt+", "ngpt")
SPLIT = ("angpt", "gpt+")
CASES = {
    f"{a}-{way}": {"parallel": way, "model": {"architecture": a}} for a in ARCHITECTURES for way in ("ddp", "fsdp")
}
CASES |= {f"{a}-tensor": {"parallel": "fsdp", "tensor_parallel": 2, "model": {"architecture": a}} for a in SPLIT}
CASES |= {
    "accumulated": {"parallel": "fsdp", "micro_batch_size": 1},
    "recomputed": {"parallel": "fsdp", "activation_checkpointing": True},
    "compiled": {"parallel": "fsdp", "compile": True},
    "muon-fsdp": {"parallel": "fsdp", "optimizer": "muon"},
    "muon-tensor": {"parallel": "fsdp", "tensor_parallel": 2, "optimizer": "muon"},
    "bfloat16": {"parallel": "fsdp", "precision": "bfloat16"},
    "fp8": {"parallel": "fsdp", "precision": "fp8"},
    "fp8-tensor": {"parallel": "fsdp", "tensor_parallel": 2, "precision": "fp8"},
    "broken": {"parallel": "fsdp"},
    "unwritten": {"parallel": "fsdp"},
    "stopped": {"parallel": "fsdp"},
    "stopped-tensor": {"parallel": "fsdp", "tensor_parallel": 2},
    "skipped": {"parallel": "fsdp", "max_skipped_steps": 2},
    "clipped": {"parallel": "fsdp", "grad_clip": 0.05},
}
# Those that need four processes, or that time is left for there only.
MORE = {f"{a}-hsdp": {"parallel": "hsdp", "model": {"architecture": a}} for a in ARCHITECTURES}
MORE |= {f"{a}-tensor-ddp": {"tensor_parallel": 2, "model": {"architecture": a}} for a in SPLIT}
MORE |= {
    "tensor-hsdp": {"parallel": "hsdp", "tensor_parallel": 2},
    "tensor-accumulated": {"parallel": "fsdp", "tensor_parallel": 2, "micro_batch_size": 1},
    "tensor-recomputed": {"parallel": "fsdp", "tensor_parallel": 2, "activation_checkpointing": True},
    "tensor-compiled": {"parallel": "fsdp", "tensor_parallel": 2, "compile": True},
    "tensor-bfloat16": {"parallel": "fsdp", "tensor_parallel": 2, "precision": "bfloat16"},
}


def config_of(corpus, name):
    """Settings of a case: 20 steps of 8 windows."""
    case = (CASES | MORE)[name]
    base = {"data": str(corpus), "batch_tokens": 256, "tokens": 256 * 20, "log_every": 1, "eval_tokens": 2048}
    model = {**SMALL, **case.get("model", {})}
    return resolve_config({**base, "lr": 5e-3, "checkpoint_every": 10, "eval_every": 10, **case, "model": model}, 257)


def main(corpus, folder, names):
    with parallel.join() as world:
        torch.set_num_threads(1)
        check_own_loops(world)
        for name in names:
            dataset, resume = Dataset.open(corpus), (folder / name / "config.yaml").exists()
            world.barrier()
            config = run.resumed_config(folder / name, {}) if resume else config_of(corpus, name)
            trainer = Trainer(config, dataset, folder / name, Notes(), resume, world)
            if not resume:
                check_start(trainer)
                with world.rank_0_first():
                    if world.rank == 0:
                        run.create_run_folder(folder / name, config, dataset)
            if trainer.world.rank % config.tensor_parallel == 0:
                record_windows(trainer)
            if name != "broken":
                trainer.optimizer.register_step_post_hook(lambda *_, trainer=trainer: check_bounds(trainer))
            if name in FAILURES:
                fail_on_the_last_rank(trainer, world, name)
            elif name == "skipped":
                skip_on_the_last_rank(trainer, world)
            else:
                trainer.run()
                check_traffic(trainer)
        for name in ("angpt-fsdp", "angpt-tensor"):
            if name in names:
                check_init(corpus, folder / name, world)


def record_windows(trainer):
    """Of each step, the windows of which this process makes a share of the batch, a line each in the run folder."""
    place = trainer.folder / f"windows-{trainer.world.size}-{trainer.world.rank}.jsonl"
    windows, use = trainer.batches.windows, trainer.batches.batch

    def recorded(step):
        numbers, other = [], copy.copy(windows)
        other.gather = numbers.extend
        other.batch(step, trainer.config.batch_size, trainer.world.data_rank, trainer.world.data_size)
        with place.open("a") as file:
            file.write(json.dumps([step + 1, [int(number) for number in numbers]]) + "\n")
        batch = use(step)
        assert all(torch.equal(*pair) for pair in zip(batch, windows.gather(np.array(numbers)), strict=True))
        return batch

    trainer.batches.batch = recorded


def check_init(corpus, source, world):
    """A run of several processes that starts from the weights of another such run has these weights."""
    config = replace(config_of(corpus, "gpt+-fsdp"), init=str(source), model=config_of(corpus, source.name).model)
    started = Trainer(config, Dataset.open(corpus), source.with_name("new"), Notes(), world=world).model.state_dict()
    saved = checkpoint.restore(checkpoint.newest(source / "checkpoints", print), torch.device("cpu")).state_dict()
    for name, value in started.items():
        assert torch.equal(parallel.full_tensor(value), saved[name]), name


def check_own_loops(world):
    """``bind`` without our trainer: torch's DDP, FSDP2 on one of our models and on one of the user's own blocks."""
    torch.manual_seed(0)
    own = nn.Sequential(Embedding(50, 64), EncoderBlock(Attention(64, heads=2, causal=True), MLP(64)), Head(64, 50))
    for architecture in ("angpt", "ngpt"):
        model = build(ModelConfig(vocab_size=50, **SMALL, architecture=architecture))
        check_own_loop(world, DistributedDataParallel(model))
        check_own_loop(world, fully_shard(copy.deepcopy(model)))
    check_own_loop(world, fully_shard(own))


def check_own_loop(world, model):
    """Bounds hold after every step, on every process, and what replicated weights there are stay the same on all."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    watch = Watch(model, optimizer)
    for step in range(3):
        tokens = torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(10 * step + world.rank))
        torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert watch.steps == 3 and len(watch.bounds) >= 9
    for bound in watch.bounds:
        first = bound.parameter.detach().clone()
        if first is local(first):
            dist.broadcast(first, 0)
            assert torch.equal(bound.parameter, first)


def check_start(trainer):
    """The weights are those of a single process, but for the rounding of norms, and shared where they should be."""
    torch.manual_seed(trainer.config.seed)
    alone = build(trainer.config.model).state_dict()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(parallel.full_tensor(value), alone[name], rtol=1e-6, atol=0)
    whole = trainer.config.parallel == "ddp" and trainer.config.tensor_parallel == 1
    weight = trainer.model.embedding.weight
    assert (weight.to_local().shape == weight.shape) == whole


def check_bounds(trainer):
    """After every step they hold for every row on this rank."""
    for bound in trainer.model.bounds():
        lengths = norms(bound).to_local()
        assert lengths.numel() == 0 or lengths.max() <= 1 + 1e-6, bound.name


def check_traffic(trainer):
    """Bounds of rows need none but where their columns are split, and accumulated gradients go out once."""
    with CommDebugMode() as traffic:
        project_(bound for bound in trainer.model.bounds() if bound.axis == 1)
    split = trainer.config.tensor_parallel > 1 and trainer.model.bounds()
    assert traffic.get_total_counts() == (2 * trainer.config.model.layers if split else 0)
    if trainer.config.micro_batch_size < trainer.config.batch_size // 2 and trainer.config.parallel == "fsdp":
        with Sums() as sums:
            trainer.update(trainer.done)
        assert sums.count == trainer.config.model.layers + 1


class Sums(TorchDispatchMode):
    """Counts the messages that add up gradients and leave each rank its share."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "reduce_scatter" in str(func)
        return func(*args, **(kwargs or {}))


FAILURES = {
    "broken": DivergedError,
    "unwritten": WriteError,
    "stopped": RunStoppedError,
    "stopped-tensor": RunStoppedError,
}


def fail_on_the_last_rank(trainer, world, name):
    """After 7 steps the last rank alone gets a gradient that is no number, a signal, or a full disk; all must end."""
    update, start = trainer.update, trainer.done

    def disturbed(step):
        if step == start + 7 and world.rank == world.size - 1:
            if name == "broken":
                trainer.model.embedding.register_forward_hook(lambda _module, _inputs, output: output * float("nan"))
            elif name == "unwritten":
                checkpoint.LocalShards.write = full_disk
            else:
                os.kill(os.getpid(), signal.SIGTERM)
        return update(step)

    write = checkpoint.LocalShards.write
    trainer.update = disturbed
    try:
        trainer.run()
    except FAILURES[name] as error:
        if name == "unwritten":
            assert mentions(str(error), *f"10 {trainer.folder / 'checkpoints'} {os.strerror(errno.ENOSPC)}".split()), (
                error
            )
            assert "step-" not in str(error), error  # no earlier checkpoint
            assert 10 <= trainer.done < 20
        else:
            assert mentions(str(error), *(str(start + 7)).split()), error
            assert trainer.done == start + 7
    else:
        raise AssertionError("the run went on")
    finally:
        checkpoint.LocalShards.write = write


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def skip_on_the_last_rank(trainer, world):
    """At step 7 the last rank alone has a loss that is no number: all leave the step out."""
    loss, update = trainer.loss, trainer.update

    def disturbed(step):
        spoilt = step == 7 and world.rank == world.size - 1
        trainer.loss = (lambda *batch: loss(*batch) * float("nan")) if spoilt else loss
        before = state(trainer)
        found = update(step)
        kept = all(name in before and torch.equal(value, before[name]) for name, value in state(trainer).items())
        assert kept == (not found) == (step == 7), step
        return found

    trainer.update = disturbed
    trainer.run()
    assert trainer.skipped == 1


def state(trainer):
    """Copies of this rank's weights and moments."""
    found = dict(trainer.model.named_parameters())
    for number, moments in enumerate(trainer.optimizer.state.values()):
        found |= {f"{number}.{name}": value for name, value in moments.items()}
    return {name: getattr(value, "_local_tensor", value).detach().clone() for name, value in found.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
