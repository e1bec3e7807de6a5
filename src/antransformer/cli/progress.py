"""Progress on a terminal as a bar, elsewhere as plain lines."""

import math
import os
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from antransformer.runs.queue import RunResult
from antransformer.training.metrics import MetricsLine


def new_bar(text: str, console: Console, transient: bool = False) -> Progress:
    """A bar behind a text, with the field ``numbers`` and the time left; silent where the console is no terminal."""
    return Progress(
        TextColumn(text),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
        transient=transient,
    )


class LiveDisplay:
    """Something with a bar that is on the terminal while it is entered."""

    bar: Progress

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()


class TrainingProgress(LiveDisplay):
    """Shows a run: a bar with loss, tokens/s, MFU and time left, or a plain line at each metrics line.

    Args:
        steps: length of the run.
        shown: false for all but one of several processes that train together.
    """

    def __init__(self, steps: int, shown: bool = True) -> None:
        self.steps, self.shown = steps, shown
        self.begun = False
        self.console = Console(stderr=False, force_terminal=None if shown else False)
        self.bar = new_bar("step {task.completed:,.0f}/{task.total:,.0f}", self.console)
        self.task = self.bar.add_task("train", total=steps, numbers="starting")
        self.validation = ""

    def step(self, step: int) -> None:
        """Move the bar; the first call says where the run begins."""
        if self.begun:
            self.bar.update(self.task, completed=step)
        else:
            self.bar.reset(self.task, completed=step)
            self.begun = True

    def metrics(self, line: MetricsLine) -> None:
        """Show the numbers of a metrics line."""
        if not self.shown:
            return
        if "val_loss" in line:
            self.validation = f"  val {line['val_loss']:.3f}"
        loss = f"loss {line['loss']:.3f}" if "loss" in line else "skipped"
        numbers = f"{loss}{self.validation}  {line['tokens_per_second']:,.0f} tok/s"
        if line["mfu"] is not None:
            numbers += f"  MFU {line['mfu']:.0%}"
        if self.console.is_terminal:
            self.bar.update(self.task, numbers=numbers)
        else:
            left = (self.steps - line["step"]) * line["tokens"] / line["step"] / line["tokens_per_second"]
            log(f"step {line['step']}/{self.steps}  {numbers}  {_duration(left)} left")

    def log(self, text: str) -> None:
        """A line of its own."""
        if not self.shown:
            return
        if self.console.is_terminal:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            log(text)


class ExperimentProgress(LiveDisplay):
    """Shows an experiment: a bar over the tokens of a stage's runs, and a line for each run that ends."""

    def __init__(self) -> None:
        self.console = Console(stderr=False)
        self.bar = new_bar("{task.description}", self.console)
        self.task = self.bar.add_task("", total=0, numbers="")
        self.name, self.tokens, self.runs, self.ended, self.trained = "", 0, 0, 0, 0
        self.started = time.monotonic()

    def stage(self, name: str) -> None:
        """A new stage begins."""
        self.name, self.tokens, self.runs, self.ended, self.trained = name, 0, 0, 0, 0
        self.bar.reset(self.task, description=name, total=0, numbers="")

    def plan(self, tokens: int, runs: int) -> None:
        """More is to come in this stage."""
        self.tokens += tokens
        self.runs += runs
        self.bar.update(self.task, total=self.tokens)
        self._line(f"{self.name}: {self.runs} runs, {self.tokens / 1e6:,.1f}M tokens")

    def advance(self, tokens: int) -> None:
        """So many more tokens are trained on."""
        self.trained += tokens
        self.bar.update(self.task, completed=self.trained, numbers=f"{self.ended}/{self.runs} runs")

    def done(self, outcome: RunResult, found: bool) -> None:
        """One run ended."""
        self.ended += 1
        loss = "diverged" if math.isinf(outcome.loss) else f"loss {outcome.loss:.4f}"
        self._line(f"{self.ended}/{self.runs}  {outcome.name}  {loss}{'  (done before)' if found else ''}")
        self.bar.update(self.task, numbers=f"{self.ended}/{self.runs} runs")

    def _line(self, text: str) -> None:
        if self.console.is_terminal:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            log(f"[{_duration(time.monotonic() - self.started)}] {text}")


class EvaluationProgress(LiveDisplay):
    """Shows an evaluation: a bar over the texts of a task, or a plain line when all of them are read."""

    def __init__(self) -> None:
        # The stream itself: what the work prints meanwhile goes elsewhere.
        self.console = Console(file=sys.stderr)
        self.bar = new_bar("{task.description}", self.console, transient=True)
        self.task = self.bar.add_task("", total=None, numbers="")
        self.started = time.monotonic()

    def __call__(self, name: str, done: int, total: int) -> None:
        """So many of a task's texts are read; of none, it is being loaded."""
        numbers = f"{done:,}/{total:,} texts" if total else "loading"
        self.bar.update(self.task, description=name, completed=done, total=total or None, numbers=numbers)
        if self.bar.disable and 0 < total <= done:
            line = f"[{_duration(time.monotonic() - self.started)}] {name}  {total:,} texts"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class PrepareProgress(LiveDisplay):
    """Shows the preparation of data; pass it as ``progress`` to ``data.prepare``."""

    def __init__(self, label: str) -> None:
        console = Console(stderr=True)
        self.label, self.last = label, time.monotonic()
        self.bar = new_bar("{task.description}", console, transient=True)
        self.task = self.bar.add_task(label, total=None, numbers="")

    def __call__(self, done_bytes: int, total_bytes: int, documents: int, tokens: int) -> None:
        """One batch of documents is written."""
        numbers = f"{done_bytes / 1e6:,.0f} MB  {documents:,} documents  {tokens / 1e6:,.1f}M tokens"
        self.bar.update(self.task, completed=done_bytes, total=total_bytes, numbers=numbers)
        if self.bar.disable and time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            print(f"{self.label}: {numbers}", file=sys.stderr, flush=True)


def log(text: str) -> None:
    """Print a line. Where nobody reads any more (``| head``, a closed terminal) the work goes on in silence."""
    try:
        print(text, flush=True)
    except OSError:
        silence()


def silence() -> None:
    """Send everything that is still printed nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
