"""Start the ranks of a job on this machine, as torchrun does, and report a failure in one line.

torchrun ends with a traceback of its own after any failure of a rank. Here the first failure is the last line that is
printed. Each rank leaves its message in the file that torch's agent names in its environment.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from antransformer.errors import ConfigError, RankFailedError

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # set by torch's agent for each rank
QUIET = "ANTRANSFORMER_QUIET_RANKS"  # set here: the ranks leave messages to this process
SHUTDOWN_SECONDS = 300  # after a signal, for the step in progress and a checkpoint, before ranks are killed


def launch(words: Sequence[str], processes: int) -> None:
    """Run ``antransformer`` with these words as that number of ranks, and wait for them.

    Raises:
        ConfigError: the number is below 1.
        RankFailedError: a rank failed, or a signal stopped all; it has the message and the exit status.
    """
    if processes < 1:
        raise ConfigError(f"--processes must be at least 1, got {processes}")
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from antransformer.training.resources import available_cores

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    os.environ[QUIET] = "1"
    with TemporaryDirectory() as folder, _signal_handlers_restored():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
        )
        logging.disable(logging.CRITICAL)  # the agent repeats at length what the ranks report
        try:
            elastic_launch(config, sys.executable)("-m", "antransformer", *words)
        except ChildFailedError as error:
            raise RankFailedError(*_first_failure(error)) from None
        except SignalException as error:
            raise RankFailedError(*_stopped(Path(folder), error.sigval)) from None
        finally:
            logging.disable(logging.NOTSET)
            del os.environ[QUIET]


@contextlib.contextmanager
def _signal_handlers_restored() -> Iterator[None]:
    """Undo the agent's own handlers, which raise an exception in whatever this process, or a fork of it, does next."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def job_number(name: str, default: int | None = None) -> int:
    """Return a number that torchrun sets in the environment.

    Raises:
        ConfigError: it is not a number, or missing without a default: something else than torchrun set the others.
    """
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        problem = "missing" if text is None else f"{text!r}, not a number"
        raise ConfigError(f"the environment variable {name} is {problem}: start with torchrun, or unset WORLD_SIZE")
    return int(text)


def record_failure(line: str) -> bool:
    """Leave the message of this rank for torch's agent; return whether the launcher prints it.

    Without a message, torchrun's summary says only that there is no traceback.
    """
    path = os.environ.get(ERROR_FILE)
    if not path:
        return False
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": line, "timestamp": int(time.time())}), encoding="utf-8")
        return QUIET in os.environ
    return False


def _first_failure(error: object) -> tuple[str, int]:
    """Message and exit status of the first rank that left a message, or else of the first that failed."""
    failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)  # type: ignore[attr-defined]
    reported = [(rank, failure) for rank, failure in failures if Path(failure.error_file).is_file()]
    # The agent ends the other ranks after a failure, also one that has left its message and is about to exit.
    rank, failure = min(reported, key=lambda item: item[1].exitcode < 0) if reported else failures[0]
    status = failure.exitcode
    if reported and status < 0:
        status = next((other.exitcode for _, other in failures if other.exitcode > 0), status)
    reason = f"was killed by {failure.signal_name()}" if status < 0 else f"exited with status {status}"
    message = str(failure.message) if reported else f"antransformer: rank {rank} {reason}"
    return message, 128 - status if status < 0 else status


def _stopped(folder: Path, received: signal.Signals) -> tuple[str, int]:
    """Message of rank 0, which names the checkpoint, and the exit status after a signal."""
    for path in sorted(folder.rglob("error.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            return str(json.loads(path.read_text(encoding="utf-8"))["message"]), 128 + received
    return f"antransformer: stopped by {received.name}", 128 + received
