"""The run queue of comparisons and sweeps: one process and one folder for each run, several runs at a time.

Finished runs are skipped, interrupted runs resume from their checkpoint, and diverged runs count as results. An
interrupted experiment therefore continues when it is started again.
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
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from antransformer.data import Dataset
from antransformer.errors import AntransformerError, ConfigError, DataError, MachineError, RunStoppedError
from antransformer.files import read_json
from antransformer.runs import worker
from antransformer.runs.settings import flatten
from antransformer.runs.worker import RESULT_FILE
from antransformer.training import run_folder
from antransformer.training.config import MUTABLE_ON_RESUME, TrainConfig, to_mapping
from antransformer.training.device import choose_device, choose_precision, resolve_auto
from antransformer.training.resources import available_cores
from antransformer.training.stop_signals import FORWARDED, StopSignals
from antransformer.wording import counted


@dataclass(frozen=True)
class Job:
    """A training run for the queue.

    Attributes:
        name: unique name, which is also the name of the run folder.
        config: complete settings.
        keep: whether to keep the last checkpoint after the run.
    """

    name: str
    config: TrainConfig
    keep: bool = False


@dataclass(frozen=True)
class RunResult:
    """Result of a finished run; the loss is infinite where the run diverged."""

    name: str
    loss: float
    bits_per_byte: float
    seconds_per_step: float
    parameters: int
    machine: str


class Progress(Protocol):
    """Receives progress callbacks from the queue: from several threads, one call at a time."""

    def plan(self, tokens: int, runs: int) -> None:
        """Add tokens and runs to the work that is planned."""

    def advance(self, tokens: int, earlier: bool = False) -> None:
        """Add tokens to those that are done; ``earlier``: an earlier call trained on them."""

    def done(self, result: RunResult, cached: bool, /) -> None:
        """Report a finished run; ``cached``: an earlier call finished it."""


class RunQueue:
    """Executes runs in worker processes, one at a time on each device.

    Args:
        root: parent of the run folders.
        dataset: verified data.
        devices: one entry for each worker, such as ``["cpu", "cpu"]`` or ``["cuda:0", "cuda:1"]``.
        progress: receives the callbacks.
    """

    def __init__(self, root: Path, dataset: Dataset, devices: Sequence[str], progress: Progress) -> None:
        self.root, self.dataset, self.devices, self.progress = root, dataset, devices, progress
        self.lock = threading.Lock()  # guards ``processes``, ``stopping`` and calls of ``progress``
        self.processes: set[subprocess.Popen[str]] = set()
        self.stopping = False

    def run(self, jobs: Iterable[Job]) -> dict[str, RunResult]:
        """Execute all jobs and return their results by name; jobs of equal names are run once.

        Raises:
            ConfigError: a run folder of that name has other settings.
            DataError: a run folder was trained on other data, or its result is damaged.
            RunStoppedError: SIGINT, SIGTERM or SIGHUP was received; every active run has saved a checkpoint.
            MachineError: a worker failed for a reason other than divergence.
        """
        jobs = list({job.name: job for job in jobs}.values())
        self.progress.plan(sum(tokens_of(job.config) for job in jobs), len(jobs))
        results, waiting = {}, []
        for job in jobs:
            result = self.finished(job)
            if result is None:
                waiting.append(job)
            else:
                results[job.name] = result
                self.progress.advance(tokens_of(job.config), earlier=True)
                self.progress.done(result, True)
        return results | self._execute(waiting)

    def finished(self, job: Job) -> RunResult | None:
        """Return the result of a run that an earlier call finished, or None; raises the errors of ``run``."""
        folder = self.root / job.name
        if not (folder / run_folder.CONFIG_FILE).is_file():
            return None
        self.require_settings(folder, job.config)
        if not (folder / RESULT_FILE).is_file():
            return None
        try:
            content = read_json(folder / RESULT_FILE)
            digest = content["data"]
            result = RunResult(
                name=job.name,
                loss=_positive_or_infinite(content["loss"]),
                bits_per_byte=_positive_or_infinite(content["bits_per_byte"]),
                seconds_per_step=_positive_or_infinite(content["seconds_per_step"]),
                parameters=int(content["parameters"]),
                machine=str(content["machine"]),
            )
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError(f"{folder / RESULT_FILE} is damaged: delete {folder} to run it again") from error
        if digest != self.dataset.digest:
            raise DataError(f"{folder} was trained on other data than {self.dataset.name}: choose another --out")
        return result

    def require_settings(self, folder: Path, config: TrainConfig, except_for: Collection[str] = ()) -> None:
        """Check that a run folder has the settings of a config that affect results; raises ConfigError.

        Args:
            folder: run folder.
            config: complete settings.
            except_for: dotted names of settings that may differ.
        """
        saved = flatten(to_mapping(run_folder.saved_config(folder)))
        if saved["precision"] == "auto":  # a run of an earlier release
            saved["precision"] = str(choose_precision("auto", torch.device(self.devices[0]))).removeprefix("torch.")
        # Other validation windows give another loss, so a resumed run may change them but a cached result may not.
        free = {*(MUTABLE_ON_RESUME - {"eval_tokens"}), *except_for}
        new = flatten(to_mapping(resolve_auto(config, self.devices[0])))
        for key in {**new, **saved}:  # a mapping has no settings that are None
            if key not in free and saved.get(key) != new.get(key):
                raise ConfigError(
                    f"{folder} was run with {key} {saved.get(key)}, not {new.get(key)}: choose another --out"
                )

    def _execute(self, jobs: Sequence[Job]) -> dict[str, RunResult]:
        """Run jobs on all devices, each served by a thread that waits for one worker process at a time."""
        waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        # Longest first: otherwise a long run that starts last keeps one device busy while the others are idle.
        for job in sorted(jobs, key=lambda job: -job.config.tokens):
            waiting.put(job)
        results: dict[str, RunResult] = {}
        failures: list[Exception] = []

        def serve(device: str) -> None:
            try:
                while not self.stopping:
                    result = self._train(waiting.get_nowait(), device)
                    if result is not None:
                        results[result.name] = result
            except queue.Empty:
                pass
            except Exception as error:  # raised again below, in the thread of the caller
                failures.append(error)
                self._stop_workers()

        threads = [threading.Thread(target=serve, args=(device,)) for device in self.devices]
        with StopSignals("saving the active runs; repeat to stop at once") as stop:
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    while thread.is_alive():
                        thread.join(0.2)
                        if stop.received:
                            self._stop_workers()
            except KeyboardInterrupt:
                with self.lock:
                    killed = [*self.processes] if self.stopping else []
                for process in killed:
                    process.kill()  # it may be in a long step
                self._stop_workers()  # a second SIGINT can arrive before the loop has seen the first
                for thread in threads:
                    thread.join()
                raise
        if failures:
            raise failures[0]
        if stop.received:
            raise RunStoppedError(
                f"stopped by {stop.received.name} after {len(results)} of {counted(len(jobs), 'run')} of this stage; "
                "run the same command again to continue",
                stop.received,
            )
        return results

    def _train(self, job: Job, device: str) -> RunResult | None:
        """Train one run in a worker process; None where the queue stopped it."""
        folder = self.root / job.name
        config = resolve_auto(job.config, self.devices[0])
        if not (folder / run_folder.CONFIG_FILE).is_file():
            run_folder.create_run_folder(folder, config, self.dataset)
        elif not run_folder.has_started(folder):  # a call with other settings, such as micro_batch_size, created it
            run_folder.save_config(folder, config)
        process = self._start_worker(folder, device)
        if process is None:
            return None
        # A separate thread: a worker blocks while the pipe of its standard error is full.
        stderr_lines: list[str] = []
        reader = threading.Thread(target=lambda: stderr_lines.extend(process.stderr or []))
        reader.start()
        error, tokens = self._forward_progress(process, job.config.batch_tokens)
        status = process.wait()
        reader.join()
        with self.lock:
            self.processes.discard(process)
        if status and self.stopping:
            return None
        result = self.finished(job)
        if result is None:
            raise _worker_error(folder, status, error or "".join(stderr_lines[-1:]).strip())
        if not job.keep:
            shutil.rmtree(folder / run_folder.CHECKPOINTS, ignore_errors=True)
        with self.lock:
            self.progress.advance(tokens_of(job.config) - tokens)  # the rest of a run that diverged
            self.progress.done(result, False)
        return result

    def _start_worker(self, folder: Path, device: str) -> "subprocess.Popen[str] | None":
        """Start the worker process of a run; None where the queue is stopping."""
        with self.lock:
            if self.stopping:
                return None
            threads, sharing = str(threads_per_worker(len(self.devices))), str(self.devices.count(device))
            process = subprocess.Popen(
                # -P: a user's file in the current folder must not shadow a library of the same name
                [sys.executable, "-P", "-m", worker.__name__, str(folder), self.dataset.name, device, threads, sharing],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                # Its number of threads is an argument; the variable would stop the worker from adapting it.
                env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {FORWARDED: "1"},
                start_new_session=True,  # Ctrl-C in the terminal reaches this process only, which then stops workers
            )
            self.processes.add(process)
            return process

    def _forward_progress(self, process: "subprocess.Popen[str]", batch_tokens: int) -> tuple[str | None, int]:
        """Forward a worker's steps until it exits; return the error that it reported, if any, and its tokens."""
        error, last_step = None, None  # a resumed run first sends the step of its checkpoint
        for line in process.stdout or []:
            try:
                message = dict(json.loads(line))
            except (ValueError, TypeError):  # output of a library
                continue
            error = message.get("error", error)
            if "step" in message:
                tokens = (message["step"] - (last_step or 0)) * batch_tokens
                with self.lock:
                    self.progress.advance(tokens, earlier=last_step is None)
                last_step = message["step"]
        return error, (last_step or 0) * batch_tokens

    def _stop_workers(self) -> None:
        """Start no further runs and let active workers save a checkpoint.

        Workers are signalled once: a second signal would abort a worker that is writing its checkpoint.
        """
        with self.lock:
            if not self.stopping:
                self.stopping = True
                for process in self.processes:
                    process.terminate()


def tokens_of(config: TrainConfig) -> int:
    """Number of tokens that a run trains on: its full batches."""
    return config.steps * config.batch_tokens


def default_devices(workers: int | None = None) -> list[str]:
    """Return one entry for each worker: by default one for each GPU, or for each CPU core up to 8."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return [f"cuda:{index % count}" for index in range(workers or count)]
    return ["cpu"] * (workers or min(8, available_cores()))


def available_devices(devices: Sequence[str], workers: int | None = None) -> list[str]:
    """Return one device for each worker: those given, or the default ones.

    Raises:
        ConfigError: a device is not available, ``workers`` is below 1, or devices and workers are both given.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    chosen = list(devices) or default_devices(workers)
    # This process needs the default devices no more than their workers do. The first one becomes its current device.
    for device in reversed(devices or chosen[:1]):
        choose_device(device)
    if devices and workers:
        raise ConfigError("devices and workers exclude each other: each of the devices has one worker")
    return chosen


def threads_per_worker(workers: int) -> int:
    """Number of CPU threads of each worker: its share of the cores, and at most ``OMP_NUM_THREADS``."""
    share, limit = max(1, available_cores() // workers), os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(limit)) if limit.isdecimal() and int(limit) else share


def _worker_error(folder: Path, status: int, message: str) -> AntransformerError:
    """Return the error for a worker that exited without a result."""
    if status == 2:  # the worker's exit status for a mistake of the user
        return ConfigError(f"{folder}: {message}")
    if status < 0:
        name = signal.Signals(-status).name
        message = f"the worker was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
    message = message or f"the worker exited with status {status}"
    return MachineError(f"{folder}: {message}; finished runs are kept: run the same command again to continue")


def _positive_or_infinite(value: float | None) -> float:
    """Return a number of ``result.json``; null, which a diverged run has, becomes infinity.

    Raises:
        ValueError: the number is not positive.
    """
    number = math.inf if value is None else float(value)
    if not number > 0:
        raise ValueError(f"{number} is not positive")
    return number
