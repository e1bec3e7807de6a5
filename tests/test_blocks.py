import doctest
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import antransformer
from antransformer import blocks, bounds, errors, factors, functional
from antransformer.blocks import DecoderBlock, EncoderBlock, EncoderDecoder
from antransformer.nn import MLP, Attention, Embedding, Head, Linear, Residual
from helpers.messages import mentions

MASKS = {
    "bidirectional": ({}, lambda row, keys: keys),
    "causal": ({"causal": True}, lambda row, keys: row + 1),
    "sliding, causal": ({"causal": True, "window": 4}, lambda row, keys: min(row + 1, 4)),
    "sliding": ({"window": 4}, lambda row, keys: min(row, 3) + min(keys - row, 4)),
}
KV_HEADS = {"multi-head": 4, "grouped-query": 2, "multi-query": 1}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def unit(*shape, dtype=torch.float32):
    return functional.normalize(torch.randn(shape, dtype=dtype))


def mean_norm(x):
    return x.norm(dim=-1).mean().item()


def mean_square_derivative(activation, std):
    """Mean square derivative of an activation, E activation'(z)^2, for z ~ N(0, std^2)."""
    z = (torch.randn(1_000_000) * std).requires_grad_()
    (gradient,) = torch.autograd.grad(activation(z).sum(), z)
    return gradient.square().mean().item()


@pytest.mark.parametrize("module", [functional, antransformer.nn, blocks, bounds], ids=lambda module: module.__name__)
def test_worked_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("std", [0.5, 2.0])
@pytest.mark.parametrize("activation", [F.silu, F.gelu, F.relu, torch.tanh, lambda z: F.relu(z).square()])
@pytest.mark.parametrize("gated", [True, False])
def test_scale_of_the_mlp_forward_and_backward(gated, activation, std):
    mlp, x = MLP(256, 768, gated, activation, std), unit(400, 256).requires_grad_()
    y = mlp(x)
    assert mean_norm(y) == pytest.approx(1, rel=0.03)
    y.backward(unit(400, 256))
    # The path through the activation has gain std nu act'(z). With a gate, the path through u has gain 1.
    expected = (std * factors.activation(activation, std)) ** 2 * mean_square_derivative(activation, std)
    assert x.grad.square().sum(-1).mean().item() == pytest.approx(expected + gated, rel=0.08)
    gate = mlp.gate_proj.weight if gated else None
    functional_y = functional.mlp(x, mlp.up_proj.weight, mlp.down_proj.weight, gate, activation, std)
    torch.testing.assert_close(y, functional_y)


@pytest.mark.parametrize("kv_heads", KV_HEADS)
@pytest.mark.parametrize("mask", MASKS)
def test_scale_of_dense_attention_forward(mask, kv_heads):
    options, visible_keys = MASKS[mask]
    attention = Attention(256, 4, KV_HEADS[kv_heads], **options)
    nn.init.zeros_(attention.score_scale)  # uniform attention
    scale = torch.tensor([factors.attention(visible_keys(row, 12)) for row in range(12)])
    norms = attention(unit(200, 12, 256)).norm(dim=-1).mean(0) * scale
    torch.testing.assert_close(norms, torch.ones(12), rtol=0.05, atol=0)


@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_scale_of_attention_backward_and_of_its_output_scale(kv_heads):
    attention, x = Attention(256, 4, KV_HEADS[kv_heads], out_scale=factors.attention(12)), unit(200, 12, 256)
    nn.init.zeros_(attention.score_scale)
    y = attention(x.requires_grad_())
    assert mean_norm(y) == pytest.approx(1, rel=0.04)
    y.backward(unit(200, 12, 256))
    assert mean_norm(x.grad) == pytest.approx(1, rel=0.05)  # a sum of 12 gradients of norm 1/12, times sqrt(12)


def test_scores_of_random_directions_have_unit_variance():
    attention, x = Attention(256, 4), unit(100, 12, 256)
    q, k = (functional.normalize(proj(x).unflatten(-1, (-1, 64))) for proj in (attention.q_proj, attention.k_proj))
    scores = torch.einsum("btnh,bsnh->bnts", q * attention.score_scale, k)
    assert scores.std().item() == pytest.approx(1, rel=0.05)


def loop_attention(q, k, v, score_scale, allowed):
    """Attention one head and row at a time; ``allowed(row, column)`` is whether a key is visible."""
    out, group = torch.zeros_like(q), q.shape[2] // k.shape[2]
    for head in range(q.shape[2]):
        for row in range(q.shape[1]):
            columns = [column for column in range(k.shape[1]) if allowed(row, column)]
            keys = F.normalize(k[:, columns, head // group], dim=-1)
            scores = torch.einsum("bh,bsh->bs", F.normalize(q[:, row, head], dim=-1), keys) * score_scale
            out[:, row, head] = torch.einsum("bs,bsh->bh", scores.softmax(-1), v[:, columns, head // group])
    return out.flatten(2)


@pytest.mark.parametrize("kv_heads", KV_HEADS)
@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, lambda row, column: True),
        ({"causal": True}, lambda row, column: column <= row),
        ({"window": 3}, lambda row, column: abs(row - column) < 3),
        ({"causal": True, "window": 3}, lambda row, column: 0 <= row - column < 3),
        ({"mask": torch.arange(9)[None] != 4}, lambda row, column: column != 4),
        ({"causal": True, "mask": torch.arange(9)[None] != 4}, lambda row, column: column <= row and column != 4),
    ],
)
def test_attention_agrees_with_a_loop_forward_and_backward(options, allowed, kv_heads):
    shapes = ((2, 9, 4, 8), (2, 9, KV_HEADS[kv_heads], 8), (2, 9, KV_HEADS[kv_heads], 8))
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    scale = torch.tensor([2.5], dtype=torch.float64, requires_grad=True)
    ours, theirs = functional.attention(q, k, v, scale, **options), loop_attention(q, k, v, scale, allowed)
    torch.testing.assert_close(ours, theirs)
    gradient = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, (q, k, v, scale), gradient)
    for grad, expected in zip(grads, torch.autograd.grad(theirs, (q, k, v, scale), gradient), strict=True):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("memory_length", [None, 7])
def test_attention_agrees_with_torchs_multi_head_attention(memory_length, causal, padded):
    # With inputs whose heads have unit norm and rotations as projections, q and k have unit norm in both modules.
    ours = Attention(32, 4, causal=causal).double()
    theirs = nn.MultiheadAttention(32, 4, bias=False, batch_first=True, dtype=torch.float64)
    x = unit(3, 5, 4, 8, dtype=torch.float64).flatten(2)
    memory = x if memory_length is None else unit(3, memory_length, 4, 8, dtype=torch.float64).flatten(2)
    rotations = [
        torch.block_diag(*torch.linalg.qr(torch.randn(4, 8, 8, dtype=torch.float64)).Q) * size for size in (0.3, 0.2)
    ]
    with torch.no_grad():
        ours.q_proj.weight.copy_(rotations[0])
        ours.k_proj.weight.copy_(rotations[1])
        ours.score_scale.fill_(1 / math.sqrt(8))  # torch's constant
        values = ours.v_proj.weight * ours.v_proj.factor
        theirs.in_proj_weight.copy_(torch.cat([rotations[0] / 0.3, rotations[1] / 0.2, values]))
        theirs.out_proj.weight.copy_(ours.out_proj.weight * ours.out_proj.factor)
    keys = memory.shape[1]
    padding = torch.zeros(3, keys, dtype=torch.bool)
    if padded:
        padding[1, 3:] = padding[2, 1:] = True
    causal_mask = ~torch.ones(5, keys, dtype=torch.bool).tril() if causal else None
    expected, _ = theirs(x, memory, memory, key_padding_mask=padding, attn_mask=causal_mask, need_weights=False)
    mask = ~padding[:, None, None] if padded else None
    torch.testing.assert_close(ours(x, None if memory is x else memory, mask), expected)


@pytest.mark.parametrize("rotary", [0.0, 0.5, 1.0])
def test_rotary_of_a_part_of_each_head(rotary):
    attention, x = Attention(64, 2, rotary=rotary, causal=True).double(), unit(2, 6, 64, dtype=torch.float64)
    q, k, v = (proj(x).unflatten(-1, (2, 32)) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
    rotary_dim = round(32 * rotary)
    tables = functional.rotary_tables(torch.arange(6), rotary_dim, 10_000.0)
    if rotary_dim:
        q, k = (
            torch.cat([functional.rotate(heads[..., :rotary_dim], tables), heads[..., rotary_dim:]], -1)
            for heads in (q, k)
        )
    y = loop_attention(q, k, v, attention.score_scale, lambda row, column: column <= row)
    torch.testing.assert_close(attention(x), attention.out_proj(y), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("queries", "keys"), [(3, 6), (6, 3)])
def test_rotary_positions_of_a_cross_attention_count_from_zero_in_both_sequences(queries, keys):
    attention = Attention(64, 2, rotary=0.5).double()
    x, memory = unit(2, queries, 64, dtype=torch.float64), unit(2, keys, 64, dtype=torch.float64)
    q = attention.q_proj(x).unflatten(-1, (2, 32))
    k, v = (proj(memory).unflatten(-1, (2, 32)) for proj in (attention.k_proj, attention.v_proj))
    q, k = (
        functional.rotate(heads, functional.rotary_tables(torch.arange(heads.shape[1]), 16, 10_000.0))
        for heads in (q, k)
    )
    y = loop_attention(q, k, v, attention.score_scale, lambda row, column: True)
    torch.testing.assert_close(attention(x, memory), attention.out_proj(y), rtol=1e-6, atol=1e-9)


def test_a_mask_is_boolean_and_may_have_one_axis():
    q = torch.randn(1, 3, 2, 8)
    mask = torch.tensor([True, False, True])
    torch.testing.assert_close(functional.attention(q, q, q, mask=mask), functional.attention(q, q, q, mask=mask[None]))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        functional.attention(q, q, q, mask=torch.zeros(3, 3))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 7), (2, 5, 7), (2, 1, 1, 6), (3, 1, 1, 7), (1, 2, 1, 5, 7)])
def test_a_mask_of_another_shape_is_refused(shape, causal):
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 4, 8)
    with pytest.raises(ValueError) as error:
        functional.attention(q, k, k, causal=causal, mask=torch.ones(shape, dtype=torch.bool))
    assert "(2, 4, 5, 7)" in str(error.value) and str(shape) in str(error.value)


def test_an_initial_value_of_0_is_refused_since_it_would_never_change():
    with pytest.raises(errors.ConfigError):
        Residual(8, alpha=0.0)


def test_a_query_with_no_visible_key_gives_zero_and_no_nan(monkeypatch):
    """The kernel gets a key for every query, since the gradients of some kernels would be NaN otherwise."""
    q, kernel = torch.randn(1, 3, 2, 8, requires_grad=True), F.scaled_dot_product_attention
    mask = torch.tensor([[True, True, True], [False, False, False], [True, False, False]])

    def with_keys(*args, attn_mask, **options):
        assert attn_mask.any(-1).all()
        return kernel(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", with_keys)
    y = functional.attention(q, q, q, mask=mask)
    assert torch.equal(y[0, 1], torch.zeros(16)) and y[0, [0, 2]].abs().min() > 0
    y.sum().backward()
    assert q.grad.isfinite().all()


def test_padding_does_not_reach_the_other_tokens():
    block = EncoderBlock(Attention(64, 2, rotary=1.0), MLP(64))
    x = unit(2, 8, 64)
    mask = (torch.arange(8) < 5)[None, None, None]
    torch.testing.assert_close(block(x, mask)[:, :5], block(x[:, :5]))


def small_language_model():
    return antransformer.build(antransformer.ModelConfig(vocab_size=20, width=64, layers=1, head_dim=32))


def small_encoder_decoder(layers=2):
    encoder = [EncoderBlock(Attention(256, 4, rotary=0.5), MLP(256)) for _ in range(layers)]
    decoder = [
        DecoderBlock(Attention(256, 4, causal=True, rotary=0.5), Attention(256, 4, kv_heads=2), MLP(256))
        for _ in range(layers)
    ]
    return EncoderDecoder(encoder, decoder)


def test_encoder_decoder_keeps_norms_and_order():
    model, source, target = (
        small_encoder_decoder(),
        unit(20, 9, 256).requires_grad_(),
        unit(20, 6, 256).requires_grad_(),
    )
    y = model(source, target)
    assert mean_norm(y) == pytest.approx(1, rel=0.05)
    # Later tokens of the target do not reach earlier ones; every token of the source reaches all.
    first = torch.autograd.grad(y[:, 2].sum(), (source, target), retain_graph=True)
    assert (first[0].norm(dim=-1) > 0).all()
    assert (first[1].norm(dim=-1) > 0).all(0).tolist() == [True] * 3 + [False] * 3
    y.backward(unit(20, 6, 256))
    assert 0.3 < mean_norm(target.grad) < 1.2  # a gradient of norm 1 through four updates with alpha 1/20


def test_source_mask_hides_padding_from_encoder_and_decoder():
    model, source, target = small_encoder_decoder(1), unit(2, 9, 256), unit(2, 6, 256)
    mask = (torch.arange(9) < 4)[None, None, None]
    torch.testing.assert_close(model(source, target, mask), model(source[:, :4], target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_activations_keep_their_dtype_and_compile_as_one_graph(dtype):
    block = EncoderBlock(Attention(64, 2, kv_heads=1, causal=True, window=3, rotary=0.5), MLP(64)).to(dtype)
    x = unit(2, 8, 64).to(dtype)
    y = torch.compile(block, backend="eager", fullgraph=True)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, block(x))


def test_compiled_and_exported_with_dynamic_shapes_a_block_is_one_graph():
    block = EncoderBlock(Attention(64, heads=2, causal=True, rotary=0.5), MLP(64))
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=True)
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=64)}
    exported = torch.export.export(block, (unit(2, 8, 64),), dynamic_shapes=(dynamic,)).module()
    for x in (unit(2, 8, 64), unit(3, 9, 64), unit(5, 7, 64)):
        torch.testing.assert_close(compiled(x), block(x))
        torch.testing.assert_close(exported(x), block(x))


class Classifier(nn.Module):
    """A user's model that mixes our blocks with a norm layer of torch."""

    def __init__(self):
        super().__init__()
        self.embedding = Embedding(20, 64)
        self.inputs = Linear(5, 64, bias=True)
        self.norm = nn.LayerNorm(64)
        self.blocks = nn.ModuleList(EncoderBlock(Attention(64, 2, kv_heads=1), MLP(64)) for _ in range(2))
        self.head = Head(64, 3)

    def forward(self, tokens, values):
        x = self.embedding(tokens) + functional.normalize(self.inputs(values))
        x = functional.normalize(self.norm(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def test_bounds_of_a_users_model_hold_after_real_steps():
    model = Classifier()
    collected = {bound.name: bound for bound in bounds.collect_bounds(model)}
    matrices = {name for name, value in model.named_parameters() if value.ndim == 2}
    assert collected.keys() == matrices | {"inputs.bias"} and len(collected) == 4 + 2 * 7
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    antransformer.bind(model, optimizer)
    with torch.no_grad():
        model.head.weight.mul_(0.5)  # rows inside the unit ball
    for _ in range(3):
        tokens, values = torch.randint(0, 20, (16, 7)), torch.randn(16, 7, 5)
        F.cross_entropy(model(tokens, values), tokens[:, 0] % 3).backward()
        before = {name: bound.parameter.detach().clone() for name, bound in collected.items()}
        optimizer.step()
        optimizer.zero_grad()
        for name, bound in collected.items():
            assert not torch.equal(bound.parameter, before[name])
            assert bounds.norms(bound).max() <= 1 + 1e-6
    assert model.inputs.bias.norm() > 0.3 and model.norm.weight.norm() > 2


def test_attention_with_an_adapter_around_a_projection_can_be_printed():
    attention = Attention(64, heads=4, kv_heads=2)
    attention.q_proj = nn.ModuleDict({"base": attention.q_proj, "adapter": Linear(64, 64)})
    assert "heads=4, kv_heads=2" in repr(attention)


def test_bounds_of_a_submodule_are_collected_and_a_method_bounds_takes_precedence():
    language = small_language_model()
    both = nn.ModuleDict({"language": language, "head": Linear(64, 2)})
    names = [bound.name for bound in bounds.collect_bounds(both)]
    assert names == [f"language.{bound.name}" for bound in language.bounds()] + ["head.weight"]

    class OnlyTheFirst(nn.Sequential):
        def bounds(self):
            return [antransformer.Bound("0.weight", self[0].weight, strict=True)]

    assert [bound.strict for bound in bounds.collect_bounds(OnlyTheFirst(Linear(4, 4), Linear(4, 4)))] == [True]


def test_constructors_initialise_and_draw_nothing_on_meta():
    state = torch.get_rng_state()
    with torch.device("meta"):
        Classifier()
    assert torch.equal(torch.get_rng_state(), state)
    for bound in bounds.collect_bounds(Classifier()):
        length = bounds.norms(bound)
        torch.testing.assert_close(length, torch.full_like(length, bound.name != "inputs.bias"))
    torch.testing.assert_close(Residual(8).alpha(), torch.full((8,), 0.05))
    x = unit(4, 64)
    for head in (Head(64, 3), Head(64, 3, scalar=True)):
        torch.testing.assert_close(head(x), x @ head.weight.T)


@pytest.mark.parametrize("make", [lambda: Linear(64, 4096), lambda: Embedding(4096, 64)])
def test_initial_rows_in_bfloat16_are_rounded_once(make):
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        weight = make().weight
    finally:
        torch.set_default_dtype(default)
    assert weight.dtype == torch.bfloat16
    assert (weight.double().norm(dim=1) - 1).abs().max() < 0.003


def test_outputs_of_a_head_share_one_scale_on_request():
    head, x = Head(64, 3, scalar=True), unit(4, 64)
    assert head.output_scale.value.shape == (1,)
    with torch.no_grad():
        head.output_scale.value *= 5
    torch.testing.assert_close(head(x), 5 * (x @ head.weight.T))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Attention(100, 3), ("heads", "width", 100, 3)),
        (lambda: Attention(64, 4, kv_heads=3), ("kv_heads", 4, 3)),
        (lambda: Attention(64, 4, kv_heads=0), ("kv_heads", 4, 0)),
        (lambda: Attention(64, 4, window=0), ("window", 1, 0)),
        (lambda: Attention(64, 4, rotary=1.5), ("rotary", 16, 1.5)),
        (lambda: Attention(64, 4, rotary=0.3), ("rotary", 16, 0.3)),
        (lambda: EncoderBlock(Attention(64, 4), MLP(32)), ("MLP", 64, 32)),
        (lambda: DecoderBlock(Attention(64, 4), Attention(32, 4), MLP(64)), ("Attention", 64, 32)),
    ],
)
def test_bad_arguments_are_named_with_their_values(make, parts):
    with pytest.raises(errors.ConfigError) as error:
        make()
    assert mentions(error.value, *parts)


def test_a_width_that_is_no_integer_is_refused_also_if_its_value_is_known():
    MLP(64)
    with pytest.raises(ValueError, match=r"64\.0"):
        MLP(64.0)


def test_an_exported_program_has_no_operator_of_this_package():
    model = nn.Sequential(
        Embedding(50, 64), EncoderBlock(Attention(64, 4, causal=True, rotary=0.5), MLP(64)), Head(64, 50)
    )
    program = torch.export.export(model, (torch.arange(20).reshape(2, 10),))
    assert "antransformer." not in program.graph_module.code


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: EncoderBlock(MLP(64), Attention(64, 4)), "Attention"),
        (lambda: DecoderBlock(Attention(64, 4), torch.nn.MultiheadAttention(64, 4), MLP(64)), "MultiheadAttention"),
        (lambda: MLP(64, activation="gelu"), "gelu"),
        (lambda: antransformer.build("angpt"), "ModelConfig"),
        (lambda: antransformer.normalize_(torch.nn.Linear), "Linear"),
        (lambda: antransformer.bind(torch.optim.SGD(MLP(8).parameters()), MLP(8)), "SGD, MLP"),
        (lambda: antransformer.generate((MLP(64), None)), "MLP, NoneType"),
        (lambda: antransformer.generate((small_language_model(), None)), "AnGPT, NoneType"),
        (lambda: antransformer.generate((small_language_model(),)), "AnGPT"),
        (lambda: antransformer.evaluate((MLP(64), None)), "tuple"),
        (lambda: antransformer.export(MLP(64), "folder"), "MLP"),
    ],
)
def test_arguments_of_the_wrong_type_are_named(make, part):
    with pytest.raises(TypeError, match=part):
        make()
