"""The queue of runs behind every experiment: each run a process and a folder of its own, several at a time.

A run that is done is not run again, one that was broken off goes on from its checkpoint, and one that diverged has
that as its result. So an experiment that was killed is gone on with by asking for it again.
"""

import json
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from antransformer.data import Dataset
from antransformer.errors import AntransformerError, ConfigError, DataError, MachineError, RunStoppedError
from antransformer.files import read_json
from antransformer.runs import worker
from antransformer.runs.worker import RESULT_FILE
from antransformer.training import run_folder as runs
from antransformer.training.config import MUTABLE_ON_RESUME, TrainConfig, to_mapping
from antransformer.training.trainer import StopSignals


@dataclass(frozen=True)
class Job:
    """A run to be made.

    Attributes:
        name: of its folder.
        config: its complete settings.
        keep: whether its last checkpoint stays when it is finished.
    """

    name: str
    config: TrainConfig
    keep: bool = False


@dataclass(frozen=True)
class RunResult:
    """How a job ended; the loss is infinite where it diverged."""

    name: str
    loss: float
    bits_per_byte: float
    seconds_per_step: float
    parameters: int
    machine: str


class Progress(Protocol):
    """Hears of the queue; the command line shows it. Calls come from several threads, one at a time."""

    def plan(self, tokens: int, runs: int) -> None:
        """So many more tokens and runs are to come."""

    def advance(self, tokens: int) -> None:
        """So many tokens were trained on, or found done."""

    def done(self, outcome: RunResult, found: bool) -> None:
        """A run ended, or was found finished."""


class RunQueue:
    """Runs jobs in worker processes, one at a time on each device.

    Args:
        root: where the run folders go.
        dataset: verified data.
        devices: one entry a worker, such as ``["cpu", "cpu"]`` or ``["cuda:0", "cuda:1"]``.
        progress: hears of it.
    """

    def __init__(self, root: Path, dataset: Dataset, devices: Sequence[str], progress: Progress) -> None:
        self.root, self.dataset, self.devices, self.progress = root, dataset, devices, progress
        self.lock = threading.Lock()
        self.processes: set[subprocess.Popen[str]] = set()
        self.halted = False

    def run(self, jobs: Iterable[Job]) -> dict[str, RunResult]:
        """All jobs to their end, each named once; results by name.

        Raises:
            ConfigError: a folder holds a run of the same name with other settings.
            DataError: it was trained on other data.
            RunStoppedError: SIGINT or SIGTERM came; every run's checkpoint is written.
            MachineError: a worker failed for another reason than divergence.
        """
        jobs = list({job.name: job for job in jobs}.values())
        self.progress.plan(sum(steps_tokens(job.config) for job in jobs), len(jobs))
        outcomes, waiting = {}, []
        for job in jobs:
            outcome = self.finished(job)
            if outcome is None:
                waiting.append(job)
            else:
                outcomes[job.name] = outcome
                self.progress.advance(steps_tokens(job.config))
                self.progress.done(outcome, found=True)
        return outcomes | self._work(waiting)

    def finished(self, job: Job) -> RunResult | None:
        """The outcome of a job that was done before; raises as ``run``."""
        folder = self.root / job.name
        if not (folder / runs.CONFIG_FILE).is_file():
            return None
        saved = flatten(to_mapping(runs.saved_config(folder)))
        for key, value in flatten(to_mapping(job.config)).items():
            if key not in MUTABLE_ON_RESUME - {"eval_tokens"} and saved.get(key) != value:
                raise ConfigError(f"{folder} was made with {key} {saved.get(key)}, not {value}: choose another --out")
        if not (folder / RESULT_FILE).is_file():
            return None
        try:
            result = read_json(folder / RESULT_FILE)
            digest = result["data"]
            outcome = RunResult(
                name=job.name,
                loss=_number(result["loss"]),
                bits_per_byte=_number(result["bits_per_byte"]),
                seconds_per_step=_number(result["seconds_per_step"]),
                parameters=int(result["parameters"]),
                machine=str(result["machine"]),
            )
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError(f"{folder / RESULT_FILE}: damaged; remove {folder}, and the run is made again") from error
        if digest != self.dataset.digest:
            raise DataError(f"{folder} was trained on other data than {self.dataset.path}: choose another --out")
        return outcome

    def _work(self, jobs: Sequence[Job]) -> dict[str, RunResult]:
        waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in sorted(jobs, key=lambda job: -job.config.tokens):  # long ones first: the workers end together
            waiting.put(job)
        outcomes: dict[str, RunResult] = {}
        failures: list[Exception] = []

        def serve(device: str) -> None:
            try:
                while not self.halted:
                    outcome = self._train(waiting.get_nowait(), device)
                    if outcome is not None:
                        outcomes[outcome.name] = outcome
            except queue.Empty:
                pass
            except Exception as error:  # raised again in the thread that waits
                failures.append(error)
                self._halt()

        threads = [threading.Thread(target=serve, args=(device,)) for device in self.devices]
        with StopSignals() as stop:
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    while thread.is_alive():
                        thread.join(0.2)
                        if stop.received:
                            self._halt()
            except KeyboardInterrupt:  # a second signal does not wait for the next look at the first
                self._halt()
                for thread in threads:
                    thread.join()
                raise
        if failures:
            raise failures[0]
        if stop.received:
            raise RunStoppedError(
                f"stopped by {stop.received.name}; {len(outcomes)} of {len(jobs)} runs of this stage are done; "
                "the same command goes on with the rest",
                stop.received,
            )
        return outcomes

    def _train(self, job: Job, device: str) -> RunResult | None:
        """Run one worker to its end; None where it was stopped."""
        folder = self.root / job.name
        if not (folder / runs.CONFIG_FILE).is_file():
            runs.create_run_folder(folder, job.config, self.dataset)
        with self.lock:
            if self.halted:
                return None
            process = subprocess.Popen(
                # -P: a file of the user's that is named like a library is not imported in its place
                [sys.executable, "-P", "-m", worker.__name__, str(folder), str(self.dataset.path), device],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(max(1, cores() // len(self.devices)))},
                start_new_session=True,  # a Ctrl-C in the terminal is ours to pass on
            )
            self.processes.add(process)
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.extend(process.stderr or []))
        reader.start()
        failure = self._listen(process, job.config.batch_tokens)
        status = process.wait()
        reader.join()
        with self.lock:
            self.processes.discard(process)
        if status and self.halted:
            return None
        outcome = self.finished(job)
        if outcome is None:
            raise _failure(folder, status, failure or "".join(errors[-1:]).strip())
        if not job.keep:
            shutil.rmtree(folder / runs.CHECKPOINTS, ignore_errors=True)
        with self.lock:
            self.progress.done(outcome, found=False)
        return outcome

    def _listen(self, process: "subprocess.Popen[str]", batch_tokens: int) -> str | None:
        """Pass a worker's steps on until it ends; returns the error that it sent, if any."""
        failure, last = None, 0
        for line in process.stdout or []:
            try:
                message = dict(json.loads(line))
            except (ValueError, TypeError):  # a library's chatter
                continue
            failure = message.get("error", failure)
            step = message.get("step", last)
            with self.lock:
                self.progress.advance((step - last) * batch_tokens)
            last = step
        return failure

    def _halt(self) -> None:
        """Start no more, and let each worker write its checkpoint; once, for a second signal would cut that short."""
        with self.lock:
            if not self.halted:
                self.halted = True
                for process in self.processes:
                    process.terminate()


def steps_tokens(config: TrainConfig) -> int:
    """Tokens that a run trains on: whole batches."""
    return config.steps * config.batch_tokens


def default_devices(workers: int | None = None) -> list[str]:
    """One entry a worker: every GPU, or a worker for each core (at most 8) on a CPU."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return [f"cuda:{index % count}" for index in range(workers or count)]
    return ["cpu"] * (workers or min(8, cores()))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _failure(folder: Path, status: int, said: str) -> AntransformerError:
    """Why a worker left no result."""
    if status == 2:
        return ConfigError(f"{folder}: {said}")
    if status < 0:
        name = signal.Signals(-status).name
        said = f"its process was ended by {name}{', for want of memory?' if name == 'SIGKILL' else ''}"
    reason = said or f"its process ended with status {status}"
    return MachineError(f"{folder}: {reason}; the runs that are done are kept, and the same command goes on")


def _number(value: float | None) -> float:
    """A positive number; a diverged run's null is infinity."""
    number = math.inf if value is None else float(value)
    if not number > 0:
        raise ValueError(f"{number} is not positive")
    return number
