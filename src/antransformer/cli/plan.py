"""Plan a run: which size, tokens, batch and learning rate, what loss to expect, how to share it, how long it takes.

The budget is one of: --flops; --gpus with --hours; --tokens with --size. The size comes from scaling laws, your own
(--fits, the JSON of 'antransformer fit') or those shipped that were measured nearest; so does the loss, for anGPT and
for GPT+. Memory and hours come from a model of them, which docs/scaling.md describes and checks.

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
from antransformer.scaling.law_files import LawFile, nearest_shipped, predict, read_laws, shown
from antransformer.scaling.planner import Cluster, Plan
from antransformer.training.config import Count, convert, nearest
from antransformer.training.cost_model.throughput import GPUS
from antransformer.training.defaults import parameter_count

USAGE = "antransformer plan (--flops X | --gpus N --hours X | --tokens TOKENS --size SIZE) [options]"
BUDGETS = "give one budget: --flops, or --hours with --gpus, or --tokens with --size"
COMPARED = ("angpt", "gpt+")


def add_arguments(parser: Parser) -> None:
    """Options of the verb."""
    group = parser.add_argument_group("budget, one of")
    group.add_argument("--flops", metavar="X", help="compute, such as 1e20, as scaling laws count it: 6 N D")
    group.add_argument("--hours", metavar="X", help="time on --gpus")
    group.add_argument("--tokens", metavar="TOKENS", help="such as 100B, with --size")
    group.add_argument("--size", metavar="SIZE", help=f"{', '.join(PRESETS)}, or a number of parameters such as 7B")
    group = parser.add_argument_group("machines")
    group.add_argument("--gpus", metavar="N", help="how many (default 8)")
    group.add_argument("--gpu", metavar="NAME", default="h100", help=f"{', '.join(GPUS)} (default h100)")
    group.add_argument("--gpus-per-machine", metavar="N", help="(default 8)")
    group.add_argument("--network", metavar="X", help="Gbit/s between machines for each GPU (default 400)")
    group.add_argument("--mfu", metavar="X", help="share of the peak that you measured (default: by the model)")
    group = parser.add_argument_group("model and laws")
    group.add_argument(
        "--architecture", metavar="NAME", default="angpt", help=f"{', '.join(registry.names())} (default angpt)"
    )
    group.add_argument("--context", metavar="N", help="longest sequence in tokens (default 2048)")
    group.add_argument("--vocab-size", metavar="N", help=f"of your tokenizer (default {PAPER_VOCABULARY})")
    group.add_argument("--fits", type=Path, metavar="FILE", help="laws of your own, by antransformer fit --json FILE")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the config there (default: print it)")


def run(parsed: argparse.Namespace) -> None:
    """Plan, print, write."""
    if parsed.out:
        check_target("--out", parsed.out)
        if parsed.out.exists() or parsed.out.is_symlink():
            raise ConfigError(f"--out {parsed.out}: exists, and is not overwritten: choose another name")
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
    """The plan of whichever budget was given, and the laws that it follows."""
    given = {name for name in ("flops", "hours", "tokens", "size") if getattr(parsed, name) is not None}
    if given not in ({"flops"}, {"hours"}, {"tokens", "size"}) or (given == {"hours"} and parsed.gpus is None):
        raise ConfigError(BUDGETS)
    mfu = None if parsed.mfu is None else positive(parsed, "mfu", 0.0)
    if mfu and mfu > 1:
        raise ConfigError(f"--mfu must be at most 1, a share, got {parsed.mfu}")
    if given == {"tokens", "size"}:
        tokens = _above_0("tokens", convert(parsed.tokens, Count, "--tokens"))
        config = sized(parsed.size, template)
        compute = 6.0 * tokens * parameter_count(config)
        file = read_laws(parsed.fits) if parsed.fits else nearest_shipped(template.architecture, compute)
        laws = file.of.get(template.architecture) if file else None
        return plans.make(config, tokens, cluster, laws, mfu), file
    budget = positive(parsed, "flops" if "flops" in given else "hours", 0.0)
    rough = budget if "flops" in given else cluster.peak * (mfu or 0.4) * budget * 3600
    file = read_laws(parsed.fits) if parsed.fits else plans.default_laws(template.architecture, rough)
    way = plans.by_compute if "flops" in given else plans.by_hours
    return way(budget, template, cluster, file, mfu), file


def sized(size: str, template: ModelConfig) -> ModelConfig:
    """The model of a preset's name, or of a number of parameters."""
    if size.lower() in PRESETS:
        it = PRESETS[size.lower()]
        return plans.with_shape(template, it["width"], it["layers"])
    try:
        parameters = convert(size, Count, "--size")
    except ConfigError:
        raise ConfigError(f"--size must be one of {', '.join(PRESETS)}, or a number such as 7B, got {size}") from None
    return plans.shape(_above_0("size", parameters), template)


def positive(parsed: argparse.Namespace, name: str, default: float) -> float:
    """An option that is a number above 0.

    Raises:
        ConfigError: it is not.
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
    """The YAML file."""
    header = f"# {plan.cluster.devices:,} {plan.cluster.name}: antransformer train --config FILE --data FOLDER\n"
    return header + yaml.safe_dump(plan.settings(), sort_keys=False)


def show(plan: Plan, file: LawFile | None) -> None:
    """All tables, and what is to be known of them."""
    console = Console(highlight=False)
    console.print(run_table(plan))
    console.print(memory_table(plan))
    if file:
        table, said = loss_table(plan, file)
        console.print(table)
        where = f"measured {file.measured}" if file.measured else "your own"
        console.print(f"Laws: {file.name}, {where}.", soft_wrap=True)
    else:
        said = [f"no loss law measured for {style_of(plan.config.architecture).label}: give --fits"]
    for note in (*plan.sources, *plan.notes, *said):
        console.print(f"- {note}", soft_wrap=True)
    console.print(
        "- hours, memory and MFU are a model's, nothing was measured on a GPU: docs/scaling.md", soft_wrap=True
    )
    print()


def run_table(plan: Plan) -> Table:
    """What to train, and for how long."""
    config, layout, context = plan.config, plan.layout, plan.config.context
    table = new_table("run", "")
    rows = {
        "architecture": style_of(config.architecture).label,
        "parameters": f"{shown(plan.parameters)} (width {config.width:,}, {config.layers} layers)",
        "tokens": f"{shown(plan.tokens)} ({plan.tokens / plan.parameters:.3g} a parameter)",
        "compute": f"{plan.compute:.3g} FLOPs (6 N D)",
        "batch": f"{plan.batch:,} sequences of {context:,} = {shown(plan.batch * context)} tokens",
        "steps": f"{plan.tokens // (plan.batch * context):,}",
        "learning rate": f"{plan.lr:g}" + (f" (for width {plan.lr_width:,})" if plan.lr_width else ""),
        "devices": f"{plan.cluster.devices:,} {plan.cluster.name}",
        "sharing": sharing(plan),
        "micro batch": f"{layout.micro_batch_size} sequences, {layout.passes} a step",
        "expected MFU": f"{plan.mfu:.1%}",
        "expected time": f"{plan.hours:,.3g} hours",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def sharing(plan: Plan) -> str:
    """In words."""
    layout = plan.layout
    words = [layout.way if layout.devices > 1 else "one device"]
    words += [f"tensor parallel {layout.tensor}"] if layout.tensor > 1 else []
    words += ["activation checkpointing"] if layout.checkpointing else []
    return ", ".join(words)


def memory_table(plan: Plan) -> Table:
    """Of one device."""
    table = new_table("memory a device at its peak", "GB")
    for name, size in (*vars(plan.memory).items(), ("total", plan.memory.total)):
        table.add_row(name, f"{size / 1e9:.2f}")
    table.add_row(f"of {plan.cluster.name}", f"{plan.cluster.gpu.memory / 1e9:.0f}")
    return table


def loss_table(plan: Plan, file: LawFile) -> tuple[Table, list[str]]:
    """The loss to expect of either architecture for the same parameters and tokens, and what speaks against it."""
    table, said = new_table("expected loss, nats per token", "", "band", "law"), []
    for name in dict.fromkeys((plan.config.architecture, *COMPARED)):
        found = predict(file.of[name], plan.parameters, plan.tokens) if name in file.of else None
        if found is None:
            said.append(f"no loss law measured for {style_of(name).label}: give --fits")
            continue
        known = math.isfinite(found.high)
        band = f"{found.low:.3f} to {found.high:.3f} ({found.band})" if known else "unknown"
        table.add_row(style_of(name).label, f"{found.loss:.3f}", band, found.law)
        said += [f"loss of {style_of(name).label}, outside of what was measured: {line}" for line in found.outside]
    return table, said
