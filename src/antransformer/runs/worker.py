"""The worker process of one run in an experiment.

It is started with ``python -m antransformer.runs.worker RUN DATA DEVICE THREADS SHARING``, where SHARING is the number
of workers on the device.

The worker sends its parent JSON lines on standard output (``step`` or ``error``) and writes ``result.json`` into the
run folder. When its standard input closes, it saves a checkpoint and exits: no worker outlives a killed experiment.
"""

import contextlib
import json
import os
import signal
import statistics
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from antransformer.data import Dataset, eval_batches
from antransformer.data.mixture import open_mixture
from antransformer.diagnostics.probes import PROBE_TOKENS, probe
from antransformer.errors import AntransformerError, DivergedError, RunStoppedError, UsageError
from antransformer.files import replace_text
from antransformer.lock import lock
from antransformer.training import run_folder
from antransformer.training.device import cpu_name, is_out_of_memory
from antransformer.training.metrics import METRICS_FILE, MetricsLine, MetricsLog, read_metrics
from antransformer.training.micro_batch import fit_default_micro_batch
from antransformer.training.trainer import Trainer
from antransformer.wording import counted

RESULT_FILE = "result.json"
PROBES_FILE = "probes.jsonl"


class WorkerReporter:
    """Sends progress to the parent and probes the model at each metrics line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def attach(self, trainer: Trainer) -> None:
        """Set the trainer whose model is probed, and choose the validation text of the probes."""
        config = trainer.config
        sequences = max(1, PROBE_TOKENS // config.model.context)
        self.trainer = trainer
        self.tokens, _ = next(eval_batches(trainer.validation, config.model.context, sequences))
        self.probes = MetricsLog(self.folder, trainer.done, name=PROBES_FILE)

    def step(self, step: int) -> None:
        """Send the step to the parent."""
        send(step=step)

    def metrics(self, line: MetricsLine) -> None:
        """Probe the model at the step of a metrics line."""
        trainer = self.trainer
        values = probe(trainer.model, trainer.optimizer, self.tokens.to(trainer.device))
        with contextlib.suppress(ValueError):  # not finite: the trainer is about to report divergence itself
            self.probes.write({"step": line["step"], "tokens": line["tokens"], **values})

    def log(self, text: str) -> None:
        """Ignore log messages: a worker has no terminal."""


def main(arguments: list[str]) -> int:
    """Train the run and return the exit status: 0 also for a diverged run, since divergence is a result."""
    folder, data, device = Path(arguments[0]), arguments[1], arguments[2]
    torch.set_num_threads(int(arguments[3]))
    threading.Thread(target=stop_with_parent, daemon=True).start()
    try:
        with lock(folder):  # the worker of a killed experiment may be saving its checkpoint
            train(folder, data, device, int(arguments[4]))
    except RunStoppedError as error:
        send(error=str(error))
        return error.status
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        send(error="out of memory: lower --micro-batch-size or --workers")
        return 1
    except (AntransformerError, OSError, MemoryError) as error:
        send(error=" ".join(str(error).split()) or type(error).__name__)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def train(folder: Path, data: str, device: str, sharing: int) -> None:
    """Start or resume the run in ``folder`` and write its ``result.json``."""
    if not run_folder.has_started(folder):
        saved = run_folder.saved_config(folder)
        fitted = fit_default_micro_batch(replace(saved, device=device), sharing)
        run_folder.save_config(folder, replace(fitted, device=saved.device))
    config = run_folder.resumed_config(folder, {"device": device, "data": data})
    reporter = WorkerReporter(folder)
    dataset = open_mixture(data, None, partial(Dataset.open, verify=False))  # the parent has verified it
    trainer = Trainer(config, dataset, folder, reporter, resume=True)
    reporter.attach(trainer)
    record: dict[str, Any] = {"tokens": config.steps * config.batch_tokens, "data": dataset.digest}
    try:
        result = trainer.run()
        record |= {"loss": result.val_loss, "bits_per_byte": result.bits_per_byte, "diverged": None}
    except DivergedError as error:
        record |= {"loss": None, "bits_per_byte": None, "diverged": str(error)}
    speeds = [speed for line in read_metrics(folder / METRICS_FILE) if (speed := line.get("tokens_per_second"))]
    record["seconds_per_step"] = config.batch_tokens / statistics.median(speeds) if speeds else None
    record["parameters"] = trainer.model.parameter_count()
    record["machine"] = describe_machine(trainer)
    replace_text(folder / RESULT_FILE, json.dumps(record, indent=2) + "\n")


def describe_machine(trainer: Trainer) -> str:
    """Device, precision, compilation, threads and torch version: what affects a run's speed or its last digits."""
    device = trainer.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()} ({device.type})"
    compiled = ", compiled" if trainer.config.compile else ""
    threads = counted(torch.get_num_threads(), "thread")
    return f"{name}, {str(trainer.precision).removeprefix('torch.')}{compiled}, {threads}, torch {torch.__version__}"


def send(**message: Any) -> None:
    """Send one JSON line to the parent."""
    with contextlib.suppress(OSError):  # the parent is dead: ``stop_with_parent`` ends this process with a checkpoint
        print(json.dumps(message), flush=True)


def stop_with_parent() -> None:
    """Send this process SIGTERM when its standard input closes."""
    # os.read takes no lock: a thread that holds sys.stdin's lock at exit makes the interpreter abort.
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
