"""Progress of long work as plain lines: an estimate after a few seconds, then a line every half minute."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator

from antransformer.wording import counted

ESTIMATE_SECONDS = 3.0  # of work before the first estimate
LINE_SECONDS = 30.0  # between two lines


class Pace:
    """Prints progress of counted work to ``log``; call it with (done, total) as often as the work advances.

    Args:
        name: what is done, the start of each line.
        unit: what is counted.
        log: called with each line.
        repeat: whether to print further lines after the estimate.
    """

    def __init__(self, name: str, unit: str, log: Callable[[str], None], repeat: bool = True) -> None:
        self.name, self.unit, self.log, self.repeat = name, unit, log, repeat
        self.start: tuple[float, float] | None = None  # time and amount of the first call
        self.next_line = ESTIMATE_SECONDS

    def __call__(self, done: float, total: float) -> None:
        """Print a line if one is due and work is left."""
        now = time.monotonic()
        if self.start is None:
            self.start = now, done
            return
        elapsed, advanced = now - self.start[0], done - self.start[1]
        if elapsed < self.next_line or advanced <= 0 or done >= total:
            return
        self.next_line = elapsed + LINE_SECONDS if self.repeat else math.inf
        left = format_duration(elapsed * (total - done) / advanced)
        self.log(f"{self.name}: {done:,.0f}/{total:,.0f} {self.unit}, {left} left")

    def skip(self, amount: float) -> None:
        """Count work of an earlier call, which says nothing about the speed: the next ``done`` includes it."""
        if self.start is not None:
            self.start = self.start[0], self.start[1] + amount

    def restart(self) -> None:
        """Measure the speed from the next call on."""
        if self.start is not None:
            self.next_line = max(ESTIMATE_SECONDS, self.next_line - (time.monotonic() - self.start[0]))
            self.start = None

    def defer(self) -> None:
        """Count a line that was printed elsewhere: the next one is due half a minute after it."""
        if self.start is not None:
            self.next_line = time.monotonic() - self.start[0] + LINE_SECONDS


@contextlib.contextmanager
def heartbeat(text: str, log: Callable[[str], None]) -> Iterator[None]:
    """Print a line during work that reports no progress, after a few seconds and then every half minute."""
    ended, started = threading.Event(), time.monotonic()

    def beat() -> None:
        wait = ESTIMATE_SECONDS
        while not ended.wait(wait):
            log(f"{text}: {time.monotonic() - started:,.0f} seconds so far")
            wait = LINE_SECONDS

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def format_duration(seconds: float) -> str:
    """Return a rounded duration in words, such as ``about 3 minutes``."""
    if seconds < 90:
        return f"about {counted(max(1, math.ceil(seconds)), 'second')}"
    return f"about {math.ceil(seconds / 60)} minutes" if seconds < 5400 else f"about {seconds / 3600:.1f} hours"
