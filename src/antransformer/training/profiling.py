"""Profiling: a trace for chrome://tracing or Perfetto, and the most expensive operations."""

import os
from collections.abc import Callable
from pathlib import Path

from torch.profiler import profile, schedule

FIRST, LAST = 5, 8  # steps of a run that are traced, after warm-up
TOP_OPERATIONS = 10
NAMES = {"ProfilerStep*": "Python between the operations"}


def profile_steps(trace: Path, log: Callable[[str], object]) -> profile:
    """Profiler of steps ``FIRST`` to ``LAST``: enter it, and call its ``step()`` after each training step.

    After the last of them, or when it is left earlier, it writes the trace and reports to ``log``.
    """
    silence_profiler()
    plan = schedule(wait=FIRST - 2, warmup=1, active=LAST - FIRST + 1, repeat=1)
    return profile(schedule=plan, on_trace_ready=lambda profiler: report(profiler, trace, log), acc_events=True)


def profile_call(call: Callable[[], object], trace: Path, log: Callable[[str], object]) -> None:
    """Profile one call, write its trace and report to ``log``."""
    silence_profiler()
    with profile(acc_events=True) as profiler:
        call()
    report(profiler, trace, log)


def report(profiler: profile, trace: Path, log: Callable[[str], object]) -> None:
    """Write the trace, and log the most expensive operations with their shares of the total time.

    The time of an operation excludes the operations inside it. It is device time if there is a device, else CPU time.
    """
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    events = profiler.key_averages()
    # On a device the time of an annotation, such as a step, includes the operations inside it.
    times = {event.key: event.self_device_time_total for event in events if not event.is_user_annotation}
    if not any(times.values()):
        times = {NAMES.get(event.key, event.key): event.self_cpu_time_total for event in events}
    log(f"{trace}: share of the total time by operation")
    for name in sorted(times, key=times.__getitem__, reverse=True)[:TOP_OPERATIONS]:
        log(f"{times[name] / sum(times.values()):7.1%}  {name}")


def silence_profiler() -> None:
    """Keep torch's profiler from writing to standard error when it starts and stops."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
