"""Models that are timed against each other: ours, and those of other libraries in the same shape.

Each library is configured for speed as its documentation recommends: fused attention, no dropout, no biases. Width,
layers, heads, MLP width and vocabulary are equal. Small differences remain: Qwen3 and nGPT-pytorch rotate complete
heads, and x-transformers has no learnable scale on the attention scores.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from antransformer.benchmarks.settings import END_OF_TEXT, MASKED_VARIANTS, OUR_ARCHITECTURES, replace_architecture
from antransformer.benchmarks.timing import describe_error
from antransformer.bounds import bind
from antransformer.errors import MissingExtraError
from antransformer.models import ModelConfig, build
from antransformer.training.config import resolve_config
from antransformer.training.optimizer import make_optimizer

Loss = Callable[[Tensor], Tensor]  # token ids (B, T + 1) -> mean next-token loss


class TrainingSetup(NamedTuple):
    """Model, loss and optimizer of one variant."""

    model: nn.Module
    loss: Loss
    optimizer: Optimizer


def our_setup(shape: ModelConfig, architecture: str, end_of_text: int | None = None) -> TrainingSetup:
    """One of our architectures with bounds, and with AdamW, as the other libraries."""
    model = build(replace_architecture(shape, architecture))
    model.end_of_text = end_of_text
    config = resolve_config({"recipe": "paper", "model": model.config.mapping()}, shape.vocab_size)
    optimizer = make_optimizer(model, config)
    bind(model, optimizer)
    return TrainingSetup(model, lambda tokens: model.loss(tokens[:, :-1], tokens[:, 1:]), optimizer)


def qwen3_config(shape: ModelConfig) -> Any:
    """Config of Qwen3 from transformers in this shape.

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


def qwen3(shape: ModelConfig) -> TrainingSetup:
    """Qwen3 from transformers with its own loss; raises like ``qwen3_config``."""
    config = qwen3_config(shape)
    from transformers import Qwen3ForCausalLM

    model: nn.Module = Qwen3ForCausalLM(config)

    def loss(tokens: Tensor) -> Tensor:
        targets = tokens[:, 1:].contiguous()
        value: Tensor = model(input_ids=tokens[:, :-1], labels=targets, shift_labels=targets, use_cache=False).loss
        return value

    return TrainingSetup(model, loss, adam(model))


def x_transformers(shape: ModelConfig) -> TrainingSetup:
    """Decoder of x-transformers.

    Raises:
        MissingExtraError: x-transformers is not installed.
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

    return TrainingSetup(model, loss, adam(model))


def ngpt_pytorch(shape: ModelConfig) -> TrainingSetup:
    """nGPT of nGPT-pytorch, with weights normalized after each step (``manual_norm_weights``, its faster option).

    Raises:
        MissingExtraError: nGPT-pytorch is not installed.
    """
    try:
        from nGPT_pytorch import nGPT
        from nGPT_pytorch.nGPT import Attention, FeedForward, NormLinear, Scale
    except ImportError as error:
        raise MissingExtraError("nGPT-pytorch", "bench") from error
    for module in (nGPT, Attention, FeedForward, NormLinear, Scale):
        module.__hash__ = nn.Module.__hash__  # they define __eq__ only, and torch needs hashable modules
    model = nGPT(
        num_tokens=shape.vocab_size,
        dim=shape.width,
        depth=shape.layers,
        dim_head=shape.head_dim,
        heads=shape.heads,
        ff_expand_factor=1.5 * shape.mlp_ratio,  # nGPT-pytorch multiplies this by 2/3
        manual_norm_weights=True,
        add_value_residual=False,
    )
    optimizer = adam(model)
    model.register_step_post_hook(optimizer)
    return TrainingSetup(model, lambda tokens: model(tokens, return_loss=True), optimizer)


def adam(model: nn.Module) -> Optimizer:
    """AdamW as our trainer uses it, for models of other libraries."""
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=fused)


BUILDERS: dict[str, Callable[[ModelConfig], TrainingSetup]] = {
    **{name: partial(our_setup, architecture=name) for name in OUR_ARCHITECTURES},
    "qwen3": qwen3,
    "x-transformers": x_transformers,
    "ngpt-pytorch": ngpt_pytorch,
    **{
        name: partial(our_setup, architecture=architecture, end_of_text=END_OF_TEXT)
        for name, architecture in zip(MASKED_VARIANTS, OUR_ARCHITECTURES, strict=True)
    },
}


def build_variants(
    names: Sequence[str], shape: ModelConfig, device: torch.device, log: Callable[[str], None]
) -> tuple[dict[str, TrainingSetup], dict[str, str]]:
    """Build variants by name; return them, and the reasons of those that cannot be built.

    Variants whose library is not installed are in neither, and reported to ``log``.
    """
    setups, problems = {}, {}
    for name in names:
        torch.manual_seed(0)
        try:
            with device:
                setups[name] = BUILDERS[name](shape)
        except MissingExtraError as error:
            log(f"skipping {name}: {error}")
        except Exception as error:  # other releases of a library may raise anything
            problems[name] = describe_error(error)
            log(f"{name} failed: {problems[name]}")
    return setups, problems
