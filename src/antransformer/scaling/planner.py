"""Plans a training run for a budget of compute, time or tokens.

Model size, batch and learning rate come from scaling laws. Memory and time come from the models in
``training.cost_model``. docs/planning.md describes the rules and compares them with measurements.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch

from antransformer.errors import ConfigError
from antransformer.models import ModelConfig
from antransformer.models.config import PRESETS
from antransformer.models.registry import get
from antransformer.reporting.labels import format_count
from antransformer.scaling.fitting import FLOPS_PER_PARAMETER
from antransformer.scaling.intervals import Interval
from antransformer.scaling.law_files import LawFile, Laws, extrapolation_note, format_quantity, nearest_shipped
from antransformer.training import defaults
from antransformer.training.cost_model import throughput
from antransformer.training.cost_model.memory import Layout, Memory, estimate_memory
from antransformer.training.optimizer_registry import OPTIMIZERS, OptimizerSpec
from antransformer.training.recipes import with_recipe
from antransformer.wording import counted

HEAD_DIM = 64
MAX_WIDTH = 16_384
PAPER_WIDTH = 1536  # largest of the paper; see layers_of_width
USABLE_MEMORY = 0.9  # fraction of a device; the CUDA context, libraries and fragmentation take the rest
MAX_TIME_RATIO = 0.97  # a less simple layout must take less than this fraction of the time
MAX_HORIZON_EXPONENT = 2.0  # of the setting
TOLERANCE = 1.1  # deviations up to this factor are not worth a note


@dataclass(frozen=True)
class Cluster:
    """Hardware of a run.

    Attributes:
        gpu_name: type of all GPUs, a key of ``throughput.GPUS``.
        devices: number of GPUs.
        gpus_per_node: number of GPUs in one node.
        network: bytes/s from each GPU to other nodes.

    Raises:
        ConfigError: a number is below 1, or several nodes are used and the last one is not full.
    """

    gpu_name: str
    devices: int
    gpus_per_node: int
    network: float

    def __post_init__(self) -> None:
        for option, count in (("--gpus", self.devices), ("--gpus-per-machine", self.gpus_per_node)):
            if count < 1:
                raise ConfigError(f"{option} must be at least 1, got {count}")
        if self.devices > self.gpus_per_node and self.devices % self.gpus_per_node:
            raise ConfigError(
                f"{self.devices} GPUs do not fill nodes of {self.gpus_per_node}: change --gpus or --gpus-per-machine"
            )

    @property
    def gpu(self) -> throughput.Gpu:
        """Data sheet of the GPU."""
        return throughput.GPUS[self.gpu_name]

    @property
    def peak_flops(self) -> float:
        """Peak FLOP/s of all GPUs together."""
        return self.devices * self.gpu.peak_flops


@dataclass(frozen=True)
class Plan:
    """Planned training run.

    Attributes:
        config: model.
        parameters: number of learnable parameters.
        tokens: tokens of the run, a multiple of the batch.
        batch: sequences per step.
        lr: peak learning rate.
        lr_width: width at which ``lr`` was tuned, as in ``TrainConfig``; 0 if a law gives the rate for this model.
        lr_horizon: steps at which ``lr`` was tuned, as in ``TrainConfig``.
        horizon_exponent: exponent of ``lr_horizon``.
        cluster: hardware.
        layout: distribution over the devices.
        memory: memory of one device at its peak.
        mfu: expected fraction of the peak FLOP/s.
        hours: expected duration.
        sources: origins of batch size and learning rate, one line each.
        notes: warnings, one line each.
        laws: file of scaling laws that was used; None without a file for the architecture.
        training: optimizer, schedule and other settings that ``lr`` is for, where they are not the paper's.
        own_rate: name and value of the rate that the optimizer has in addition, such as muon_lr.
    """

    config: ModelConfig
    parameters: int
    tokens: int
    batch: int
    lr: float
    lr_width: int
    lr_horizon: int
    horizon_exponent: float
    cluster: Cluster
    layout: Layout
    memory: Memory
    mfu: float
    hours: float
    sources: tuple[str, ...]
    notes: tuple[str, ...]
    laws: LawFile | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    own_rate: tuple[str, float] | None = None

    @property
    def optimizer(self) -> str:
        """Optimizer that ``lr`` is for."""
        return str(self.training.get("optimizer", "adam"))

    @property
    def compute(self) -> float:
        """Compute in FLOPs as scaling laws count it, 6 N D for N parameters and D tokens."""
        return float(FLOPS_PER_PARAMETER) * self.parameters * self.tokens

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.tokens // (self.batch * self.config.context)

    @property
    def preset(self) -> str | None:
        """Name of the preset with the model's width and depth, if there is one."""
        size = (self.config.width, self.config.layers)
        return next((name for name, preset in PRESETS.items() if (preset["width"], preset["layers"]) == size), None)

    def settings(self) -> dict[str, Any]:
        """Return the settings for ``antransformer train --config``, except for the data."""
        model = {"context": self.config.context}
        if not self.preset:
            model |= {"width": self.config.width, "layers": self.config.layers}
        size = {"preset": self.preset} if self.preset else {}
        tensor_parallel = self.layout.tensor_parallel
        return {
            "recipe": "paper",  # the paper's laws and the defaults of the learning rate are those of AdamW
            **self.training,
            "architecture": self.config.architecture,
            **size,
            "model": model,
            "tokens": self.tokens,
            "batch_tokens": self.batch * self.config.context,
            "micro_batch_size": self.layout.micro_batch_size,
            "lr": self.lr,
            **({self.own_rate[0]: self.own_rate[1]} if self.own_rate else {}),
            "lr_width": self.lr_width,
            "lr_horizon": self.lr_horizon,
            "horizon_exponent": self.horizon_exponent,
            "precision": "bfloat16",
            "parallel": self.layout.strategy,
            **({"tensor_parallel": tensor_parallel} if tensor_parallel > 1 else {}),
            "activation_checkpointing": self.layout.checkpointing,
        }


def plan_for_flops(
    flops: float, template: ModelConfig, cluster: Cluster, file: LawFile, mfu: float | None = None
) -> Plan:
    """Plan the compute-optimal model size, with the tokens that the budget allows.

    Args:
        flops: budget in FLOPs, counted as 6 N D.
        template: config with architecture, vocabulary size and context.
        cluster: hardware.
        file: scaling laws.
        mfu: fraction of the peak FLOP/s; None to estimate it.

    Raises:
        ConfigError: there is no law for the model size, or the model does not fit on the devices.
    """
    laws = _laws_with_size(file, template.architecture)
    best_size = laws.best_size(flops)
    config = config_of_size(best_size, template)
    tokens = flops / (FLOPS_PER_PARAMETER * defaults.parameter_count(config))
    plan = plan_run(config, tokens, cluster, laws, mfu)
    notes = plan.notes + size_note("the best size", best_size, plan.parameters)
    if extrapolation := extrapolation_note("compute", flops, laws.compute or (flops, flops)):
        notes += (f"best size: {extrapolation}",)
    return replace(plan, notes=notes)


def size_note(name: str, wanted: float, parameters: int) -> tuple[str, ...]:
    """Note that the number of parameters is not the wanted one, as the only entry; empty if it is."""
    if _about_equal(parameters, wanted):
        return ()
    nearest = f"the nearest possible one has {format_quantity(parameters)}"
    return (f"{name} is {format_quantity(wanted)} parameters; {nearest}",)


def plan_for_hours(
    hours: float, template: ModelConfig, cluster: Cluster, file: LawFile, mfu: float | None = None
) -> Plan:
    """Plan the compute-optimal model size for a number of hours.

    Other arguments and errors are the same as in ``plan_for_flops``.
    """
    flops = cluster.peak_flops * (mfu or throughput.ASSUMED_MFU) * hours * 3600
    # MFU and operations per token depend on the size, and the size depends on both: iterate.
    for _ in range(4):
        plan = plan_for_flops(flops, template, cluster, file, mfu)
        flops *= hours / plan.hours
    # Two sizes or layouts may alternate. The hours of the last one are proportional to its tokens.
    steps = max(1, round(plan.steps * hours / plan.hours))
    tokens = steps * plan.batch * plan.config.context
    return replace(plan, tokens=tokens, hours=plan.hours * tokens / plan.tokens)


def _laws_with_size(file: LawFile, architecture: str) -> Laws:
    laws = file.by_architecture.get(architecture)
    if laws is None or laws.compute is None:
        raise ConfigError(
            f"{file.name} has no law for the model size of {architecture}: give --fits FILE with one, or --tokens and "
            "--size"
        )
    return laws


def plan_run(config: ModelConfig, tokens: float, cluster: Cluster, laws: Laws | None, mfu: float | None = None) -> Plan:
    """Plan batch size, learning rate and layout for a given model and number of tokens.

    Args:
        config: model.
        tokens: tokens of the run; the plan rounds them to full batches.
        cluster: hardware.
        laws: scaling laws of the architecture; None for the defaults.
        mfu: fraction of the peak FLOP/s; None to estimate it.

    Raises:
        ConfigError: the model does not fit on the devices, or the law gives a batch of less than one sequence.
    """
    parameters = defaults.parameter_count(config)
    batch_tokens, batch_source = _value_and_source("batch", config, laws)
    if laws and "batch" in laws.powers and batch_tokens < config.context:
        raise ConfigError(
            f"the law of the best batch gives {batch_tokens:,.3g} tokens, less than one sequence of "
            f"{config.context:,}: fit it to batches in tokens, or decrease --context"
        )
    lr, lr_source = _value_and_source("lr", config, laws)
    best_batch = max(1, round(batch_tokens / config.context))
    layout, memory = choose_layout(config, best_batch, cluster)
    batch = layout.batch_size
    notes = []
    if not _about_equal(batch, best_batch):
        notes.append(
            f"the batch is {counted(batch, 'sequence')} instead of {best_batch:,}, because all "
            f"{layout.data_parallel_size:,} devices or groups process the same number"
        )
    steps = max(1, round(tokens / (batch * config.context)))
    run_tokens = steps * batch * config.context
    if not _about_equal(run_tokens, tokens):
        notes.append(
            f"the run has {format_quantity(run_tokens)} tokens instead of {format_quantity(tokens)}, "
            "to fill its batches"
        )
    plain = with_recipe({"recipe": "paper"})
    training = {**plain, **(laws.training if laws and "lr" in laws.powers else {})}
    lr_horizon, exponent = _horizon(config, parameters, batch * config.context, laws)
    mfu = mfu or throughput.expected_mfu(config, layout, cluster.gpu, cluster.network)
    seconds = throughput.flops_per_token(config) * run_tokens / (cluster.peak_flops * mfu)
    return Plan(
        config=config,
        parameters=parameters,
        tokens=run_tokens,
        batch=batch,
        lr=float(f"{lr:.3g}"),
        lr_width=defaults.SMALL_LR_WIDTH if _uses_small_default("lr", config, laws) else 0,
        lr_horizon=lr_horizon,
        horizon_exponent=exponent,
        cluster=cluster,
        layout=layout,
        memory=memory,
        mfu=mfu,
        hours=seconds / 3600,
        sources=(batch_source, lr_source),
        notes=tuple(notes),
        training={name: value for name, value in training.items() if plain.get(name, False) != value},
        own_rate=_own_rate(config, lr, OPTIMIZERS[training["optimizer"]]),
    )


def _about_equal(value: float, expected: float) -> bool:
    return 1 / TOLERANCE < value / expected < TOLERANCE


def _value_and_source(name: str, config: ModelConfig, laws: Laws | None) -> tuple[float, str]:
    """Return the batch in tokens or the learning rate, and a line with its origin.

    The given laws come first, then the default for small models, then the paper's laws.
    """
    title = {"batch": "batch", "lr": "learning rate"}[name]
    if laws and name in laws.powers:
        law, parameters = laws.powers[name], defaults.parameter_count(config)
        return float(law(parameters)), _with_extrapolation(f"{title}: law of the same file", parameters, law.span)
    if _uses_small_default(name, config, laws):
        value = {"batch": defaults.SMALL_BATCH_TOKENS, "lr": defaults.SMALL_LR[config.architecture]}[name]
        return value, f"{title}: the default below 30M parameters, measured at nano"
    coefficient, exponent = {"batch": defaults.BATCH_FITS, "lr": defaults.LR_FITS}[name][config.architecture]
    size = defaults.paper_size(config)  # as ``train``
    value = coefficient * size**exponent * (defaults.FITTED_SEQUENCE if name == "batch" else 1)
    return value, _with_extrapolation(f"{title}: the paper's law", size, defaults.FITTED_PARAMETERS)


def _horizon(config: ModelConfig, parameters: int, batch_tokens: int, laws: Laws | None) -> tuple[int, float]:
    """Return the steps at which the learning rate holds, and the exponent over steps; zeros if a law has no horizon."""
    exponent, ratio = defaults.horizon_exponent(config, OPTIMIZERS["adam"]), float(defaults.TOKENS_PER_PARAMETER)
    if laws and "lr" in laws.powers:
        if laws.horizon is None:
            return 0, 0.0
        exponent, ratio = laws.horizon
    elif defaults.is_small(config):
        return defaults.SMALL_LR_STEPS, exponent
    return max(1, round(ratio * parameters / batch_tokens)), min(max(0.0, exponent), MAX_HORIZON_EXPONENT)


def _own_rate(config: ModelConfig, lr: float, optimizer: OptimizerSpec) -> tuple[str, float] | None:
    """Rate that an optimizer has in addition to ``lr``, in proportion to it as in the runs of a sweep."""
    if not optimizer.lr_setting:
        return None
    default, _ = _value_and_source("lr", config, None)
    return optimizer.lr_setting, float(f"{lr * defaults.optimizer_lr(config, optimizer) / default:.3g}")


def _uses_small_default(name: str, config: ModelConfig, laws: Laws | None) -> bool:
    """Return whether the model is too small for the paper's laws, and no given law replaces them."""
    return defaults.is_small(config) and not (laws and name in laws.powers)


def _with_extrapolation(source: str, parameters: int, span: Interval) -> str:
    extrapolation = extrapolation_note("parameters", parameters, span)
    return f"{source}; {extrapolation}" if extrapolation else source


# Sizes


def config_of_size(parameters: float, template: ModelConfig) -> ModelConfig:
    """Return a model with about ``parameters`` parameters and a depth close to ``layers_of_width``.

    The width is a multiple of the head dimension; from 2,048 on the number of heads is a multiple of eight, so that
    tensor parallelism can split them.
    """
    sizes = []
    for width in (*range(HEAD_DIM, 2048, HEAD_DIM), *range(2048, MAX_WIDTH + 1, 8 * HEAD_DIM)):
        block, root = (4 + 3 * template.mlp_ratio) * width**2, 2 * template.vocab_size * width  # matrices only
        layers = min(max(1, round((parameters - root) / block)), 4 * layers_of_width(width))
        size_error = abs(math.log((layers * block + root) / parameters))
        sizes.append((size_error + abs(math.log(layers / layers_of_width(width))), width, layers))
    _, width, layers = min(sizes)
    return resized(template, width, layers)


def resized(template: ModelConfig, width: int, layers: int) -> ModelConfig:
    """Return the template with another width and depth; settings that depend on them take their defaults."""
    return ModelConfig(
        architecture=template.architecture,
        vocab_size=template.vocab_size,
        context=template.context,
        width=width,
        layers=layers,
    )


def layers_of_width(width: int) -> int:
    """Return the depth for a width: three layers per 128, as most presets have.

    Beyond the paper's sizes depth grows with the square root of the width, as in published models: 80 layers at 8,192.
    """
    paper_layers = 3 * PAPER_WIDTH / 128
    return max(1, round(3 * width / 128 if width <= PAPER_WIDTH else paper_layers * math.sqrt(width / PAPER_WIDTH)))


# Layouts


def choose_layout(config: ModelConfig, batch: int, cluster: Cluster) -> tuple[Layout, Memory]:
    """Return the simplest layout that fits, unless a later one takes less than ``MAX_TIME_RATIO`` of its time.

    Each layout of ``candidate_layouts`` is tried with the largest micro-batch that fits.

    Args:
        config: model.
        batch: sequences per step; the layout may round it.
        cluster: hardware.

    Raises:
        ConfigError: no layout fits.
    """
    best: tuple[float, Layout, Memory] | None = None
    least_bytes = math.inf
    for candidate in candidate_layouts(config, cluster):
        for layout in micro_batch_layouts(candidate, batch):
            memory = estimate_memory(config, layout, torch.bfloat16)
            least_bytes = min(least_bytes, memory.total)
            if memory.total <= USABLE_MEMORY * cluster.gpu.memory:
                # Per sequence, since layouts round the batch differently.
                seconds = throughput.step_seconds(config, layout, cluster.gpu, cluster.network) / layout.batch_size
                if best is None or seconds < MAX_TIME_RATIO * best[0]:
                    best = seconds, layout, memory
                break
    if best is None:
        raise ConfigError(
            f"{format_count(float(defaults.parameter_count(config)))} parameters do not fit on {cluster.devices:,} "
            f"{cluster.gpu_name}: each needs {least_bytes / 1e9:,.0f} GB and has "
            f"{USABLE_MEMORY * cluster.gpu.memory / 1e9:.0f} usable GB; increase --gpus, or choose a larger --gpu or a "
            "smaller model"
        )
    return best[1], best[2]


def candidate_layouts(config: ModelConfig, cluster: Cluster) -> Iterator[Layout]:
    """Yield layouts, simplest first: ddp, hsdp, fsdp; then with activation checkpointing; then tensor-parallel."""
    strategies = ["ddp"]
    strategies += ["hsdp"] if cluster.devices > cluster.gpus_per_node else []
    strategies += ["fsdp"] if cluster.devices > 1 else []
    within_node = min(cluster.gpus_per_node, cluster.devices)
    for tensor_parallel, checkpointing, strategy in product((1, 2, 4, 8), (False, True), strategies):
        # Not across nodes: its all-reduces do not overlap with anything.
        if within_node % tensor_parallel or (tensor_parallel > 1 and not can_split(config, tensor_parallel)):
            continue
        yield Layout(strategy, cluster.devices, cluster.gpus_per_node, tensor_parallel, checkpointing)


def can_split(config: ModelConfig, tensor_parallel: int) -> bool:
    """Return whether the architecture supports tensor parallelism, and the heads divide evenly."""
    return bool(get(config.architecture).tensor_parallel) and config.heads % tensor_parallel == 0


def micro_batch_layouts(layout: Layout, batch: int) -> Iterator[Layout]:
    """Yield the layout with all ways to accumulate ``batch`` sequences, fewest passes first.

    The batch is rounded to a multiple of the data-parallel size and of the passes.
    """
    per_device = max(1, round(batch / layout.data_parallel_size))
    # dict.fromkeys removes duplicates and keeps the order.
    for passes in dict.fromkeys(-(-per_device // micro) for micro in range(per_device, 0, -1)):
        yield replace(layout, grad_accum_steps=passes, micro_batch_size=max(1, round(per_device / passes)))


def default_laws(architecture: str, compute: float | None) -> LawFile:
    """Return the shipped laws that were measured nearest to ``compute`` FLOPs.

    Raises:
        ConfigError: no shipped file covers the architecture.
    """
    file = nearest_shipped(architecture, compute)
    if file is None:
        raise ConfigError(f"no shipped scaling law for {architecture}: give --fits FILE")
    return file
