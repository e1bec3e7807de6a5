"""anGPT (arXiv:2505.22014), nGPT (arXiv:2410.01131), GPT+ and its variants for Hugging Face's transformers.

Exported folders have a copy of this file, so it imports nothing from antransformer. A block is

    x = residual(x, attention(norm(x)))
    x = residual(x, mlp(norm(x)))

and ``PARTS`` in ``layers_antransformer`` has the attention, MLP, norm and residual of each architecture.

Shapes: B batch, T new tokens, d model width, V vocabulary.
"""

import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_antransformer import AntransformerConfig
from .layers_antransformer import BOUNDED, PARTS, Attention, Bound, Rotary, ScaledParameter, rotary_tables

CACHE = fields(BaseModelOutputWithPast)[1].name  # "cache", or "past_key_values" before transformers 5.24


class Block(GradientCheckpointingLayer):
    """Attention and MLP, each added to or interpolated into the residual stream."""

    def __init__(self, config: AntransformerConfig, layer_idx: int) -> None:
        super().__init__()
        parts = PARTS[config.architecture]
        self.attention_norm = parts.norm(config, layer_idx + 1)
        self.attention = parts.attention(config, layer_idx)
        self.attention_residual = parts.residual(config)
        self.mlp_norm = parts.norm(config, layer_idx + 1)
        self.mlp = parts.mlp(config)
        self.mlp_residual = parts.residual(config)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None, cache: Cache | None = None, **kwargs: Any
    ) -> Tensor:
        """Map the residual stream (B, T, d) to (B, T, d)."""
        y, _ = self.attention(self.attention_norm(x), rotary, mask, cache, **kwargs)
        x = self.attention_residual(x, y)
        x = self.mlp_residual(x, self.mlp(self.mlp_norm(x)))
        return x


class AntransformerPreTrainedModel(PreTrainedModel):
    """Superclass of the base model and the language model: flags for transformers, bounds and initialization."""

    config: AntransformerConfig
    config_class = AntransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "embedding"
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}

    def bounds(self) -> list[Bound]:
        """Constraints on the weights; an empty list for an architecture without bounds."""
        # The method has the name and the result that antransformer.bind looks for.
        bound = PARTS[self.config.architecture].bound
        # By name, so that matrices of adapters have no bound: those of LoRA start at zero.
        matrices = [item for item in self.named_parameters() if item[0].endswith(BOUNDED)]
        return [bound(name, weight) for name, weight in matrices] if bound else []

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize a module: rows of about unit norm, where ``antransformer.build`` draws exact ones."""
        reset = getattr(module, "reset_parameters", None)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        elif reset is not None:
            reset()
        elif isinstance(module, AntransformerModel) and module.embedding_scale is not None:
            nn.init.constant_(module.embedding_scale, math.sqrt(self.config.hidden_size))


class AntransformerModel(AntransformerPreTrainedModel):
    """Base model: from token ids to the normalized residual stream that the head reads."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"^logit_scale\."]

    def __init__(self, config: AntransformerConfig) -> None:
        super().__init__(config)
        parts = PARTS[config.architecture]
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_scale = nn.Parameter(torch.empty(1)) if parts.scaled_embedding else None
        self.blocks = nn.ModuleList(Block(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.final_norm = parts.norm(config, 1)
        self.gradient_checkpointing = False  # set by transformers, which then disables the cache
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Map token ids (B, T), or their embeddings (B, T, d), to hidden states (B, T, d); arguments as usual.

        ``past_key_values`` is the name of ``cache`` in transformers before 5.24.

        Raises:
            ValueError: both ids and embeddings are given, or neither is.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if self.embedding_scale is not None:
            x = x * self.embedding_scale
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            start = 0 if cache is None else cache.get_seq_length()
            indices = torch.arange(x.shape[1], device=x.device) + start
            position_ids = indices.unsqueeze(0)
            if attention_mask is not None and len(attention_mask.shape) == 2:  # block masks have no ndim
                # Scores of nGPT depend on the positions themselves, so padding on the left must not count.
                counted = (attention_mask.ne(0).cumsum(-1) - 1).clamp_min(0)
                position_ids = counted[:, indices.clamp_max(counted.shape[1] - 1)]
        mask = create_causal_mask(self.config, x, attention_mask, position_ids=position_ids, **{CACHE: cache})
        rotary = rotary_tables(position_ids, self.config)
        for block in self.blocks:
            x = block(x, rotary, mask, cache=cache, **kwargs)
        return BaseModelOutputWithPast(self.final_norm(x), cache)  # by position: the name of the cache differs


class AntransformerForCausalLM(AntransformerPreTrainedModel, GenerationMixin):
    """Causal language model; embedding and head are not tied."""

    def __init__(self, config: AntransformerConfig) -> None:
        super().__init__(config)
        self.model = AntransformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        scaled_head = PARTS[config.architecture].scaled_head
        size = 1 if config.logit_scale == "scalar" else config.vocab_size
        self.logit_scale = ScaledParameter(size, 1.0, config.s_scale) if scaled_head else None
        self.post_init()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Change the number of ids in embedding, head and logit scale; arguments as in transformers.

        By default new rows are at the mean of the old ones, which is close to zero. ``mean_resizing=False`` draws them
        as at initialization, with about unit norm. New entries of the logit scale have their initial value. All ids can
        be generated afterwards, also those that the tokenizer of the export did not have.
        """
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if new_num_tokens is not None:
            self.generation_config.suppress_tokens = None
        if self.logit_scale is not None and self.config.logit_scale != "scalar":
            self.logit_scale.resize(len(embedding.weight))
        return embedding

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Map token ids (B, T), or their embeddings (B, T, d), to logits (B, T, V); arguments as usual.

        The loss is the mean cross-entropy of labels (B, T) given the preceding tokens; labels of -100 are ignored.
        """
        cache = past_key_values if cache is None else cache
        outputs = self.model(
            input_ids, attention_mask, position_ids, cache, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs
        )
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits(outputs.last_hidden_state[:, positions])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss, logits, getattr(outputs, CACHE), outputs.hidden_states, outputs.attentions
        )  # by position: the name of the cache differs between releases

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states of the base model (..., d) to logits (..., V)."""
        logits: Tensor = self.lm_head(hidden)
        return logits if self.logit_scale is None else logits * self.logit_scale().to(logits)
