"""Continuation of a run to more tokens, with its optimizer state and peak learning rates.

A longer run keeps its settings except for the length. It also records ``initial_tokens``, its first length, and with
``--rewarm`` where its learning rate rose again.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from antransformer.errors import CheckpointError, ConfigError
from antransformer.settings import Count, convert, shown
from antransformer.training.config import TrainConfig
from antransformer.training.distributed.parallel import SINGLE_PROCESS, DistributedContext
from antransformer.training.learning_rates import peak_rates
from antransformer.training.run_folder import resume_command
from antransformer.wording import counted

REWARM_SETTINGS = ("rewarm_from", "rewarm_ratio", "rewarm_steps")
# Settings that differ between a longer run and its checkpoints from before the extension.
LENGTH_SETTINGS = ("tokens", "initial_tokens", *REWARM_SETTINGS)


def read_rewarm(value: Any, resume: bool) -> float:
    """Convert and check the value of ``--rewarm``.

    Raises:
        ConfigError: it is not a number above 0 and below 1, or is given without ``--resume``.
    """
    rewarm: float = convert(value, float, "rewarm")
    if not 0 < rewarm < 1:
        raise ConfigError(f"rewarm must be above 0 and below 1, got {shown(rewarm)}")
    if not resume:
        raise ConfigError("rewarm continues a finished run with more tokens: set resume (--resume), or omit rewarm")
    return rewarm


def check_length(config: TrainConfig, tokens: int, rewarm: float | None, folder: Path) -> None:
    """Check that a run can be resumed with a length of ``tokens``: its own, or at least one step more.

    A job that is restarted or queued again repeats its arguments, so ``rewarm`` may be the one that the run has.

    Raises:
        CheckpointError: the length is shorter, or less than one step longer.
        ConfigError: ``rewarm`` is given, the length is the run's own, and the run was not extended with this value.
    """
    if tokens == config.tokens:
        if rewarm is not None and config.rewarm_steps != _rise(rewarm, config.steps - (config.rewarm_from or 0)):
            raise ConfigError(
                f"rewarm needs more tokens than the {config.tokens:,} of {folder}: raise tokens, or omit rewarm"
            )
    elif tokens // config.batch_tokens <= config.steps:
        least = (config.steps + 1) * config.batch_tokens
        raise CheckpointError(
            f"{folder} has {config.tokens:,} tokens, and {tokens:,} tokens add no step: give at least {least:,} to "
            "extend the run, omit tokens to resume it, or start a new run with another --out"
        )


def extend(config: TrainConfig, tokens: Count, step: int, rewarm: float | None, folder: Path) -> TrainConfig:
    """Return the settings of a longer run.

    Without ``rewarm`` the run equals one of the new length with the same peak rates and warm-up steps. With
    ``rewarm`` the schedule begins anew at ``step``, and its fractions are of the added steps.

    Args:
        config: settings of the run so far.
        tokens: new length, at least one step longer.
        step: step of the newest checkpoint, 0 without one.
        rewarm: fraction of the added steps over which the learning rate rises to its peak.
        folder: run folder, for messages.

    Raises:
        CheckpointError: the decay has begun and ``rewarm`` is None, there is no checkpoint to rewarm, or ``step`` is
            before an earlier rewarm.
        ConfigError: ``rewarm`` and ``decay_fraction`` exceed 1 together.
    """
    require_rewarm_step(config, step, folder)
    longer = replace(config, tokens=tokens, initial_tokens=config.initial_tokens or config.tokens)
    if rewarm is None:
        if step > config.decay_start and config.min_lr_ratio < 1:
            raise CheckpointError(
                f"{folder} is at step {step:,} of {config.steps:,}, and its learning rate decays from step "
                f"{config.decay_start:,} on: set rewarm (--rewarm 0.1) to raise it again, or start a new run with "
                "another --out"
            )
        return longer
    if not step:
        raise CheckpointError(f"{folder} has no checkpoint, so no learning rate to raise: omit rewarm")
    if rewarm + (config.decay_fraction or 0) > 1 + 1e-9:
        right = "lower rewarm" if _largest_rewarm(config) else "start a new run with another --out"
        raise ConfigError(f"rewarm {rewarm:g} and decay_fraction {config.decay_fraction:g} exceed 1 together: {right}")
    added = tokens // config.batch_tokens - step
    return replace(longer, rewarm_from=step, rewarm_ratio=config.lr_at(step, 1.0), rewarm_steps=_rise(rewarm, added))


def _rise(rewarm: float, added: int) -> int:
    """Number of the added steps over which the learning rate rises."""
    return max(1, int(rewarm * added))


def extends(config: TrainConfig, settings: Mapping[str, Any], step: int) -> bool:
    """Return whether a config continues a checkpoint: the same first length, and the same learning rate at its step.

    Args:
        config: settings of the run; all but its length equal the settings of the checkpoint.
        settings: settings in the checkpoint.
        step: step of the checkpoint.
    """
    try:
        length: dict[str, Any] = {name: settings.get(name) for name in LENGTH_SETTINGS}
        earlier = replace(config, **length)
    except ConfigError:
        return False
    return (
        step <= earlier.steps <= config.steps
        and (earlier.initial_tokens or earlier.tokens) == (config.initial_tokens or config.tokens)
        and earlier.lr_at(step, 1.0) == config.lr_at(step, 1.0)
    )


def require_no_rewarm(config: TrainConfig) -> None:
    """Raise ``ConfigError`` if a new run has the settings of one that was extended with ``--rewarm``."""
    if config.rewarm_from is not None:
        *names, last = REWARM_SETTINGS
        raise ConfigError(
            f"{', '.join(names)} and {last} are settings of a run that --rewarm extended, and a new run cannot repeat "
            "its rise of the learning rate: remove them"
        )


def require_rewarm_step(config: TrainConfig, step: int, folder: Path) -> None:
    """Raise ``CheckpointError`` if a rewarmed run would train from before the step where its rate rose again."""
    if step < (config.rewarm_from or 0):
        *names, last = LENGTH_SETTINGS if step else REWARM_SETTINGS
        listed = f"{', '.join(names)} and {last}"
        remedy = f"remove {listed}"
        if step:
            remedy = f"set {listed} as in the state.json of that checkpoint (remove those that it lacks)"
        raise CheckpointError(
            f"{folder}: config.yaml raises the learning rate after step {config.rewarm_from:,} of a run, but training "
            f"would start from step {step:,}: restore a later checkpoint, or {remedy}"
        )


def describe_finished(config: TrainConfig, folder: Path, dist_ctx: DistributedContext = SINGLE_PROCESS) -> str:
    """One line about a run with no steps left, and how to train longer."""
    decayed, largest = config.steps > config.decay_start and config.min_lr_ratio < 1, _largest_rewarm(config)
    if decayed and not largest:
        return f"{folder} is finished at step {config.steps:,}: start a new run with another --out to train longer"
    rewarm = f" --rewarm {min(0.1, largest):g}" if decayed else ""
    return (
        f"{folder} is finished at step {config.steps:,}; train longer with: {resume_command(folder, dist_ctx)} "
        f"--tokens {2 * config.tokens}{rewarm}"
    )


def _largest_rewarm(config: TrainConfig) -> float:
    """Largest fraction for ``rewarm``, which leaves the steps of the decay; 0 if the decay takes all steps."""
    return math.floor(100 * (1 - (config.decay_fraction or 0)) + 1e-6) / 100


def describe(config: TrainConfig, step: int) -> str:
    """One line about an extended run: its steps and tokens, the next learning rate, and the beginning of the decay."""
    rising = config.warmup_steps + (config.rewarm_from or 0) - step
    rise = f", rising over {counted(rising, 'step')}" if rising > 0 else ""
    rate = config.lr_at(step + 1, peak_rates(config).vectors)
    return (
        f"extending the run from step {step:,} ({step * config.batch_tokens:,} tokens) to step {config.steps:,} "
        f"({config.tokens:,} tokens): learning rate {rate:.4g}{rise}, decay after step "
        f"{config.decay_start:,}, peak rates of a run of {config.initial_steps:,} steps"
    )
