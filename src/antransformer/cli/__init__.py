"""The command ``antransformer VERB``: parse, call, print. One file a verb."""

import io
import sys
from collections.abc import Sequence

from antransformer.cli import (
    ablate,
    bench,
    compare,
    demo,
    diagnose,
    evaluate,
    export,
    fit,
    generate,
    import_,
    plan,
    prepare,
    sweep,
    train,
)
from antransformer.cli.options import Parser
from antransformer.cli.progress import silence
from antransformer.errors import AntransformerError, RunStoppedError, UsageError
from antransformer.training.device import is_out_of_memory
from antransformer.version import __version__

VERBS = {
    "prepare": prepare,
    "train": train,
    "generate": generate,
    "evaluate": evaluate,
    "export": export,
    "import": import_,
    "compare": compare,
    "ablate": ablate,
    "sweep": sweep,
    "fit": fit,
    "plan": plan,
    "diagnose": diagnose,
    "bench": bench,
    "demo": demo,
}


def make_parser() -> Parser:
    """The parser of all verbs."""
    parser = Parser(
        prog="antransformer",
        description="Train transformers in a compact space: scalar normalization factors and bounded weight rows in "
        "place of norm layers, weight decay and warm-up (arXiv:2505.22014).",
        epilog="'antransformer train' alone trains a small model on the source of Python's standard library.",
    )
    parser.add_argument("--version", action="version", version=f"antransformer {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, dest="verb")
    for name, module in VERBS.items():
        summary = (module.__doc__ or "").strip().partition("\n")[0]
        verb = verbs.add_parser(name, help=summary.replace("%", "%%"), description=module.__doc__, usage=module.USAGE)
        module.add_arguments(verb)
        verb.set_defaults(run=module.run, parser=verb)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0, 2 for a user's mistake, 1 for a failure of the machine."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal's encoding does not
    try:
        parsed, unknown = make_parser().parse_known_args(arguments)
        if unknown:
            parsed.parser.refuse(unknown[0])
        parsed.run(parsed)
    except RunStoppedError as error:
        return _say(error, error.status)
    except UsageError as error:
        return _say(f"error: {error}", 2)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        silence()
        return 0
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return _say("error: not enough memory: lower --micro-batch-size or --batch-size, or choose a smaller model", 1)
    except (AntransformerError, OSError, MemoryError) as error:
        return _say(f"error: {error or type(error).__name__}", 1)
    except KeyboardInterrupt:
        return _say("stopped by SIGINT", 130)
    return 0


def _say(message: object, status: int) -> int:
    """One line on standard error, whatever the message holds."""
    print("antransformer:", " ".join(str(message).split()), file=sys.stderr)
    return status
