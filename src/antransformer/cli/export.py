"""Export a checkpoint to a Hugging Face folder or a GGUF file.

The native format loads with AutoModelForCausalLM.from_pretrained, either after "import antransformer", or without this
package with trust_remote_code=True: the code is in the folder. "antransformer import" makes a run of it again.

The formats exaone4 (anGPT) and qwen3 (GPT+) are folders of a standard architecture for transformers, vLLM and MLX. The
format gguf is a file of the same model for llama.cpp and ollama. These formats are for inference: see docs/serving.md.

examples:
  antransformer export --checkpoint runs/angpt-nano --out exported/angpt-nano
  antransformer export --checkpoint runs/angpt-1b --out exported/angpt-1b --format exaone4 --dtype bfloat16
  antransformer export --checkpoint runs/angpt-1b --out angpt-1b.gguf --format gguf --dtype q8_0
"""

import argparse
from pathlib import Path

import antransformer
from antransformer.cli.options import Parser, add_checkpoint_argument
from antransformer.files import quoted
from antransformer.interop.formats import DTYPES, FORMATS, GGUF_DTYPES

USAGE = "antransformer export --checkpoint RUN --out PATH [options]"


def add_arguments(parser: Parser) -> None:
    """Add the options of ``export``: checkpoint, target, and format of the weights."""
    add_checkpoint_argument(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="folder or GGUF file to create")
    parser.add_argument(
        "--format",
        default="native",
        choices=tuple(FORMATS),
        metavar="NAME",
        help="native, exaone4 (anGPT), qwen3 (GPT+) or gguf (default native)",
    )
    parser.add_argument(
        "--dtype",
        choices=(*DTYPES, *GGUF_DTYPES),
        metavar="NAME",
        help="data type of the weights: float32, bfloat16 or float16; with gguf f32, f16, bf16, q8_0 or q4_0 "
        "(default: the first)",
    )
    parser.add_argument("--max-shard-size", metavar="SIZE", help="size limit of one file of weights (default 5GB)")


def run(parsed: argparse.Namespace) -> None:
    """Export, and print the check of the files and how to load them."""
    checkpoint = antransformer.export(
        parsed.checkpoint,
        parsed.out,
        format=parsed.format,
        dtype=parsed.dtype,
        max_shard_size=parsed.max_shard_size,
        on_check=print,
    )
    dtype = parsed.dtype or ("f32" if parsed.format == "gguf" else "float32")
    print(f"{parsed.out}: {checkpoint.model.architecture}, step {checkpoint.step:,}, {dtype}")
    print("next:", next_step(parsed.out, parsed.format))


def next_step(out: Path, format: str) -> str:
    """Return the command, or the line of Python, that loads an export."""
    if format == "gguf":
        return f"antransformer serve --gguf {quoted(out)}"
    load = f"transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})"
    return f"{load}, after import antransformer" if format == "native" else load
