"""Parity of our models with independent code in transformers."""

import pytest
import torch

from antransformer.functional import causal_attention, rotary_tables, rotate
from antransformer.models import Cache, ModelConfig, build
from antransformer.models.gpt_plus import RMS_EPS

transformers = pytest.importorskip("transformers")


def qwen3_of(ours):
    """Qwen3 of transformers with the weights of a GPT+ that has rotary_fraction 1.

    Qwen3 has gains on q and k after an RMS norm, and divides scores by sqrt(h). So scores g * cos(q, k) need the gain
    g / sqrt(h) on q and 1 on k.
    """
    config, h = ours.config, ours.config.head_dim
    sizes = {"hidden_size": config.width, "num_hidden_layers": config.layers, "intermediate_size": config.mlp_hidden}
    heads = {"num_attention_heads": config.heads, "num_key_value_heads": config.heads, "head_dim": h}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
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
    sizes = {"vocab_size": 300, "width": 128, "layers": 4, "context": 64, "head_dim": 32}
    ours = build(ModelConfig(architecture="gpt+", rotary_fraction=1.0, **sizes))
    for parameter in ours.parameters():  # so that gains and scales differ
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


def reference_attention(q, k, v, mask, scale):
    """Attention softmax(scale * q k^T) v in float64, for q (B, T, n, h), k and v (B, S, n, h) and a mask (B, T, S)."""
    q, k, v = (part.double() for part in (q, k, v))
    scores = torch.einsum("btnh,bsnh->bnts", q, k) * scale
    weights = scores.masked_fill(~mask.unsqueeze(1), -torch.inf).softmax(-1)
    return torch.einsum("bnts,bsnh->btnh", weights, v).flatten(2)


# Absolute errors from rounding q, k, v and the result, for values of about 1.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("padding", [None, [0, 4, 9], [0, 0, 1]])
@pytest.mark.parametrize("chunks", [[37], [1, 36], [30, 1, 1, 5]])
@pytest.mark.parametrize(("heads", "head_dim", "scale"), [(3, 12, 0.7), (1, 64, 8.0)])
def test_attention_is_that_of_float64(heads, head_dim, scale, chunks, padding, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn((3, 3, 37, heads, head_dim), generator=generator)
    q, k = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    q, k, v = (part.to(dtype) for part in (q, k, v))
    width = heads * head_dim
    model = build(ModelConfig(width=width, head_dim=head_dim, layers=1, context=40, vocab_size=2)).to(dtype)
    cache, parts, start = Cache(model, 3, None if padding is None else torch.tensor(padding)), [], 0
    for chunk in chunks:
        ctx = cache.attention_context(chunk)._replace(kv_cache=cache.layer(0))
        new = slice(start, start + chunk)
        parts.append(causal_attention(q[:, new], k[:, new], v[:, new], ctx, scale))
        cache.length = start = start + chunk
    positions = torch.arange(37)
    is_text = positions >= torch.tensor(padding or [0, 0, 0])[:, None]
    mask = (positions <= positions[:, None]) & is_text[:, None] | torch.eye(37, dtype=torch.bool)
    expected = reference_attention(q, k, v, mask, scale)
    torch.testing.assert_close(torch.cat(parts, 1)[is_text].double(), expected[is_text], rtol=0, atol=TOLERANCES[dtype])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = torch.nn.functional.scaled_dot_product_attention(
            *(part.double().transpose(1, 2) for part in (q, k, v)), attn_mask=mask.unsqueeze(1), scale=scale
        )
    torch.testing.assert_close(theirs.transpose(1, 2).flatten(2), expected, rtol=0, atol=1e-12)
