"""Build the model of a config."""

import torch

from antransformer.errors import ConfigError
from antransformer.models.ablations import ABLATIONS
from antransformer.models.config import ModelConfig
from antransformer.models.decoder import Decoder
from antransformer.models.registry import get


def build(config: ModelConfig) -> Decoder:
    """Model of a config in float32 on the default device, with weights drawn from torch's global generator.

    Under ``torch.device("meta")`` no memory is allocated. ``model.to_empty(device=...)`` and
    ``model.reset_parameters()`` then give the same weights as a direct build.

    Raises:
        TypeError: the config is not a ``ModelConfig``.
        ConfigError: the class of a registered architecture is not a subclass of ``Decoder``.
    """
    if not isinstance(config, ModelConfig):
        raise TypeError(f"build needs a ModelConfig, such as ModelConfig(architecture='angpt'), got {config!r}")
    device = torch.get_default_device()
    make = ABLATIONS.get(config.ablation) or get(config.architecture).cls
    # Built on meta first: torch's modules would draw weights that reset_parameters draws again.
    with torch.device("meta"):
        model: Decoder = make(config)
    if not isinstance(model, Decoder):
        raise ConfigError(
            f"architecture {config.architecture}: {type(model).__name__} must be a subclass of "
            "antransformer.models.Decoder"
        )
    model.float()  # whatever torch's default dtype is
    if device.type != "meta":
        model.to_empty(device=device)
        model.reset_parameters()
    return model
