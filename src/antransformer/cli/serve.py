"""Serve a trained model with an OpenAI-compatible interface.

The checkpoint is exported to a temporary GGUF file, which llama.cpp serves on 127.0.0.1 until Ctrl-C. This is for
trying a model. How to serve it for others is in docs/serving.md.

Begin a prompt with <|endoftext|> to begin a document, as antransformer generate does.

examples:
  antransformer serve --checkpoint runs/angpt-nano
  antransformer serve --gguf angpt-1b.gguf --port 9000
"""

import argparse
import signal
from pathlib import Path

import antransformer
from antransformer.cli.options import Parser
from antransformer.interop.formats import GGUF_DTYPES

USAGE = "antransformer serve (--checkpoint RUN | --gguf FILE) [options]"


def add_arguments(parser: Parser) -> None:
    """Add the options of ``serve``: checkpoint or file, port and data type."""
    parser.add_argument("--checkpoint", type=Path, metavar="RUN", help="run folder or checkpoint")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="file of antransformer export --format gguf")
    parser.add_argument("--port", type=int, default=8080, metavar="N", help="port; 0 for a free one (default 8080)")
    parser.add_argument(
        "--dtype",
        choices=GGUF_DTYPES,
        metavar="NAME",
        help=f"data type of the weights, with --checkpoint: {', '.join(GGUF_DTYPES)} (default f32)",
    )


def run(parsed: argparse.Namespace) -> None:
    """Serve until Ctrl-C, SIGTERM or SIGHUP."""
    for name in ("SIGTERM", "SIGHUP"):  # so that the temporary file is removed; there is no SIGHUP on Windows
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    serving = antransformer.serve(parsed.checkpoint, gguf=parsed.gguf, port=parsed.port, dtype=parsed.dtype)
    with serving as address:
        print(f"serving at {address}/v1; press Ctrl-C to stop", flush=True)
        print(
            f'next: curl {address}/v1/completions -d \'{{"prompt": "<|endoftext|>Once", "max_tokens": 50}}\'',
            flush=True,
        )
        try:
            address.wait()
        except KeyboardInterrupt:
            return
