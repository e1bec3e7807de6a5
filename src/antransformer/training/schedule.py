"""Learning-rate schedules: linear warm-up, then the peak rate, then a decay of one of several shapes."""

import math
from collections.abc import Callable

# Progress after which the logarithmic decay leaves its steep part. At 0.1 half of the decay is over after a quarter of
# its steps; a larger value approaches the linear decay.
LOG_RHO = 0.1

# Decay from 1 to 0 as a function of its progress from 0 to 1.
SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "wsd": lambda progress: 1 - progress,  # arXiv:2404.06395; differs from linear only in requiring a decay fraction
    "log": lambda progress: 1 - math.log1p(progress / LOG_RHO) / math.log1p(1 / LOG_RHO),  # arXiv:2608.01284
    "sqrt": lambda progress: 1 - math.sqrt(progress),  # arXiv:2405.18392
}


def learning_rate(
    step: int,
    steps: int,
    peak: float,
    *,
    schedule: str = "cosine",
    warmup_steps: int = 0,
    decay_start: int | None = None,
    min_lr_ratio: float = 0.01,
    start: int = 0,
    start_ratio: float = 0.0,
) -> float:
    """Learning rate of one step.

    Args:
        step: number of the step, from ``start + 1`` to ``steps``.
        steps: number of steps of the run.
        peak: peak learning rate.
        schedule: shape of the decay, a key of ``SHAPES``.
        warmup_steps: number of warm-up steps; with 0 the rate begins at the peak.
        decay_start: last step at the peak; by default the end of the warm-up.
        min_lr_ratio: final learning rate as a fraction of the peak.
        start: step after which the warm-up begins.
        start_ratio: learning rate at ``start`` as a fraction of the peak.
    """
    warmed_up = start + warmup_steps
    if warmup_steps and step <= warmed_up:
        taken = step - start
        return peak * start_ratio * (1 - taken / warmup_steps) + peak * taken / warmup_steps
    decay_start = warmed_up if decay_start is None else decay_start
    if step <= decay_start:
        return peak
    progress = (step - decay_start) / (steps - decay_start)
    return peak * (min_lr_ratio + (1 - min_lr_ratio) * SHAPES[schedule](progress))
