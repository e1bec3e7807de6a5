"""Measure speed, side by side in alternation: medians over rounds, with quartiles.

generate: tokens a second while the cache is filled with a prompt and while new tokens are made, of our architectures
and of transformers' Qwen3 in the same shape, with random weights. The ratio is that to the folded anGPT's speed, round
by round.

examples:
  antransformer bench --what generate
  antransformer bench --what generate --preset 125m --mode both --dtype bfloat16 --json speed.json
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from antransformer.analysis import bench_generate
from antransformer.analysis.bench import Quartiles, Row, machine
from antransformer.cli.common import check_target
from antransformer.cli.options import Parser, add_config, settings_of
from antransformer.errors import ConfigError
from antransformer.models import ModelConfig
from antransformer.models.config import PAPER_VOCABULARY, preset_sizes
from antransformer.training.config import normalise
from antransformer.training.device import choose_device, choose_precision

USAGE = "antransformer bench --what generate [options]"
MODES: dict[str, tuple[bench_generate.Mode, ...]] = {
    "eager": ("eager",),
    "compiled": ("compiled",),
    "both": ("eager", "compiled"),
}


def add_arguments(parser: Parser) -> None:
    """Options of the verb."""
    parser.add_argument("--what", choices=BENCHES, required=True, help="what to measure")
    parser.add_argument("--preset", default="nano", metavar="NAME", help="size of the models (default nano)")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 16], metavar="N", help="sequences at once (default 1 16)"
    )
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of a prompt (default 512)")
    parser.add_argument("--new", type=int, default=128, metavar="N", help="tokens to make (default 128)")
    parser.add_argument("--mode", choices=MODES, default="eager", help="through torch.compile or not (default eager)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="turns of each contender (default 15)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: as torch chooses)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default auto)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the weights (default auto: bfloat16 on a GPU)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every round there too")
    group = parser.add_argument_group("model settings", "to change what the preset says")
    add_config(group, ModelConfig, prefix="model.", only=bench_generate.SHAPE)


def run(parsed: argparse.Namespace) -> None:
    """Measure and print."""
    if parsed.json:
        check_target("--json", parsed.json)
    if parsed.threads is not None:
        if parsed.threads < 1:
            raise ConfigError(f"--threads must be at least 1, got {parsed.threads}")
        torch.set_num_threads(parsed.threads)
    facts, rows = BENCHES[parsed.what](parsed)
    Console(highlight=False).print(table(rows))
    if parsed.json:
        content = {"what": parsed.what, **facts, "rows": [asdict(row) for row in rows]}
        parsed.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"figures: {parsed.json}")


def generation(parsed: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """What was measured, and its rows."""
    given = normalise({"preset": parsed.preset, **settings_of(parsed)}, "command line")
    shape = {**preset_sizes(parsed.preset), "vocab_size": PAPER_VOCABULARY, "context": parsed.prompt + parsed.new}
    device = choose_device(parsed.device)
    settings = bench_generate.Settings(
        model=ModelConfig(**{**shape, **given.get("model", {})}),
        batches=tuple(parsed.batch),
        prompt=parsed.prompt,
        new=parsed.new,
        modes=MODES[parsed.mode],
        rounds=parsed.rounds,
        device=device,
        dtype=choose_precision(parsed.dtype, device),
    )
    rows = bench_generate.bench_generate(settings, note=lambda text: print(text, file=sys.stderr, flush=True))
    facts = {
        "model": settings.model.mapping(),
        "prompt": settings.prompt,
        "new": settings.new,
        "dtype": str(settings.dtype),
        "reference": bench_generate.REFERENCE,
        "machine": machine(device),
    }
    return facts, rows


BENCHES: dict[str, Callable[[argparse.Namespace], tuple[dict[str, Any], list[Row]]]] = {"generate": generation}


def table(rows: Sequence[Row]) -> Table:
    """Medians and quartiles."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in (*rows[0].task, "contender"):
        shown.add_column(column)
    for column in ("tokens/s", "quartiles", "ratio", "quartiles"):
        shown.add_column(column, justify="right", no_wrap=True)
    for number, row in enumerate(rows, start=1):
        last = number == len(rows) or rows[number].task != row.task
        shown.add_row(
            *(str(value) for value in row.task.values()),
            row.contender,
            *spread(row.speed, ",.0f"),
            *spread(row.ratio, ".2f"),
            end_section=last,
        )
    return shown


def spread(value: Quartiles, style: str) -> tuple[str, str]:
    """Median, and ``low-high``."""
    return f"{value.median:{style}}", f"{value.low:{style}}-{value.high:{style}}"
