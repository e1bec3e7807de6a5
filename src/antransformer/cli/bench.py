"""Measure speed and memory of variants in alternation: medians and quartiles over rounds.

step: training steps of our architectures and of other libraries in the same shape (forward, backward, optimizer,
bounds). Reports tokens per second, peak memory, and the fraction of the attainable FLOP/s. That peak comes from the
data sheet of the GPU; on a CPU it is measured with a large matrix product.

loss: cross-entropy of the head with its gradients, with and without chunks, and its peak memory. Vocabulary sizes are
512 and 50,304 unless --model.vocab-size is given.

optimizer: optimizer steps with and without bounds, in parameters per second.

data: "antransformer prepare" against the library tokenizers on the same text in memory; and training with synchronous
and prefetched batches, with the fraction of time spent waiting for data.

busy: training on a CPU, alone and next to --processes other busy processes, with the number of threads fixed and
adapted. With --rounds 3 it takes about five minutes.

generate: prefill and decode of our architectures and of Qwen3 (transformers) in the same shape, with random weights.

engines: prefill and decode of the model in --checkpoint by this package, llama.cpp (xllamacpp) and MLX (mlx-lm), where
they are installed, on the CPU and with one sequence.

The ratio is the speed divided by the speed of the first variant in the same round (generate: the folded anGPT).

With --sweep, time and memory are measured at several sizes. An exponent p means growth as size^p. "expected" is the
exponent of the number of operations, or of the memory model.

examples:
  antransformer bench step --mode both
  antransformer bench step --preset 32m --model.context 256 --variants gpt+ angpt --profile traces
  antransformer bench data --text 'corpus/*.jsonl' --tokenizer path/to/tokenizer.json
  antransformer bench generate --preset 125m --mode both --dtype bfloat16 --json speed.json
  antransformer bench engines --checkpoint runs/angpt-nano --threads 1
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.table import Table

from antransformer.benchmarks.settings import MASKED_VARIANTS, MODES, SHAPE, VARIANTS, Mode
from antransformer.cli.options import Parser, add_config, add_device_argument, settings_of
from antransformer.cli.tables import TableConsole, new_table
from antransformer.errors import ConfigError, UsageError
from antransformer.files import check_json_target, write_result
from antransformer.models.config import PAPER_VOCABULARY, ModelConfig, preset_sizes
from antransformer.training.config import normalize_settings

if TYPE_CHECKING:
    from antransformer.benchmarks.timing import Benchmark, Quartiles, Row

USAGE = "antransformer bench BENCHMARK [options]"
TABLE_WIDTH = 200  # columns, if the output is not a terminal
MAX_THREADS = 1024
LOSS_VOCABULARIES = (512, PAPER_VOCABULARY)
GROWTH_VARIANTS = ("gpt+", "angpt")
# Options that not every benchmark has, with their defaults for those that have them.
DEFAULTS: dict[str, dict[str, Any]] = {
    "step": {"preset": "nano", "batch": [8], "variants": None, "mode": "eager", "profile": None, "sweep": None},
    "loss": {"preset": "nano", "batch": [8]},
    "optimizer": {"preset": "nano"},
    "data": {"preset": "nano", "batch": [8], "text": [], "tokenizer": []},
    "busy": {"preset": "nano", "batch": [8], "processes": 1},
    "generate": {
        "preset": "nano",
        "batch": [1, 16],
        "prompt_tokens": 512,
        "max_new_tokens": 128,
        "mode": "eager",
    },
    "engines": {"checkpoint": None, "prompt_tokens": 128, "max_new_tokens": 64},
}


class RefuseWhat(argparse.Action):
    """The former option ``--what``, which became a positional argument."""

    def __call__(self, _parser: object, _namespace: object, values: object, _option: object = None) -> NoReturn:
        """Raise a ``UsageError`` with the present form."""
        raise UsageError(f"--what is now a positional argument: antransformer bench {values or 'BENCHMARK'}")


def add_arguments(parser: Parser) -> None:
    """Add the options of ``antransformer bench``."""
    parser.add_argument("benchmark", choices=tuple(DEFAULTS), metavar="BENCHMARK", help=", ".join(DEFAULTS))
    parser.add_argument("--what", nargs="?", action=RefuseWhat, help=argparse.SUPPRESS)
    parser.add_argument("--preset", metavar="NAME", help="size of the models (default nano)")
    parser.add_argument("--batch", type=int, nargs="+", metavar="N", help="batch size (default 8; generate: 1 16)")
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        help=f"step: from {', '.join(VARIANTS)} (default all; first: baseline), and with --document-mask of train: "
        f"{', '.join(MASKED_VARIANTS)}",
    )
    parser.add_argument(
        "--text", nargs="+", metavar="INPUT", help="data: inputs of prepare (default: 16 MiB of the standard library)"
    )
    parser.add_argument(
        "--tokenizer", nargs="+", metavar="NAME", help="data: tokenizers (default: byte and a BPE of 4,096 ids)"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="busy: number of other processes (default 1)")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="RUN", help="engines: run folder, or one checkpoint in RUN/checkpoints"
    )
    parser.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="generate, engines: length of a prompt (default 512; 128)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="generate, engines: tokens to generate (default 128; 64)"
    )
    parser.add_argument(
        "--mode", choices=(*MODES, "both"), help="step, generate: eager, with torch.compile, or both (default eager)"
    )
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="timings of each variant (default 15)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: chosen by torch)")
    add_device_argument(parser)
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="dtype of matrix products; generate: also of weights (default auto: bfloat16 on GPUs)",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FOLDER",
        help="step: write a trace of one step of each variant there, and print its ten most expensive operations",
    )
    parser.add_argument(
        "--sweep",
        type=Path,
        metavar="FOLDER",
        help="step: measure 1, 2, 4 and 8 times the width, layers, context and batch; print exponents and write a "
        f"figure there (default variants: {' '.join(GROWTH_VARIANTS)})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results of every round to this file")
    group = parser.add_argument_group("model settings", "override the preset")
    add_config(group, ModelConfig, prefix="model.", only=SHAPE)


def run(parsed: argparse.Namespace) -> None:
    """Run a benchmark and print its table."""
    import torch

    from antransformer.training.device import choose_device, choose_precision

    apply_defaults(parsed)
    if parsed.json:
        check_json_target("--json", parsed.json, lambda content: "benchmark" in content)
    if parsed.threads is not None:
        if not 1 <= parsed.threads <= MAX_THREADS:
            raise ConfigError(f"--threads must be from 1 to {MAX_THREADS:,}, got {parsed.threads}")
        torch.set_num_threads(parsed.threads)
    device = choose_device(parsed.device)
    shared = {"rounds": parsed.rounds, "device": device, "dtype": choose_precision(parsed.dtype, device)}
    benchmark = BENCHMARKS[parsed.benchmark](parsed, shared)
    if parsed.json:  # before the tables, whose reader may close the pipe
        write_result(parsed.json, json.dumps(benchmark.content(device), indent=2) + "\n")
    console = TableConsole()
    if not console.is_terminal:
        console.width = TABLE_WIDTH  # lines in a file or pipe are not cut
    console.print(result_table(benchmark))
    for row in benchmark.rows:
        if row.problem:
            task = ", ".join(map(str, row.task.values()))
            console.print(f"{row.variant} ({task}) failed: {row.problem}", markup=False, soft_wrap=True)
    if "growth" in benchmark.facts:
        console.print(growth_table(benchmark.facts["growth"]))
    if parsed.json:
        print(f"results: {parsed.json}")


def apply_defaults(parsed: argparse.Namespace) -> None:
    """Fill in the defaults of the chosen benchmark.

    Raises:
        ConfigError: an option belongs to another benchmark.
    """
    defaults = DEFAULTS[parsed.benchmark]
    for name in sorted({name for options in DEFAULTS.values() for name in options}):
        if name not in defaults and getattr(parsed, name) is not None:
            owners = ", ".join(benchmark for benchmark, options in DEFAULTS.items() if name in options)
            raise ConfigError(f"--{name.replace('_', '-')} is an option of bench {owners}, not of {parsed.benchmark}")
        if name in defaults and getattr(parsed, name) is None:
            setattr(parsed, name, defaults[name])


def bench_step(parsed: argparse.Namespace, shared: dict[str, Any]) -> "Benchmark":
    """Run ``bench step``, with --sweep at several sizes."""
    from antransformer.benchmarks.growth import bench_growth
    from antransformer.benchmarks.train_step import StepSettings
    from antransformer.benchmarks.train_step import bench_step as time_steps
    from antransformer.results.folder import require_own_folder

    if parsed.sweep and parsed.profile:
        raise ConfigError("--profile traces one shape, --sweep measures many: give only one of them")
    settings = StepSettings(
        model=model_config(parsed),
        variants=tuple(parsed.variants or (GROWTH_VARIANTS if parsed.sweep else VARIANTS)),
        batch=single_batch(parsed),
        modes=modes(parsed),
        profile=parsed.profile,
        **shared,
    )
    for option, folder in (("--profile", parsed.profile), ("--sweep", parsed.sweep)):
        if folder:
            require_own_folder(folder, "bench", option)
            make_folder(option, folder)
    return bench_growth(settings, parsed.sweep, log) if parsed.sweep else time_steps(settings, log)


def bench_loss(parsed: argparse.Namespace, shared: dict[str, Any]) -> "Benchmark":
    """Run ``bench loss``."""
    from antransformer.benchmarks.loss_and_optimizer import LossSettings
    from antransformer.benchmarks.loss_and_optimizer import bench_loss as time_losses

    model = model_config(parsed)
    vocab_sizes = (model.vocab_size,) if "vocab_size" in settings_of(parsed).get("model", {}) else LOSS_VOCABULARIES
    settings = LossSettings(model=model, vocab_sizes=vocab_sizes, batch=single_batch(parsed), **shared)
    return time_losses(settings, log)


def bench_optimizer(parsed: argparse.Namespace, shared: dict[str, Any]) -> "Benchmark":
    """Run ``bench optimizer``."""
    from antransformer.benchmarks.loss_and_optimizer import bench_optimizer as time_optimizers
    from antransformer.benchmarks.settings import Settings

    return time_optimizers(Settings(model=model_config(parsed), **shared), log)


def bench_data(parsed: argparse.Namespace, shared: dict[str, Any]) -> "Benchmark":
    """Run ``bench data``."""
    from antransformer.benchmarks.data import DataSettings
    from antransformer.benchmarks.data import bench_data as time_data

    return time_data(
        DataSettings(
            model=model_config(parsed),
            text=tuple(parsed.text),
            tokenizers=tuple(parsed.tokenizer),
            batch=single_batch(parsed),
            **shared,
        ),
        log,
    )


def bench_generate(parsed: argparse.Namespace, shared: dict[str, Any]) -> "Benchmark":
    """Run ``bench generate``."""
    from antransformer.benchmarks.generate import GenerationSettings
    from antransformer.benchmarks.generate import bench_generate as time_generation

    settings = GenerationSettings(
        model=model_config(parsed, context=parsed.prompt_tokens + parsed.max_new_tokens),
        batches=tuple(parsed.batch),
        prompt_tokens=parsed.prompt_tokens,
        max_new_tokens=parsed.max_new_tokens,
        modes=modes(parsed),
        **shared,
    )
    return time_generation(settings, log)


def bench_engines(parsed: argparse.Namespace, shared: dict[str, Any]) -> "Benchmark":
    """Run ``bench engines``."""
    from antransformer.benchmarks.engines import EngineSettings
    from antransformer.benchmarks.engines import bench_engines as time_engines
    from antransformer.training.run_folder import open_checkpoint

    if parsed.checkpoint is None:
        raise ConfigError("bench engines needs --checkpoint RUN, the model to measure")
    if shared["device"].type != "cpu":
        raise ConfigError(f"bench engines measures CPUs: give --device cpu, not {shared['device']}")
    if "model" in settings_of(parsed):
        raise ConfigError("bench engines measures the model of --checkpoint: leave out --model options")
    sizes = {"prompt_tokens": parsed.prompt_tokens, "max_new_tokens": parsed.max_new_tokens}
    settings = EngineSettings(dtype=shared["dtype"], rounds=parsed.rounds, **sizes)
    return time_engines(*open_checkpoint(parsed.checkpoint, log), settings, log)


def bench_busy(parsed: argparse.Namespace, shared: dict[str, Any]) -> "Benchmark":
    """Run ``bench busy``."""
    from antransformer.benchmarks.busy import bench_busy as time_busy
    from antransformer.benchmarks.train_step import StepSettings

    settings = StepSettings(model=model_config(parsed), variants=("angpt",), batch=single_batch(parsed), **shared)
    return time_busy(settings, parsed.processes, log)


BENCHMARKS: dict[str, Callable[[argparse.Namespace, dict[str, Any]], "Benchmark"]] = {
    "step": bench_step,
    "loss": bench_loss,
    "optimizer": bench_optimizer,
    "data": bench_data,
    "busy": bench_busy,
    "generate": bench_generate,
    "engines": bench_engines,
}


def model_config(parsed: argparse.Namespace, **sizes: int) -> ModelConfig:
    """Config of the preset with these sizes, overridden by the command line."""
    settings = normalize_settings({"preset": parsed.preset, **settings_of(parsed)}, "command line").get("model", {})
    return ModelConfig(**{**preset_sizes(parsed.preset), "vocab_size": PAPER_VOCABULARY, **sizes, **settings})


def modes(parsed: argparse.Namespace) -> tuple[Mode, ...]:
    """Modes that ``--mode`` selects."""
    return MODES if parsed.mode == "both" else (parsed.mode,)


def single_batch(parsed: argparse.Namespace) -> int:
    """Batch size of a benchmark that takes only one.

    Raises:
        ConfigError: ``--batch`` has several values.
    """
    if len(parsed.batch) > 1:
        raise ConfigError(f"--batch takes one number in bench {parsed.benchmark}, got {len(parsed.batch)}")
    batch: int = parsed.batch[0]
    return batch


def make_folder(option: str, path: Path) -> None:
    """Create a folder for results before the measurements.

    Raises:
        ConfigError: the folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot create this folder ({error.strerror})") from error


def log(text: str) -> None:
    """Print progress to standard error, since standard output holds the results."""
    print(text, file=sys.stderr, flush=True)


def result_table(benchmark: "Benchmark") -> Table:
    """Table of medians and quartiles, and of memory, utilization and waiting where they were measured."""
    rows = benchmark.rows
    names = [*rows[0].task, "variant"]
    optional = [name for name in ("MiB", "util.", "waiting") if any(optional_cell(row, name) for row in rows)]
    table = new_table(*names, benchmark.unit, "quartiles", "ratio", "quartiles", *optional)
    table.show_edge, table.padding = False, (0, 0, 0, 0)  # fits into a terminal of 80 columns
    for index, column in enumerate(table.columns):
        column.justify, column.no_wrap = "left" if index < len(names) else "right", True
    for number, row in enumerate(rows, start=1):
        table.add_row(
            *(f"{value:,}" if isinstance(value, int) else value for value in row.task.values()),
            row.variant,
            *(median_and_quartiles(row.speed, ",.0f") if row.speed else ("failed", "")),
            *(median_and_quartiles(row.ratio, ".2f") if row.ratio else ("", "")),
            *(optional_cell(row, name) for name in optional),
            end_section=number == len(rows) or rows[number].task != row.task,
        )
    return table


def growth_table(growth: Sequence[dict[str, Any]]) -> Table:
    """Table of measured and expected exponents."""
    table = new_table("mode", "axis", "variant", "time", "expected", "last doubling", "expected", "memory", "expected")
    table.show_edge, table.padding = False, (0, 0, 0, 0)  # fits into a terminal of 80 columns
    for column in table.columns[1:3]:
        column.justify = "left"
    keys = ("time", "time_expected", "last_time", "last_time_expected", "memory", "memory_expected")
    for item in growth:
        table.add_row(item["mode"], item["axis"], item["variant"], *(f"{item[key]:.2f}" for key in keys))
    return table


def optional_cell(row: "Row", name: str) -> str:
    """Cell of a measurement that not all benchmarks have, empty if it is missing."""
    if name == "MiB":
        return "" if row.memory is None else f"{row.memory / 2**20:,.{1 if row.memory < 2**27 else 0}f}"
    value, number_format = (row.utilization, ".0%") if name == "util." else (row.waiting, ".2%")
    return "" if value is None else f"{value.median:{number_format}}"


def median_and_quartiles(value: "Quartiles", number_format: str) -> tuple[str, str]:
    """Cells of the median and of the quartiles as ``low-high``."""
    return f"{value.median:{number_format}}", f"{value.low:{number_format}}-{value.high:{number_format}}"
