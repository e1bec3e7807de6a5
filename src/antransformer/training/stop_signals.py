"""Signals that stop a run after the step in progress: Ctrl-C, SIGTERM, and SIGHUP of a closed terminal.

One stop may send a signal twice, and the second must not end a process that is saving. A closed terminal sends SIGHUP
through the shell, and again when the shell has ended. A system that signals all processes of a job sends SIGTERM to a
rank, and torchrun forwards its own.
"""

import contextlib
import os
import signal
import threading
from types import FrameType

SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
FORWARDED = "ANTRANSFORMER_FORWARDED_SIGNALS"  # environment variable: a parent process forwards its signals


def _sent_twice() -> set[signal.Signals]:
    """Signals that this process may get twice for one stop."""
    forwarded = FORWARDED in os.environ or "RANK" in os.environ
    names = ("SIGHUP", "SIGTERM") if forwarded else ("SIGHUP",)
    return {number for number in SIGNALS if number.name in names}


class StopSignals:
    """While entered, records the first of ``SIGNALS`` in ``received``; a second one has its usual effect.

    A second SIGHUP is ignored, and so is a second SIGTERM in a rank or in a process that has the environment variable
    ``FORWARDED``.

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
        repeated = self.received in _sent_twice()
        for other, handler in self._handlers.items():
            signal.signal(other, signal.SIG_IGN if repeated and other == number else handler)
        if self.announcement is not None:
            # Not through print, which the signal may have interrupted. Nobody may read it any more.
            with contextlib.suppress(OSError):
                os.write(2, f"{self.received.name}: {self.announcement}\n".encode())
