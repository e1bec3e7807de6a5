"""Configuration for Hugging Face's transformers. Exported folders have a copy of this file."""

from typing import Any

from transformers import PreTrainedConfig

# Architectures and their options, with defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "angpt": {"alpha_init": 0.05, "s_scale": 0.03, "gate_scale": "sqrt_width", "logit_scale": "vector"},
    "ngpt": {"alpha_init": 0.05, "s_scale": 0.03},
    "dyt": {"dyt_alpha_init": 1.0},
    "gpt+": {},
    "gpt": {},
    "ln-scaling": {},
}


class AntransformerConfig(PreTrainedConfig):
    """Fields of ``antransformer.ModelConfig`` under transformers' names; the names of ``ModelConfig`` are aliases.

    Attributes:
        format_version: version of the exported folder. Version 1 has the names of ``antransformer.ModelConfig`` in
            config.json, and names of tensors without the prefix ``model.``. Both versions load.

        intermediate_size: hidden width of the MLP; None for 4 times ``hidden_size``.
        num_attention_heads, head_dim: one may be None, and follows from the other; both None for a ``head_dim`` of 64.

    Raises:
        ValueError: the architecture is unknown, or ``hidden_size`` is not ``num_attention_heads * head_dim``.
    """

    model_type = "antransformer"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "context": "max_position_embeddings",
        "rotary_fraction": "partial_rotary_factor",
        # Names in folders exported by older releases. Those also have nu_p, which is ignored.
        "head_width": "head_dim",
        "rotary_base": "rope_theta",
    }

    format_version: int = 2
    architecture: str = "angpt"
    vocab_size: int = 50_304
    hidden_size: int = 128
    intermediate_size: Any = None
    num_hidden_layers: int = 4
    num_attention_heads: Any = None
    head_dim: Any = None
    max_position_embeddings: int = 2048
    partial_rotary_factor: float = 0.5
    rope_theta: float = 10_000.0
    # Options of single architectures, by default as in OPTIONS; None in all other architectures.
    alpha_init: Any = None
    s_scale: Any = None
    gate_scale: Any = None
    logit_scale: Any = None
    init_std: Any = None
    dyt_alpha_init: Any = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, mlp_ratio: int = 4, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.format_version = type(self).format_version  # saved again, a folder has the newest form
        if self.architecture not in OPTIONS:
            raise ValueError(f"unknown architecture {self.architecture!r}: choose from {', '.join(OPTIONS)}")
        for name, default in OPTIONS[self.architecture].items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        if self.intermediate_size is None:
            self.intermediate_size = mlp_ratio * self.hidden_size
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads if self.num_attention_heads else 64
        if self.num_attention_heads is None:
            self.num_attention_heads = self.hidden_size // self.head_dim
        if self.num_attention_heads * self.head_dim != self.hidden_size:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be num_attention_heads {self.num_attention_heads} times "
                f"head_dim {self.head_dim}"
            )

    @property
    def rotary_dim(self) -> int:
        """Number of coordinates of each head with rotary embedding, even."""
        rotary_dim: int = round(self.head_dim * self.partial_rotary_factor)
        return rotary_dim
