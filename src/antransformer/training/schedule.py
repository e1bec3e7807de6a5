"""Learning rate over a run."""

import math


def learning_rate(
    step: int, steps: int, peak: float, *, warmup_fraction: float = 0.0, min_lr_ratio: float = 0.01
) -> float:
    """Linear warm-up, then cosine decay (arXiv:2505.22014, section 5.1).

    Args:
        step: update number, 1 to ``steps``.
        steps: length of the run.
        peak: highest learning rate.
        warmup_fraction: share of the run spent warming up; 0 starts at the peak.
        min_lr_ratio: learning rate of the last update as a share of the peak.
    """
    warmup_steps = int(warmup_fraction * steps)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
