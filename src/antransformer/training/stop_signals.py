"""Signals that stop a run after the step in progress: Ctrl-C, SIGTERM, and SIGHUP of a closed terminal."""

import contextlib
import os
import signal
import threading
from types import FrameType

SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopSignals:
    """While entered, records the first of ``SIGNALS`` in ``received``; a second one has its usual effect.

    SIGHUP stays ignored where it is, as under nohup. Outside the main thread, where Python allows no handlers, no
    signal is recorded.

    Args:
        announcement: text printed at once for the first signal; None for no text.
    """

    received: signal.Signals | None = None

    def __init__(self, announcement: str | None = None) -> None:
        self.announcement = announcement

    def __enter__(self) -> "StopSignals":
        chosen = [
            number for number in SIGNALS if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN
        ]
        if threading.current_thread() is not threading.main_thread():
            chosen = []
        self._handlers = {number: signal.signal(number, self._receive) for number in chosen}
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
