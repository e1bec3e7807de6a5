"""Export a checkpoint to a Hugging Face folder.

Exported models load with AutoModelForCausalLM.from_pretrained, either after "import antransformer", or without this
package with trust_remote_code=True: the code is in the folder. "antransformer import" makes a run of it again.

examples:
  antransformer export --checkpoint runs/angpt-nano --out exported/angpt-nano
  antransformer export --checkpoint runs/angpt-1b --out exported/angpt-1b --dtype bfloat16
"""

import argparse
from pathlib import Path

import antransformer
from antransformer.cli.options import Parser, add_checkpoint_argument

USAGE = "antransformer export --checkpoint RUN --out DIR [options]"


def add_arguments(parser: Parser) -> None:
    """Add the options of ``export``: checkpoint, folder, and format of the weights."""
    add_checkpoint_argument(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="data type of the weights (default float32)",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="size limit of one file of weights (default 5GB)"
    )


def run(parsed: argparse.Namespace) -> None:
    """Export, and print how to load the folder."""
    checkpoint = antransformer.export(
        parsed.checkpoint, parsed.out, dtype=parsed.dtype, max_shard_size=parsed.max_shard_size
    )
    print(f"{parsed.out}: {checkpoint.model.architecture}, step {checkpoint.step:,}, {parsed.dtype}")
    print(f'next: transformers.AutoModelForCausalLM.from_pretrained("{parsed.out}"), after import antransformer')
