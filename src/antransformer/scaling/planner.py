"""A training run for a budget: size, tokens, batch, learning rate by scaling laws; sharing, memory, hours by models of
both (``training.memory``, ``training.throughput``). docs/scaling.md has the rules, and what they were checked against.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from antransformer.errors import ConfigError
from antransformer.models import ModelConfig
from antransformer.models.config import PRESETS
from antransformer.models.registry import get
from antransformer.reporting.labels import format_count
from antransformer.scaling.fitting import FLOPS_PER_PARAMETER, Interval
from antransformer.scaling.law_files import LawFile, Laws, nearest_shipped, outside, shown
from antransformer.training import defaults
from antransformer.training.cost_model import throughput
from antransformer.training.cost_model.memory import Layout, Memory, memory

HEAD_WIDTH = 64
WIDEST = 16_384
PAPER_WIDTH = 1536  # beyond, depth grows with the root of the width, as in published models: 80 layers at 8,192
USABLE = 0.9  # of a device's memory; the rest is the context's, the libraries' and lost between blocks
BETTER = 0.97  # of the time of a step, for which a less simple way to share is worth it


@dataclass(frozen=True)
class Cluster:
    """What a run has.

    Attributes:
        name: of the GPU, a key of ``throughput.GPUS``.
        devices: how many.
        node: of them in one machine.
        network: bytes/s of each device to other machines.
    """

    name: str
    devices: int
    node: int
    network: float

    def __post_init__(self) -> None:
        if self.devices > self.node and self.devices % self.node:
            raise ConfigError(
                f"{self.devices} GPUs are not whole machines of {self.node}: change --gpus or --gpus-per-machine"
            )

    @property
    def gpu(self) -> throughput.Gpu:
        """Its figures."""
        return throughput.GPUS[self.name]

    @property
    def peak(self) -> float:
        """FLOP/s of all."""
        return self.devices * self.gpu.peak


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        config: the model.
        parameters: learnable numbers of it.
        tokens: of the run, whole batches.
        batch: sequences of a step.
        lr: peak learning rate.
        lr_width: the width that it is for, as in ``TrainConfig``: that of the default, or 0, since laws give it for the
            model's own.
        cluster: what it runs on.
        layout: how the devices share it.
        memory: of one device.
        mfu: expected share of the devices' peak.
        hours: expected.
        sources: where batch and learning rate come from.
        notes: what else is to be known.
    """

    config: ModelConfig
    parameters: int
    tokens: int
    batch: int
    lr: float
    lr_width: int
    cluster: Cluster
    layout: Layout
    memory: Memory
    mfu: float
    hours: float
    sources: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def compute(self) -> float:
        """6 N D, by which scaling laws count."""
        return float(FLOPS_PER_PARAMETER) * self.parameters * self.tokens

    @property
    def preset(self) -> str | None:
        """The name of a shipped size that it has."""
        sizes = (self.config.width, self.config.layers)
        return next((name for name, it in PRESETS.items() if (it["width"], it["layers"]) == sizes), None)

    def settings(self) -> dict[str, Any]:
        """What ``antransformer train --config`` takes, without the data."""
        model = {"context": self.config.context}
        if not self.preset:
            model |= {"width": self.config.width, "layers": self.config.layers}
        size = {"preset": self.preset} if self.preset else {}
        return {
            "architecture": self.config.architecture,
            **size,
            "model": model,
            "tokens": self.tokens,
            "batch_tokens": self.batch * self.config.context,
            "micro_batch_size": self.layout.micro_batch_size,
            "lr": self.lr,
            "lr_width": self.lr_width,
            "precision": "bfloat16",
            "parallel": self.layout.way,
            **({"tensor_parallel": self.layout.tensor} if self.layout.tensor > 1 else {}),
            "activation_checkpointing": self.layout.checkpointing,
        }


def by_compute(
    compute: float, template: ModelConfig, cluster: Cluster, file: LawFile, mfu: float | None = None
) -> Plan:
    """The best size for 6 N D FLOPs, and the tokens that they then suffice for.

    Args:
        compute: FLOPs.
        template: architecture, vocabulary and context.
        cluster: what it runs on.
        file: laws.
        mfu: share of the peak; None for the model's.

    Raises:
        ConfigError: no law of the best size, or the model does not fit on the devices.
    """
    laws = _sized(file, template.architecture)
    best = laws.best_size(compute)
    config = shape(best, template)
    tokens = compute / (FLOPS_PER_PARAMETER * defaults.parameter_count(config))
    plan = make(config, tokens, cluster, laws, mfu)
    notes = plan.notes
    if not 1 / 1.1 < plan.parameters / best < 1.1:
        notes += (f"the best size would be {shown(best)} parameters; the nearest shape has {shown(plan.parameters)}",)
    if far := outside("compute", compute, laws.compute or (compute, compute)):
        notes += (f"best size: {far}",)
    return replace(plan, notes=notes)


def by_hours(hours: float, template: ModelConfig, cluster: Cluster, file: LawFile, mfu: float | None = None) -> Plan:
    """The best size for what the devices compute in so many hours; arguments and errors as in ``by_compute``."""
    compute = cluster.peak * (mfu or throughput.ASSUMED_MFU) * hours * 3600
    for _ in range(4):  # a size has operations a token, and a share of the peak, of its own
        plan = by_compute(compute, template, cluster, file, mfu)
        compute *= hours / plan.hours
    return plan


def _sized(file: LawFile, architecture: str) -> Laws:
    laws = file.of.get(architecture)
    if laws is None or laws.compute is None:
        raise ConfigError(
            f"no law of the best size of {architecture} in {file.name}: give --fits with one, or --tokens and --size"
        )
    return laws


def make(config: ModelConfig, tokens: float, cluster: Cluster, laws: Laws | None, mfu: float | None = None) -> Plan:
    """All else of a run with this model on so many tokens; arguments and errors as in ``by_compute``.

    Raises:
        ConfigError: the model does not fit on the devices, or a batch is less than a sequence by its law.
    """
    parameters = defaults.parameter_count(config)
    batch, batch_source = _setting("batch", parameters, config.architecture, laws)
    if laws and "batch" in laws.powers and batch < config.context:
        raise ConfigError(
            f"the law of the best batch gives {batch:,.3g} tokens, less than one sequence of {config.context:,}: fit "
            "it to batches in tokens, or lower --context"
        )
    lr, lr_source = _setting("lr", parameters, config.architecture, laws)
    wanted = max(1, round(batch / config.context))
    layout, need = share(config, wanted, cluster)
    sequences = layout.copies * layout.passes * layout.micro_batch_size
    notes = []
    if not 1 / 1.1 < sequences / wanted < 1.1:
        notes.append(
            f"the batch is {sequences:,} sequences, and by its law {wanted:,}: each of {layout.copies:,} devices or "
            "groups takes the same number of them"
        )
    steps = max(1, round(tokens / (sequences * config.context)))
    used = mfu or throughput.expected_mfu(config, layout, cluster.gpu, cluster.network)
    whole = steps * sequences * config.context
    if not 1 / 1.1 < whole / tokens < 1.1:
        notes.append(f"the run has {shown(whole)} tokens in place of {shown(tokens)}: whole batches")
    seconds = throughput.flops_per_token(config) * whole / (cluster.peak * used)
    return Plan(
        config,
        parameters,
        whole,
        sequences,
        float(f"{lr:.3g}"),
        defaults.SMALL_LR_WIDTH if _by_default("lr", parameters, laws) else 0,
        cluster,
        layout,
        need,
        used,
        seconds / 3600,
        (batch_source, lr_source),
        tuple(notes),
    )


def _setting(name: str, parameters: int, architecture: str, laws: Laws | None) -> tuple[float, str]:
    """The batch in tokens, or the learning rate: by the laws given, the paper's or the small default; and whence."""
    title = {"batch": "batch", "lr": "learning rate"}[name]
    if laws and name in laws.powers:
        law = laws.powers[name]
        return float(law(parameters)), _source(f"{title}: law of the same file", parameters, law.span)
    if _by_default(name, parameters, laws):
        small = {"batch": defaults.SMALL_BATCH_TOKENS, "lr": defaults.SMALL_LR[architecture]}[name]
        return small, f"{title}: the default below 30M parameters, measured at nano"
    coefficient, exponent = {"batch": defaults.BATCH_FITS, "lr": defaults.LR_FITS}[name][architecture]
    value = coefficient * parameters**exponent * (defaults.FITTED_SEQUENCE if name == "batch" else 1)
    return value, _source(f"{title}: the paper's law", parameters, defaults.FITTED_PARAMETERS)


def _by_default(name: str, parameters: int, laws: Laws | None) -> bool:
    """Whether no law says it: the user's have none, and the paper's do not reach so far down."""
    return parameters < defaults.FITTED_PARAMETERS[0] and not (laws and name in laws.powers)


def _source(law: str, parameters: int, span: Interval) -> str:
    far = outside("parameters", parameters, span)
    return f"{law}; {far}" if far else law


# Sizes


def shape(parameters: float, template: ModelConfig) -> ModelConfig:
    """The model of about so many parameters whose depth is nearest to what ``depth`` says.

    Widths are whole heads, and from 2,048 on multiples of eight, which eight devices can share.
    """
    sizes = []
    for width in (*range(HEAD_WIDTH, 2048, HEAD_WIDTH), *range(2048, WIDEST + 1, 8 * HEAD_WIDTH)):
        block, root = (4 + 3 * template.mlp_ratio) * width**2, 2 * template.vocab_size * width  # the matrices
        layers = min(max(1, round((parameters - root) / block)), 4 * depth(width))
        error = abs(math.log((layers * block + root) / parameters))
        sizes.append((error + abs(math.log(layers / depth(width))), width, layers))
    return with_shape(template, *min(sizes)[1:])


def with_shape(template: ModelConfig, width: int, layers: int) -> ModelConfig:
    """The template in another size, with what its defaults depend on."""
    return ModelConfig(
        architecture=template.architecture,
        vocab_size=template.vocab_size,
        context=template.context,
        width=width,
        layers=layers,
    )


def depth(width: int) -> int:
    """Layers of a width: three for each 128, as the presets have on the whole; fewer beyond the paper's sizes."""
    most = 3 * PAPER_WIDTH / 128
    return max(1, round(3 * width / 128 if width <= PAPER_WIDTH else most * math.sqrt(width / PAPER_WIDTH)))


# Sharing


def share(config: ModelConfig, batch: int, cluster: Cluster) -> tuple[Layout, Memory]:
    """The simplest way that fits, unless another one takes less than ``BETTER`` of its expected time a step.

    Simplest first: replicated, hybrid, sharded; then with activation checkpointing; then with tensor parallelism within
    a machine. Of each, the largest micro batch that fits.

    Raises:
        ConfigError: none fits.
    """
    best: tuple[float, Layout, Memory] | None = None
    least = math.inf
    for start in candidates(config, cluster):
        for layout in passes_of(start, batch):
            need = memory(config, layout, torch.bfloat16)
            least = min(least, need.total)
            if need.total <= USABLE * cluster.gpu.memory:
                sequences = layout.copies * layout.passes * layout.micro_batch_size
                seconds = throughput.step_seconds(config, layout, cluster.gpu, cluster.network) / sequences
                if best is None or seconds < BETTER * best[0]:
                    best = seconds, layout, need
                break
    if best is None:
        raise ConfigError(
            f"{format_count(float(defaults.parameter_count(config)))} parameters do not fit on {cluster.devices:,} "
            f"{cluster.name}: each would need {least / 1e9:,.0f} GB of its usable "
            f"{USABLE * cluster.gpu.memory / 1e9:.0f} GB; raise --gpus, or choose a larger --gpu or a smaller model"
        )
    return best[1], best[2]


def candidates(config: ModelConfig, cluster: Cluster) -> Iterator[Layout]:
    """Ways to share, the simplest first."""
    ways = ["ddp"]
    ways += ["hsdp"] if cluster.devices > cluster.node else []
    ways += ["fsdp"] if cluster.devices > 1 else []
    in_machine = min(cluster.node, cluster.devices)
    for tensor, checkpointing, way in product((1, 2, 4, 8), (False, True), ways):
        if in_machine % tensor or (tensor > 1 and not splits(config, tensor)):
            continue
        yield Layout(way, cluster.devices, cluster.node, tensor, checkpointing)


def splits(config: ModelConfig, tensor: int) -> bool:
    """Whether so many devices can share the layers of a model."""
    return bool(get(config.architecture).tensor_parallel) and config.heads % tensor == 0


def passes_of(layout: Layout, batch: int) -> Iterator[Layout]:
    """The ways to go through a batch, that of the fewest passes first; the batch is rounded to what is even."""
    each = max(1, round(batch / layout.copies))
    for passes in dict.fromkeys(-(-each // micro) for micro in range(each, 0, -1)):
        yield replace(layout, passes=passes, micro_batch_size=max(1, round(each / passes)))


def default_laws(architecture: str, compute: float | None) -> LawFile:
    """The shipped laws that were measured nearest.

    Raises:
        ConfigError: there are none for the architecture.
    """
    file = nearest_shipped(architecture, compute)
    if file is None:
        raise ConfigError(f"no loss law measured for {architecture}: give --fits")
    return file
