"""Plan a run: model size, tokens, batch, learning rate, expected loss, parallelism, memory and time.

Give one budget: --flops; --gpus with --hours; or --tokens with --size. The size comes from scaling laws: your own
(--fits, the JSON of 'antransformer fit'), or the shipped ones that were measured nearest. So does the expected loss of
anGPT and GPT+. Memory and time come from a model that docs/scaling.md describes and checks.

examples:
  antransformer plan --flops 1e20
  antransformer plan --gpus 8 --gpu h100 --hours 72 --mfu 0.4
  antransformer plan --tokens 100B --size 0.5b --out plan.yaml
  antransformer train --config plan.yaml --data data/mine
"""

import argparse
import math
from collections.abc import Iterable
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from antransformer.cli.common import check_target, new_table
from antransformer.cli.options import Parser, number
from antransformer.errors import ConfigError
from antransformer.files import replace_text
from antransformer.models import ModelConfig, registry
from antransformer.models.config import PAPER_VOCABULARY, PRESETS
from antransformer.reporting.labels import style_of
from antransformer.scaling import planner as plans
from antransformer.scaling.law_files import LawFile, format_quantity, nearest_shipped, predict, read_laws
from antransformer.scaling.planner import Cluster, Plan
from antransformer.settings import Count, convert, nearest
from antransformer.training.cost_model.throughput import GPUS
from antransformer.training.defaults import parameter_count

USAGE = "antransformer plan (--flops X | --gpus N --hours X | --tokens TOKENS --size SIZE) [options]"
BUDGETS = "give one budget: --flops, or --hours with --gpus, or --tokens with --size"
COMPARED = ("angpt", "gpt+")


def add_arguments(parser: Parser) -> None:
    """Add the options of ``plan``: budget, hardware, model and scaling laws."""
    group = parser.add_argument_group("budget, one of")
    group.add_argument("--flops", metavar="X", help="compute such as 1e20, counted as 6 N D like in scaling laws")
    group.add_argument("--hours", metavar="X", help="time on --gpus")
    group.add_argument("--tokens", metavar="TOKENS", help="training tokens such as 100B, with --size")
    group.add_argument("--size", metavar="SIZE", help=f"{', '.join(PRESETS)}, or a number of parameters such as 7B")
    group = parser.add_argument_group("hardware")
    group.add_argument("--gpus", metavar="N", help="number of GPUs (default 8)")
    group.add_argument("--gpu", metavar="NAME", default="h100", help=f"{', '.join(GPUS)} (default h100)")
    group.add_argument("--gpus-per-machine", metavar="N", help="number of GPUs in one machine (default 8)")
    group.add_argument("--network", metavar="X", help="Gbit/s between machines for each GPU (default 400)")
    group.add_argument("--mfu", metavar="X", help="measured fraction of the peak FLOP/s (default: estimated)")
    group = parser.add_argument_group("model and laws")
    group.add_argument(
        "--architecture", metavar="NAME", default="angpt", help=f"{', '.join(registry.names())} (default angpt)"
    )
    group.add_argument("--context", metavar="N", help="sequence length in tokens (default 2048)")
    group.add_argument("--vocab-size", metavar="N", help=f"size of the vocabulary (default {PAPER_VOCABULARY})")
    group.add_argument("--fits", type=Path, metavar="FILE", help="your scaling laws (antransformer fit --json FILE)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the config to FILE (default: print it)")


def run(parsed: argparse.Namespace) -> None:
    """Make the plan, print its tables, and print or write its config."""
    if parsed.out:
        check_target("--out", parsed.out)
        if parsed.out.exists() or parsed.out.is_symlink():
            raise ConfigError(f"--out {parsed.out}: already exists: choose another name")
    template = ModelConfig.preset(
        "32m",
        _one_of(parsed, "architecture", registry.names()),
        number(parsed, "vocab_size", PAPER_VOCABULARY),
        context=number(parsed, "context", 2048),
    )
    cluster = Cluster(
        _one_of(parsed, "gpu", GPUS),
        number(parsed, "gpus", 8),
        number(parsed, "gpus_per_machine", 8),
        positive(parsed, "network", 400.0) * 1e9 / 8,
    )
    plan, file = make(parsed, template, cluster)
    config = config_text(plan)
    show(plan, file)
    if parsed.out:
        replace_text(parsed.out, config)
        print(f"next: antransformer train --config {parsed.out} --data FOLDER")
    else:
        print(config, end="")


def make(parsed: argparse.Namespace, template: ModelConfig, cluster: Cluster) -> tuple[Plan, LawFile | None]:
    """Return the plan for the given budget, and the scaling laws that it uses."""
    budget = {name for name in ("flops", "hours", "tokens", "size") if getattr(parsed, name) is not None}
    if budget not in ({"flops"}, {"hours"}, {"tokens", "size"}) or (budget == {"hours"} and parsed.gpus is None):
        raise ConfigError(BUDGETS)
    mfu = None if parsed.mfu is None else positive(parsed, "mfu", 0.0)
    if mfu and mfu > 1:
        raise ConfigError(f"--mfu must be a fraction of at most 1, got {parsed.mfu}")
    if budget == {"tokens", "size"}:
        tokens = _above_0("tokens", convert(parsed.tokens, Count, "--tokens"))
        config = sized(parsed.size, template)
        compute = 6.0 * tokens * parameter_count(config)
        file = read_laws(parsed.fits) if parsed.fits else nearest_shipped(template.architecture, compute)
        laws = file.by_architecture.get(template.architecture) if file else None
        return plans.plan_run(config, tokens, cluster, laws, mfu), file
    amount = positive(parsed, "flops" if "flops" in budget else "hours", 0.0)
    flops = amount if "flops" in budget else cluster.peak_flops * (mfu or 0.4) * amount * 3600
    file = read_laws(parsed.fits) if parsed.fits else plans.default_laws(template.architecture, flops)
    plan_for = plans.plan_for_flops if "flops" in budget else plans.plan_for_hours
    return plan_for(amount, template, cluster, file, mfu), file


def sized(size: str, template: ModelConfig) -> ModelConfig:
    """Return the config for the name of a preset or a number of parameters."""
    if size.lower() in PRESETS:
        preset = PRESETS[size.lower()]
        return plans.resized(template, preset["width"], preset["layers"])
    try:
        parameters = convert(size, Count, "--size")
    except ConfigError:
        raise ConfigError(f"--size must be one of {', '.join(PRESETS)}, or a number such as 7B, got {size}") from None
    return plans.config_of_size(_above_0("size", parameters), template)


def positive(parsed: argparse.Namespace, name: str, default: float) -> float:
    """Return a numeric option, or ``default`` where it is not given.

    Raises:
        ConfigError: the value is not a number above 0.
    """
    value = getattr(parsed, name)
    return default if value is None else _above_0(name, convert(value, float, f"--{name}"))


def _above_0(name: str, value: float) -> float:
    if not 0 < value < 1e30:
        raise ConfigError(f"--{name} must be above 0 and below 1e30, got {value:g}")
    return value


def _one_of(parsed: argparse.Namespace, name: str, known: Iterable[str]) -> str:
    value = str(getattr(parsed, name)).lower()
    if value not in known:
        raise ConfigError(f"unknown --{name} {value}{nearest(value, known)}; known are {', '.join(known)}")
    return value


def config_text(plan: Plan) -> str:
    """Return the plan as YAML for ``antransformer train --config``."""
    header = f"# {plan.cluster.devices:,} {plan.cluster.gpu_name}: antransformer train --config FILE --data FOLDER\n"
    return header + yaml.safe_dump(plan.settings(), sort_keys=False)


def show(plan: Plan, file: LawFile | None) -> None:
    """Print all tables, and notes on sources and limits."""
    console = Console(highlight=False)
    console.print(run_table(plan))
    console.print(memory_table(plan))
    if file:
        table, notes = loss_table(plan, file)
        console.print(table)
        origin = f"measured {file.measured}" if file.measured else "your own"
        console.print(f"Scaling laws: {file.name}, {origin}.", soft_wrap=True)
    else:
        notes = [f"no scaling law for the loss of {style_of(plan.config.architecture).label}: give --fits"]
    limits = "time, memory and MFU are estimates, not measured on a GPU: see docs/scaling.md"
    for note in (*plan.sources, *plan.notes, *notes, limits):
        console.print(f"- {note}", soft_wrap=True)
    print()


def run_table(plan: Plan) -> Table:
    """Return the table of model, budget, layout and time."""
    config, layout, context = plan.config, plan.layout, plan.config.context
    table = new_table("run", "")
    rows = {
        "architecture": style_of(config.architecture).label,
        "parameters": f"{format_quantity(plan.parameters)} (width {config.width:,}, {config.layers} layers)",
        "tokens": f"{format_quantity(plan.tokens)} ({plan.tokens / plan.parameters:.3g} per parameter)",
        "compute": f"{plan.compute:.3g} FLOPs (6 N D)",
        "batch": f"{plan.batch:,} sequences of {context:,} = {format_quantity(plan.batch * context)} tokens",
        "steps": f"{plan.tokens // (plan.batch * context):,}",
        "learning rate": f"{plan.lr:g}" + (f" (for width {plan.lr_width:,})" if plan.lr_width else ""),
        "devices": f"{plan.cluster.devices:,} {plan.cluster.gpu_name}",
        "parallelism": parallelism(plan),
        "micro batch": f"{layout.micro_batch_size} sequences, {layout.grad_accum_steps} per step",
        "expected MFU": f"{plan.mfu:.1%}",
        "expected time": f"{plan.hours:,.3g} hours",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def parallelism(plan: Plan) -> str:
    """Return a phrase such as "fsdp, tensor parallel 8, activation checkpointing"."""
    layout = plan.layout
    words = [layout.strategy if layout.devices > 1 else "one device"]
    words += [f"tensor parallel {layout.tensor_parallel}"] if layout.tensor_parallel > 1 else []
    words += ["activation checkpointing"] if layout.checkpointing else []
    return ", ".join(words)


def memory_table(plan: Plan) -> Table:
    """Return the table of the peak memory of one device."""
    table = new_table("peak memory per device", "GB")
    for name, size in (*vars(plan.memory).items(), ("total", plan.memory.total)):
        table.add_row(name.replace("_", " "), f"{size / 1e9:.2f}")
    table.add_row(f"of {plan.cluster.gpu_name}", f"{plan.cluster.gpu.memory / 1e9:.0f}")
    return table


def loss_table(plan: Plan, file: LawFile) -> tuple[Table, list[str]]:
    """Return the table of expected losses for these parameters and tokens, and notes on extrapolation."""
    table, notes = new_table("expected loss, nats per token", "", "band", "law"), []
    for name in dict.fromkeys((plan.config.architecture, *COMPARED)):
        laws = file.by_architecture.get(name)
        prediction = predict(laws, plan.parameters, plan.tokens) if laws else None
        label = style_of(name).label
        if prediction is None:
            notes.append(f"no scaling law for the loss of {label}: give --fits")
            continue
        known = math.isfinite(prediction.high)
        band = f"{prediction.low:.3f} to {prediction.high:.3f} ({prediction.band})" if known else "unknown"
        table.add_row(label, f"{prediction.loss:.3f}", band, prediction.law)
        notes += [f"loss of {label}, extrapolated: {line}" for line in prediction.extrapolations]
    return table, notes
