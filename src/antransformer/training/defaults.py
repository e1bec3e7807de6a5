"""What a run does where the user says nothing: learning rate, batch, tokens, and each architecture's recipe.

From 32m to 1b the learning rate and the batch come from the paper's power laws (arXiv:2505.22014, section 5.3) for
the architecture. They do not reach below (extrapolated to a million parameters GPT+'s learning rate would be 0.05), so
smaller models take values measured at nano; docs/log.md has the measurements.
"""

from dataclasses import replace
from typing import TypeVar

import torch

from antransformer.errors import ConfigError
from antransformer.models import ModelConfig, build
from antransformer.models.config import PAPER_VOCABULARY
from antransformer.models.registry import get

Value = TypeVar("Value")

FITTED_PARAMETERS = (30e6, 1.1e9)  # the paper's sizes, 32m to 1b
FITTED_SEQUENCE = 2048  # tokens in one of the paper's sequences, in which its batches are counted
TOKENS_PER_PARAMETER = 20  # arXiv:2203.15556, and the paper's hyperparameter sweeps


class ByArchitecture(dict[str, Value]):
    """Values by architecture; one without a value has that of the architecture that its ``defaults_like`` names.

    The paper fits laws for anGPT and GPT+ only, so all others follow one of these two.
    """

    def __missing__(self, name: str) -> Value:
        relative = get(name).defaults_like
        if relative == name:
            raise ConfigError(f"architecture {name}: defaults_like must name another, such as {', '.join(self)}")
        return self[relative]


# (coefficient, exponent) of a power law in the number of parameters.
BATCH_FITS = ByArchitecture({"angpt": (1.1e-6, 0.984), "gpt+": (9e-5, 0.729)})
LR_FITS = ByArchitecture({"angpt": (0.065, -0.178), "gpt+": (42.0, -0.482)})

SMALL_LR = ByArchitecture({"angpt": 1.2e-2, "ngpt": 6e-3, "gpt+": 8e-3})
SMALL_LR_WIDTH = 128  # what these were measured at
MUON_LR = ByArchitecture({"angpt": 0.04, "gpt+": 0.02})
MUON_INIT_STD = 0.02  # where weights are not of unit norm; Adam's of 1/sqrt(width) are too large for steps of one size
SMALL_BATCH_TOKENS = 2048
SMALL_TOKENS = 8_000_000  # under one epoch of the default corpus

# Share of the run with a rising learning rate, and decay of the weight matrices.
WARMUP = ByArchitecture({"angpt": 0.0, "gpt+": 0.1})
WEIGHT_DECAY = ByArchitecture({"angpt": 0.0, "gpt+": 0.1})


def parameter_count(config: ModelConfig) -> int:
    """Learnable numbers of the model, counted without allocating it."""
    with torch.device("meta"):
        return build(config).parameter_count()


def fitted_size(config: ModelConfig) -> int | None:
    """Parameters as the paper counts them, with its vocabulary of 50,304; None below the fitted range.

    The vocabulary is put at the paper's so that a preset keeps its place whatever the tokenizer.

    Raises:
        ConfigError: above the fitted range, where no default is known.
    """
    size = parameter_count(replace(config, vocab_size=PAPER_VOCABULARY))
    smallest, largest = FITTED_PARAMETERS
    if size > largest:
        raise ConfigError(
            f"no default learning rate or batch is known for {size / 1e9:.1f}B parameters (the fits end at 1.1B): "
            "give --lr and --batch-tokens"
        )
    return size if size >= smallest else None


def is_small(config: ModelConfig) -> bool:
    """Whether the model lies below the fitted range; see ``fitted_size``."""
    return parameter_count(replace(config, vocab_size=PAPER_VOCABULARY)) < FITTED_PARAMETERS[0]


def learning_rate(config: ModelConfig) -> float:
    """Peak learning rate for the architecture and size, to three digits; raises as ``fitted_size``."""
    size = fitted_size(config)
    if size is None:
        return SMALL_LR[config.architecture]
    coefficient, exponent = LR_FITS[config.architecture]
    return float(f"{coefficient * size**exponent:.3g}")


def lr_width(config: ModelConfig) -> int:
    """Width that the default learning rate is for; 0 where it is for the model's own, as in the fitted range."""
    return SMALL_LR_WIDTH if is_small(config) else 0


def batch_tokens(config: ModelConfig) -> int:
    """Tokens of one step for the architecture and size; raises as ``fitted_size``."""
    size = fitted_size(config)
    if size is None:
        return SMALL_BATCH_TOKENS
    coefficient, exponent = BATCH_FITS[config.architecture]
    return round(coefficient * size**exponent) * FITTED_SEQUENCE


def tokens(config: ModelConfig) -> int:
    """Length of the run in tokens: 20 a parameter inside the fitted range."""
    return SMALL_TOKENS if is_small(config) else TOKENS_PER_PARAMETER * parameter_count(config)


def micro_batch_size(config: ModelConfig, batch_size: int) -> int:
    """Sequences in one forward pass: so many that the logits stay within 2^28 numbers, in passes of about equal size.

    Logits are the largest activation of a small model with a large vocabulary: 2^28 are 1 GiB in float32.
    """
    most = max(1, 2**28 // (config.vocab_size * config.context))
    passes = -(-batch_size // most)
    return -(-batch_size // passes)
