"""Documents in one row are trained as if each were alone, in every architecture."""

from types import SimpleNamespace

import pytest
import torch

from antransformer.kernels import document_attention
from antransformer.kernels.document_attention import block_mask, dense_mask
from antransformer.models import ModelConfig, build, decoder
from antransformer.models.ablations import ABLATIONS
from antransformer.models.registry import BUILT_IN

END = 3  # id of the end-of-text token
LENGTHS = ((9, 1, 14), (1, 8, 8, 7))  # tokens of the documents in each row
SIZES = {"vocab_size": 50, "width": 64, "layers": 2, "head_dim": 32, "context": 24}
KINDS = [*((name, {}) for name in BUILT_IN), *(("angpt", {"ablation": name}) for name in list(ABLATIONS)[:1])]


def make(architecture="angpt", **options):
    torch.manual_seed(0)
    return build(ModelConfig(architecture=architecture, **SIZES, **options))


def packed():
    """Tokens and targets (2, 24). The first document of row 0 began before the row, and all others begin in it."""
    tokens = torch.randint(4, 50, (len(LENGTHS), 25), generator=torch.Generator().manual_seed(1))
    for row, lengths in enumerate(LENGTHS):
        starts = torch.tensor((0, *lengths)).cumsum(0)
        tokens[row, starts[1:] if row == 0 else starts] = END
    return tokens[:, :-1], tokens[:, 1:]


def documents(tokens, targets):
    """Each document as a row of its own."""
    return [
        (x[None], y[None])
        for row, lengths in enumerate(LENGTHS)
        for x, y in zip(tokens[row].split(lengths), targets[row].split(lengths), strict=True)
    ]


def loss_and_gradients(model, batches):
    """Mean loss over all tokens of the batches, and its gradients."""
    count = sum(targets.numel() for _, targets in batches)
    loss = sum(model.loss(tokens, targets) * (targets.numel() / count) for tokens, targets in batches)
    return loss, torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize(("architecture", "options"), KINDS)
def test_a_packed_row_equals_its_documents_alone(architecture, options):
    model, (tokens, targets) = make(architecture, **options), packed()
    expected, expected_gradients = loss_and_gradients(model, documents(tokens, targets))
    mixed, _ = loss_and_gradients(model, [(tokens, targets)])
    model.end_of_text = END
    loss, gradients = loss_and_gradients(model, [(tokens, targets)])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert abs(mixed - expected) > 1e-4  # without the mask, documents see each other
    for (name, _), gradient, alone in zip(model.named_parameters(), gradients, expected_gradients, strict=True):
        assert (gradient - alone).norm() <= 1e-4 * alone.norm(), name


@pytest.mark.parametrize("architecture", BUILT_IN)
def test_an_earlier_document_and_a_later_token_change_nothing(architecture):
    model, (tokens, _) = make(architecture), packed()
    model.end_of_text = END
    changed = tokens.clone()
    changed[0, :9] = 7  # the first document
    changed[0, -1] = 7  # the last token
    before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[9:-1], after[9:-1]) and not torch.equal(before[:9], after[:9])


def test_bfloat16_and_recomputed_blocks_keep_documents_apart():
    model, (tokens, targets) = make(), packed()
    model.end_of_text = END
    changed = tokens.clone()
    changed[0, :9] = 7
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(tokens)[0, 9:], model(changed)[0, 9:])
        half = model.loss(tokens, targets)
    torch.testing.assert_close(half, model.loss(tokens, targets), rtol=0.01, atol=0)


def test_a_model_is_one_graph_with_and_without_the_mask():
    model, (tokens, targets) = make(), packed()
    expected = model.loss(tokens, targets)
    torch.compiler.reset()
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, targets), expected)
    model.end_of_text = END
    torch.testing.assert_close(compiled(tokens, targets), model.loss(tokens, targets))
    assert abs(model.loss(tokens, targets) - expected) > 1e-4


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("form", [dense_mask, block_mask])
def test_the_masks_of_other_devices_compute_the_same(form, monkeypatch):
    model, (tokens, _) = make(), packed()
    model.end_of_text = END
    expected = model(tokens)
    monkeypatch.setattr(decoder, "document_mask", form)
    with torch.no_grad():  # FlexAttention has no gradients on CPUs
        torch.testing.assert_close(model(tokens), expected)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(tokens), expected)


@pytest.mark.slow
@pytest.mark.parametrize("compile", ["nothing", "blocks", "model"])
def test_compiled_flex_attention_computes_the_same(compile, monkeypatch):
    torch.compiler.reset()
    model, (tokens, _) = make(), packed()
    model.end_of_text = END
    expected = model(tokens)
    fused, gpu = document_attention._fused, SimpleNamespace(is_cuda=True)  # where FlexAttention is always compiled
    monkeypatch.setattr(document_attention, "_fused", lambda function, _: fused(function, gpu))
    monkeypatch.setattr(decoder, "document_mask", block_mask)
    if compile == "blocks":
        for block in model.blocks:
            block.compile()
    with torch.no_grad():
        call = torch.compile(model, fullgraph=True) if compile == "model" else model
        torch.testing.assert_close(call(tokens), expected)
