"""Build the model of a config."""

import torch

from antransformer.errors import ConfigError
from antransformer.models.ablations import ABLATIONS
from antransformer.models.config import ModelConfig
from antransformer.models.decoder import Decoder
from antransformer.models.registry import BUILT_IN, get


def build(config: ModelConfig) -> Decoder:
    """Model of a config in float32 on the default device, with weights drawn from torch's global generator.

    Under ``torch.device("meta")`` no memory is allocated. For architectures of this package,
    ``model.to_empty(device=...)`` and ``model.reset_parameters()`` then give the same weights as a direct build.

    Raises:
        TypeError: the config is not a ``ModelConfig``.
        ConfigError: the class of a registered architecture is not a subclass of ``Decoder``.
    """
    if not isinstance(config, ModelConfig):
        raise TypeError(f"build needs a ModelConfig, such as ModelConfig(architecture='angpt'), got {config!r}")
    device = torch.get_default_device()
    make = ABLATIONS.get(config.ablation) or get(config.architecture).cls
    # On meta, torch's modules draw no weights, which reset_parameters draws anyway. Other packages' classes may have
    # buffers, tied weights, and modules that their reset_parameters leaves unchanged.
    on_meta = can_skip_constructor(config)
    with torch.device("meta" if on_meta else device):
        model: Decoder = make(config)
    if not isinstance(model, Decoder):
        raise ConfigError(
            f"architecture {config.architecture}: {type(model).__name__} must be a subclass of "
            "antransformer.models.Decoder"
        )
    model.float()  # whatever torch's default dtype is
    if device.type != "meta":
        if on_meta:
            model.to_empty(device=device)
        model.reset_parameters()
    return model


def build_to_load(config: ModelConfig, device: torch.device) -> Decoder:
    """Model on a device whose state is about to be loaded; only what a state dict does not have is initialized.

    The global random generators keep their states.
    """
    if can_skip_constructor(config):
        with torch.device("meta"):
            model = build(config)
        return model.to_empty(device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        return build(config)


def can_skip_constructor(config: ModelConfig) -> bool:
    """Whether ``reset_parameters`` and a state dict each set the whole state of a model, as in this package."""
    return config.architecture in BUILT_IN
