"""Peak learning rates of a run, by the role of the parameters; importable without torch."""

import math
from typing import NamedTuple

from antransformer.training import defaults
from antransformer.training.config import TrainConfig
from antransformer.training.optimizer_registry import OPTIMIZERS
from antransformer.wording import counted


class PeakRates(NamedTuple):
    """Peak learning rates.

    Attributes:
        embedding, head, vectors: rates of AdamW. Vectors are all parameters with one axis.
        blocks: rate of the weight matrices inside the blocks, of the optimizer that trains them.
    """

    embedding: float
    head: float
    vectors: float
    blocks: float


def peak_rates(config: TrainConfig) -> PeakRates:
    """Peak learning rates of a run at its width and its number of steps.

    ``embed_lr``, ``head_lr`` and ``vector_lr`` take the place of ``lr`` where they are set. All rates are scaled from
    ``lr_width`` and ``lr_horizon`` to the width and the steps of the run, see ``width_ratio`` and ``horizon_factor``.
    """
    # AdamW moves each coordinate by about the learning rate. Coordinates of a row of norm 1 have size 1/sqrt(width),
    # so with lr ~ 1/sqrt(width) rows of any width rotate by the same angle. Inside the blocks 1/width, as in muP
    # (arXiv:2203.03466), was measured to be better, with and without bounds.
    width, horizon = width_ratio(config), horizon_factor(config)
    outer, optimizer_lr = math.sqrt(width) * horizon, OPTIMIZERS[config.optimizer].lr_setting
    return PeakRates(
        embedding=(config.embed_lr or config.lr) * outer,
        head=(config.head_lr or config.lr) * outer,
        vectors=(config.vector_lr or config.lr) * horizon,
        blocks=(getattr(config, optimizer_lr) if optimizer_lr else config.lr * width) * horizon,
    )


def given_rate(config: TrainConfig, setting: str) -> float:
    """Value of a learning-rate setting that trains the same if the user gives it, which switches the horizon off."""
    return (getattr(config, setting) or config.lr) * horizon_factor(config)


def width_ratio(config: TrainConfig) -> float:
    """``lr_width`` over the model's width; 1 if ``lr_width`` is 0."""
    return config.lr_width / config.model.width if config.lr_width else 1.0


def horizon_factor(config: TrainConfig) -> float:
    """Factor of all rates in a run of more than ``lr_horizon`` steps: (lr_horizon / steps) ^ horizon_exponent.

    It is 1 in shorter runs and if ``lr_horizon`` is 0. An extended run keeps the factor of its first length.
    """
    # A row that is held at norm 1 keeps rotating by the angle that the rate gives it, so a longer run needs a lower
    # rate to settle. docs/results.md has the measured exponents. Higher rates in shorter runs are an extrapolation
    # towards divergence, so they are left to the user.
    return defaults.horizon_factor(config.lr_horizon, config.initial_steps, config.horizon_exponent)


def format_rates(config: TrainConfig) -> str:
    """Peak learning rates as text: one, or one for each role with the width and steps from which ``lr`` is scaled."""
    spec, rates = OPTIMIZERS[config.optimizer], peak_rates(config)
    if set(rates) == {config.lr}:
        return f"{config.lr:g}"
    matrices = f"block matrices ({spec.label})" if spec.lr_setting else "block matrices"
    roles: dict[str, list[str]] = {}
    for role, rate in zip(("embedding", "head", "vectors", matrices), rates, strict=True):
        roles.setdefault(f"{rate:.3g}", []).append(role)
    text = ", ".join(f"{rate} for {_joined(names)}" for rate, names in roles.items())
    tuned = [f"width {config.lr_width:,}"] if width_ratio(config) != 1 else []
    tuned += [counted(config.lr_horizon, "step")] if horizon_factor(config) != 1 else []
    notes = [f"lr {config.lr:g} scaled from {_joined(tuned)}"] if tuned else []
    notes += [f"{spec.lr_setting} {note}"] if (note := optimizer_lr_note(config)) else []
    return f"{text} ({'; '.join(notes)})" if notes else text


def optimizer_lr_note(config: TrainConfig) -> str:
    """Rate and steps from which the default of the optimizer's own rate is scaled; empty if it is not."""
    spec, model, steps = OPTIMIZERS[config.optimizer], config.model, config.initial_steps
    if spec.lr_setting is None:
        return ""
    exponent = config.horizon_exponent or defaults.horizon_exponent(model, spec)
    factor = defaults.optimizer_lr_factor(model, min(steps, config.lr_horizon or steps), exponent)
    if factor == 1:
        return ""
    tuned = defaults.optimizer_lr(model, spec) * config.lr / defaults.learning_rate(model)
    # The config does not record whether a rate is the default, which is rounded.
    if not math.isclose(getattr(config, spec.lr_setting), tuned * factor, rel_tol=0.01):
        return ""
    return f"{tuned:.3g} scaled from {counted(defaults.SMALL_LR_STEPS, 'step')}"


def _joined(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
