"""Kills ranks of real runs at random moments and reports the outcomes.

    python tests/helpers/faults.py --kills 50     # 50 kills, each 0 to 30 s after a start
    python tests/helpers/faults.py --soak 60      # an hour of training, with a kill every few minutes

A run of two processes is repeated under SIGKILL until the kills or the minutes are used up. The metrics of every run
must equal those of an uninterrupted run, except for times. With --kills torchrun restarts a job once: every other kill
ends the job, and the same command is run again. The exit status is 1 if anything went wrong.
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

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script does not have tests/ on its path

from helpers.small import SMALL_OPTIONS, make_corpus

RANKS = 2
LIMIT = 60  # seconds in which a job must end or restart
MOMENTS = ("start", "step", "checkpoint")  # of a kill
TIMED_METRICS = ("seconds", "tokens_per_second", "mfu")


class Job:
    """One torchrun agent with its ranks, killed at the end of the context.

    Args:
        arguments: module to run, and its arguments.
        log: file to which output is appended.
        restarts: torchrun's --max-restarts.
        rendezvous: number of nodes and port of the rendezvous; None for a single node.
    """

    def __init__(
        self, arguments: list, log: Path, restarts: int = 0, rendezvous: tuple[int, int] | None = None
    ) -> None:
        nodes, port = rendezvous or (1, 0)
        self.local_world_size = RANKS // nodes
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={self.local_world_size}"]
        if rendezvous:
            command += [f"--nnodes={nodes}", "--rdzv-backend=c10d", "--rdzv-id=one"]
            command += [f"--rdzv-endpoint=127.0.0.1:{port}"]
        else:
            command += ["--standalone"]
        command += [f"--max-restarts={restarts}", "-m", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        with log.open("a") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in (*self.ranks().values(), self.process.pid):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def ranks(self) -> dict[int, int]:
        """Return the process id of each living rank."""
        pids = {}
        for path in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in map(int, path.read_text().split()):
                with contextlib.suppress(OSError):  # the process has just ended
                    rank = re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
                    if rank is not None:
                        pids[int(rank[1])] = pid
        return pids

    def wait_for_ranks(self, old_pids: Collection[int] = (), seconds: float = 2 * LIMIT) -> dict[int, int]:
        """Wait until all ranks run in new processes; return their process ids, or {} if the job ended or timed out.

        Sets ``waited`` to the time in seconds.
        """
        self.waited = 0.0
        while self.waited < seconds:
            began, ranks = time.monotonic(), self.ranks()
            if len(ranks) == self.local_world_size and not set(old_pids) & set(ranks.values()):
                return ranks
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
            self.waited += min(time.monotonic() - began, 1.0)  # a longer pause stopped the whole machine
        return {}


@dataclass
class Kill:
    """One SIGKILL and its outcome.

    Attributes:
        rank: rank that was killed.
        moment: "start", "checkpoint" (while one is written) or "step".
        step: last step in the metrics.
        saved: step of the latest checkpoint, or -1.
        status: exit status of the job; None if torchrun restarted it.
        seconds: time until then.
    """

    rank: int
    moment: str
    step: int
    saved: int
    status: int | None = None
    seconds: float = 0.0


class Campaign:
    """Repeats a run under kills until a number of kills or a time is reached.

    Args:
        folder: folder for data, runs and logs.
        steps: steps of a run.
        restarts: torchrun's --max-restarts.
        pause: shortest and longest time from a start to the kill, in seconds.
        kills: number of kills, or None.
        minutes: duration, or None.
        generator: random generator of moments and ranks.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        restarts: int,
        pause: tuple[float, float],
        kills: int | None,
        minutes: float | None,
        generator: random.Random,
    ) -> None:
        self.folder, self.steps, self.restarts, self.pause = folder, steps, restarts, pause
        self.max_kills, self.minutes, self.generator = kills, minutes, generator
        self.kills: list[Kill] = []
        self.faults: list[str] = []
        self.runs = self.jobs = self.resumed = 0
        self.began = 0.0
        self.data = make_corpus(folder / "data")

    def arguments(self, out: Path) -> list:
        """Return the arguments that start a run and, repeated, resume it."""
        size = ["--batch-tokens=256", f"--tokens={256 * self.steps}", "--lr=1e-2", "--parallel=fsdp"]
        every = ["--log-every=5", "--checkpoint-every=50", "--eval-every=500", "--eval-tokens=4096"]
        return ["antransformer", "train", "--data", self.data, "--out", out, *size, *every, *SMALL_OPTIONS]

    def run(self) -> None:
        """Train without kills, and then with kills, one run after the other."""
        reference = self.folder / "uninterrupted"
        with Job(self.arguments(reference), reference.with_suffix(".log")) as job:
            if job.process.wait():
                raise SystemExit(f"the uninterrupted run failed: see {reference.with_suffix('.log')}")
        expected = timeless_metrics(reference)
        print_with_time(f"uninterrupted: {self.steps} steps, validation loss {expected[-1]['val_loss']!r}")
        self.began = time.monotonic()
        while self.continues():
            self.runs += 1
            out = self.folder / f"run-{self.runs}"
            self.train(out)
            lines = timeless_metrics(out)
            if lines != expected:
                self.faults.append(f"{out}: metrics differ from the uninterrupted run")
            val_loss = lines[-1]["val_loss"]
            print_with_time(f"run {self.runs}: validation loss {val_loss!r}, metrics equal: {lines == expected}")

    def continues(self) -> bool:
        """Return whether another kill is due."""
        if self.max_kills is not None:
            return len(self.kills) < self.max_kills
        return time.monotonic() - self.began < 60 * self.minutes

    def train(self, out: Path) -> None:
        """Train one run to its end, repeating its command until it succeeds."""
        log, status = out.with_suffix(".log"), None
        safe = 0  # step of the latest checkpoint before the last kill: no restart may resume from an earlier one
        while status != 0:
            self.jobs += 1
            with Job(self.arguments(out), log, self.restarts) as job:
                ranks = job.wait_for_ranks()
                while ranks:
                    printed = log.stat().st_size
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        job.process.wait(self.generator.uniform(*self.pause) if self.continues() else None)
                    kill = None if job.process.poll() is not None else self.kill(ranks, out, log, printed)
                    safe = self.check_resumption(out, output_since(log, printed), safe, kill)
                    ranks = job.wait_for_ranks(ranks.values(), LIMIT) if kill else {}
                    if kill:
                        kill.seconds = round(job.waited, 1)
                        kill.status = None if ranks else job.process.poll()
                        print_with_time(f"{len(self.kills)}: {kill}")
                        if not ranks and not kill.status:
                            self.faults.append(f"kill {len(self.kills)}: neither restarted nor ended within {LIMIT} s")
                status = job.process.wait()
            for path in checkpoint.step_folders(out / "checkpoints"):
                try:
                    checkpoint.read(path)
                except CheckpointError as error:
                    self.faults.append(f"damaged checkpoint: {error}")

    def kill(self, ranks: dict[int, int], out: Path, log: Path, printed: int) -> Kill | None:
        """Kill one rank, unless training is complete."""
        rank = self.generator.randrange(RANKS)
        moment = "checkpoint" if list((out / "checkpoints").glob(".partial-*")) else "step"
        if str(out) not in output_since(log, printed):
            moment = "start"
        saved = max(map(checkpoint.step_of, checkpoint.step_folders(out / "checkpoints")), default=-1)
        step = max((line["step"] for line in read_metrics(out / "metrics.jsonl")), default=0)
        if step == self.steps:
            return None
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(ranks[rank], signal.SIGKILL)
        self.kills.append(Kill(rank, moment, step, saved))
        return self.kills[-1]

    def check_resumption(self, out: Path, text: str, safe: int, kill: Kill | None) -> int:
        """Check that a start resumed from the latest checkpoint; return the step of the latest one now.

        Args:
            out: run folder.
            text: output since that start.
            safe: step of the latest checkpoint before the start.
            kill: kill that ended it, if any.
        """
        # A start prints the path of each checkpoint that it tries, and then the path of the run folder itself.
        tried, *rest = re.split(rf"{re.escape(str(out))}(?![\w/-])", text, maxsplit=1)
        steps = [int(step) for step in re.findall(rf"{re.escape(str(out))}/checkpoints/step-(\d+)", tried)]
        if steps:
            self.resumed += 1
            if steps[-1] < safe:
                self.faults.append(f"{out}: resumed from step {steps[-1]}, although checkpoint {safe} was complete")
        if len(steps) > 1 or (safe > 0 and rest and not steps):
            self.faults.append(f"{out}: skipped a checkpoint")
        return max(safe, kill.saved) if kill else safe

    def report(self) -> str:
        """Return the counts as a Markdown table."""
        ended = [kill for kill in self.kills if kill.status is not None]
        restarted = [kill for kill in self.kills if kill.status is None]
        moments = ", ".join(f"{sum(kill.moment == name for kill in self.kills)} {name}" for name in MOMENTS)
        rows = {
            "kills": f"{len(self.kills)} ({moments})",
            "of rank 0, 1": ", ".join(str(sum(kill.rank == rank for kill in self.kills)) for rank in range(RANKS)),
            "restarted by torchrun": f"{len(restarted)}, {time_range(restarted)}",
            "job ended, status not 0": f"{sum(kill.status != 0 for kill in ended)}, {time_range(ended)}",
            "jobs started": self.jobs,
            "resumed from a checkpoint": self.resumed,
            "runs, steps per run": f"{self.runs}, {self.steps}",
            "minutes": f"{(time.monotonic() - self.began) / 60:.0f}",
            "faults": len(self.faults),
        }
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def timeless_metrics(folder: Path) -> list[dict]:
    """Return the metrics lines without measured times."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMED_METRICS} for line in lines]


def output_since(log: Path, printed: int) -> str:
    """Return the output after the first ``printed`` bytes."""
    return log.read_bytes()[printed:].decode(errors="replace")


def time_range(kills: list[Kill]) -> str:
    """Return the median and the longest time as text."""
    seconds = sorted(kill.seconds for kill in kills)
    return f"after {seconds[len(seconds) // 2]:.1f} s (longest {seconds[-1]:.1f} s)" if seconds else "-"


def print_with_time(text: str) -> None:
    """Print a line with the time of day."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--kills", type=int, help="number of kills, each 0 to 30 s after a start")
    budget.add_argument(
        "--soak", type=float, metavar="MINUTES", help="duration, with kills 1 to 4 minutes after a start"
    )
    parser.add_argument("--steps", type=int, default=2000, help="steps of a run (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments and ranks (default 0)")
    parser.add_argument("--folder", type=Path, help="folder for runs and logs (default: a new one in /tmp)")
    parsed = parser.parse_args()
    folder = parsed.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    restarts, pause = (1, (0, 30)) if parsed.kills else (1000, (60, 240))
    campaign = Campaign(folder, parsed.steps, restarts, pause, parsed.kills, parsed.soak, random.Random(parsed.seed))
    campaign.run()
    print(campaign.report(), *campaign.faults, sep="\n")
    sys.exit(bool(campaign.faults))


if __name__ == "__main__":
    main()
