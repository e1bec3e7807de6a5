"""Default training settings by architecture and model size; importable without torch.

From 32m to 1b the learning rate and the batch size follow the paper's power laws for the architecture
(arXiv:2505.22014, section 5.3). The laws do not extrapolate to smaller models: at a million parameters, GPT+'s learning
rate would be 0.05. Smaller models use values measured at nano; docs/log.md has the measurements.
"""

from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

from antransformer.errors import ConfigError
from antransformer.models.config import PAPER_VOCABULARY, ModelConfig
from antransformer.models.registry import get
from antransformer.training.optimizer_registry import OptimizerSpec

Value = TypeVar("Value")

FITTED_PARAMETERS = (30e6, 1.1e9)  # the paper's sizes, 32m to 1b
FITTED_SEQUENCE = 2048  # tokens per sequence; the paper counts batches in sequences
TOKENS_PER_PARAMETER = 20  # arXiv:2203.15556, and the paper's hyperparameter sweeps


class ByArchitecture(dict[str, Value]):
    """Values by architecture. Architectures without a value use that of their ``defaults_like``.

    The paper fits laws for anGPT and GPT+ only, so all others follow one of these two.
    """

    def __missing__(self, name: str) -> Value:
        relative = get(name).defaults_like
        if relative == name:
            raise ConfigError(f"architecture {name}: defaults_like must name another, such as {', '.join(self)}")
        return self[relative]


# (coefficient, exponent) of power laws in the number of parameters.
BATCH_FITS = ByArchitecture({"angpt": (1.1e-6, 0.984), "gpt+": (9e-5, 0.729)})
LR_FITS = ByArchitecture({"angpt": (0.065, -0.178), "gpt+": (42.0, -0.482)})

SMALL_LR = ByArchitecture({"angpt": 1.2e-2, "ngpt": 6e-3, "gpt+": 8e-3})
SMALL_LR_WIDTH = 128  # model width at which these were measured
SMALL_LR_STEPS = 600  # steps of the runs in which they were measured
SMALL_BATCH_TOKENS = 2048
SMALL_TOKENS = 8_000_000  # less than one epoch of the default corpus

WARMUP = ByArchitecture({"angpt": 0.0, "gpt+": 0.1})
WEIGHT_DECAY = ByArchitecture({"angpt": 0.0, "gpt+": 0.1})


@lru_cache(maxsize=256)  # settings are resolved for each run of an experiment, and need the count several times
def parameter_count(config: ModelConfig) -> int:
    """Number of learnable parameters of a model, counted without allocating it."""
    import torch  # here, since settings are also read where no model is built

    from antransformer.models import build

    with torch.device("meta"):
        return build(config).parameter_count()


def fitted_size(config: ModelConfig, strict: bool = True) -> int | None:
    """Number of parameters with the paper's vocabulary of 50,304, for the power laws; None below the fitted range.

    Raises:
        ConfigError: the model is larger than the fitted range, so no default is known; unless ``strict`` is false,
            which gives None.
    """
    size = paper_size(config)
    smallest, largest = FITTED_PARAMETERS
    if size > largest and not strict:
        return None
    if size > largest:
        raise ConfigError(
            f"no default learning rate or batch size is known for {size / 1e9:.1f}B parameters (the fits end at 1.1B): "
            "give lr and batch_tokens, and muon_lr with Muon"
        )
    return size if size >= smallest else None


def is_small(config: ModelConfig) -> bool:
    """Whether the model is smaller than the fitted range."""
    return paper_size(config) < FITTED_PARAMETERS[0]


def paper_size(config: ModelConfig) -> int:
    """Number of parameters of the model with the paper's vocabulary."""
    # With one vocabulary size for all, a preset has the same defaults whatever the tokenizer.
    return parameter_count(replace(config, vocab_size=PAPER_VOCABULARY))


def learning_rate(config: ModelConfig) -> float:
    """Peak learning rate of AdamW, rounded to three digits; raises the errors of ``fitted_size``."""
    size = fitted_size(config)
    if size is None:
        return SMALL_LR[config.architecture]
    coefficient, exponent = LR_FITS[config.architecture]
    return float(f"{coefficient * size**exponent:.3g}")


def lr_width(config: ModelConfig) -> int:
    """Model width at which the default learning rate was tuned; 0 in the fitted range, where it needs no scaling.

    ``training.learning_rates`` applies the rule.
    """
    return SMALL_LR_WIDTH if is_small(config) else 0


def lr_horizon(config: ModelConfig) -> int:
    """Number of steps for which the default learning rates were tuned; 0 above the fitted range.

    In the fitted range the paper's runs have 20 tokens per parameter.
    """
    if is_small(config):
        return SMALL_LR_STEPS
    return tokens(config) // batch_tokens(config) if paper_size(config) <= FITTED_PARAMETERS[1] else 0


def horizon_exponent(config: ModelConfig, optimizer: OptimizerSpec) -> float:
    """Default exponent of the best learning rates over the steps of a run."""
    return ByArchitecture(optimizer.horizon_exponents)[config.architecture]


def horizon_factor(horizon: int, steps: int, exponent: float) -> float:
    """Factor of the learning rates in a run of ``steps``, given the ``horizon`` for which they were tuned or 0."""
    return min(1.0, (horizon / steps) ** exponent) if horizon else 1.0


def optimizer_lr(config: ModelConfig, optimizer: OptimizerSpec) -> float:
    """Default of the learning rate that an optimizer adds to ``lr``, such as ``muon_lr``."""
    return ByArchitecture(optimizer.default_lrs)[config.architecture]


def optimizer_lr_factor(config: ModelConfig, steps: int, exponent: float) -> float:
    """Factor of ``optimizer_lr`` in a run of ``steps``, in addition to that of ``lr_horizon``.

    ``lr`` follows the fits of the paper from 30M parameters on, and needs no factor up to ``lr_horizon``. The rates of
    Muon have no such fits. They were measured in runs of about 600 steps, the largest with the body of ``32m``.
    """
    return horizon_factor(SMALL_LR_STEPS, max(1, min(steps, lr_horizon(config))), exponent)


def beta2(config: ModelConfig) -> float:
    """Coefficient of AdamW's mean square: 0.99 below 100M parameters, as in the sweeps of the paper (section 5.3)."""
    return 0.99 if paper_size(config) < 100e6 else 0.95


def batch_tokens(config: ModelConfig) -> int:
    """Tokens per optimizer step; raises the errors of ``fitted_size``."""
    size = fitted_size(config)
    if size is None:
        return SMALL_BATCH_TOKENS
    coefficient, exponent = BATCH_FITS[config.architecture]
    sequences: int = round(coefficient * size**exponent)
    return sequences * FITTED_SEQUENCE


def tokens(config: ModelConfig) -> int:
    """Number of training tokens: 20 per parameter from the fitted range upwards."""
    return SMALL_TOKENS if is_small(config) else TOKENS_PER_PARAMETER * parameter_count(config)


def micro_batch_size(config: ModelConfig, batch_size: int) -> int:
    """Sequences per forward pass, such that the logits have at most 2^28 elements and all passes about equal size."""
    # For a CPU, where a larger micro-batch is hardly faster. On a GPU the free memory decides (fit_micro_batch).
    most = max(1, 2**28 // (config.vocab_size * config.context))
    passes = -(-batch_size // most)
    return -(-batch_size // passes)
