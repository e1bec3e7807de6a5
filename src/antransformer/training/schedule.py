"""Learning-rate schedule."""

import math


def learning_rate(
    step: int, steps: int, peak: float, *, warmup_fraction: float = 0.0, min_lr_ratio: float = 0.01
) -> float:
    """Learning rate with linear warm-up and cosine decay (arXiv:2505.22014, section 5.1).

    Args:
        step: number of the step, from 1 to ``steps``.
        steps: number of steps of the run.
        peak: peak learning rate.
        warmup_fraction: fraction of the run used for warm-up; with 0 the first step is at the peak.
        min_lr_ratio: final learning rate as a fraction of the peak.
    """
    warmup_steps = int(warmup_fraction * steps)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
