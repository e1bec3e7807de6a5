"""The process that trains one run of an experiment: ``python -m antransformer.runs.worker RUN DATA DEVICE``.

It speaks to the one that started it in JSON lines on standard output (``step`` and ``error``) and leaves
``result.json`` in the run folder. It stops, with its checkpoint written, when its standard input ends, so that nothing
goes on training when the experiment was killed.
"""

import contextlib
import json
import os
import platform
import signal
import statistics
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from antransformer.data import Dataset, eval_batches
from antransformer.diagnostics.probes import PROBE_TOKENS, probe
from antransformer.errors import AntransformerError, DivergedError, RunStoppedError, UsageError
from antransformer.files import replace_text
from antransformer.training import run_folder as runs
from antransformer.training.device import is_out_of_memory
from antransformer.training.metrics import MetricsLine, MetricsLog, read_metrics
from antransformer.training.trainer import Trainer

RESULT_FILE = "result.json"
PROBES_FILE = "probes.jsonl"


class Reporter:
    """Sends progress to the parent, and takes the probes at each metrics line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def follow(self, trainer: Trainer) -> None:
        """Whom the probes look at."""
        config = trainer.config
        sequences = max(1, PROBE_TOKENS // config.model.context)
        self.trainer = trainer
        self.tokens, _ = next(eval_batches(trainer.validation, config.model.context, sequences))
        self.probes = MetricsLog(self.folder, trainer.done, name=PROBES_FILE)

    def step(self, step: int) -> None:
        """Tell the parent."""
        send(step=step)

    def metrics(self, line: MetricsLine) -> None:
        """Probe the model beside its metrics line."""
        trainer = self.trainer
        found = probe(trainer.model, trainer.optimizer, self.tokens.to(trainer.device))
        with contextlib.suppress(ValueError):  # not finite: the run is about to diverge, and says so itself
            self.probes.write({"step": line["step"], "tokens": line["tokens"], **found})

    def log(self, text: str) -> None:
        """Nobody reads a worker's notes."""


def main(arguments: list[str]) -> int:
    """Train the run to its end; 0 also where it diverged, which is a result."""
    folder, data, device = Path(arguments[0]), arguments[1], arguments[2]
    threading.Thread(target=stop_with_parent, daemon=True).start()
    try:
        train(folder, data, device)
    except RunStoppedError as error:
        return error.status
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        send(error="not enough memory: lower --micro-batch-size, or --workers")
        return 1
    except (AntransformerError, OSError, MemoryError) as error:
        send(error=" ".join(str(error).split()) or type(error).__name__)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def train(folder: Path, data: str, device: str) -> None:
    """Go on with the run in ``folder`` and leave its result there."""
    config = runs.resumed_config(folder, {"device": device, "data": data})
    reporter = Reporter(folder)
    dataset = Dataset.open(data, verify=False)  # the parent has verified it
    trainer = Trainer(config, dataset, folder, reporter, resume=True)
    reporter.follow(trainer)
    outcome: dict[str, Any] = {"tokens": config.steps * config.batch_tokens, "data": dataset.digest}
    try:
        result = trainer.run()
        outcome |= {"loss": result.val_loss, "bits_per_byte": result.bits_per_byte, "diverged": None}
    except DivergedError as error:
        outcome |= {"loss": None, "bits_per_byte": None, "diverged": str(error)}
    speeds = [speed for line in read_metrics(folder / "metrics.jsonl") if (speed := line.get("tokens_per_second"))]
    outcome["seconds_per_step"] = config.batch_tokens / statistics.median(speeds) if speeds else None
    outcome["parameters"] = trainer.model.parameter_count()
    outcome["machine"] = machine(trainer)
    replace_text(folder / RESULT_FILE, json.dumps(outcome, indent=2) + "\n")


def machine(trainer: Trainer) -> str:
    """What a run was made with, as far as it bears on its speed or its last digits."""
    device = trainer.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor()} ({device.type})"
    compiled = ", compiled" if trainer.config.compile else ""
    threads = f"{torch.get_num_threads()} threads"
    return f"{name}, {str(trainer.precision).removeprefix('torch.')}{compiled}, {threads}, torch {torch.__version__}"


def processor() -> str:
    """The CPU's name where the system tells it."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def send(**message: Any) -> None:
    """One JSON line to the parent. Where that is gone the end of standard input says so, and a checkpoint is due."""
    with contextlib.suppress(OSError):
        print(json.dumps(message), flush=True)


def stop_with_parent() -> None:
    """End as by SIGTERM when standard input does."""
    while os.read(sys.stdin.fileno(), 1):  # unbuffered: a reader that holds a lock at the end would abort it
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
