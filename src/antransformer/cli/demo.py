"""Train a small model in about four minutes, and look at it.

Prepares the source of this Python's standard library, trains anGPT on it, prints the held-out loss beside what gzip
makes of the same text, draws the loss curve, and writes a sample.
"""

import argparse
import gzip
from pathlib import Path

from antransformer.cli.common import open_data
from antransformer.cli.generate import write_sample
from antransformer.cli.options import Parser
from antransformer.cli.train import train
from antransformer.data import Dataset
from antransformer.reporting.loss_curve import loss_curve
from antransformer.training.config import merge, normalize_settings
from antransformer.training.config_files import read_config

USAGE = "antransformer demo [options]"
PROMPT = "def "


def add_arguments(parser: Parser) -> None:
    """Options of the verb."""
    parser.add_argument(
        "--tokens", metavar="TOKENS", help="length of the run (default: about four minutes on two cores)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: the first free one in runs)")


def run(parsed: argparse.Namespace) -> None:
    """The whole way from text to text."""
    settings = normalize_settings(read_config("demo"), "demo")
    if parsed.tokens:
        settings = merge(settings, normalize_settings({"tokens": parsed.tokens}, "command line"))
    folder, result = train(settings, parsed.out)
    dataset = open_data(settings["data"])
    print(
        f"\nheld-out text: {result.val_loss:.3f} nats per token, {result.bits_per_byte:.3f} bits per byte "
        f"(gzip -9: {gzip_bits_per_byte(dataset):.3f})"
    )
    print(f"loss curve:    {loss_curve(folder)}")
    print(f"\na sample after {PROMPT!r}:\n")
    write_sample(folder, PROMPT, max_new_tokens=160, temperature=0.7, top_p=0.95)


def gzip_bits_per_byte(dataset: Dataset) -> float:
    """Bits that ``gzip -9`` needs for a byte of the validation text, documents joined."""
    ids = [int(token) for array in dataset.split("val").arrays for token in array if token != dataset.end_of_text]
    text = dataset.tokenizer().decode(ids).encode()
    return 8 * len(gzip.compress(text, compresslevel=9)) / len(text)
