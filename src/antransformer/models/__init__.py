"""The architectures and how to build one."""

import torch

from antransformer.models.ablations import ABLATIONS
from antransformer.models.angpt import AnGPT
from antransformer.models.config import OPTIONS, PRESETS, ModelConfig
from antransformer.models.decoder import Cache, Decoder
from antransformer.models.dyt import DyT
from antransformer.models.gpt import GPT
from antransformer.models.gpt_plus import GPTPlus
from antransformer.models.ln_scaling import LNScaling
from antransformer.models.ngpt import NGPT

ARCHITECTURES: dict[str, type[AnGPT] | type[NGPT] | type[GPTPlus]] = {
    "angpt": AnGPT,
    "ngpt": NGPT,
    "gpt+": GPTPlus,
    "gpt": GPT,
    "ln-scaling": LNScaling,
    "dyt": DyT,
}


def build(config: ModelConfig) -> Decoder:
    """The model of a config, initialised from torch's global generator, in float32 on the current default device.

    Under ``torch.device("meta")`` nothing is allocated; ``model.to_empty(device=...)`` and
    ``model.reset_parameters()`` then make it real, with the same weights.
    """
    device = torch.get_default_device()
    with torch.device("meta"):  # torch's modules would draw weights of their own, to be drawn again
        model = ABLATIONS.get(config.ablation, ARCHITECTURES[config.architecture])(config)
    if device.type != "meta":
        model.to_empty(device=device)
        model.reset_parameters()
    return model


__all__ = [
    "ABLATIONS",
    "ARCHITECTURES",
    "GPT",
    "NGPT",
    "OPTIONS",
    "PRESETS",
    "AnGPT",
    "Cache",
    "Decoder",
    "DyT",
    "GPTPlus",
    "LNScaling",
    "ModelConfig",
    "build",
]
