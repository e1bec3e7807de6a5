"""Script that tests start with torchrun: every rank trains the named cases, one after the other.

python -m torch.distributed.run --nproc-per-node N tests/helpers/parallel_worker.py CORPUS FOLDER NAME...
"""

import copy
import errno
import json
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

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
from antransformer.training import run_folder
from antransformer.training.checkpointing import checkpoint
from antransformer.training.config import resolve_config
from antransformer.training.distributed import parallel
from antransformer.training.schedule import SHAPES
from antransformer.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script does not have tests/ on its path

from helpers.messages import mentions
from helpers.small import SMALL, Notes, Watch, local
from helpers.trainers import lines_as_documents

STEPS, SAVED, FAILURE = 6, 3, 2  # steps of a run, step of its first checkpoint, and step of a failure
ARCHITECTURES = ("angpt", "gpt+", "ngpt")
TENSOR_PARALLEL = ("angpt", "gpt+")
CASES = {
    f"{name}-{strategy}": {"parallel": strategy, "model": {"architecture": name}}
    for name in ARCHITECTURES
    for strategy in ("ddp", "fsdp")
}
CASES |= {
    f"{name}-tensor": {"parallel": "fsdp", "tensor_parallel": 2, "model": {"architecture": name}}
    for name in TENSOR_PARALLEL
}
CASES |= {
    "accumulated": {"parallel": "fsdp", "micro_batch_size": 1},
    "recomputed": {"parallel": "fsdp", "activation_checkpointing": True},
    "compiled": {"parallel": "fsdp", "compile": True},
    "muon-fsdp": {"parallel": "fsdp", "optimizer": "muon", "model": {"logit_scale": "scalar"}},
    "muon-tensor": {
        "parallel": "fsdp",
        "tensor_parallel": 2,
        "optimizer": "muon",
        "model": {"logit_scale": "scalar"},
    },
    "normuon-fsdp": {"parallel": "fsdp", "optimizer": "normuon"},
    "normuon-tensor": {
        "parallel": "fsdp",
        "tensor_parallel": 2,
        "optimizer": "normuon",
        "weight_decay": 0.1,
        "cautious_weight_decay": True,
    },
    "cautious": {"parallel": "fsdp", "cautious_weight_decay": True, "model": {"architecture": "gpt+"}},
    "bfloat16": {"parallel": "fsdp", "precision": "bfloat16"},
    "fp8": {"parallel": "fsdp", "precision": "fp8"},
    "fp8-tensor": {"parallel": "fsdp", "tensor_parallel": 2, "precision": "fp8"},
    "documents": {"parallel": "fsdp", "document_mask": True, "activation_checkpointing": True},
    "documents-tensor": {"parallel": "fsdp", "tensor_parallel": 2, "document_mask": True},
    "broken": {"parallel": "fsdp"},
    "unwritten": {"parallel": "fsdp"},
    "stopped": {"parallel": "fsdp"},
    "stopped-tensor": {"parallel": "fsdp", "tensor_parallel": 2},
    "skipped": {"parallel": "fsdp", "max_skipped_steps": 2},
    "clipped": {"parallel": "fsdp", "grad_clip": 0.05},
    "averaged-ddp": {"parallel": "ddp", "ema": 0.3, "sample_every": 3},
    # The default recipe with another schedule: Muon, averages, a decay after a plateau.
    "best-ddp": {"parallel": "ddp", "recipe": "best", "schedule": "wsd", "decay_fraction": 0.6, "ema": 0.3},
    "averaged-fsdp": {"parallel": "fsdp", "ema": 0.3, "sample_every": 3},
    "averaged-ngpt": {"parallel": "fsdp", "ema": 0.3, "model": {"architecture": "ngpt"}},
    "averaged-tensor": {"parallel": "fsdp", "tensor_parallel": 2, "ema": 0.3, "sample_every": 3},
}
# Cases that need four processes, or are left to the slow tests with four processes to save time.
FOUR_PROCESS_CASES = {f"{name}-hsdp": {"parallel": "hsdp", "model": {"architecture": name}} for name in ARCHITECTURES}
FOUR_PROCESS_CASES |= {
    f"{name}-tensor-ddp": {"tensor_parallel": 2, "model": {"architecture": name}} for name in TENSOR_PARALLEL
}
FOUR_PROCESS_CASES |= {
    "tensor-hsdp": {"parallel": "hsdp", "tensor_parallel": 2},
    "averaged-hsdp": {"parallel": "hsdp", "ema": 0.3, "sample_every": 3},
    "tensor-accumulated": {"parallel": "fsdp", "tensor_parallel": 2, "micro_batch_size": 1},
    "tensor-recomputed": {"parallel": "fsdp", "tensor_parallel": 2, "activation_checkpointing": True},
    "tensor-compiled": {"parallel": "fsdp", "tensor_parallel": 2, "compile": True},
    "documents-compiled": {"parallel": "fsdp", "document_mask": True, "compile": True},
    "tensor-bfloat16": {"parallel": "fsdp", "tensor_parallel": 2, "precision": "bfloat16"},
}
# Every schedule with and without averages, in both recipes: slow tests with two processes.
SCHEDULE_CASES = {
    f"{recipe}-{schedule}": {"recipe": recipe, "schedule": schedule, "parallel": strategy, **options}
    for recipe, strategy, options in (("paper", "ddp", {}), ("best", "fsdp", {"ema": 0.3}))
    for schedule in SHAPES
}
for name in ("paper-wsd", "best-wsd"):
    SCHEDULE_CASES[name]["decay_fraction"] = 0.6


def config_of(corpus, name):
    """Return the settings of a case: ``STEPS`` steps of 8 windows."""
    case = (CASES | FOUR_PROCESS_CASES | SCHEDULE_CASES)[name]
    base = {
        "recipe": "paper",
        "precision": "float32",
        "data": str(corpus),
        "batch_tokens": 256,
        "tokens": 256 * STEPS,
        "log_every": 1,
        "eval_tokens": 512,
    }
    model = {**SMALL, **case.get("model", {})}
    every = {"checkpoint_every": SAVED, "eval_every": SAVED}
    return resolve_config({**base, "lr": 5e-3, **every, **case, "model": model}, 257)


def run(words):
    """Train the cases, given as command line words."""
    corpus, folder, *names = words
    train(Path(corpus), Path(folder), names)


def train(corpus, folder, names):
    with parallel.init_distributed() as dist_ctx:
        torch.set_num_threads(1)
        check_user_loops(dist_ctx)
        for name in names:
            dataset, resume = Dataset.open(corpus), (folder / name / "config.yaml").exists()
            dist_ctx.barrier()
            config = run_folder.resumed_config(folder / name, {}) if resume else config_of(corpus, name)
            # Generated code is left to the slow cases: two processes need a minute for it.
            compiler = partial(torch.compile, backend="eager") if name == "compiled" else torch.compile
            with mock.patch("torch.compile", compiler):
                trainer = Trainer(config, dataset, folder / name, Notes(), resume, dist_ctx)
            lines_as_documents(trainer)
            if not resume:
                check_start(trainer)
                with dist_ctx.rank_0_first():
                    if dist_ctx.rank == 0:
                        run_folder.create_run_folder(folder / name, config, dataset)
            if trainer.dist_ctx.rank % config.tensor_parallel == 0:
                record_windows(trainer)
            if name != "broken":
                trainer.optimizer.register_step_post_hook(lambda *_, trainer=trainer: check_bounds(trainer))
            if name in FAILURES:
                fail_on_the_last_rank(trainer, dist_ctx, name)
            elif name == "skipped":
                skip_on_the_last_rank(trainer, dist_ctx)
            else:
                trainer.run()
                check_collectives(trainer)
        for name in ("angpt-fsdp", "angpt-tensor"):
            if name in names:
                check_init(corpus, folder / name, dist_ctx)


def record_windows(trainer):
    """Write the window numbers in this rank's share of each batch to a file in the run folder, one line per step."""
    dist_ctx = trainer.dist_ctx
    log = trainer.folder / f"windows-{dist_ctx.world_size}-{dist_ctx.rank}.jsonl"
    windows, batch_of = trainer.batches.windows, trainer.batches.batch

    def recorded(step):
        # A copy whose last stage collects the numbers instead of reading the windows.
        numbers, recorder = [], copy.copy(windows)
        recorder.gather = numbers.extend
        recorder.batch(step, trainer.config.batch_size, dist_ctx.data_parallel_rank, dist_ctx.data_parallel_size)
        with log.open("a") as file:
            file.write(json.dumps([step + 1, [int(number) for number in numbers]]) + "\n")
        batch = batch_of(step)
        assert all(torch.equal(*pair) for pair in zip(batch, windows.gather(np.array(numbers)), strict=True))
        return batch

    trainer.batches.batch = recorded


def check_init(corpus, source, dist_ctx):
    """A run with --init has the weights of the run that it starts from, with both sharded."""
    config = replace(config_of(corpus, "gpt+-fsdp"), init=str(source), model=config_of(corpus, source.name).model)
    trainer = Trainer(config, Dataset.open(corpus), source.with_name("new"), Notes(), dist_ctx=dist_ctx)
    saved = checkpoint.restore(checkpoint.newest(source / "checkpoints", print), torch.device("cpu")).state_dict()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(parallel.full_tensor(value), saved[name]), name


def check_user_loops(dist_ctx):
    """Check ``bind`` in a user's own training loop: DDP and FSDP2 on our models, FSDP2 on blocks of the library."""
    torch.manual_seed(0)
    blocks = nn.Sequential(Embedding(50, 64), EncoderBlock(Attention(64, heads=2, causal=True), MLP(64)), Head(64, 50))
    for architecture in ("angpt", "ngpt"):
        model = build(ModelConfig(vocab_size=50, **SMALL, architecture=architecture))
        check_user_loop(dist_ctx, DistributedDataParallel(model))
        check_user_loop(dist_ctx, fully_shard(copy.deepcopy(model)))
    check_user_loop(dist_ctx, fully_shard(blocks))


def check_user_loop(dist_ctx, model):
    """Bounds hold after every step on every rank, and replicated weights stay equal on all."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    watch = Watch(model, optimizer)
    for step in range(3):
        tokens = torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(10 * step + dist_ctx.rank))
        torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert watch.steps == 3 and len(watch.bounds) >= 9
    for bound in watch.bounds:
        of_rank_0 = bound.parameter.detach().clone()
        if of_rank_0 is local(of_rank_0):  # replicated
            dist.broadcast(of_rank_0, 0)
            assert torch.equal(bound.parameter, of_rank_0)


def check_start(trainer):
    """Initial weights are the same as in a single process up to rounding, and are sharded as configured."""
    torch.manual_seed(trainer.config.seed)
    single = build(trainer.config.model).state_dict()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(parallel.full_tensor(value), single[name], rtol=1e-6, atol=0)
    replicated = trainer.config.parallel == "ddp" and trainer.config.tensor_parallel == 1
    weight = trainer.model.embedding.weight
    assert (weight.to_local().shape == weight.shape) == replicated


def check_bounds(trainer):
    """Every row on this rank is within its bound."""
    for bound in trainer.model.bounds():
        lengths = norms(bound).to_local()
        assert lengths.numel() == 0 or lengths.max() <= 1 + 1e-6, bound.name


def check_collectives(trainer):
    """Bounds of rows communicate only where columns are split; accumulated gradients are reduced once per step."""
    with CommDebugMode() as collectives:
        project_(bound for bound in trainer.model.bounds() if bound.axis == 1)
    columns_split = trainer.config.tensor_parallel > 1 and trainer.model.bounds()
    assert collectives.get_total_counts() == (2 * trainer.config.model.layers if columns_split else 0)
    if trainer.average is not None and not trainer.average.strict_bounds:
        with CommDebugMode() as collectives:
            trainer.average.update()
        assert collectives.get_total_counts() == 0
    if trainer.config.micro_batch_size < trainer.config.batch_size // 2 and trainer.config.parallel == "fsdp":
        with ReduceScatterCounter() as counter:
            trainer.update(trainer.done)
        assert counter.count == trainer.config.model.layers + 1


class ReduceScatterCounter(TorchDispatchMode):
    """Counts reduce-scatters, with which FSDP reduces gradients."""

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


def fail_on_the_last_rank(trainer, dist_ctx, name):
    """After some steps the last rank alone gets a NaN, a full disk or a signal: all ranks must end at the same step."""
    update, start = trainer.update, trainer.done

    def disturbed(step):
        if step == start + FAILURE and dist_ctx.rank == dist_ctx.world_size - 1:
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
            facts = f"{SAVED} {trainer.folder / 'checkpoints'} {os.strerror(errno.ENOSPC)}"
            assert mentions(str(error), *facts.split()), error
            assert "step-" not in str(error), error  # no earlier checkpoint
            assert SAVED <= trainer.done < STEPS
        else:
            assert mentions(str(error), str(start + FAILURE)), error
            assert trainer.done == start + FAILURE
            if name != "broken":
                assert mentions(str(error), "--resume", "--processes", str(dist_ctx.world_size)), error
    else:
        raise AssertionError("the run did not end")
    finally:
        checkpoint.LocalShards.write = write


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def skip_on_the_last_rank(trainer, dist_ctx):
    """At one step the last rank alone has a NaN loss: all ranks skip the step."""
    loss, update = trainer.loss, trainer.update

    def disturbed(step):
        spoiled = step == FAILURE and dist_ctx.rank == dist_ctx.world_size - 1
        trainer.loss = (lambda *batch: loss(*batch) * float("nan")) if spoiled else loss
        before = state(trainer)
        losses = update(step)
        unchanged = all(name in before and torch.equal(value, before[name]) for name, value in state(trainer).items())
        assert unchanged == (not losses) == (step == FAILURE), step
        return losses

    trainer.update = disturbed
    trainer.run()
    assert trainer.skipped == 1


def state(trainer):
    """Return copies of this rank's weights and moments."""
    tensors = dict(trainer.model.named_parameters())
    for number, moments in enumerate(trainer.optimizer.state.values()):
        tensors |= {f"{number}.{name}": value for name, value in moments.items()}
    return {name: getattr(value, "_local_tensor", value).detach().clone() for name, value in tensors.items()}


if __name__ == "__main__":
    run(sys.argv[1:])
