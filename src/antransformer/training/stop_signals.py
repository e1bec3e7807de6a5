"""Signals that stop a run after the step in progress."""

import contextlib
import os
import signal
from types import FrameType


class StopSignals:
    """While entered, records the first SIGINT or SIGTERM in ``received``; a second one has its usual effect.

    Args:
        announcement: text printed at once for the first signal; None for no text.
    """

    received: signal.Signals | None = None

    def __init__(self, announcement: str | None = None) -> None:
        self.announcement = announcement

    def __enter__(self) -> "StopSignals":
        self._handlers = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.__exit__()
        if self.announcement is not None:
            # Not through print, which the signal may have interrupted. Nobody may read it any more.
            with contextlib.suppress(OSError):
                os.write(2, f"{self.received.name}: {self.announcement}\n".encode())
