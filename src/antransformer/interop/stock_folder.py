"""Hugging Face folder of a model in the layout of a standard architecture, without code of this package."""

import json
from pathlib import Path
from typing import Any

import torch

from antransformer.data import Tokenizer
from antransformer.interop.stock_weights import ROPE_FACTOR, Rope, StockModel

CLASSES = {"exaone4": "Exaone4ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def write_folder(
    stock: StockModel, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype, max_shard_size: str
) -> None:
    """Write the weights, the configuration and the generation configuration."""
    from huggingface_hub import save_torch_state_dict  # a dependency of transformers

    weights = {name: weight.to(dtype) for name, weight in stock.weights.items()}
    save_torch_state_dict(weights, folder, max_shard_size=max_shard_size)
    write_json(folder / "config.json", configuration(stock, tokenizer.end_of_text, dtype))
    generation: dict[str, Any] = special_ids(tokenizer.end_of_text)
    # Logits of ids that the tokenizer does not have were never trained.
    unused = list(range(tokenizer.vocab_size, stock.config.vocab_size))
    write_json(folder / "generation_config.json", generation | ({"suppress_tokens": unused} if unused else {}))


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def special_ids(end_of_text: int) -> dict[str, int]:
    """Return the ids of special tokens, which are all the end of text."""
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_text)


def configuration(stock: StockModel, end_of_text: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the content of config.json, with the keys of transformers 5 and of older readers."""
    config = stock.config
    content = {
        "architectures": [CLASSES[stock.layout]],
        "model_type": stock.layout,
        **dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch.")),
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": stock.eps,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "layer_types": ["full_attention"] * config.layers,
        "sliding_window": None,
        **special_ids(end_of_text),
        **rope_parameters(stock.rope),
    }
    if stock.layout == "exaone4":
        return content | {"sliding_window_pattern": None}
    return content | {"attention_bias": False, "use_sliding_window": False, "max_window_layers": config.layers}


def rope_parameters(rope: Rope) -> dict[str, Any]:
    """Return the rotary embedding as transformers 5, vLLM and llama.cpp read it, and as mlx-lm does."""
    scaling = None
    if rope.scaling:
        scaling = {
            "rope_type": "llama3",
            "factor": ROPE_FACTOR,
            "low_freq_factor": rope.scaling.low_freq_factor,
            "high_freq_factor": rope.scaling.high_freq_factor,
            "original_max_position_embeddings": rope.scaling.original_context,
        }
    parameters = {"rope_theta": rope.theta, **(scaling or {"rope_type": "default"})}
    return {"rope_parameters": parameters, "rope_theta": rope.theta, "rope_scaling": scaling}
