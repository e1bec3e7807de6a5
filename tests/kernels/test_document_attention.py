"""The two forms of the mask against a loop, and FlexAttention against torch's attention."""

import pytest
import torch

from antransformer.functional import AttentionContext, causal_attention
from antransformer.kernels.document_attention import block_mask, dense_mask, document_mask, document_starts


def random_starts(length, batch=3):
    generator = torch.Generator().manual_seed(length)
    return document_starts((torch.rand(batch, length, generator=generator) < 0.02).long(), 1)


def test_a_token_sees_its_document_up_to_itself():
    tokens = torch.tensor([[0, 5, 9, 5, 5, 8], [9, 9, 0, 0, 0, 9]])
    starts = document_starts(tokens, 9)
    mask = dense_mask(starts)
    assert mask.shape == (2, 1, 6, 6) and mask.dtype == torch.bool
    for row, ids in enumerate(tokens.tolist()):
        for query in range(6):
            start = max((place for place in range(query + 1) if ids[place] == 9), default=0)
            assert mask[row, 0, query].nonzero().flatten().tolist() == list(range(start, query + 1))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("length", [100, 384])
def test_the_block_mask_is_the_dense_one(length):
    starts, places = random_starts(length), torch.arange(length)
    mask, dense = block_mask(starts), dense_mask(starts)
    batch = torch.arange(3)[:, None, None]
    assert torch.equal(mask.mask_mod(batch, 0, places[:, None], places), dense[:, 0])
    assert mask.sparsity() > 0 or length == 100  # blocks of 128 x 128
    q, k, v = torch.randn(3, 3, length, 2, 16)
    on_cpu = causal_attention(q, k, v, AttentionContext(None, document_mask(starts), starts=starts), 0.3)
    for each in (mask, dense):
        torch.testing.assert_close(causal_attention(q, k, v, AttentionContext(None, each, starts=starts), 0.3), on_cpu)
