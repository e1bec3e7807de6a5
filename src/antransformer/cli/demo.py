"""Train a small model in two to five minutes, and look at it.

Trains anGPT on the source of Python's standard library. Prints its validation loss next to the compression rate of
gzip on the same text, draws the loss curve, and generates a sample.
"""

import argparse
import gzip
import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

import antransformer
from antransformer.cli.options import Parser
from antransformer.files import quoted

if TYPE_CHECKING:
    from antransformer.data import Dataset

USAGE = "antransformer demo [options]"
PROMPT = "def "


def add_arguments(parser: Parser) -> None:
    """Add the options of ``demo``: length and run folder."""
    parser.add_argument("--tokens", metavar="TOKENS", help="tokens to train on (default 1.6M)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default runs/angpt-nano)")


def run(parsed: argparse.Namespace) -> None:
    """Train, print losses, draw the loss curve and generate a sample."""
    from antransformer.data.stdlib import open_data
    from antransformer.reporting.loss_curve import loss_curve
    from antransformer.training.run_folder import require_empty, saved_config

    if parsed.out:
        require_empty(parsed.out, resumable=False)
    figure = find_spec("matplotlib") is not None
    if not figure:
        print("matplotlib is not installed, so there will be no loss curve: pip install 'antransformer[plots]'")
    settings = {"tokens": parsed.tokens} if parsed.tokens else {}
    trained = antransformer.train(config="demo", out=parsed.out, progress=True, **settings)
    gzip_rate = gzip_bits_per_byte(open_data(saved_config(trained.folder).data))
    print(
        f"\nvalidation loss: {trained.result.val_loss:.3f} nats per token, {trained.result.bits_per_byte:.3f} bits per "
        f"byte (gzip -9: {gzip_rate:.3f})"
    )
    if figure:
        print(f"loss curve:      {loss_curve(trained.folder)}")
    print(f"\nsample after {PROMPT!r}:\n")
    print(antransformer.generate(trained.folder, PROMPT, max_new_tokens=160, temperature=0.7))
    environment = "" if which("antransformer") else f"source {quoted(Path(sys.prefix) / 'bin/activate')}, then "
    print(f"\nnext: {environment}antransformer generate --checkpoint {quoted(trained.folder)} --prompt 'class '")


def gzip_bits_per_byte(dataset: "Dataset") -> float:
    """Return the size in bits of the validation text after ``gzip -9``, per byte of text."""
    ids = [int(token) for array in dataset.split("val").arrays for token in array if token != dataset.end_of_text]
    text = dataset.tokenizer().decode(ids).encode()
    return 8 * len(gzip.compress(text, compresslevel=9)) / len(text)
