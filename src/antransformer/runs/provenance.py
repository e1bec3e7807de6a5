"""Provenance of an experiment's runs for its report: command, versions, machines and data."""

import platform
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from antransformer.data import Dataset
from antransformer.runs.queue import RunQueue, RunResult
from antransformer.version import __version__


def command() -> str:
    """Return the command of this process: ``antransformer VERB ...``, or the script that uses the Python interface."""
    program = Path(sys.argv[0])
    is_cli = program.name == "antransformer" or program.parts[-2:] == ("antransformer", "__main__.py")
    return shlex.join(["antransformer", *sys.argv[1:]] if is_cli else ["python", *sys.argv])


def provenance(dataset: Dataset, queue: RunQueue, seconds: float, results: Iterable[RunResult]) -> dict[str, Any]:
    """Return command, versions, machines, data and date as values that JSON can hold.

    Args:
        dataset: the data of all runs.
        queue: executed the runs.
        seconds: wall time of this call; runs of earlier calls are not in it.
        results: every run, also those of earlier calls and of other machines.
    """
    return {
        "command": command(),
        "antransformer": __version__,
        "python": platform.python_version(),
        "machines": sorted({result.machine for result in results}),
        "workers": len(queue.devices),
        "data": dataset.name,
        "data_digest": dataset.digest,
        "tokenizer": f"{dataset.tokenizer_name}, {dataset.vocab_size} ids",
        "date": time.strftime("%Y-%m-%d"),
        "minutes_of_last_call": round(seconds / 60, 1),
    }
