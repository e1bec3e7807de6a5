"""Configuration for Hugging Face's transformers. Exported folders have a copy of this file."""

from typing import Any

from transformers import PreTrainedConfig


class AntransformerConfig(PreTrainedConfig):
    """Fields of ``antransformer.ModelConfig``, also readable under the names that transformers uses."""

    model_type = "antransformer"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {
        "hidden_size": "width",
        "intermediate_size": "mlp_hidden",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "max_position_embeddings": "context",
        # Names in folders exported by version 1. Those also have nu_p, which is ignored.
        "head_width": "head_dim",
        "rotary_base": "rope_theta",
    }

    architecture: str = "angpt"
    vocab_size: int = 50_304
    width: int = 128
    layers: int = 4
    context: int = 2048
    head_dim: int = 64
    mlp_ratio: int = 4
    rotary_fraction: float = 0.5
    rope_theta: float = 10_000.0
    # Options of single architectures; None in all others.
    alpha_init: Any = 0.05
    s_scale: Any = 0.03
    gate_scale: Any = "sqrt_width"
    init_std: Any = None
    dyt_alpha_init: Any = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.width // self.head_dim

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the MLP."""
        return self.width * self.mlp_ratio

    @property
    def rotary_dim(self) -> int:
        """Number of coordinates of each head with rotary embedding, even."""
        return round(self.head_dim * self.rotary_fraction)
