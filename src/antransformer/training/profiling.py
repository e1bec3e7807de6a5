"""Where the time goes: a trace for chrome://tracing or Perfetto, and the operations that take longest."""

import os
from collections.abc import Callable
from pathlib import Path

from torch.profiler import profile, schedule

FIRST, LAST = 5, 8  # steps of a run that are traced: the first ones warm up
SHOWN = 10
NAMES = {"ProfilerStep*": "Python between the operations"}


def of_steps(trace: Path, note: Callable[[str], object]) -> profile:
    """A profiler of steps ``FIRST`` to ``LAST``: enter it, and call its ``step()`` after each step.

    It writes the trace behind the last of them, or where it is left before, and tells ``note`` what took longest.
    """
    quiet()
    plan = schedule(wait=FIRST - 2, warmup=1, active=LAST - FIRST + 1, repeat=1)
    return profile(schedule=plan, on_trace_ready=lambda profiler: report(profiler, trace, note), acc_events=True)


def of_call(call: Callable[[], object], trace: Path, note: Callable[[str], object]) -> None:
    """Write a trace of a call, and tell ``note`` what took longest."""
    quiet()
    with profile(acc_events=True) as profiler:
        call()
    report(profiler, trace, note)


def report(profiler: profile, trace: Path, note: Callable[[str], object]) -> None:
    """Write what was recorded, and tell ``note`` of the dearest operations, each with its share of the time of all.

    An operation's time is without that of those inside it. Where there is a device, its time is what counts.
    """
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    events = profiler.key_averages()
    # On a device an annotation, such as that of a step, spans the operations inside it.
    times = {event.key: event.self_device_time_total for event in events if not event.is_user_annotation}
    if not any(times.values()):
        times = {NAMES.get(event.key, event.key): event.self_cpu_time_total for event in events}
    note(f"{trace}: of the time of all operations")
    for name in sorted(times, key=times.__getitem__, reverse=True)[:SHOWN]:
        note(f"{times[name] / sum(times.values()):7.1%}  {name}")


def quiet() -> None:
    """Keep torch's profiler from writing on standard error that it begins and ends."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
