import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import antransformer
from antransformer.bounds import collect_bounds, norms
from antransformer.models import ModelConfig, build
from helpers.small import Watch

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=True, **SIZES))
    return model, {"input_ids": torch.randint(0, 50, (2, 9))}, 7 * 2 + 1  # embedding and head are tied


def bert():
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(BertConfig(vocab_size=50, max_position_embeddings=16, **SIZES))
    return (
        model,
        {"input_ids": torch.randint(0, 50, (2, 9))},
        6 * 2 + 3 + 1,
    )  # tied, and a layer before it


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=5, **SIZES))
    return model, {"pixel_values": torch.randn(2, 3, 16, 16)}, 6 * 2 + 1


def model_and_batch(make):
    """Return a model with long rows in evaluation mode, a batch, and the number of weights to bound."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, batch, count = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval(), batch, count


@pytest.mark.parametrize("make", [llama, bert, vit])
def test_outputs_keep_every_bit_and_rows_stay_bounded_in_training(make):
    model, batch, count = model_and_batch(make)
    expected = model(**batch).logits
    weights = sum(isinstance(part, (nn.Linear, nn.Embedding)) for part in model.modules())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)  # built before normalize_, which keeps the parameters
    assert antransformer.normalize_(model) is model
    assert torch.equal(model(**batch).logits, expected)
    bounds = collect_bounds(model)
    assert len({bound.parameter for bound in bounds}) == count and len(bounds) == weights
    assert all(0.5 < norms(bound).max() <= 1 for bound in bounds)
    watch = Watch(model, optimizer)
    before = [bound.parameter.detach().clone() for bound in bounds]
    for _ in range(3):
        model(**batch).logits.logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert watch.steps == 3 and len(watch.bounds) == weights and watch.inside
    for bound, start in zip(bounds, before, strict=True):
        if "token_type" not in bound.name:
            assert not torch.equal(bound.parameter, start), bound.name


@pytest.mark.parametrize("make", [llama, bert, vit])
def test_a_state_dict_goes_into_another_normalized_model(make):
    model, batch, _ = model_and_batch(make)
    other = antransformer.normalize_(make()[0]).eval()  # with other factors
    state = {name: value.clone() for name, value in antransformer.normalize_(model).state_dict().items()}
    other.load_state_dict(state)
    assert torch.equal(other(**batch).logits, model(**batch).logits)


def test_tied_weights_stay_tied_and_a_second_call_changes_nothing():
    model, batch, _ = model_and_batch(llama)
    antransformer.normalize_(model)
    expected, names = model(**batch).logits, list(model.state_dict())
    antransformer.normalize_(model)
    assert list(model.state_dict()) == names and torch.equal(model(**batch).logits, expected)
    head = model.lm_head.parametrizations.weight
    assert head.original is model.model.embed_tokens.parametrizations.weight.original
    duplicate = copy.deepcopy(model)
    assert torch.equal(duplicate(**batch).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_rows_of_zeros(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 64, padding_idx=0), nn.Linear(64, 8), nn.Linear(8, 3, bias=False)).to(dtype)
    nn.init.zeros_(model[2].weight)
    tokens = torch.arange(20)
    expected = model(tokens), model[0].weight.clone(), model[1].weight.clone()
    antransformer.normalize_(model)
    assert torch.equal(model(tokens), expected[0])
    assert torch.equal(model[0].weight, expected[1]) and torch.equal(model[1].weight, expected[2])
    assert all(bound.parameter.dtype == dtype for bound in collect_bounds(model))


def test_other_weights_are_not_changed():
    model = nn.Sequential(
        nn.Conv1d(3, 5, 2),
        nn.LayerNorm(64),
        nn.MultiheadAttention(64, 2),
        antransformer.nn.Linear(64, 64),
        antransformer.nn.Embedding(9, 64),
        parametrize.register_parametrization(nn.Linear(4, 4), "weight", nn.Identity()),
        nn.Linear(64, 8),
        prune.l1_unstructured(nn.Linear(4, 4), "weight", 2),  # its weight is computed by a hook
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    antransformer.normalize_(model)
    state = model.state_dict()
    changed = {"2.out_proj.weight", "6.weight"}
    assert set(before) - set(state) == changed
    assert all(torch.equal(state[name], before[name]) for name in set(before) - changed)
    assert model[2].in_proj_weight is dict(model.named_parameters())["2.in_proj_weight"]


def test_errors_name_the_module_and_change_nothing():
    with pytest.raises(TypeError, match=r"nn\.Linear") as error:
        antransformer.normalize_(nn.LayerNorm(4))
    assert "LayerNorm" in str(error.value)
    sizes = {"vocab_size": 50, "width": 64, "layers": 1, "context": 16, "head_dim": 32}
    with pytest.raises(TypeError, match="GPTPlus"):
        antransformer.normalize_(build(ModelConfig(architecture="gpt+", **sizes)))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.constant_(model[1].weight, float("nan"))
    with pytest.raises(ValueError, match=r"1\.weight"):
        antransformer.normalize_(model)
    assert not any(parametrize.is_parametrized(part) for part in model)


class Tied(nn.Module):
    """An embedding whose weight is also used outside of it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.shared = self.embedding.weight

    def forward(self, tokens):
        return self.embedding(tokens) @ self.shared.T


def half(value, *shape):
    layer = nn.Linear(*shape, bias=False).half()
    nn.init.constant_(layer.weight, value)
    return layer


def stored_as(dtype):
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Tied, "shared"),
        (lambda: nn.Sequential(half(1e4, 16, 2)), "0.weight"),
        (lambda: nn.Sequential(nn.Linear(4, 4, device="meta")), "0.weight"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), "0.weight"),
        (lambda: stored_as(torch.int8), "1.0.weight"),
        (lambda: stored_as(torch.float8_e4m3fn), "1.0.weight"),
        (lambda: stored_as(torch.complex64), "1.0.weight"),
    ],
)
def test_a_weight_that_cannot_be_scaled_is_refused_and_nothing_changes(make, name):
    model = nn.Sequential(nn.Linear(4, 4), make())
    before = model[0].weight.clone()
    with pytest.raises(ValueError) as error:
        antransformer.normalize_(model)
    assert name in str(error.value)
    assert torch.equal(model[0].weight, before) and "weight" in model[0]._parameters


def test_an_empty_embedding_is_normalized():
    model = antransformer.normalize_(nn.Sequential(nn.Embedding(0, 4), nn.Linear(4, 4)))
    assert model[0].weight.shape == (0, 4)
