"""The command ``antransformer VERB``: each verb has a file that parses options, calls the Python interface and prints.

Only the chosen verb is imported, and no verb imports torch before it runs, so ``--help`` and mistakes are fast.
"""

import errno
import importlib
import io
import logging
import sys
from collections.abc import Sequence

from antransformer.cli.options import Parser
from antransformer.errors import AntransformerError, RankFailedError, RunStoppedError, UsageError
from antransformer.settings import nearest
from antransformer.version import __version__

# Verb -> one-line summary, which is also the first line of the docstring of its module.
VERBS = {
    "prepare": "Turn text into a data folder to train on.",
    "verify": "Check all tokens of a data folder against its checksums.",
    "train": "Train a model on prepared data.",
    "generate": "Write text with a trained model.",
    "evaluate": "Score a trained model with lm_eval, or by its perplexity on text.",
    "export": "Export a checkpoint to a Hugging Face folder or a GGUF file.",
    "serve": "Serve a trained model with an OpenAI-compatible interface.",
    "import": 'Import a Hugging Face folder that "antransformer export" wrote.',
    "compare": "Compare architectures tuned by the same search, with several seeds and confidence intervals.",
    "ablate": "Measure what each part of anGPT contributes.",
    "sweep": "Search the best learning rate and batch of every size.",
    "fit": "Fit scaling laws: best learning rate and batch, compute frontier, and L(N, D), with 95% intervals.",
    "plan": "Plan a run: size, tokens, batch, learning rate, expected loss, parallelism and time.",
    "diagnose": "Measure norms inside a trained model: residual stream, blocks, factors and weights.",
    "selftest": "Check this machine: kernels, models, checkpoints, speed and a training comparison.",
    "bench": "Measure speed and memory of variants in alternation: medians and quartiles over rounds.",
    "completion": "Print a script with which a shell completes verbs, options and values.",
    "demo": "Train a small model in two to five minutes, and look at it.",
}


def make_parser(chosen: str | None = None) -> Parser:
    """Return the parser of the command line; only the chosen verb gets its options (``completion``: all verbs)."""
    parser = Parser(
        prog="antransformer",
        description="Train transformers without learned norm layers, weight decay or learning-rate warm-up "
        "(arXiv:2505.22014).",
        epilog="'antransformer train' without options trains a small model on the source of Python's standard library.",
    )
    parser.add_argument("--version", action="version", version=f"antransformer {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, dest="verb")
    for name, summary in VERBS.items():
        summary = summary.replace("%", "%%")
        if chosen not in (name, "completion"):
            verbs.add_parser(name, help=summary)
            continue
        module = importlib.import_module(f"antransformer.cli.{'import_' if name == 'import' else name}")
        verb = verbs.add_parser(name, help=summary, description=module.__doc__, usage=module.USAGE)
        module.add_arguments(verb)
        verb.set_defaults(run=module.run, parser=parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit status: 0, 2 for wrong input, 1 for a failure of the machine."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold characters that the terminal cannot encode
    # logging's own fallback handler prints bare messages on standard error, which is what a user should see.
    if logging.lastResort and not logging.getLogger("antransformer").handlers:
        logging.getLogger("antransformer").addHandler(logging.lastResort)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _require_text(words)
        chosen = _verb(words)
        if chosen is not None and chosen not in VERBS:
            raise UsageError(f"unknown verb {chosen!r}{nearest(chosen, VERBS) or ': choose from ' + ', '.join(VERBS)}")
        parsed = make_parser(chosen).parse(words)
        parsed.run(parsed)
    except RankFailedError as error:
        print(error, file=sys.stderr)
        return error.status
    except RunStoppedError as error:
        return _complain(error, error.status)
    except UsageError as error:
        return _complain(f"error: {error}", 2)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        from antransformer.progress import discard_output

        discard_output()
        return 0
    except RuntimeError as error:
        from antransformer.training.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        advice = "lower --micro-batch-size or --batch-tokens (evaluate: --batch-size), or choose a smaller model"
        return _complain(f"error: out of memory: {advice}", 1)
    except (AntransformerError, OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            status = 2 if error.errno == errno.ENAMETOOLONG else 1
            return _complain(f"error: {error.filename}: {error.strerror}", status)
        return _complain(f"error: {error or type(error).__name__}", 1)
    except KeyboardInterrupt:
        return _complain("stopped by SIGINT", 130)
    return 0


def _verb(words: Sequence[str]) -> str | None:
    """Return the first word, or None if it is missing or an option of the program.

    Raises:
        UsageError: the first word is an option of a verb.
    """
    first = next((word for word in words if word != "--"), "--help")
    if not first.startswith("-"):
        return first
    name = first.partition("=")[0]
    if name not in ("-h", "--help", "--version"):
        raise UsageError(f"{name} comes before the verb: write antransformer VERB {name} (see antransformer --help)")
    return None


def _require_text(words: Sequence[str]) -> None:
    """Raise UsageError for a word that no file name or text can hold."""
    for word in words:
        if "\0" in word or (not word.isascii() and word != word.encode(errors="ignore").decode()):
            raise UsageError(f"the argument {word!a} is not UTF-8 text")


def _complain(message: object, status: int) -> int:
    """Print a message as one line on standard error, and return the status."""
    from antransformer.training.distributed.launcher import record_failure

    line = " ".join(["antransformer:", *str(message).split()])
    if not record_failure(line):
        print(line, file=sys.stderr)
    return status
