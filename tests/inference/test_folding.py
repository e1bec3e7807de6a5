"""Folding: the same function with fewer operations."""

from collections import Counter
from copy import deepcopy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from antransformer.inference import FoldedAnGPT, fold, generate
from antransformer.inference.folding import folded_where_possible
from antransformer.models import ModelConfig, build
from antransformer.models.ablations import ABLATIONS
from antransformer.models.registry import BUILT_IN


def model_of(architecture="angpt", **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "width": 64, "layers": 6, "context": 64, "head_dim": 32}
    model = build(ModelConfig(architecture=architecture, **sizes, **options))
    with torch.no_grad():  # initial values have many equal scales
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.mul_(1 + 2 * torch.rand_like(parameter))
    return model.eval()


def some_tokens(batch=4):
    return torch.randint(0, 300, (batch, 64), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "options", [{}, {"gate_scale": "none"}, {"gate_scale": "sqrt_mlp"}, {"alpha_init": 0.12}, {"logit_scale": "scalar"}]
)
def test_folding_keeps_the_function(options):
    model = model_of(**options)
    with torch.no_grad():
        before, after = model(some_tokens()), fold(model)(some_tokens())
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()
    assert (model.logit_scale() - 1).abs().mean() > 0.1 and model.blocks[0].mlp_residual.alpha().std() > 0.01


def test_the_state_of_a_folded_model_is_complete():
    model, other = model_of(), model_of()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.score_scale.fill_(9.0)
    folded, loaded = fold(model), fold(other)
    loaded.load_state_dict(folded.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(some_tokens()), folded(some_tokens()))


def test_folding_is_exact_in_double_precision():
    model = model_of().double()
    with torch.no_grad():
        torch.testing.assert_close(fold(model)(some_tokens()), model(some_tokens()), rtol=1e-9, atol=1e-9)


def test_a_folded_model_has_no_factors_and_fewer_scales():
    model = model_of()
    folded = fold(model)
    scales = {name: value.numel() for name, value in folded.named_parameters() if value.ndim == 1}
    # Two gains per block, as in GPT+. The score scale is a constant, and there is no final norm and no s_Z.
    assert sum(scales.values()) == 6 * 2 * 64
    assert {type(module).__name__ for module in folded.modules()} == {
        "FoldedAnGPT",
        "FoldedBlock",
        "Embedding",
        "ModuleList",
        "Linear",
    }


def test_a_folded_model_generates_the_same_text():
    model = model_of()
    options = {"max_new_tokens": 80, "temperature": 0}
    assert list(generate(fold(model), [[1, 2], [3]], **options)) == list(generate(model, [[1, 2], [3]], **options))


class Operations(TorchDispatchMode):
    """Counts the operations that reach torch's kernels, by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def operations(model):
    tokens = some_tokens()
    with Operations() as operations:
        model(tokens)
    return operations.count


def test_a_folded_model_has_no_operation_that_gpt_plus_does_not_have():
    plain, folded, gpt_plus = operations(model_of()), operations(fold(model_of())), operations(model_of("gpt+"))
    assert not folded - gpt_plus  # no operation occurs more often
    # GPT+ also applies the score scale to q in each of the 6 blocks, and a final norm.
    extra = gpt_plus - folded
    assert extra["mul"] >= 6 and sum(extra.values()) > extra["mul"]
    assert (plain - gpt_plus)["mul"] > 0


@torch.no_grad()
def test_folding_does_not_increase_the_error_of_bfloat16():
    model, tokens = model_of(), some_tokens(160)  # 10,240 tokens
    exact = model(tokens).flatten(0, 1)
    first, second = exact.topk(2).values.unbind(-1)
    errors, differing = [], []
    for half in (fold(model).bfloat16(), deepcopy(model).bfloat16()):
        logits = half(tokens).flatten(0, 1).float()
        differs = logits.argmax(-1) != exact.argmax(-1)
        # Rounding to 8 bits changes the argmax only where the two largest logits are close.
        assert (first - second)[differs].max() < 2**-5 * exact.abs().max()
        errors.append((logits - exact).square().mean())
        differing.append(differs.sum())
    assert errors[0] < errors[1] and differing[0] < differing[1] < 0.05 * tokens.numel()


def test_folding_keeps_the_dtype_and_does_not_change_the_model():
    model = model_of().bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = fold(model)
    assert isinstance(folded, FoldedAnGPT)
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.bfloat16}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_that_cannot_be_folded_are_refused():
    for architecture in set(BUILT_IN) - {"angpt"}:
        other = model_of(architecture)
        with pytest.raises(TypeError, match=rf"\b{type(other).__name__}\b"):
            fold(other)
    for ablation in ABLATIONS:
        with pytest.raises(ValueError, match=rf"\b{ablation}\b"):
            fold(model_of(ablation=ablation))
    model = model_of()
    with torch.no_grad():
        residual = model.blocks[2].mlp_residual
        residual.alpha.value[5] = residual.alpha.scale / residual.alpha.init
    assert residual.alpha()[5] == 1
    with pytest.raises(ValueError, match="alpha") as error:
        fold(model)
    assert "float32" in str(error.value)
    assert folded_where_possible(model) is model and isinstance(folded_where_possible(model_of()), FoldedAnGPT)
