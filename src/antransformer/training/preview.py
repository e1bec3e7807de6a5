"""Preview of a run: its settings with their origins, its parameters, memory and time; no run folder is created."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from antransformer.data import Dataset
from antransformer.models import build
from antransformer.models.config import preset_sizes
from antransformer.settings import Count
from antransformer.training import defaults
from antransformer.training.config import TrainConfig, to_mapping
from antransformer.training.data import epochs_note
from antransformer.training.device import choose_device
from antransformer.training.dry_run import STEPS, seconds_per_token
from antransformer.training.learning_rates import optimizer_lr_note
from antransformer.training.micro_batch import fitting_micro_batch, step_memory
from antransformer.training.optimizer_registry import OPTIMIZERS
from antransformer.training.recipes import RECIPES
from antransformer.training.resources import free_memory
from antransformer.wording import counted

LAWS = ("batch_tokens", "lr", "tokens")  # settings that the paper's laws give from 32m upwards
DEVICE = ("precision", "compile", "micro_batch_size")  # settings that the device decides
HORIZON = ("lr_horizon", "horizon_exponent")  # 0 by default in a short run, and if a rate is given


@dataclass(frozen=True)
class Setting:
    """One setting of a run.

    Attributes:
        name: dotted name.
        value: its value.
        origin: option, file, recipe, preset, law, data, device, given rate, length of the run or default.
    """

    name: str
    value: Any
    origin: str


@dataclass(frozen=True)
class Preview:
    """Settings and measurements of a run that was not started.

    Attributes:
        settings: all settings.
        parameters: number of learnable parameters.
        epochs: how often the run reads its text, in words; empty if less than once, or for a mixture.
        memory: expected bytes at the peak of a step.
        seconds_per_step: seconds of a step, from the fastest of a few; None if a step needs more than ``free`` bytes.
        seconds: expected time of all steps, in seconds; validation is not included.
        free: bytes of memory that are free on the device; infinite if unknown.
    """

    settings: tuple[Setting, ...]
    parameters: int
    epochs: str
    memory: float
    seconds_per_step: float | None
    seconds: float | None
    free: float


def preview(
    config: TrainConfig,
    dataset: Dataset,
    options: Mapping[str, Any],
    file: Mapping[str, Any],
    file_name: str | None,
    log: Callable[[str], None],
) -> Preview:
    """Take a few steps of a run without a run folder, if they fit in memory.

    Args:
        config: complete settings.
        dataset: data of the run.
        options: normalized settings from the command line.
        file: normalized settings from a file.
        file_name: its name, for the origins.
        log: called with a line before the steps, which take a minute with a large model on a CPU.

    Raises:
        ConfigError: the device is not available.
        DataError: the data does not fit the model.
    """
    if "micro_batch_size" not in {**options, **file}:
        config = replace(config, micro_batch_size=fitting_micro_batch(config) or 1)
    device = choose_device(config.device)
    memory, free = step_memory(config, device), free_memory(device)
    with torch.device("meta"):
        parameters = build(config.model).parameter_count()
    seconds = None
    if memory < free:
        log(f"timing up to {STEPS + 1} steps")
        timed = replace(config, tokens=Count(max(config.tokens, (STEPS + 1) * config.batch_tokens)))
        seconds = seconds_per_token(timed, dataset) * config.batch_tokens
    return Preview(
        settings=settings_with_origins(config, options, file, file_name),
        parameters=parameters,
        epochs=epochs_note(config, dataset),
        memory=memory,
        seconds_per_step=seconds,
        seconds=None if seconds is None else seconds * config.steps,
        free=free,
    )


def settings_with_origins(
    config: TrainConfig, options: Mapping[str, Any], file: Mapping[str, Any], file_name: str | None
) -> tuple[Setting, ...]:
    """All settings of a run with their origins; arguments as in ``preview``."""
    complete = to_mapping(config)
    model = complete.pop("model")
    rows = [Setting(name, value, _origin(name, config, options, file, file_name)) for name, value in complete.items()]
    for name, value in model.items():
        origin = _origin(name, config, options.get("model", {}), file.get("model", {}), file_name, of_model=True)
        rows.append(Setting(f"model.{name}", value, origin))
    return tuple(rows)


def _origin(
    name: str,
    config: TrainConfig,
    options: Mapping[str, Any],
    file: Mapping[str, Any],
    file_name: str | None,
    of_model: bool = False,
) -> str:
    if name in options:
        return "option"
    if name in file:
        return f"file {file_name}"
    if of_model:
        if name == "vocab_size":
            return "data"
        return f"preset {config.preset}" if name in preset_sizes(config.preset) else "default"
    if name in RECIPES[config.recipe]:
        return f"recipe {config.recipe}"
    if name in LAWS and defaults.fitted_size(config.model, strict=False) is not None:
        return "law of the paper"
    if name in HORIZON and not config.lr_horizon and (horizon := defaults.lr_horizon(config.model)):
        return "given rate" if config.steps > horizon else f"run of {counted(config.steps, 'step')}"
    if name == OPTIMIZERS[config.optimizer].lr_setting and (note := optimizer_lr_note(config)):
        return f"default, {note}"
    return "device" if name in DEVICE else "default"
