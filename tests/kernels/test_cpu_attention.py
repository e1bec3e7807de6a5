"""Attention in bfloat16 on a CPU against float64, and where the models use it."""

import pytest
import torch
import torch.nn.functional as F

from antransformer.functional import AttentionContext, LayerCache, causal_attention
from antransformer.kernels import cpu_attention
from antransformer.kernels.document_attention import dense_mask, document_starts
from antransformer.models import ModelConfig, build


def exact(q, k, v, scale, starts):
    tokens = q.shape[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() if starts is None else dense_mask(starts)
    y = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)), mask, scale=scale)
    return y.transpose(1, 2)


def random_starts(tokens, documents):
    """Documents that begin at the same random positions in each run, and differ between the two rows."""
    if not documents:
        return None
    return document_starts((torch.rand(2, tokens) < documents / tokens).long(), 1)


@pytest.mark.parametrize("documents", [0, 1, 8])
@pytest.mark.parametrize("tokens", [1, 5, 128, 300])
def test_outputs_and_gradients_have_the_error_of_bfloat16(tokens, documents):
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(2, tokens, 3, 16, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    grad = torch.randn(2, tokens, 3, 16, dtype=torch.bfloat16)
    starts = random_starts(tokens, documents)
    y, expected = cpu_attention.causal(q, k, v, 0.5, starts), exact(q, k, v, 0.5, starts)
    gradients, exact_gradients = torch.autograd.grad(y, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad)
    assert y.dtype == torch.bfloat16 and y.shape == q.shape
    for name, result, reference in zip("yqkv", (y, *gradients), (expected, *exact_gradients), strict=True):
        error = (result.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-3)
        assert error < 0.01, name


@pytest.mark.parametrize("documents", [0, 3])
def test_the_operator_is_registered_correctly(documents):
    starts = random_starts(150, documents)
    q, k, v = (torch.randn(4, 150, 16, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(cpu_attention._causal, (q, k, v, 0.25, starts), test_utils=tests)
    grad = torch.randn(4, 150, 16, dtype=torch.bfloat16)
    inputs = (grad, *(x.detach() for x in (q, k, v)), 0.25, starts)
    torch.library.opcheck(cpu_attention._causal_backward, inputs, test_utils=tests[:2])


def test_it_is_used_in_bfloat16_without_padding_or_earlier_tokens(monkeypatch):
    calls, original = [], cpu_attention.causal
    monkeypatch.setattr(cpu_attention, "causal", lambda *args: calls.append(1) or original(*args))
    model = build(ModelConfig(vocab_size=50, width=32, layers=2, context=16, head_dim=16))
    tokens = torch.randint(50, (2, 16))
    model(tokens)
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens)
    assert len(calls) == 2
    x = torch.randn(1, 3, 2, 16, dtype=torch.bfloat16)
    buffers = (torch.zeros(1, 8, 2, 16, dtype=torch.bfloat16) for _ in range(2))
    causal_attention(x, x, x, AttentionContext(None, kv_cache=LayerCache(*buffers, 2)))
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    masked = causal_attention(x, x, x, AttentionContext(None, mask=mask))
    assert len(calls) == 2
    torch.testing.assert_close(masked, causal_attention(x, x, x, AttentionContext(None)), rtol=0.02, atol=0.02)
    assert len(calls) == 3
