"""Write text with a trained model.

examples:
  antransformer generate --checkpoint runs/angpt-nano --prompt "def "
  antransformer generate --checkpoint runs/angpt-nano --prompt "import " --temperature 0
"""

import argparse

import antransformer
from antransformer.cli.options import Parser, add_checkpoint_argument, add_device_argument

USAGE = "antransformer generate --checkpoint RUN [options]"


def add_arguments(parser: Parser) -> None:
    """Add the options of ``generate``: checkpoint, prompt, sampling and device."""
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--prompt",
        default="",
        help="text to continue (default: start a new document); --prompt=-x for one that starts with a hyphen",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=200,
        metavar="N",
        help="maximum number of tokens to generate (default 200)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="sampling temperature; 0 always takes the most likely token (default 0.8)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens")
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="sample from the most likely tokens with total probability P (default 0.95)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default 0)")
    add_device_argument(parser)


def run(parsed: argparse.Namespace) -> None:
    """Print the prompt and its continuation as it is generated."""
    antransformer.generate(
        parsed.checkpoint,
        parsed.prompt,
        max_new_tokens=parsed.max_new_tokens,
        temperature=parsed.temperature,
        top_k=parsed.top_k,
        top_p=parsed.top_p,
        seed=parsed.seed,
        device=parsed.device,
        on_text=print_piece,
    )
    print()


def print_piece(piece: str) -> None:
    """Print a piece of text at once, without a line break."""
    print(piece, end="", flush=True)
