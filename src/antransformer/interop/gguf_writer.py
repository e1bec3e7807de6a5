"""GGUF file of a model in the layout of a standard architecture, for llama.cpp and the programs that contain it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from antransformer.errors import CheckpointError
from antransformer.extras import require
from antransformer.interop.gguf_tokenizer import GGUFTokenizer
from antransformer.interop.stock_weights import StockModel
from antransformer.models.config import ModelConfig

FLOAT16_DTYPES = ("f16", "q8_0", "q4_0")  # on GPUs llama.cpp multiplies these in float16
BLOCK = 32  # coordinates that share a scale in q8_0 and q4_0
WINDOW_LAYERS = 64  # number of layers for which llama.cpp gives EXAONE-4 a sliding window

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# The same name in transformers is the norm after attention in EXAONE-4, and the norm before the MLP in Qwen3.
POST_ATTENTION = {"exaone4": "post_attention_norm", "qwen3": "ffn_norm"}


def check_sizes(config: ModelConfig, layout: str, dtype: str, where: str) -> None:
    """Check that llama.cpp can run a model of these sizes.

    Raises:
        CheckpointError: it cannot, or the dtype cannot store the weights. ``where`` names the checkpoint.
    """
    if layout == "exaone4" and config.layers == WINDOW_LAYERS:
        raise CheckpointError(
            f"{where}: llama.cpp gives models of exactly {WINDOW_LAYERS} layers a sliding window: use --format exaone4"
        )
    if layout == "qwen3" and config.rotary_dim != config.head_dim:
        raise CheckpointError(
            f"{where}: llama.cpp's Qwen3 rotates whole heads, and rotary_fraction is {config.rotary_fraction:g}: "
            "use --format qwen3"
        )
    if config.context < 2:
        raise CheckpointError(f"{where}: llama.cpp needs a context of at least 2: use --format {layout}")
    if dtype.startswith("q") and config.width % BLOCK:
        raise CheckpointError(f"{where}: {dtype} needs a multiple of {BLOCK}, and the width is {config.width}: use f16")


def write_gguf(
    stock: StockModel, tokenizer: GGUFTokenizer, end_of_text: int, file: Path, name: str, dtype: str
) -> None:
    """Write the file.

    Args:
        stock: the model.
        tokenizer: its tokenizer.
        end_of_text: id of the token that ends a document.
        file: file to create.
        name: display name of the model.
        dtype: dtype of the matrices, one of ``GGUF_DTYPES``. Vectors are float32.
    """
    gguf, config = require("gguf", "gguf"), stock.config
    writer = gguf.GGUFWriter(file, stock.layout)
    writer.add_name(name)
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{dtype.upper()}" if dtype != "f32" else "ALL_F32"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.mlp_hidden)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(stock.eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(stock.rope.theta)
    add_tokenizer(writer, tokenizer, end_of_text)
    if stock.rope.divisors is not None:
        writer.add_tensor("rope_freqs.weight", stock.rope.divisors.numpy())
    for key, weight in stock.weights.items():
        add_weight(gguf, writer, tensor_name(key, stock.layout), weight, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: Any, tokenizer: GGUFTokenizer, end_of_text: int) -> None:
    """Add the vocabulary; no tokens are added before or after a text."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    writer.add_token_merges(tokenizer.merges)
    writer.add_bos_token_id(end_of_text)
    writer.add_eos_token_id(end_of_text)
    writer.add_pad_token_id(end_of_text)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def tensor_name(key: str, layout: str) -> str:
    """Return the name in GGUF of a tensor of transformers."""
    key, _, kind = key.rpartition(".")
    prefix = ""
    if key.startswith("model.layers."):
        _, _, index, key = key.split(".", 3)
        prefix = f"blk.{index}."
    name = POST_ATTENTION[layout] if key == "post_attention_layernorm" else NAMES[key]
    return f"{prefix}{name}.{kind}"


def add_weight(gguf: Any, writer: Any, name: str, weight: Tensor, dtype: str) -> None:
    """Add a tensor, matrices in ``dtype`` and vectors in float32."""
    kind = getattr(gguf.GGMLQuantizationType, dtype.upper() if weight.ndim == 2 else "F32")
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        precision = torch.float32 if kind == gguf.GGMLQuantizationType.F32 else torch.float16
        writer.add_tensor(name, weight.to(precision).numpy())
    elif kind == gguf.GGMLQuantizationType.BF16:
        rounded = weight.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, rounded, raw_dtype=kind)
    else:
        values: np.ndarray[Any, Any] = weight.to(torch.float32).numpy()
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
