"""Many devices: torch's process groups and FSDP2, applied to a model from outside.

torchrun starts the processes and tells each its place. Every way of sharing a model is a mesh of (replicate, shard):
replicated is (size, 1), sharded (1, size), hybrid (nodes, devices of a node). Gradients are averaged over both, and
parameters are split along their first axis over the second, so that the rows of a weight stay whole: their bounds need
no communication. A third axis has neighbouring ranks that share their data and split each layer: tensor_parallel.py.
Started without torchrun there is one process, and nothing here does anything.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from antransformer.errors import ConfigError
from antransformer.models import Decoder, build
from antransformer.training import float8
from antransformer.training.config import TrainConfig
from antransformer.training.distributed.liveness import RankMonitor, fresh_store
from antransformer.training.distributed.tensor_parallel import split

T = TypeVar("T")


@dataclass(frozen=True)
class DistributedContext:
    """The processes that train one model together, and which of them this one is.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        local_rank: number of this process on its machine.
        local_size: how many are on this machine.
        tensor: how many neighbours split the layers of one model among them, with the same data.
        group: of the messages between them; None is that of the main thread.
        timeout: seconds for which messages of another thread wait; of the main thread: ``limit_waits``.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    tensor: int = 1
    group: dist.ProcessGroup | None = None
    timeout: int = 600

    @property
    def data_rank(self) -> int:
        """Number of this process's share of a batch, from 0."""
        return self.rank // self.tensor

    @property
    def data_size(self) -> int:
        """How many share a batch."""
        return self.size // self.tensor

    @contextlib.contextmanager
    def rank_0_first(self) -> Iterator[None]:
        """What is inside rank 0 does before all others, and if it fails they never begin; all leave together."""
        if self.rank:
            self.barrier()
        yield
        if not self.rank:
            self.barrier()
        self.barrier()

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            dist.barrier(self.group)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of a tensor that lies on the device, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def all_reduce_max(self, value: int) -> int:
        """The largest of the numbers that the processes give; waits for all, but for no device."""
        if self.size == 1:
            return value
        agreed = torch.tensor(value)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, self.group)
        return int(agreed)

    def gather_or_raise(self, action: Callable[[], T]) -> list[T]:
        """What ``action`` returns in each of the processes; what it raises in one of them is raised in all."""
        outcome: T | Exception
        try:
            outcome = action()
        except Exception as error:
            outcome = error
        outcomes = [outcome] * self.size
        if self.size > 1:
            dist.all_gather_object(outcomes, outcome, group=self.group)
        for found in outcomes:
            if isinstance(found, Exception):
                raise found
        return outcomes  # type: ignore[return-value]  # of which none is an exception

    def with_new_group(self) -> "DistributedContext":
        """The same processes, for another thread: its messages and those of the main thread do not mix."""
        if self.size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout)))


SINGLE_PROCESS = DistributedContext()


@contextlib.contextmanager
def join() -> Iterator[DistributedContext]:
    """The world that torchrun describes in the environment, entered.

    Raises:
        MachineError: inside, when another process is gone or hangs; it is named, by one of those that are left.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield SINGLE_PROCESS
        return
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    gpu = torch.cuda.device_count() >= local_size  # else they compute on the CPU, or choose_device says what is wrong
    if gpu:
        torch.cuda.set_device(local_rank)
    store, rank, _ = next(rendezvous("env://"))
    store = fresh_store(store, rank, size)
    roll_call = RankMonitor(store, rank, size)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", store=store, rank=rank, world_size=size)
        yield DistributedContext(rank, size, local_rank, local_size)
    except BaseException as error:
        if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise roll_call.call() from error
        roll_call.leave()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def make_model(config: TrainConfig, world: DistributedContext, device: torch.device, precision: torch.dtype) -> Decoder:
    """The model on its device or devices, its weights drawn from torch's global generator, the same for any number.

    Raises:
        ConfigError: the processes can not share a batch or a model evenly, or see ``float8.convert``.
    """
    check_shares(config, world)
    with contextlib.nullcontext() if world.size == 1 else torch.device("meta"):
        model = build(config.model)
    if config.precision == "fp8":
        float8.convert(model, device)
    if world.size == 1:
        if config.activation_checkpointing:
            checkpoint_blocks(model)
        return model.to(device)
    mesh = make_mesh(config.parallel, world, device)
    limit_waits(mesh, config.timeout)
    if world.tensor > 1:
        split(model, mesh["tensor"])
    if config.activation_checkpointing:
        checkpoint_blocks(model)
    if config.compile:
        for block in model.blocks:
            block.compile()
    shard(model, mesh["replicate", "shard"], precision)
    model.to_empty(device=device)
    with ReplicatedInitMode():
        model.reset_parameters()
    return model


def check_shares(config: TrainConfig, world: DistributedContext) -> None:
    """Raise ``ConfigError`` where the processes can not share a batch or a model evenly."""
    processes, where = (world.local_size, " of a machine") if config.parallel == "hsdp" else (world.size, "")
    if processes % world.tensor:
        raise ConfigError(
            f"the number of processes{where}, {processes}, is not a multiple of tensor_parallel {world.tensor}: change "
            "one of them (torchrun --nproc-per-node, --tensor-parallel)"
        )
    if config.batch_size % world.data_size:
        sharing = f"{world.data_size} " + (f"groups of {world.tensor}" if world.tensor > 1 else "processes")
        raise ConfigError(
            f"a batch of {config.batch_size} sequences can not be shared evenly by {sharing}: change batch_tokens, or "
            "their number"
        )


def make_mesh(way: str, world: DistributedContext, device: torch.device) -> DeviceMesh:
    """The (replicate, shard, tensor) mesh of a way to share a model."""
    replicate, shard = {
        "ddp": (world.data_size, 1),
        "fsdp": (1, world.data_size),
        "hsdp": (world.size // world.local_size, world.local_size // world.tensor),
    }[way]
    names = ("replicate", "shard", "tensor")
    return init_device_mesh(device.type, (replicate, shard, world.tensor), mesh_dim_names=names)


def limit_waits(mesh: DeviceMesh, seconds: int) -> None:
    """From here on a process waits for another so long; before, while rank 0 prepares data, torch's half an hour.

    On GPUs the rest waits twice as long as the processes do that agree after a step: these can tell who is missing.
    """
    assert dist.group.WORLD is not None
    dist.group.WORLD.set_timeout(timedelta(seconds=seconds))
    for group in mesh.get_all_groups():
        group.set_timeout(timedelta(seconds=seconds if mesh.device_type == "cpu" else 2 * seconds))


def shard(model: Decoder, mesh: DeviceMesh, precision: torch.dtype) -> None:
    """Share each block, and then what is left, over a mesh; products in ``precision``, gradients summed in float32."""
    policy = MixedPrecisionPolicy()
    if precision != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


def checkpoint_blocks(model: Decoder) -> None:
    """Compute what is inside each block again in the backward pass, instead of keeping it."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def share_gradients(model: Decoder, now: bool) -> None:
    """Whether the next backward pass averages its gradients over the processes; only the last of a step has to."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


class ReplicatedInitMode(TorchDispatchMode):
    """While entered, random values of a shared parameter are those that the whole parameter would get.

    Each process draws the whole on the CPU, one parameter at a time, and keeps its part.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Intercept ``normal_``, with which all of our weights are drawn."""
        if func is torch.ops.aten.normal_.default and isinstance(args[0], DTensor):
            shared = args[0]
            drawn = torch.empty(shared.shape, dtype=shared.dtype, device="cpu")
            func(drawn, *args[1:], **(kwargs or {}))
            return shared.copy_(shard_like(drawn, shared))
        return func(*args, **(kwargs or {}))


def shard_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a tensor that all of them have, shared as ``parameter`` is."""
    if not isinstance(parameter, DTensor):
        return whole
    whole = whole.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def full_tensor(value: Tensor) -> Tensor:
    """All of a tensor that may be shared; every process has to ask for it at the same time."""
    return value.full_tensor() if isinstance(value, DTensor) else value
