"""Write text with a trained model.

examples:
  antransformer generate --checkpoint runs/angpt-nano --prompt "def "
  antransformer generate --checkpoint runs/angpt-nano --prompt "import " --temperature 0
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from antransformer.cli.options import Parser
from antransformer.errors import ConfigError
from antransformer.inference import generate
from antransformer.inference.folding import folded_where_possible
from antransformer.inference.sampling import stream_text
from antransformer.training.checkpointing.checkpoint import restore
from antransformer.training.device import choose_device
from antransformer.training.run_folder import open_checkpoint

USAGE = "antransformer generate --checkpoint RUN [options]"


def add_arguments(parser: Parser) -> None:
    """Options of the verb."""
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="run folder, or one checkpoint")
    parser.add_argument("--prompt", default="", help="text to go on from (default: the start of a document)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=200, metavar="N", help="most tokens to write (default 200)"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens only")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="nucleus sampling (default 0.95)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default auto)")


def run(parsed: argparse.Namespace) -> None:
    """Print prompt and continuation, as it comes."""
    write_sample(
        parsed.checkpoint,
        parsed.prompt,
        device=parsed.device,
        max_new_tokens=parsed.max_new_tokens,
        temperature=parsed.temperature,
        top_k=parsed.top_k,
        top_p=parsed.top_p,
        seed=parsed.seed,
    )


def write_sample(path: Path, prompt: str, device: str = "auto", **options: Any) -> None:
    """Print a prompt and its continuation by the model of a run."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("the prompt is not UTF-8 text") from error
    found, tokenizer = open_checkpoint(path, notify=lambda text: print(text, file=sys.stderr))
    model = folded_where_possible(restore(found, choose_device(device)))
    # A prompt continues a document; the end-of-text token before it says that one begins here.
    words = tokenizer.encode(prompt)
    ids = [tokenizer.end_of_text, *words]
    if len(ids) > model.config.context:
        print(
            f"the prompt has {len(ids):,} tokens, more than the context of {model.config.context:,}: the model sees "
            "its last ones only",
            file=sys.stderr,
        )
    steps = generate(model, [ids], vocab_size=tokenizer.vocab_size, stop=[tokenizer.end_of_text], **options)
    print(prompt, end="", flush=True)
    for piece in stream_text(tokenizer, (token for step in steps for token in step if token is not None), words):
        print(piece, end="", flush=True)
    print()
