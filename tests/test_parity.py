"""Our models against transformers' code, which nobody here wrote."""

import pytest
import torch

from antransformer.functional import rotary_tables, rotate
from antransformer.models import ModelConfig, build
from antransformer.models.gpt_plus import RMS_EPS

transformers = pytest.importorskip("transformers")


def qwen3_of(ours):
    """transformers' Qwen3 with the weights of a GPT+ whose heads are rotated over their whole width.

    Qwen3 has gains on q and k after an RMS norm and divides the scores by sqrt(h): g * cos(q, k) is a gain of
    g / sqrt(h) on q and of 1 on k.
    """
    config, h = ours.config, ours.config.head_width
    sizes = {"hidden_size": config.width, "num_hidden_layers": config.layers, "intermediate_size": config.mlp_width}
    heads = {"num_attention_heads": config.heads, "num_key_value_heads": config.heads, "head_dim": h}
    rope = {"rope_type": "default", "rope_theta": config.rotary_base}
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.context,
            rms_norm_eps=RMS_EPS,
            rope_parameters=rope,
            **sizes,
            **heads,
        )
    )
    weights = {
        "model.embed_tokens.weight": ours.embedding.weight,
        "model.norm.weight": ours.final_norm.weight,
        "lm_head.weight": ours.lm_head.weight,
    }
    for number, block in enumerate(ours.blocks):
        q, k, v = block.attention.qkv_proj.weight.unflatten(0, (config.heads, 3, h)).unbind(1)
        parts = {
            "input_layernorm": block.attention_norm.weight,
            "self_attn.q_proj": q.flatten(0, 1),
            "self_attn.k_proj": k.flatten(0, 1),
            "self_attn.v_proj": v.flatten(0, 1),
            "self_attn.q_norm": (block.attention.score_scale / h**0.5).expand(h),
            "self_attn.k_norm": torch.ones(h),
            "self_attn.o_proj": block.attention.out_proj.weight,
            "post_attention_layernorm": block.mlp_norm.weight,
            "mlp.up_proj": block.mlp.up_proj.weight,
            "mlp.gate_proj": block.mlp.gate_proj.weight,
            "mlp.down_proj": block.mlp.down_proj.weight,
        }
        weights |= {f"model.layers.{number}.{name}.weight": value for name, value in parts.items()}
    theirs.load_state_dict(weights)
    return theirs.eval()


@torch.no_grad()
def test_gpt_plus_is_qwen3():
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "width": 128, "layers": 4, "context": 64, "head_width": 32}
    ours = build(ModelConfig(architecture="gpt+", rotary_fraction=1.0, **sizes))
    for parameter in ours.parameters():  # away from the initial values, where gains and scales are equal
        parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    tokens = torch.randint(0, 300, (3, 64))
    logits = ours(tokens)
    assert logits.std() > 0.5
    torch.testing.assert_close(qwen3_of(ours)(tokens).logits, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_rotary_embedding_is_that_of_gpt_neox(fraction):
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding, apply_rotary_pos_emb

    h, generator = 64, torch.Generator().manual_seed(0)
    q, k = torch.randn((2, 3, 100, 5, h), generator=generator)  # (B, T, n, h)
    config = transformers.GPTNeoXConfig(hidden_size=5 * h, num_attention_heads=5, rotary_pct=fraction)
    positions = torch.arange(7, 107)
    cos, sin = GPTNeoXRotaryEmbedding(config)(q, positions.unsqueeze(0))
    theirs = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    tables = rotary_tables(positions, round(h * fraction), 10_000.0)
    for ours, expected in zip((rotate(q, tables), rotate(k, tables)), theirs, strict=True):
        torch.testing.assert_close(ours.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)
