"""Kills ranks of real runs at random moments, and counts what came of it.

    python tests/helpers/faults.py --kills 50     # at any moment from the start of the processes on
    python tests/helpers/faults.py --soak 60      # an hour of training, with a kill every few minutes

A run of two processes is repeated under SIGKILL until the kills, or the minutes, are used up. Each repetition has to
end as an unbroken run did, in every figure that it wrote down. With --kills every other one uses torchrun's restarts
up, so that the whole job has to end, and the same command is given again. Ends with status 1 where anything was not as
it ought to be.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from antransformer.errors import CheckpointError
from antransformer.training.checkpointing import checkpoint
from antransformer.training.metrics import read_metrics

sys.path.insert(0, str(Path(__file__).parent.parent))  # started as a script, in a process of its own

from helpers.small import SMALL_OPTIONS, make_corpus

RANKS = 2
LIMIT = 60  # seconds in which a job has to end, or to be back
TIMED = ("seconds", "tokens_per_second", "mfu")


class Job:
    """torchrun and its processes.

    Args:
        words: the module to run, and its arguments.
        log: what they print is appended to it.
        restarts: how often torchrun may start them again.
        place: as one machine of how many, and the port where they meet; alone without.
    """

    def __init__(self, words: list, log: Path, restarts: int = 0, place: tuple[int, int] | None = None) -> None:
        start = [sys.executable, "-m", "torch.distributed.run"]
        machines, port = place or (1, 0)
        self.size = RANKS // machines
        together = [f"--nnodes={machines}", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=one"]
        start += [f"--nproc-per-node={self.size}", *(together if place else ["--standalone"])]
        quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        with log.open("a") as output:
            self.process = subprocess.Popen(
                [*start, f"--max-restarts={restarts}", "-m", *map(str, words)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **quiet},
            )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in (*self.ranks().values(), self.process.pid):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def ranks(self) -> dict[int, int]:
        """The process of each rank that lives."""
        found = {}
        for path in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in map(int, path.read_text().split()):
                with contextlib.suppress(OSError):  # it has just ended
                    rank = re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
                    if rank is not None:
                        found[int(rank[1])] = pid
        return found

    def started(self, other_than: Collection[int] = (), seconds: float = 2 * LIMIT) -> dict[int, int]:
        """The ranks once all are there, in new processes; empty when the job ended, or the time.

        ``waited`` is how long that took.
        """
        self.waited = 0.0
        while self.waited < seconds:
            began, ranks = time.monotonic(), self.ranks()
            if len(ranks) == self.size and not set(other_than) & set(ranks.values()):
                return ranks
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
            self.waited += min(time.monotonic() - began, 1.0)  # what is longer, all were held still
        return {}


@dataclass
class Kill:
    """One SIGKILL and what came of it.

    Attributes:
        rank: who was killed.
        moment: "start", "checkpoint" (one is being written) or "step".
        step: the last that was written down.
        saved: the newest checkpoint's; -1 where there was none.
        status: with which the job ended; None where torchrun brought it back.
        seconds: until then.
    """

    rank: int
    moment: str
    step: int
    saved: int
    status: int | None = None
    seconds: float = 0.0


class Campaign:
    """Runs under fire.

    Args:
        folder: for data, runs and what they print.
        steps: of a run.
        restarts: torchrun's.
        pause: the shortest and the longest time from a start to the kill, in seconds.
        kills, minutes: how many, or how long; the other is None.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        restarts: int,
        pause: tuple[float, float],
        kills: int | None,
        minutes: float | None,
        draw: random.Random,
    ) -> None:
        self.folder, self.steps, self.restarts, self.pause = folder, steps, restarts, pause
        self.wanted, self.minutes, self.draw = kills, minutes, draw
        self.kills: list[Kill] = []
        self.faults: list[str] = []  # what ought not to have happened
        self.runs = self.jobs = self.resumed = 0
        self.began = 0.0
        self.data = make_corpus(folder / "data")

    def words(self, out: Path) -> list:
        """The one command that begins a run, and goes on with it."""
        size = ["--batch-tokens=256", f"--tokens={256 * self.steps}", "--lr=1e-2", "--parallel=fsdp"]
        every = ["--log-every=5", "--checkpoint-every=50", "--eval-every=500", "--eval-tokens=4096"]
        return ["antransformer", "train", "--data", self.data, "--out", out, *size, *every, *SMALL_OPTIONS]

    def go(self) -> None:
        """One run after the other."""
        unbroken = self.folder / "unbroken"
        with Job(self.words(unbroken), self.folder / "unbroken.log") as job:
            if job.process.wait():
                raise SystemExit(f"the unbroken run failed: see {self.folder}/unbroken.log")
        expected = figures(unbroken)
        say(f"unbroken: {self.steps} steps, validation loss {expected[-1]['val_loss']!r}")
        self.began = time.monotonic()
        while self.more():
            self.runs += 1
            out = self.folder / f"run-{self.runs}"
            self.train(out)
            found = figures(out)
            if found != expected:
                self.faults.append(f"{out}: not the figures of the unbroken run")
            say(f"run {self.runs}: validation loss {found[-1]['val_loss']!r}, all figures equal: {found == expected}")

    def more(self) -> bool:
        """Whether there is to be another kill."""
        if self.wanted is not None:
            return len(self.kills) < self.wanted
        return time.monotonic() - self.began < 60 * self.minutes

    def train(self, out: Path) -> None:
        """One run to its end, its command given again as often as it takes."""
        log, status = out.with_suffix(".log"), None
        safe = 0  # the step of the newest checkpoint before the last kill: nobody may go back behind it
        while status != 0:
            self.jobs += 1
            with Job(self.words(out), log, self.restarts) as job:
                ranks = job.started()
                while ranks:
                    printed = log.stat().st_size
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        job.process.wait(self.draw.uniform(*self.pause) if self.more() else None)
                    kill = None if job.process.poll() is not None else self.strike(job, ranks, out, log, printed)
                    safe = self.check(out, since(log, printed), safe, kill)
                    ranks = job.started(ranks.values(), LIMIT) if kill else {}
                    if kill:
                        kill.seconds = round(job.waited, 1)
                        kill.status = None if ranks else job.process.poll()
                        say(f"{len(self.kills)}: {kill}")
                        if not ranks and not kill.status:
                            self.faults.append(f"kill {len(self.kills)}: neither back nor ended in {LIMIT} s")
                status = job.process.wait()
            for path in checkpoint.step_folders(out / "checkpoints"):
                try:
                    checkpoint.read(path)
                except CheckpointError as error:
                    self.faults.append(f"looks whole and is not: {error}")

    def strike(self, job: Job, ranks: dict[int, int], out: Path, log: Path, printed: int) -> Kill | None:
        """Kill one rank, unless all have done their work."""
        rank = self.draw.randrange(RANKS)
        moment = "checkpoint" if list((out / "checkpoints").glob(".partial-*")) else "step"
        if str(out) not in since(log, printed):
            moment = "start"
        saved = max(map(checkpoint.step_of, checkpoint.step_folders(out / "checkpoints")), default=-1)
        step = max((line["step"] for line in read_metrics(out / "metrics.jsonl")), default=0)
        if step == self.steps:
            return None
        with contextlib.suppress(ProcessLookupError):  # it ended in this moment
            os.kill(ranks[rank], signal.SIGKILL)
        self.kills.append(Kill(rank, moment, step, saved))
        return self.kills[-1]

    def check(self, out: Path, text: str, safe: int, kill: Kill | None) -> int:
        """Check that a start resumed from the newest whole checkpoint; return the step of the newest one now.

        Args:
            out: run folder.
            text: everything printed since that start.
            safe: step of the newest checkpoint before the start.
            kill: the one that ended it, if any.
        """
        # A start prints the path of each checkpoint that it tries, and then the path of the run folder itself.
        tried, *more = re.split(rf"{re.escape(str(out))}(?![\w/-])", text, maxsplit=1)
        steps = [int(step) for step in re.findall(rf"{re.escape(str(out))}/checkpoints/step-(\d+)", tried)]
        if steps:
            self.resumed += 1
            if steps[-1] < safe:
                self.faults.append(f"{out}: resumed from step {steps[-1]}, although checkpoint {safe} was whole")
        if len(steps) > 1 or (safe > 0 and more and not steps):
            self.faults.append(f"{out}: skipped a checkpoint")
        return max(safe, kill.saved) if kill else safe

    def report(self) -> str:
        """The counts, as a table."""
        ended = [kill for kill in self.kills if kill.status is not None]
        back = [kill for kill in self.kills if kill.status is None]
        moments = ", ".join(f"{sum(kill.moment == name for kill in self.kills)} {name}" for name in MOMENTS)
        rows = {
            "kills": f"{len(self.kills)} ({moments})",
            "of rank 0, 1": ", ".join(str(sum(kill.rank == rank for kill in self.kills)) for rank in range(RANKS)),
            "brought back by torchrun": f"{len(back)}, {longest(back)}",
            "whole job ended, status not 0": f"{sum(kill.status != 0 for kill in ended)}, {longest(ended)}",
            "jobs started": self.jobs,
            "resumed from a checkpoint": self.resumed,
            "runs, steps each": f"{self.runs}, {self.steps}",
            "minutes": f"{(time.monotonic() - self.began) / 60:.0f}",
            "faults": len(self.faults),
        }
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


MOMENTS = ("start", "step", "checkpoint")


def figures(folder: Path) -> list[dict]:
    """The metrics lines, but for what a clock gave."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def since(log: Path, printed: int) -> str:
    """What was printed after so many bytes."""
    return log.read_bytes()[printed:].decode(errors="replace")


def longest(kills: list[Kill]) -> str:
    """In words, the median and the longest time."""
    seconds = sorted(kill.seconds for kill in kills)
    return f"after {seconds[len(seconds) // 2]:.1f} s (longest {seconds[-1]:.1f} s)" if seconds else "none"


def say(text: str) -> None:
    """With the time."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--kills", type=int, help="how many, each 0 to 30 s after a start")
    what.add_argument("--soak", type=float, metavar="MINUTES", help="how long, each kill 1 to 4 minutes after a start")
    parser.add_argument("--steps", type=int, default=2000, help="length of a run (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--folder", type=Path, help="where runs and what they print stay (default: a new one in /tmp)")
    parsed = parser.parse_args()
    folder = parsed.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    restarts, pause = (1, (0, 30)) if parsed.kills else (1000, (60, 240))
    campaign = Campaign(folder, parsed.steps, restarts, pause, parsed.kills, parsed.soak, random.Random(parsed.seed))
    campaign.go()
    print(campaign.report(), *campaign.faults, sep="\n")
    sys.exit(bool(campaign.faults))


if __name__ == "__main__":
    main()
