"""Progress displays: a live bar on a terminal, plain lines elsewhere."""

import math
import os
import sys
import time
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from antransformer.data.dataset import Dataset
from antransformer.data.stdlib import is_prepared, open_data
from antransformer.pace import Pace
from antransformer.wording import counted

if TYPE_CHECKING:
    from antransformer.runs.queue import RunResult
    from antransformer.training.metrics import MetricsLine


def new_bar(text: str, console: Console, enabled: bool, transient: bool = False) -> Progress:
    """Return a bar with a text, the field ``numbers`` and the time left; it is hidden if there is no terminal."""
    return Progress(
        TextColumn(text, markup=False),  # names of files may contain brackets
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not (enabled and console.is_terminal),
        transient=transient,
    )


class LiveDisplay:
    """Base of the displays: a context manager that shows ``bar`` until it exits, and prints lines above it.

    With ``enabled=False`` a display receives progress and shows nothing.
    """

    bar: Progress
    console: Console
    enabled: bool

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.bar.disable:  # rich before 15 prints an empty line for a hidden bar
            self.bar.stop()

    def print_line(self, text: str, prefix: str = "") -> None:
        """Print a line above the bar; without a terminal, print ``prefix`` and the line."""
        if not self.enabled:
            return
        if self.console.is_terminal:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            log(prefix + text)


class TrainingProgress(LiveDisplay):
    """Display of one training run: loss, tokens/s, MFU and time left at each metrics line.

    Args:
        steps: length of the run.
        enabled: false on all ranks but 0.
    """

    def __init__(self, steps: int, enabled: bool = True) -> None:
        self.steps, self.enabled = steps, enabled
        self.started = False
        self.console = Console()
        self.bar = new_bar("step {task.completed:,.0f}/{task.total:,.0f}", self.console, enabled)
        self.task = self.bar.add_task("train", total=steps, numbers="starting")
        self.validation = ""
        self.pace = Pace("training", "steps", self.print_line, repeat=not self.console.is_terminal)

    def step(self, step: int) -> None:
        """Move the bar to a step; the first call sets where a resumed run starts."""
        if self.started:
            self.bar.update(self.task, completed=step)
            self.pace(step, self.steps)
        else:
            # A reset also restarts the clock: steps of an earlier session must not count as speed.
            self.bar.reset(self.task, completed=step)
            self.started = True

    def metrics(self, line: "MetricsLine") -> None:
        """Show the numbers of a metrics line."""
        if not self.enabled:
            return
        if "val_loss" in line:
            self.validation = f"  val {line['val_loss']:.3f}"
        for text in line.get("samples", ()):
            self.print_line(f"sample at step {line['step']:,}: {text!r}")
        loss = f"loss {line['loss']:.3f}" if "loss" in line else "skipped"
        numbers = f"{loss}{self.validation}  {line['tokens_per_second']:,.0f} tok/s"
        if line["mfu"] is not None:
            numbers += f"  MFU {line['mfu']:.0%}"
        if self.console.is_terminal:
            self.bar.update(self.task, numbers=numbers)
        else:
            left = (self.steps - line["step"]) * line["tokens"] / line["step"] / max(line["tokens_per_second"], 0.1)
            log(f"step {line['step']}/{self.steps}  {numbers}  {_duration(left)} left")
            self.pace.defer()

    def log(self, text: str) -> None:
        """Print a message of the trainer, which may announce another speed, on a line of its own."""
        self.print_line(text)
        self.pace.restart()


class ExperimentProgress(LiveDisplay):
    """Display of an experiment: a bar over the tokens of a stage, and one line for each finished run."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.console = Console()
        self.bar = new_bar("{task.description}", self.console, enabled)
        self.task = self.bar.add_task("", total=0, numbers="")
        self.start_time = time.monotonic()
        self.stage("")

    def stage(self, name: str) -> None:
        """Start a new stage."""
        self.name, self.tokens, self.runs, self.ended, self.trained = name, 0, 0, 0, 0
        self.pace = Pace(name, "tokens", self._print_pace)
        self.bar.reset(self.task, description=name, total=0, numbers="")

    def plan(self, tokens: int, runs: int) -> None:
        """Add tokens and runs to the total of the stage."""
        self.tokens += tokens
        self.runs += runs
        self.bar.update(self.task, total=self.tokens)
        self.print_line(f"{self.name}: {counted(self.runs, 'run')}, {self.tokens / 1e6:,.1f}M tokens", self._elapsed())

    def advance(self, tokens: int, earlier: bool = False) -> None:
        """Add tokens that were trained on; ``earlier``: by an earlier call, so they do not count as speed."""
        self.trained += tokens
        numbers = f"{self.ended}/{counted(self.runs, 'run')}"
        if earlier:
            self.pace.skip(tokens)
            self.bar.reset(self.task, completed=self.trained, numbers=numbers)
            return
        self.bar.update(self.task, completed=self.trained, numbers=numbers)
        if not self.console.is_terminal:
            self.pace(self.trained, self.tokens)

    def done(self, result: "RunResult", cached: bool) -> None:
        """Print the loss of a finished run; ``cached`` marks one that an earlier call has finished."""
        self.ended += 1
        loss = "diverged" if math.isinf(result.loss) else f"loss {result.loss:.4f}"
        mark = "  (done before)" if cached else ""
        self.print_line(f"{self.ended}/{self.runs}  {result.name}  {loss}{mark}", self._elapsed())
        self.bar.update(self.task, numbers=f"{self.ended}/{counted(self.runs, 'run')}")

    def _print_pace(self, text: str) -> None:
        self.print_line(text, self._elapsed())

    def _elapsed(self) -> str:
        return f"[{_duration(time.monotonic() - self.start_time)}] "


class EvaluationProgress(LiveDisplay):
    """Display of an evaluation on standard error: a bar over the sequences that the model reads, or plain lines.

    An item of a task is several sequences: its answers, or the windows of a document.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        # lm_eval prints on standard output, and is redirected; a stream bound now is not.
        self.console = Console(file=sys.stderr)
        self.bar = new_bar("{task.description}", self.console, enabled, transient=True)
        self.task = self.bar.add_task("", total=None, numbers="")
        self.start_time = time.monotonic()
        self.pace = Pace("", "sequences", self._print)

    def __call__(self, name: str, done: int, total: int) -> None:
        """Show how many of a task's sequences are scored; a total of 0 means that the task is loading."""
        numbers = f"{done:,}/{counted(total, 'sequence')}" if total else "loading"
        self.bar.update(self.task, description=name, completed=done, total=total or None, numbers=numbers)
        if not self.enabled or not total:
            return
        if self.pace.name != name:
            self.pace = Pace(name, "sequences", self._print, repeat=self.bar.disable)
        self.pace(done, total)

    def scored(self, name: str, scores: str) -> None:
        """Print the scores of a finished task or file, which an interruption of a later one would lose."""
        if self.enabled:
            self._print(f"{name}  {scores}")

    def _print(self, text: str) -> None:
        line = f"[{_duration(time.monotonic() - self.start_time)}] {text}"
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class DataProgress(LiveDisplay):
    """Display of work on data, on standard error: a bar over its bytes, or lines."""

    def __init__(self, label: str, enabled: bool = True) -> None:
        self.enabled, self.label = enabled, label
        self.console = Console(stderr=True)
        self.bar = new_bar("{task.description}", self.console, enabled, transient=True)
        self.task = self.bar.add_task(label, total=None, numbers="")
        self.pace = Pace(label, "MB", self.log)

    def show(self, done_bytes: int, total_bytes: int, numbers: str) -> None:
        """Show what has been done, as a part of the total and as text."""
        self.bar.update(self.task, completed=done_bytes, total=total_bytes, numbers=numbers)
        if self.bar.disable:
            self.pace(done_bytes / 1e6, total_bytes / 1e6)

    def log(self, text: str) -> None:
        """Print a line."""
        if self.enabled:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class PrepareProgress(DataProgress):
    """Display of data preparation; pass it as ``progress`` to ``data.prepare``."""

    def __call__(self, done_bytes: int, total_bytes: int, documents: int, tokens: int) -> None:
        """Show the totals after a batch of documents."""
        numbers = f"{done_bytes / 1e6:,.0f} MB  {counted(documents, 'document')}  {tokens / 1e6:,.1f}M tokens"
        self.show(done_bytes, total_bytes, numbers)


class VerifyProgress(DataProgress):
    """Display of a check of data; pass it as ``progress`` to ``data.verify``."""

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        """Show the totals after a block of data."""
        self.show(done_bytes, total_bytes, f"{done_bytes / 1e9:,.1f} of {total_bytes / 1e9:,.1f} GB")


def open_dataset(name: str, progress: bool, verify: bool = True) -> Dataset:
    """Open one source, and check a sample of it unless another process does; shows progress of python-stdlib."""
    if not progress or is_prepared(name):
        return open_data(name, verify=verify)
    log(f"preparing {name}: the source of Python's standard library")
    with PrepareProgress(name) as display:
        return open_data(name, display, verify)


def log(text: str) -> None:
    """Print a line. If the reader has closed the pipe (``| head``), discard it and let the work continue."""
    try:
        print(text, flush=True)
    except OSError:
        discard_output()


def discard_output() -> None:
    """Redirect standard output to the null device."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
