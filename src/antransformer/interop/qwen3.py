"""GPT+ as Qwen3, which has the same operations."""

import torch
from torch import Tensor

from antransformer.errors import CheckpointError
from antransformer.interop.stock_weights import StockModel, head_scores, power_of_two, rope_of, split_qkv
from antransformer.models import Decoder
from antransformer.models.config import ModelConfig
from antransformer.models.gpt_plus import RMS_EPS, Block, GPTPlus

QK_RMS = 8.0  # of q and k before their norm, so that the epsilon is negligible


@torch.no_grad()
def qwen3(model: Decoder, where: str, float16: bool = False) -> StockModel:
    """Return a GPT+ in the layout of Qwen3; arguments and errors as in ``exaone4.exaone4``."""
    rope = rope_of(model.config, where)
    assert type(model) is GPTPlus  # a subclass may compute another function
    model = model.double()
    weights = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.get_parameter("final_norm.weight"),
        "lm_head.weight": model.get_parameter("lm_head.weight"),
    }
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        for name, weight in block_weights(block, model.config).items():
            weights[f"model.layers.{index}.{name}.weight"] = weight
    weights = {name: weight.detach().contiguous() for name, weight in weights.items()}
    stock = StockModel("qwen3", model.config, weights, RMS_EPS, rope, peak=0.0)
    if float16 and not stock.fits_float16():
        raise CheckpointError(f"{where}: weights overflow in float16: use bfloat16 or float32")
    return stock


def block_weights(block: Block, config: ModelConfig) -> dict[str, Tensor]:
    """Return the weights of one block."""
    attention = block.attention
    q, k, v = split_qkv(attention.qkv_proj.weight, config)
    gains = head_scores(float(attention.score_scale), config.head_dim)
    weights = {
        "input_layernorm": block.attention_norm.weight,
        "self_attn.v_proj": v.flatten(0, 1),
        "self_attn.o_proj": attention.out_proj.weight,
        "post_attention_layernorm": block.mlp_norm.weight,
        "mlp.gate_proj": block.mlp.gate_proj.weight,
        "mlp.up_proj": block.mlp.up_proj.weight,
        "mlp.down_proj": block.mlp.down_proj.weight,
    }
    for name, weight, gain in (("q", q, gains[0]), ("k", k, gains[1])):
        # The input has the mean squares of the norm's gain, if its coordinates are independent.
        square = (weight * block.attention_norm.weight).square().sum(dim=2).mean(dim=1)
        scale = power_of_two(QK_RMS, square.sqrt())
        weights[f"self_attn.{name}_proj"] = (weight * scale[:, None, None]).flatten(0, 1)
        weights[f"self_attn.{name}_norm"] = torch.full((config.head_dim,), gain, dtype=torch.float64)
    return weights
