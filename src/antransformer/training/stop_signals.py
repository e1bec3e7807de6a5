"""Signals that stop a run after the step in progress: Ctrl-C, SIGTERM, and SIGHUP of a closed terminal.

One stop may send several signals, and none of them must end a process that is saving. A closed terminal sends SIGHUP
through the shell, and again when the shell has ended. At a logout or shutdown, systemd sends SIGTERM and SIGHUP. A
system that signals all processes of a job sends SIGTERM to a rank, and torchrun forwards its own. At a second signal of
any kind torchrun sends SIGTERM.
"""

import contextlib
import os
import signal
import threading
from types import FrameType

SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
FORWARDED = "ANTRANSFORMER_FORWARDED_SIGNALS"  # environment variable: a parent process forwards its signals


def _ignored_after(first: signal.Signals) -> set[str]:
    """Names of the signals that may follow ``first`` in the same stop."""
    if first is signal.SIGINT:  # torchrun turns a second Ctrl-C into SIGTERM, which has to stop the ranks at once
        return {"SIGHUP"}
    forwarded = FORWARDED in os.environ or "RANK" in os.environ
    return {"SIGHUP", "SIGTERM"} if forwarded or first is not signal.SIGTERM else {"SIGHUP"}


def _ignore(_number: int, _frame: FrameType | None) -> None:
    pass


class StopSignals:
    """While entered, records the first of ``SIGNALS`` in ``received``; a second one has its usual effect.

    A later SIGHUP is ignored, and so is SIGTERM after SIGHUP. A rank, or a process that has the environment variable
    ``FORWARDED``, also ignores a second SIGTERM.

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
        ignored = _ignored_after(self.received)
        for other, handler in self._handlers.items():
            # Not SIG_IGN: Python prints an error if a signal is pending whose handler becomes SIG_IGN.
            signal.signal(other, _ignore if other.name in ignored else handler)
        if self.announcement is not None:
            # Not through print, which the signal may have interrupted. Nobody may read it any more.
            with contextlib.suppress(OSError):
                os.write(2, f"{self.received.name}: {self.announcement}\n".encode())
