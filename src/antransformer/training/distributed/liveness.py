"""Who is missing, when processes that train together lose one: asked at the store where torchrun has them meet.

A message between them fails at once when another process is gone, and after ``--timeout`` when one hangs. Which message
that is, and to whom, says little; but those that are well all come to such an error. They answer here, and who does not
is named.
"""

import contextlib
import os
import socket
import time
import uuid

import torch.distributed as dist

from antransformer.errors import MachineError

PATIENCE = 5.0  # seconds in which those that are well come to the error too
SHOWN = 8


def fresh_store(store: dist.Store, rank: int, size: int) -> dist.Store:
    """The part of a store that belongs to this start of the processes alone, once all of them are there.

    torchrun keeps its store when it starts them again, and who looks there for where another one listens may find where
    the one before it did. So each other process asks under a name that was never used, and rank 0 answers whatever
    names it finds, until all have come: an answer to a new name is of this start.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"name/{rank}", own)
        part = dist.PrefixStore(store.get(own).decode(), store)
        part.set(f"here/{rank}", "")
        return part
    part = dist.PrefixStore(own, store)
    while not part.check([f"here/{other}" for other in range(1, size)]):
        for other in range(1, size):
            store.set(store.get(f"name/{other}").decode(), own)
        time.sleep(0.05)
    return part


class RankMonitor:
    """Made by each process before they meet; kept for the end.

    Args:
        store: that all of them reach.
        rank: of this one.
        size: how many there are.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size = dist.PrefixStore("roll-call", store), rank, size
        self.store.set(f"name/{rank}", f"rank {rank} (process {os.getpid()} on {socket.gethostname()})")

    def leave(self) -> None:
        """This process ends for a reason of its own, and says so itself."""
        with contextlib.suppress(dist.DistError):
            self.store.set(f"answer/{self.rank}", "left")

    def call(self) -> MachineError | SystemExit:
        """What to raise when a message failed: for the first of those that answer the names of those that do not."""
        try:
            answers = self._answers()
            missing = [self.store.get(f"name/{rank}").decode() for rank in range(self.size) if rank not in answers]
        except dist.DistError:  # its host is gone
            return MachineError(f"rank {self.rank}: the machine where the processes of this run met is gone")
        if self.rank != min(rank for rank, answer in answers.items() if answer == b"here"):
            time.sleep(1)  # torchrun ends all when one ends: let the first speak
            return SystemExit(1)
        if missing:
            names = ", ".join(missing[:SHOWN]) + (f" and {len(missing) - SHOWN} more" if missing[SHOWN:] else "")
            return MachineError(f"no answer from {names}: gone, or hanging for longer than --timeout")
        if b"left" in answers.values():
            return SystemExit(1)
        return MachineError("all processes of this run answer, but one took longer than --timeout: raise it")

    def _answers(self) -> dict[int, bytes]:
        """Of each rank that gave one in time: "here", or "left"."""
        self.store.set(f"answer/{self.rank}", "here")
        keys = {rank: f"answer/{rank}" for rank in range(self.size)}
        until = time.monotonic() + PATIENCE
        while not self.store.check(list(keys.values())) and time.monotonic() < until:
            time.sleep(0.1)
        return {rank: self.store.get(key) for rank, key in keys.items() if self.store.check([key])}
