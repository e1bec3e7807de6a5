"""Data parallelism: process groups of torch, and FSDP2 applied to a model from outside.

torchrun starts one process (rank) per device and describes the job in environment variables. Every strategy is a device
mesh (replicate, shard), where N is the number of ranks:

    ddp   (N, 1)                         every rank has all parameters
    fsdp  (1, N)                         every rank has 1/N of them
    hsdp  (nodes, ranks of a node)       sharded within a node, replicated across nodes

Gradients are averaged over both axes. Parameters are sharded along their first dimension, so that every row of a weight
matrix is complete on one rank, and bounds of rows need no communication. A third mesh axis, "tensor", splits the layers
themselves (tensor_parallel.py). Without torchrun there is a single process, and nothing here has any effect.
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

from antransformer.errors import ConfigError, MachineError
from antransformer.models import Decoder, build
from antransformer.models.factory import can_skip_constructor
from antransformer.training import float8
from antransformer.training.config import TrainConfig
from antransformer.training.distributed.launcher import job_number
from antransformer.training.distributed.liveness import RankMonitor, fresh_store
from antransformer.training.distributed.tensor_parallel import apply_tensor_parallel
from antransformer.wording import counted

T = TypeVar("T")


@dataclass(frozen=True)
class DistributedContext:
    """This rank's position among the ranks that train one model, with their collective operations.

    Attributes:
        rank: global index of this process, from 0.
        world_size: number of processes.
        local_rank: index of this process on its node.
        local_world_size: number of processes on this node.
        tensor_parallel: number of neighbouring ranks that split each layer and share their data.
        group: process group of the collectives; None for the default group.
        timeout: seconds until a collective of a new group fails (for the default group see ``set_timeouts``).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    tensor_parallel: int = 1
    group: dist.ProcessGroup | None = None
    timeout: int = 600

    @property
    def data_parallel_rank(self) -> int:
        """Index of this rank's share of a batch, from 0."""
        return self.rank // self.tensor_parallel

    @property
    def data_parallel_size(self) -> int:
        """Number of shares that a batch is divided into."""
        return self.world_size // self.tensor_parallel

    @contextlib.contextmanager
    def rank_0_first(self) -> Iterator[None]:
        """Run the body on rank 0, then on all other ranks, and leave together.

        If rank 0 fails, the other ranks never run the body.
        """
        if self.rank:
            self.barrier()
        yield
        if not self.rank:
            self.barrier()
        self.barrier()

    def barrier(self) -> None:
        """Block until all ranks arrive."""
        if self.world_size > 1:
            dist.barrier(self.group)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def all_reduce_max(self, value: int) -> int:
        """Return the maximum of ``value`` over all ranks."""
        if self.world_size == 1:
            return value
        # On the CPU, through gloo: a CUDA tensor would wait for all kernels queued before it.
        maximum = torch.tensor(value)
        dist.all_reduce(maximum, dist.ReduceOp.MAX, self.group)
        return int(maximum)

    def gather_or_raise(self, action: Callable[[], T]) -> list[T]:
        """Call ``action`` on every rank and return all results, ordered by rank.

        Raises:
            Exception: the first exception that ``action`` raised on any rank, raised on all ranks.
        """
        outcome: T | Exception
        try:
            outcome = action()
        except Exception as error:
            # A rank that left here would hang the others in the collective below.
            outcome = error
        outcomes = [outcome] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(outcomes, outcome, group=self.group)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return outcomes  # type: ignore[return-value]  # none of them is an exception

    def with_new_group(self) -> "DistributedContext":
        """Return a context of the same ranks for another thread.

        Threads need groups of their own: collectives of one group must start in the same order on every rank.
        """
        if self.world_size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout)))


SINGLE_PROCESS = DistributedContext()


@contextlib.contextmanager
def init_distributed() -> Iterator[DistributedContext]:
    """Join the job that torchrun describes in the environment, and leave it at the end.

    Raises:
        ConfigError: the environment describes only a part of a job.
        MachineError: the job cannot be reached, or a collective failed in the body because a rank is dead or hung; the
            latter is raised on one healthy rank.
    """
    world_size = job_number("WORLD_SIZE", 1)
    if world_size == 1:
        yield SINGLE_PROCESS
        return
    rank, local_rank, local_world_size = map(job_number, ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    address = f"{os.environ.get('MASTER_ADDR', '')}:{job_number('MASTER_PORT')}"
    # With fewer GPUs than ranks they train on the CPU, or choose_device raises an error.
    use_gpus = torch.cuda.device_count() >= local_world_size
    if use_gpus:
        torch.cuda.set_device(local_rank)
    try:
        store = next(rendezvous("env://"))[0]
    except (ValueError, RuntimeError) as error:  # a variable is missing, or the address cannot be reached
        raise MachineError(f"rank {rank} cannot join the job at {address}: {error}") from error
    store = fresh_store(store, rank, world_size)
    monitor = RankMonitor(store, rank, world_size)
    try:
        # gloo in addition to NCCL: flags and checkpoints are exchanged on the CPU, without waiting for the GPU.
        backend = "cpu:gloo,cuda:nccl" if use_gpus else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        yield DistributedContext(rank, world_size, local_rank, local_world_size)
    except BaseException as error:
        # gloo raises a plain RuntimeError when its peer is gone.
        if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            missing = monitor.missing_ranks_error()
            if use_gpus and dist.is_initialized():
                # destroy_process_group waits for NCCL collectives, which the missing ranks never join.
                dist.distributed_c10d._abort_process_group()
            raise missing from error
        monitor.report_exit()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def make_model(
    config: TrainConfig, dist_ctx: DistributedContext, device: torch.device, precision: torch.dtype
) -> Decoder:
    """Return the initialized model on ``device``, split over the ranks.

    Weights are drawn from torch's global generator and do not depend on the number of ranks.

    Args:
        config: complete settings of the run.
        dist_ctx: ranks that share the model.
        device: device of this rank.
        precision: dtype of the matrix products.

    Raises:
        ConfigError: the batch or the model cannot be divided evenly (``check_divisibility``), or FP8 is not possible
            (``float8.convert``).
    """
    check_divisibility(config, dist_ctx)
    # On the meta device no rank allocates the full model; each initializes only its shards. The state of classes of
    # other packages comes from their constructor, with the same seed on every rank.
    on_meta = dist_ctx.world_size > 1 and can_skip_constructor(config.model)
    with torch.device("meta") if on_meta else contextlib.nullcontext():
        model = build(config.model)
    if config.precision == "fp8":
        float8.convert(model, device, config.batch_tokens // dist_ctx.data_parallel_size)
    if dist_ctx.world_size == 1:
        if config.activation_checkpointing:
            apply_activation_checkpointing(model)
        return model.to(device)
    mesh = make_mesh(config.parallel, dist_ctx, device)
    set_timeouts(mesh, config.timeout)
    # In this order: a block must be split before it is recomputed or compiled, and FSDP shards what the others leave.
    if dist_ctx.tensor_parallel > 1:
        apply_tensor_parallel(model, mesh["tensor"])
    if config.activation_checkpointing:
        apply_activation_checkpointing(model)
    if config.compile:
        for block in model.blocks:  # one by one: equal blocks share one compiled graph
            block.compile()
    apply_fsdp(model, mesh["replicate", "shard"], precision)
    if not on_meta:
        return model.to(device)
    model.to_empty(device=device)
    with ReplicatedInitMode():
        model.reset_parameters()
    return model


def check_divisibility(config: TrainConfig, dist_ctx: DistributedContext) -> None:
    """Raise ``ConfigError`` if the ranks cannot divide the batch or the layers evenly."""
    tensor_parallel = dist_ctx.tensor_parallel
    hybrid = config.parallel == "hsdp"  # its shards, and with them its tensor-parallel groups, stay within a node
    processes, scope = (dist_ctx.local_world_size, " per node") if hybrid else (dist_ctx.world_size, "")
    if processes % tensor_parallel:
        raise ConfigError(
            f"the number of processes{scope}, {processes}, is not a multiple of tensor_parallel {tensor_parallel}: "
            "change --tensor-parallel, or --processes (torchrun: --nproc-per-node)"
        )
    if config.batch_size % dist_ctx.data_parallel_size:
        shares = f"{dist_ctx.data_parallel_size} "
        shares += f"groups of {tensor_parallel} processes" if tensor_parallel > 1 else "processes"
        raise ConfigError(
            f"a batch of {counted(config.batch_size, 'sequence')} cannot be divided evenly among {shares}: "
            "change the number of processes, or batch_tokens in a new run"
        )


def make_mesh(strategy: str, dist_ctx: DistributedContext, device: torch.device) -> DeviceMesh:
    """Return the (replicate, shard, tensor) mesh of ddp, fsdp or hsdp."""
    nodes = dist_ctx.world_size // dist_ctx.local_world_size
    replicate, shard = {
        "ddp": (dist_ctx.data_parallel_size, 1),
        "fsdp": (1, dist_ctx.data_parallel_size),
        "hsdp": (nodes, dist_ctx.local_world_size // dist_ctx.tensor_parallel),
    }[strategy]
    names = ("replicate", "shard", "tensor")  # the last axis has neighbouring ranks, which share the fastest links
    return init_device_mesh(device.type, (replicate, shard, dist_ctx.tensor_parallel), mesh_dim_names=names)


def set_timeouts(mesh: DeviceMesh, seconds: int) -> None:
    """Let collectives fail after ``seconds``; GPU collectives of the mesh after twice that time.

    Until this call torch's default of 30 minutes holds, because ranks wait while rank 0 prepares data.
    """
    assert dist.group.WORLD is not None
    dist.group.WORLD.set_timeout(timedelta(seconds=seconds))
    # When NCCL times out, its watchdog aborts the process. The agreement on the CPU after each step has to fail first:
    # it raises an exception, on which the missing ranks are determined. An axis that spans all ranks is the default
    # group itself, whose gloo must keep its limit: ProcessGroup.set_timeout would set both.
    limit = timedelta(seconds=seconds if mesh.device_type == "cpu" else 2 * seconds)
    for group in mesh.get_all_groups():
        group._get_backend(torch.device(mesh.device_type))._set_default_timeout(limit)


def apply_fsdp(model: Decoder, mesh: DeviceMesh, precision: torch.dtype) -> None:
    """Shard each block, and then the rest of the model, over a (replicate, shard) mesh.

    Parameters are gathered in ``precision``, so that the residual stream has this dtype too; gradients are reduced in
    float32.
    """
    policy = MixedPrecisionPolicy()
    if precision != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


def apply_activation_checkpointing(model: Decoder) -> None:
    """Recompute the activations inside each block in the backward pass instead of storing them."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def set_gradient_sync(model: Decoder, enabled: bool) -> None:
    """Choose whether the next backward pass averages gradients over the ranks.

    With gradient accumulation only the last micro-batch of a step needs it.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


def reshard(model: Decoder) -> None:
    """Free gathered weights, so that the next forward pass gathers the current ones."""
    for module in (*model.blocks, model):
        if isinstance(module, FSDPModule):
            module.reshard()


class ReplicatedInitMode(TorchDispatchMode):
    """Makes random initialization of sharded parameters the same as in a single process.

    Every rank draws the full tensor on the CPU, one parameter at a time, and keeps its shard.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Intercept ``normal_``, the only operation that draws weights in this package."""
        if func is torch.ops.aten.normal_.default and isinstance(args[0], DTensor):
            parameter = args[0]
            # Always on the CPU: a GPU's generator would give other values than a run without sharding.
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            func(values, *args[1:], **(kwargs or {}))
            return parameter.copy_(shard_like(values, parameter))
        return func(*args, **(kwargs or {}))


def shard_like(full: Tensor, parameter: Tensor) -> Tensor:
    """Shard a tensor that all ranks hold as ``parameter`` is sharded; a plain ``parameter`` returns ``full``."""
    if not isinstance(parameter, DTensor):
        return full
    full = full.to(parameter.device)
    # No source rank: all ranks have the same values, so nothing has to be sent.
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)


def local_shard(value: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor, or another tensor itself, detached; the memory is shared."""
    value = value.detach()
    return value.to_local() if isinstance(value, DTensor) else value


def full_tensor(value: Tensor) -> Tensor:
    """Gather a sharded tensor (a collective operation); other tensors are returned as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value
