"""Finds out which ranks are dead or hung after a collective operation fails.

A collective fails at once on the ranks next to a dead one, and after ``--timeout`` when a rank hangs. The exception of
the failed collective does not tell which rank caused it. So every healthy rank reports to torchrun's key-value store,
and the error names the ranks that did not.
"""

import contextlib
import os
import socket
import time
import uuid

import torch.distributed as dist

from antransformer.errors import MachineError

ANSWER_TIMEOUT = 5.0  # seconds that healthy ranks have to report after one of them saw a failure
MAX_NAMED_RANKS = 8  # in an error message


def fresh_store(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """Return a section of ``store`` that only this start of the job uses, once all ranks are in it.

    torchrun keeps its store over restarts, and a rank could read the address that rank 0 left before a restart. So
    every other rank publishes a new random request, and rank 0 answers whatever requests it finds until all ranks have
    arrived. The answer to a new request cannot stem from an earlier start.
    """
    token = uuid.uuid4().hex
    if rank > 0:
        store.set(f"name/{rank}", token)
        section = dist.PrefixStore(store.get(token).decode(), store)
        section.set(f"here/{rank}", "")
        return section
    section = dist.PrefixStore(token, store)
    # A request of an earlier start may be overwritten at any moment: answer again and again.
    while not section.check([f"here/{other}" for other in range(1, world_size)]):
        for other in range(1, world_size):
            store.set(store.get(f"name/{other}").decode(), token)
        time.sleep(0.05)
    return section


class RankMonitor:
    """Registers this rank, and names the ranks that do not respond after a failure.

    Args:
        store: key-value store that all ranks reach.
        rank: rank of this process.
        world_size: number of ranks.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = dist.PrefixStore("liveness", store), rank, world_size
        # Written before any collective, so that a rank can be named after it is gone.
        self.store.set(f"name/{rank}", f"rank {rank} (process {os.getpid()} on {socket.gethostname()})")

    def report_exit(self) -> None:
        """Record that this rank ends with an error of its own, which it reports itself."""
        with contextlib.suppress(dist.DistError):
            self.store.set(f"answer/{self.rank}", "left")

    def missing_ranks_error(self) -> MachineError | SystemExit:
        """Return the exception to raise after a failed collective.

        The lowest healthy rank gets the error with the names of the missing ranks, all others a silent exit.
        """
        try:
            answers = self._answers()
            missing = [
                self.store.get(f"name/{rank}").decode() for rank in range(self.world_size) if rank not in answers
            ]
        except dist.DistError:  # the machine that hosts the store is gone
            return MachineError(f"rank {self.rank}: lost the connection to the rendezvous host of this run")
        if self.rank != min(rank for rank, answer in answers.items() if answer == b"here"):
            time.sleep(1)  # torchrun kills all ranks when the first ends: let the one with the message be first
            return SystemExit(1)
        if missing:
            hidden = len(missing) - MAX_NAMED_RANKS
            names = ", ".join(missing[:MAX_NAMED_RANKS]) + (f" and {hidden} more" if hidden > 0 else "")
            return MachineError(f"no answer from {names}: dead, or hung for longer than --timeout")
        if b"left" in answers.values():
            return SystemExit(1)
        return MachineError("all ranks respond, but one was slower than --timeout: increase --timeout")

    def _answers(self) -> dict[int, bytes]:
        """Return b"here" or b"left" for each rank that answered within ``ANSWER_TIMEOUT``."""
        self.store.set(f"answer/{self.rank}", "here")
        keys = {rank: f"answer/{rank}" for rank in range(self.world_size)}
        deadline = time.monotonic() + ANSWER_TIMEOUT
        while not self.store.check(list(keys.values())) and time.monotonic() < deadline:
            time.sleep(0.1)
        # Checked one by one, because get() would block on a key that is missing.
        return {rank: self.store.get(key) for rank, key in keys.items() if self.store.check([key])}
