"""Progress of long work as plain lines: an estimate after a few seconds, then a line every half minute."""

import math
import time
from collections.abc import Callable

ESTIMATE_SECONDS = 3.0  # of work before the first estimate
LINE_SECONDS = 30.0  # between two lines


class Pace:
    """Prints progress of counted work to ``log``; call it with (done, total) as often as the work advances.

    Args:
        name: what is done, the start of each line.
        unit: what is counted.
        log: called with each line.
    """

    def __init__(self, name: str, unit: str, log: Callable[[str], None]) -> None:
        self.name, self.unit, self.log = name, unit, log
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
        self.next_line = elapsed + LINE_SECONDS
        left = format_duration(elapsed * (total - done) / advanced)
        self.log(f"{self.name}: {done:,.0f}/{total:,.0f} {self.unit}, {left} left")


def format_duration(seconds: float) -> str:
    """Return a rounded duration in words, such as ``about 3 minutes``."""
    if seconds < 90:
        return f"about {max(1, math.ceil(seconds))} seconds"
    return f"about {math.ceil(seconds / 60)} minutes" if seconds < 5400 else f"about {seconds / 3600:.1f} hours"
