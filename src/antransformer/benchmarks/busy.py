"""Training on a CPU while other processes use its cores, with and without adapting the number of threads."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from antransformer.benchmarks.models import our_setup
from antransformer.benchmarks.settings import require_positive
from antransformer.benchmarks.timing import Benchmark, alternate, make_rows
from antransformer.benchmarks.train_step import StepSettings, make_step
from antransformer.errors import ConfigError
from antransformer.training.threads import ThreadWatch
from antransformer.wording import counted

FIXED, ADAPTED = "fixed threads", "adapted threads"
BUSY = "while True: pass"
SECONDS = 10.0  # of a timing without other processes: several times what a change of the threads takes


def bench_busy(settings: StepSettings, processes: int, log: Callable[[str], None]) -> Benchmark:
    """Time training steps of anGPT without other processes, and next to ``processes`` busy ones.

    Args:
        settings: shape, batch, precision and rounds.
        processes: number of other processes, each of which uses one core.
        log: receives progress.

    Raises:
        ConfigError: the device is not a CPU, or a number is less than 1.
    """
    require_positive(processes=processes)
    if settings.device.type != "cpu":
        raise ConfigError(f"bench busy measures a CPU, not {settings.device}")
    step = make_step(our_setup(settings.model, "angpt"), settings)
    step()
    started = time.perf_counter()
    step()
    steps = max(1, round(SECONDS / (time.perf_counter() - started)))
    tokens = steps * settings.batch * settings.model.context
    log(
        f"{counted(settings.rounds, 'round')} of {counted(steps, 'step')} for each variant, alone and next to "
        f"{counted(processes, 'busy process', 'busy processes')}"
    )

    def run(adapted: bool, others: int) -> dict[str, float]:
        with busy_processes(others), ThreadWatch(settings.device, log) if adapted else nullcontext() as watch:
            started = time.perf_counter()
            for _ in range(steps):
                step()
                if watch is not None:
                    watch.update()
            return {str(others): time.perf_counter() - started}

    rows = []
    for others in (0, processes):
        calls = {FIXED: lambda n=others: run(False, n), ADAPTED: lambda n=others: run(True, n)}
        times, problems = alternate(calls, settings.rounds, log)
        rows += make_rows({"other processes": others}, times.get(str(others), {}), tokens, FIXED, problems)
    return Benchmark("busy", settings.facts(FIXED), rows)


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Keep a number of cores busy."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
