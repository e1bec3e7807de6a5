"""Plan a run: size, tokens, batch, learning rate, expected loss, parallelism and time.

The budget is one of: --flops; --gpus with --hours; --tokens with --size. Scaling laws give the size and the expected
loss, for anGPT and for GPT+: your own (--fits, the JSON of 'antransformer fit'), or the shipped laws measured nearest.
Memory and hours come from a cost model, which docs/planning.md describes and checks.

examples:
  antransformer plan --flops 1e20
  antransformer plan --gpus 8 --gpu h100 --hours 72 --mfu 0.4
  antransformer plan --tokens 100B --size 0.5b --out plan.yaml
  antransformer train --config plan.yaml --data data/mine
"""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.table import Table

import antransformer
from antransformer.cli.options import Parser, number
from antransformer.cli.tables import TableConsole, new_table
from antransformer.errors import ConfigError
from antransformer.files import check_file_target, quoted, write_result
from antransformer.models import registry
from antransformer.models.config import PAPER_VOCABULARY, PRESETS
from antransformer.reporting.labels import style_of
from antransformer.training.optimizer_registry import OPTIMIZERS
from antransformer.wording import counted

if TYPE_CHECKING:
    from antransformer.scaling.law_files import LawFile
    from antransformer.scaling.planner import Plan

USAGE = "antransformer plan (--flops X | --gpus N --hours X |\n       --tokens TOKENS --size SIZE) [options]"
COMPARED = ("angpt", "gpt+")


def add_arguments(parser: Parser) -> None:
    """Add the options of ``plan``: budget, cluster, model and laws."""
    group = parser.add_argument_group("budget, one of")
    group.add_argument("--flops", metavar="X", help="compute in FLOPs, such as 1e20: 6 times parameters times tokens")
    group.add_argument("--hours", metavar="X", help="time on --gpus")
    group.add_argument("--tokens", metavar="TOKENS", help="tokens to train on, such as 100B, with --size")
    group.add_argument("--size", metavar="SIZE", help=f"{', '.join(PRESETS)}, or a number of parameters such as 7B")
    group = parser.add_argument_group("cluster")
    group.add_argument("--gpus", metavar="N", help="number of GPUs (default 8)")
    group.add_argument("--gpu", metavar="NAME", default="h100", help="GPU model, such as a100-80gb (default h100)")
    group.add_argument("--gpus-per-machine", metavar="N", help="GPUs per node (default 8)")
    group.add_argument("--network", metavar="X", default="400", help="Gbit/s between nodes for each GPU (default 400)")
    group.add_argument("--mfu", metavar="X", help="measured model FLOPs utilization (default: estimated)")
    group = parser.add_argument_group("model and laws")
    group.add_argument(
        "--architecture", metavar="NAME", default="angpt", help=f"{', '.join(registry.names())} (default angpt)"
    )
    group.add_argument("--context", metavar="N", help="longest sequence in tokens (default 2048)")
    group.add_argument("--vocab-size", metavar="N", help=f"vocabulary size (default {PAPER_VOCABULARY})")
    group.add_argument("--fits", type=Path, metavar="FILE", help="your own laws, written by antransformer fit --json")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the config to FILE (default: print it)")


def run(parsed: argparse.Namespace) -> None:
    """Print the plan, and write or print its config."""
    if parsed.out:
        check_file_target("--out", parsed.out)
        if parsed.out.exists() or parsed.out.is_symlink():
            raise ConfigError(f"--out {parsed.out} exists and is not overwritten: choose another name")
    plan = antransformer.plan(
        flops=parsed.flops,
        hours=parsed.hours,
        tokens=parsed.tokens,
        size=parsed.size,
        architecture=parsed.architecture,
        context=number(parsed, "context", 2048),
        vocab_size=number(parsed, "vocab_size", PAPER_VOCABULARY),
        gpus=number(parsed, "gpus", None),
        gpu=parsed.gpu,
        gpus_per_machine=number(parsed, "gpus_per_machine", 8),
        network=parsed.network,
        mfu=parsed.mfu,
        fits=parsed.fits,
    )
    print_plan(plan)
    config = config_text(plan)
    if parsed.out:
        write_result(parsed.out, config)
        print(f"next: antransformer train --config {quoted(parsed.out)} --data FOLDER")
    else:
        print(config, end="")


def config_text(plan: "Plan") -> str:
    """Return the YAML file of settings for ``antransformer train --config``."""
    header = f"# {plan.cluster.devices:,} {plan.cluster.gpu_name}: antransformer train --config FILE --data FOLDER\n"
    return header + yaml.safe_dump(plan.settings(), sort_keys=False)


def print_plan(plan: "Plan") -> None:
    """Print the tables of run, memory and loss, and the notes."""
    console = TableConsole()
    console.print(run_table(plan))
    console.print(memory_table(plan))
    if plan.laws:
        table, caveats = loss_table(plan, plan.laws)
        console.print(table)
        origin = f"measured {plan.laws.measured}" if plan.laws.measured else "your own"
        console.print(f"Laws: {plan.laws.name}, {origin}.", soft_wrap=True)
    else:
        caveats = [no_law(plan.config.architecture)]
    for note in (*plan.sources, *plan.notes, *caveats):
        console.print(f"- {note}", soft_wrap=True)
    console.print("- hours, memory and MFU are estimates: docs/planning.md", soft_wrap=True)
    print()


def run_table(plan: "Plan") -> Table:
    """Return a table of the settings and the expected time."""
    from antransformer.scaling.law_files import format_quantity

    config, layout, context = plan.config, plan.layout, plan.config.context
    table = new_table("run", "")
    rows = {
        "architecture": style_of(config.architecture).label,
        "parameters": f"{format_quantity(plan.parameters)} (width {config.width:,}, {counted(config.layers, 'layer')})",
        "tokens": f"{format_quantity(plan.tokens)} ({plan.tokens / plan.parameters:.3g} per parameter)",
        "compute": f"{plan.compute:.3g} FLOPs (6 N D)",
        "batch": f"{counted(plan.batch, 'sequence')} of {context:,} = {format_quantity(plan.batch * context)} tokens",
        "steps": f"{plan.steps:,}",
        "optimizer": OPTIMIZERS[plan.optimizer].label,
        "learning rate": format_rate(plan),
        "devices": f"{plan.cluster.devices:,} {plan.cluster.gpu_name}",
        "parallelism": parallelism(plan),
        "micro-batch": f"{counted(layout.micro_batch_size, 'sequence')}, accumulated over {layout.grad_accum_steps}",
        "expected MFU": f"{plan.mfu:.1%}",
        "expected time": f"{plan.hours:,.3g} hours",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def format_rate(plan: "Plan") -> str:
    """Return the learning rate, with the width and the steps at which it was tuned."""
    tuned = [f"width {plan.lr_width:,}"] if plan.lr_width else []
    tuned += [counted(plan.lr_horizon, "step")] if plan.lr_horizon else []
    return f"{plan.lr:g}" + (f" (at {' and '.join(tuned)})" if tuned else "")


def parallelism(plan: "Plan") -> str:
    """Return the layout in words, such as ``fsdp, tensor parallel 2``."""
    layout = plan.layout
    words = [layout.strategy if layout.devices > 1 else "one device"]
    words += [f"tensor parallel {layout.tensor_parallel}"] if layout.tensor_parallel > 1 else []
    words += ["activation checkpointing"] if layout.checkpointing else []
    return ", ".join(words)


def memory_table(plan: "Plan") -> Table:
    """Return a table of the peak memory of one device by purpose, in GB."""
    table = new_table("peak memory per device", "GB")
    for name, size in (*vars(plan.memory).items(), ("total", plan.memory.total)):
        table.add_row(name.replace("_", " "), f"{size / 1e9:.2f}")
    table.add_row(f"available on {plan.cluster.gpu_name}", f"{plan.cluster.gpu.memory / 1e9:.0f}")
    return table


def loss_table(plan: "Plan", laws: "LawFile") -> tuple[Table, list[str]]:
    """Return a table of the expected losses for these parameters and tokens, and caveats about them."""
    from antransformer.scaling.law_files import predict

    table, caveats = new_table("expected loss, nats per token", "", "band", "law"), []
    for name in dict.fromkeys((plan.config.architecture, *COMPARED)):
        law = laws.by_architecture.get(name)
        prediction = predict(law, plan.parameters, plan.tokens) if law else None
        if prediction is None:
            caveats.append(no_law(name))
            continue
        label = style_of(name).label
        known = math.isfinite(prediction.high)
        band = f"{prediction.low:.3f} to {prediction.high:.3f} ({prediction.band})" if known else "unknown"
        table.add_row(label, f"{prediction.loss:.3f}", band, prediction.law)
        caveats += [f"loss of {label} is extrapolated: {line}" for line in prediction.extrapolations]
    return table, caveats


def no_law(architecture: str) -> str:
    """Return the note that no loss law is known for an architecture."""
    return f"no loss law measured for {style_of(architecture).label}: give --fits"
