"""The models that are timed side by side: ours, and those of other libraries in the same shape.

Each of the others is set up as its own documentation has it for speed: fused attention, no dropout, no biases. Width,
depth, heads, MLP width and vocabulary are the same; what differs is small: Qwen3 and nGPT-pytorch rotate whole heads,
and x-transformers has no learnable scale on the scores.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from antransformer.bounds import bind
from antransformer.errors import MissingExtraError
from antransformer.models import ModelConfig, build
from antransformer.training.config import resolve_config
from antransformer.training.optimizer import make_optimizer

SHAPE = ("vocab_size", "width", "layers", "context", "head_dim", "mlp_ratio", "rotary_fraction", "rope_theta")
OURS = ("gpt+", "ngpt", "angpt")

Loss = Callable[[Tensor], Tensor]  # tokens (B, T + 1) to the mean loss of the T that follow others


class Trainee(NamedTuple):
    """What is trained, and how."""

    model: nn.Module
    loss: Loss
    optimizer: Optimizer


def replace_architecture(model: ModelConfig, architecture: str) -> ModelConfig:
    """A model of the same shape and of another architecture, whose own options have their defaults."""
    shape = {name: getattr(model, name) for name in SHAPE}
    return ModelConfig(**{**shape, "architecture": architecture})


def ours(shape: ModelConfig, architecture: str) -> Trainee:
    """One of our architectures, with the optimizer and the bounds that ``antransformer train`` gives it."""
    model = build(replace_architecture(shape, architecture))
    optimizer = make_optimizer(model, resolve_config({"model": model.config.mapping()}, shape.vocab_size))
    bind(model, optimizer)
    return Trainee(model, lambda tokens: model.loss(tokens[:, :-1], tokens[:, 1:]), optimizer)


def qwen3_config(shape: ModelConfig) -> Any:
    """transformers' Qwen3 in this shape.

    Raises:
        MissingExtraError: transformers is not installed, or too old.
    """
    try:
        from transformers import Qwen3Config
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
    return Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=False,
    )


def qwen3(shape: ModelConfig) -> Trainee:
    """transformers' Qwen3 with its own loss; raises as ``qwen3_config``."""
    config = qwen3_config(shape)
    from transformers import Qwen3ForCausalLM

    model: nn.Module = Qwen3ForCausalLM(config)

    def loss(tokens: Tensor) -> Tensor:
        targets = tokens[:, 1:].contiguous()
        return model(input_ids=tokens[:, :-1], labels=targets, shift_labels=targets, use_cache=False).loss

    return Trainee(model, loss, adam(model))


def x_transformers(shape: ModelConfig) -> Trainee:
    """x-transformers' decoder.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        from x_transformers import Decoder, TransformerWrapper
    except ImportError as error:
        raise MissingExtraError("x-transformers", "bench") from error
    layers = Decoder(
        dim=shape.width,
        depth=shape.layers,
        heads=shape.heads,
        attn_dim_head=shape.head_dim,
        attn_flash=True,
        attn_qk_norm=True,
        rotary_pos_emb=True,
        rotary_emb_dim=shape.rotary_dim,
        use_rmsnorm=True,
        ff_mult=shape.mlp_ratio,
        ff_glu=True,
        ff_swish=True,
        ff_no_bias=True,
    )
    model: nn.Module = TransformerWrapper(
        num_tokens=shape.vocab_size, max_seq_len=shape.context, use_abs_pos_emb=False, attn_layers=layers
    )

    def loss(tokens: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return Trainee(model, loss, adam(model))


def ngpt_pytorch(shape: ModelConfig) -> Trainee:
    """nGPT-pytorch's nGPT; its weights are normalized after each step (``manual_norm_weights``, its faster way).

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        from nGPT_pytorch import nGPT
        from nGPT_pytorch.nGPT import Attention, FeedForward, NormLinear, Scale
    except ImportError as error:
        raise MissingExtraError("nGPT-pytorch", "bench") from error
    for module in (nGPT, Attention, FeedForward, NormLinear, Scale):
        module.__hash__ = nn.Module.__hash__  # they define equality alone, and torch's walk through a model needs both
    model = nGPT(
        num_tokens=shape.vocab_size,
        dim=shape.width,
        depth=shape.layers,
        dim_head=shape.head_dim,
        heads=shape.heads,
        ff_expand_factor=1.5 * shape.mlp_ratio,  # of which it takes two thirds
        manual_norm_weights=True,
        add_value_residual=False,
    )
    optimizer = adam(model)
    model.register_step_post_hook(optimizer)
    return Trainee(model, lambda tokens: model(tokens, return_loss=True), optimizer)


def adam(model: nn.Module) -> Optimizer:
    """What our own trainer takes, for the models of others."""
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=fused)


TRAINEES: dict[str, Callable[[ModelConfig], Trainee]] = {
    **{name: partial(ours, architecture=name) for name in OURS},
    "qwen3": qwen3,
    "x-transformers": x_transformers,
    "ngpt-pytorch": ngpt_pytorch,
}
PACKAGES = ("torch", "transformers", "x-transformers", "nGPT-pytorch", "tokenizers")


def make(
    names: Sequence[str], shape: ModelConfig, device: torch.device, note: Callable[[str], None]
) -> dict[str, Trainee]:
    """What is to be trained, by name; ``note`` is told what is left out since it is not installed."""
    trainees = {}
    for name in names:
        torch.manual_seed(0)
        try:
            with device:
                trainees[name] = TRAINEES[name](shape)
        except MissingExtraError as error:
            note(f"{name} is left out: {error}")
    return trainees


def versions() -> dict[str, str]:
    """Of the libraries compared, those that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
