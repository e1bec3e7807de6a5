"""Measure speed, side by side in alternation: medians over rounds, with quartiles.

step: training (forward, backward, optimizer, bound), of our architectures and of other libraries in the same shape,
each with its own model, loss and optimizer: tokens a second, memory at the peak, and the share that is used of what
the device could do. That is what its data sheet says, or on a CPU the speed of a large matrix product in the round.

loss: the loss of the head's product and its gradients, whole and in chunks, with memory at the peak; of vocabularies of
512 and 50,304 unless one is given.

data: tokens a second from text files to shards (``prepare``), beside the library tokenizers alone on the same text in
memory; and training with batches that are read in turn or ahead, with the share of the time that it waits for them.

optimizer: steps of the optimizer with and without the bounds, in parameters a second.

generate: tokens a second while the cache is filled with a prompt and while new tokens are made, of our architectures
and of transformers' Qwen3 in the same shape, with random weights.

With --sweep: the exponent p of size^p by which time and memory grow, beside the one that the count of operations, or
the model of memory, asks for; "at the end" is over the last doubling.

The ratio is that to the speed of the first variant (of generate: the folded anGPT) in the same round.

examples:
  antransformer bench --what step --mode both
  antransformer bench --what step --preset 32m --model.context 256 --variants gpt+ angpt --profile traces
  antransformer bench --what data --text 'corpus/*.jsonl' --tokenizer path/to/tokenizer.json
  antransformer bench --what generate --preset 125m --mode both --dtype bfloat16 --json speed.json
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from antransformer.benchmarks import data as bench_data
from antransformer.benchmarks import generate as bench_generate
from antransformer.benchmarks import growth as bench_sweep
from antransformer.benchmarks import loss_and_optimizer as bench_parts
from antransformer.benchmarks import train_step as bench_step
from antransformer.benchmarks.models import SHAPE, TRAINEES, versions
from antransformer.benchmarks.timing import Mode, Quartiles, Row, machine
from antransformer.cli.common import check_target, new_table
from antransformer.cli.options import Parser, add_config, settings_of
from antransformer.errors import ConfigError
from antransformer.models import ModelConfig
from antransformer.models.config import PAPER_VOCABULARY, preset_sizes
from antransformer.training.config import normalize_settings
from antransformer.training.device import choose_device, choose_precision

USAGE = "antransformer bench --what NAME [options]"
MODES: dict[str, tuple[Mode, ...]] = {
    "eager": ("eager",),
    "compiled": ("compiled",),
    "both": ("eager", "compiled"),
}
WIDEST = 200  # columns of a table
VOCABULARIES = [512, PAPER_VOCABULARY]
# Of what is measured, the options that it has of those that not all have, with their defaults.
DEFAULTS: dict[str, dict[str, Any]] = {
    "step": {"batch": [8], "variants": list(TRAINEES), "mode": "eager", "profile": None, "sweep": None},
    "loss": {"batch": [8]},
    "data": {"batch": [8], "text": [], "tokenizer": []},
    "optimizer": {},
    "generate": {"batch": [1, 16], "prompt": 512, "new": 128, "mode": "eager"},
}


def add_arguments(parser: Parser) -> None:
    """Options of the verb."""
    parser.add_argument("--what", choices=BENCHES, required=True, help="what to measure")
    parser.add_argument("--preset", default="nano", metavar="NAME", help="size of the models (default nano)")
    parser.add_argument(
        "--batch", type=int, nargs="+", metavar="N", help="sequences at once (default 8; generate: 1 16)"
    )
    parser.add_argument("--variants", nargs="+", metavar="NAME", help=f"step: of {', '.join(TRAINEES)} (default all)")
    parser.add_argument(
        "--text", nargs="+", metavar="INPUT", help="data: as of prepare (default 16 MiB of Python's standard library)"
    )
    parser.add_argument(
        "--tokenizer", nargs="+", metavar="NAME", help="data: as of prepare (default byte, and a BPE of 4,096 ids)"
    )
    parser.add_argument("--prompt", type=int, metavar="N", help="generate: tokens of a prompt (default 512)")
    parser.add_argument("--new", type=int, metavar="N", help="generate: tokens to make (default 128)")
    parser.add_argument("--mode", choices=MODES, help="through torch.compile or not (default eager)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="turns of each variant (default 15)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: as torch chooses)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default auto)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the matrix products; generate: of the weights too (default auto: bfloat16 on a GPU)",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FOLDER",
        help="step: write a trace of one step of each variant there, and print its ten dearest operations",
    )
    parser.add_argument(
        "--sweep",
        type=Path,
        metavar="FOLDER",
        help="step: at one, two, four and eight times each of width, layers, context and batch, with exponents and a "
        "picture there (variants by default gpt+ and angpt)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every round there too")
    group = parser.add_argument_group("model settings", "to change what the preset says")
    add_config(group, ModelConfig, prefix="model.", only=SHAPE)


def run(parsed: argparse.Namespace) -> None:
    """Measure and print."""
    some = parsed.variants is None
    complete(parsed)
    if parsed.sweep and some:
        parsed.variants = ["gpt+", "angpt"]
    for name, value in (("rounds", parsed.rounds), ("batch", min(parsed.batch or [1]))):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if parsed.json:
        check_target("--json", parsed.json)
    if parsed.threads is not None:
        if parsed.threads < 1:
            raise ConfigError(f"--threads must be at least 1, got {parsed.threads}")
        torch.set_num_threads(parsed.threads)
    facts, rows = BENCHES[parsed.what](parsed)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDEST  # nobody's lines are cut
    console.print(table(rows))
    if "growth" in facts:
        console.print(growth_table(facts["growth"]))
    if parsed.json:
        facts |= {"machine": machine(choose_device(parsed.device)), "versions": versions()}
        content = {"what": parsed.what, **facts, "rows": [asdict(row) for row in rows]}
        parsed.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"figures: {parsed.json}")


def complete(parsed: argparse.Namespace) -> None:
    """Fill in the defaults of what is measured.

    Raises:
        ConfigError: an option was given that it does not have.
    """
    for name in sorted({name for options in DEFAULTS.values() for name in options}):
        if name in DEFAULTS[parsed.what]:
            if getattr(parsed, name) is None:
                setattr(parsed, name, DEFAULTS[parsed.what][name])
        elif getattr(parsed, name) is not None:
            having = ", ".join(what for what, options in DEFAULTS.items() if name in options)
            raise ConfigError(f"--{name} is an option of {having}, not of {parsed.what}: leave it out")


def steps(parsed: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """What was measured of training, and its rows."""
    device = choose_device(parsed.device)
    settings = bench_step.Settings(
        model=shape(parsed),
        variants=tuple(parsed.variants),
        batch=one(parsed.batch),
        modes=MODES[parsed.mode],
        rounds=parsed.rounds,
        device=device,
        precision=choose_precision(parsed.dtype, device),
        profile=parsed.profile,
    )
    for option, path in (("--profile", parsed.profile), ("--sweep", parsed.sweep)):
        if path:
            make_folder(option, path)
    if parsed.sweep and parsed.profile:
        raise ConfigError("--profile is of one shape, and --sweep of many: leave one out")
    rows = (bench_sweep.bench_sweep if parsed.sweep else bench_step.bench_step)(settings, tell)
    facts: dict[str, Any] = {
        "model": settings.model.mapping(),
        "batch": settings.batch,
        "dtype": str(settings.precision),
        "baseline": rows[0].variant,
    }
    if parsed.sweep:
        facts["growth"] = [asdict(it) for it in bench_sweep.growths(settings, rows)]
        for mode in settings.modes:
            chart = bench_sweep.growth_chart(settings, [row for row in rows if row.task["mode"] == mode])
            tell(f"picture: {chart.save_png(parsed.sweep)}")
    return facts, rows


def loss(parsed: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """What was measured of the loss, and its rows."""
    device, batch = choose_device(parsed.device), one(parsed.batch)
    dtype = choose_precision(parsed.dtype, device)
    given = shape(parsed)
    sizes = [given.vocab_size] if "vocab_size" in settings_of(parsed).get("model", {}) else VOCABULARIES
    shapes = [replace(given, vocab_size=size) for size in sizes]
    rows = list(bench_parts.bench_loss(shapes, batch, parsed.rounds, device, dtype))
    return {"width": given.width, "context": given.context, "batch": batch, "dtype": str(dtype)}, rows


def data(parsed: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """What was measured of the data, and its rows."""
    device, batch, model = choose_device(parsed.device), one(parsed.batch), shape(parsed)
    dtype = choose_precision(parsed.dtype, device)
    rows = list(bench_data.bench_tokens(parsed.text or bench_data.sample(), parsed.tokenizer, parsed.rounds))
    rows += bench_data.bench_loading(model, batch, parsed.rounds, device, dtype)
    return {"model": model.mapping(), "batch": batch, "dtype": str(dtype)}, rows


def optimizer(parsed: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """What was measured of the optimizer, and its rows."""
    model = shape(parsed)
    rows = list(bench_parts.bench_optimizer(model, parsed.rounds, choose_device(parsed.device)))
    return {"model": model.mapping()}, rows


def generation(parsed: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """What was measured of generation, and its rows."""
    device = choose_device(parsed.device)
    settings = bench_generate.Settings(
        model=shape(parsed, context=parsed.prompt + parsed.new),
        batches=tuple(parsed.batch),
        prompt=parsed.prompt,
        new=parsed.new,
        modes=MODES[parsed.mode],
        rounds=parsed.rounds,
        device=device,
        dtype=choose_precision(parsed.dtype, device),
    )
    rows = bench_generate.bench_generate(settings, tell)
    facts = {
        "model": settings.model.mapping(),
        "prompt": settings.prompt,
        "new": settings.new,
        "dtype": str(settings.dtype),
        "baseline": bench_generate.BASELINE,
    }
    return facts, rows


def shape(parsed: argparse.Namespace, **sizes: int) -> ModelConfig:
    """The preset with these sizes, and those given on the command line."""
    given = normalize_settings({"preset": parsed.preset, **settings_of(parsed)}, "command line").get("model", {})
    return ModelConfig(**{**preset_sizes(parsed.preset), "vocab_size": PAPER_VOCABULARY, **sizes, **given})


def one(batches: list[int]) -> int:
    """The batch, where there can be only one.

    Raises:
        ConfigError: there are several.
    """
    if len(batches) > 1:
        raise ConfigError(f"--batch takes one number here, got {len(batches)}")
    return batches[0]


def make_folder(option: str, path: Path) -> None:
    """Make a folder for results, before the work.

    Raises:
        ConfigError: it can not be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option} {path} can not be made: {error.strerror}; give the name of a folder") from error


def tell(text: str) -> None:
    """Progress, which is no result."""
    print(text, file=sys.stderr, flush=True)


BENCHES: dict[str, Callable[[argparse.Namespace], tuple[dict[str, Any], list[Row]]]] = {
    "step": steps,
    "loss": loss,
    "data": data,
    "optimizer": optimizer,
    "generate": generation,
}


def table(rows: Sequence[Row]) -> Table:
    """Medians and quartiles, and what else was measured."""
    names = [*rows[0].task, "variant"]
    more = [name for name in EXTRA if any(extra(row, name) for row in rows)]
    unit = "parameters/s" if "architecture" in rows[0].task else "tokens/s"
    shown = new_table(*names, unit, "quartiles", "ratio", "quartiles", *more)
    shown.show_edge, shown.padding = False, (0, 0, 0, 0)  # a terminal of 80 columns has room for all
    for place, column in enumerate(shown.columns):
        column.justify, column.no_wrap = "left" if place < len(names) else "right", True
    for number, row in enumerate(rows, start=1):
        last = number == len(rows) or rows[number].task != row.task
        cells = [*spread(row.speed, ",.0f"), *spread(row.ratio, ".2f"), *(extra(row, name) for name in more)]
        shown.add_row(
            *(f"{value:,}" if isinstance(value, int) else value for value in row.task.values()),
            row.variant,
            *cells,
            end_section=last,
        )
    return shown


def growth_table(growths: Sequence[dict[str, Any]]) -> Table:
    """Exponents, measured and asked for: of the time over all sizes and over the last doubling, and of the memory."""
    shown = new_table("mode", "axis", "variant", "time", "asked", "at the end", "asked", "memory", "asked")
    for column in shown.columns[1:3]:
        column.justify = "left"
    for it in growths:
        numbers = (it[key] for key in ("time", "asked", "end", "end_asked", "memory", "memory_asked"))
        shown.add_row(it["mode"], it["axis"], it["name"], *(f"{number:.2f}" for number in numbers))
    return shown


EXTRA = ("MiB", "used", "waits")


def extra(row: Row, name: str) -> str:
    """What not all rows have: memory at the peak, shares of the device's speed used and of the time spent waiting."""
    if name == "MiB":
        return "" if row.memory is None else f"{row.memory / 2**20:,.{1 if row.memory < 2**27 else 0}f}"
    share = row.utilization if name == "used" else row.waiting
    return "" if share is None else f"{share.median:{'.0%' if name == 'used' else '.2%'}}"


def spread(value: Quartiles, style: str) -> tuple[str, str]:
    """Median, and ``low-high``."""
    return f"{value.median:{style}}", f"{value.low:{style}}-{value.high:{style}}"
