import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from antransformer import functional
from antransformer.diagnostics.probes import layer_alphas
from antransformer.errors import ConfigError
from antransformer.kernels import cpu_attention
from antransformer.models import ModelConfig, build
from antransformer.models.ablations import ABLATIONS
from antransformer.nn import Linear, Residual, ScaledParameter
from antransformer.training.metrics import mean_alpha
from helpers.messages import mentions

GPT_PLUS_FAMILY = ["gpt+", "gpt", "ln-scaling", "dyt"]
ARCHITECTURES = [*GPT_PLUS_FAMILY, "ngpt", "angpt"]
WITH_ABLATIONS = [*((name, None) for name in ARCHITECTURES), *(("angpt", name) for name in ABLATIONS)]
SMALL = {"vocab_size": 61, "width": 64, "layers": 3, "context": 24, "head_dim": 16}

# arXiv:2505.22014: parameters in millions at a vocabulary of 50,304.
PAPER_SIZES = {
    "gpt+": {"32m": 32.05, "62m": 62.24, "125m": 127.03, "250m": 247.17, "0.5b": 505.73, "1b": 1073},
    "ngpt": {"32m": 32.11, "62m": 62.33, "125m": 127.16, "250m": 247.34, "0.5b": 506.00, "1b": 1073},
    "angpt": {"32m": 32.10, "62m": 62.28, "125m": 127.08, "250m": 247.21, "0.5b": 505.78, "1b": 1073},
}


def small(architecture, seed=0, **overrides):
    torch.manual_seed(seed)
    return build(ModelConfig(architecture=architecture, **{**SMALL, **overrides}))


def some_tokens(batch=3, length=24, seed=0):
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def stir(model):
    """Change every parameter, so that no scale is 1 and no offset is 0 by accident."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            factor, offset = torch.randn((2, *parameter.shape), generator=generator, dtype=parameter.dtype)
            parameter.mul_(1 + 0.3 * factor).add_(0.01 * offset)
    return model


@pytest.mark.parametrize("size", PAPER_SIZES["gpt+"])
@pytest.mark.parametrize("architecture", PAPER_SIZES)
def test_parameter_counts_agree_with_the_paper(architecture, size):
    with torch.device("meta"):
        model = build(ModelConfig.preset(size, architecture=architecture, vocab_size=50_304))
    tolerance = 1 if size == "1b" else 0.015
    assert model.parameter_count() / 1e6 == pytest.approx(PAPER_SIZES[architecture][size], abs=tolerance)


def test_parameter_counts_of_the_other_baselines():
    v, d, layers = SMALL["vocab_size"], SMALL["width"], SMALL["layers"]
    matrices, norms = 2 * v * d + layers * (4 + 3 * 4) * d * d, 2 * layers + 1
    expected = {
        "gpt+": matrices + norms * d + layers,
        "gpt": matrices + norms * d,
        "ln-scaling": matrices + norms * d + layers,
        "dyt": matrices + norms * (2 * d + 1) + layers + 1,  # plus the scale of the embedding
    }
    assert {name: small(name).parameter_count() for name in GPT_PLUS_FAMILY} == expected


# References for arXiv:2505.22014, table 1: plain float64 operations in the printed order, one head and position at a
# time, with no factor folded into a weight.


def rms(x, gain):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def scaled(parameter):
    return parameter.init / parameter.scale * parameter.value


def rotate_half(x, head_dim):
    """Rotary embedding of half of a head (T, h); coordinate i is paired with i + h / 4."""
    quarter = head_dim // 4
    y = x.clone()
    for position in range(x.shape[0]):
        for i in range(quarter):
            angle = position * 10_000.0 ** (-2 * i / (2 * quarter))
            a, b = x[position, i], x[position, i + quarter]
            y[position, i] = a * math.cos(angle) - b * math.sin(angle)
            y[position, i + quarter] = a * math.sin(angle) + b * math.cos(angle)
    return y


def heads_of(weight, head, h):
    """Rows of q, k and v of one head in the fused weight."""
    return weight[head * 3 * h : (head + 1) * 3 * h].split(h)


def attend(q, k, v, scale):
    scores = q @ k.T * scale
    future = torch.triu(torch.ones_like(scores), diagonal=1).bool()
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


def attend_normalized(q, k, v, attention):
    return attend(unit(q), unit(k), v, attention.score_scale)


def attend_plain(q, k, v, attention):
    return attend(q, k, v, 1 / math.sqrt(attention.head_dim))


def gain(x, norm, depth):
    return rms(x, norm.weight)


def gain_over_root_of_depth(x, norm, depth):
    return rms(x, norm.weight) / math.sqrt(depth)


def dynamic_tanh(x, norm, depth):
    return norm.weight * torch.tanh(norm.alpha * x) + norm.bias


def reference_gpt_plus(model, tokens, norm_of=gain, attention=attend_normalized, embedding_scale=1):
    x, h = model.embedding.weight[tokens] * embedding_scale, model.config.head_dim
    for depth, block in enumerate(model.blocks, start=1):
        a = norm_of(x, block.attention_norm, depth)
        heads = []
        for head in range(model.config.heads):
            wq, wk, wv = heads_of(block.attention.qkv_proj.weight, head, h)
            heads.append(attention(rotate_half(a @ wq.T, h), rotate_half(a @ wk.T, h), a @ wv.T, block.attention))
        x = x + torch.cat(heads, -1) @ block.attention.out_proj.weight.T
        m = norm_of(x, block.mlp_norm, depth)
        c = (m @ block.mlp.up_proj.weight.T) * F.silu(m @ block.mlp.gate_proj.weight.T)
        x = x + c @ block.mlp.down_proj.weight.T
    return norm_of(x, model.final_norm, 1) @ model.lm_head.weight.T


def reference_gpt(model, tokens):
    return reference_gpt_plus(model, tokens, attention=attend_plain)


def reference_ln_scaling(model, tokens):
    return reference_gpt_plus(model, tokens, norm_of=gain_over_root_of_depth)


def reference_dyt(model, tokens):
    return reference_gpt_plus(model, tokens, norm_of=dynamic_tanh, embedding_scale=model.embedding_scale)


def reference_ngpt(model, tokens):
    x, h, d = model.embedding.weight[tokens], model.config.head_dim, model.config.width
    for block in model.blocks:
        heads = []
        for head in range(model.config.heads):
            wq, wk, wv = heads_of(block.attention.qkv_proj.weight, head, h)
            s = scaled(block.attention.qk_scale)[head * h : (head + 1) * h]
            q, k = unit(rotate_half(x @ wq.T, h)) * s, unit(rotate_half(x @ wk.T, h)) * s
            heads.append(attend(q, k, x @ wv.T, math.sqrt(h)))
        y = unit(torch.cat(heads, -1) @ block.attention.out_proj.weight.T)
        x = unit(x + scaled(block.attention_residual.alpha).abs() * (y - x))
        u = x @ block.mlp.up_proj.weight.T * scaled(block.mlp.up_scale)
        z = x @ block.mlp.gate_proj.weight.T * scaled(block.mlp.gate_scale) * math.sqrt(d)
        y = unit(u * F.silu(z) @ block.mlp.down_proj.weight.T)
        x = unit(x + scaled(block.mlp_residual.alpha).abs() * (y - x))
    return scaled(model.logit_scale) * (x @ model.lm_head.weight.T)


def reference_angpt(model, tokens):
    x, h, d = model.embedding.weight[tokens], model.config.head_dim, model.config.width
    f = 4 * d
    nu_qkv, nu_p, nu_uz, nu_d = math.sqrt(d / h), math.sqrt(h / d), math.sqrt(d / f), math.sqrt(f / d)
    gate = {"none": 1, "sqrt_width": math.sqrt(d), "sqrt_mlp": math.sqrt(f)}[model.config.gate_scale]
    for block in model.blocks:
        heads = []
        for head in range(model.config.heads):
            wq, wk, wv = (w * nu_qkv for w in heads_of(block.attention.qkv_proj.weight, head, h))
            q, k = unit(rotate_half(x @ wq.T, h)), unit(rotate_half(x @ wk.T, h))
            heads.append(attend(q, k, x @ wv.T, block.attention.score_scale))
        y = unit(torch.cat(heads, -1) @ block.attention.out_proj.weight.T * nu_p)
        alpha = scaled(block.attention_residual.alpha)
        x = (x + alpha * (y - x)) / (alpha**2 + (1 - alpha) ** 2).sqrt()
        u, z = x @ block.mlp.up_proj.weight.T * nu_uz, x @ block.mlp.gate_proj.weight.T * nu_uz * gate
        c = u * F.silu(z) * 3.7  # any constant: the exact norm behind the down projection cancels it
        y = unit(c @ block.mlp.down_proj.weight.T * nu_d)
        alpha = scaled(block.mlp_residual.alpha)
        x = (x + alpha * (y - x)) / (alpha**2 + (1 - alpha) ** 2).sqrt()
    return scaled(model.logit_scale) * (x @ model.lm_head.weight.T)


REFERENCES = {
    "gpt+": reference_gpt_plus,
    "gpt": reference_gpt,
    "ln-scaling": reference_ln_scaling,
    "dyt": reference_dyt,
    "ngpt": reference_ngpt,
    "angpt": reference_angpt,
}
VARIANTS = [
    ("gpt+", {}),
    ("gpt", {}),
    ("ln-scaling", {}),
    ("dyt", {}),
    ("dyt", {"dyt_alpha_init": 0.3}),
    ("ngpt", {}),
    ("ngpt", {"s_scale": 0.3, "alpha_init": 0.2}),
    ("angpt", {}),
    ("angpt", {"gate_scale": "none", "s_scale": 0.3}),
    ("angpt", {"gate_scale": "sqrt_mlp", "alpha_init": 0.2}),
    ("angpt", {"logit_scale": "scalar"}),
]


@pytest.mark.parametrize(("architecture", "options"), VARIANTS)
def test_logits_and_gradients_are_those_of_the_printed_equations(architecture, options):
    model, tokens = stir(small(architecture, **options).double()), some_tokens(batch=1, length=7)
    ours, theirs = model(tokens)[0], REFERENCES[architecture](model, tokens[0])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # rotary angles are float32 in the model
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(ours.logsumexp(-1).sum(), weights, retain_graph=True)
    expected = torch.autograd.grad(theirs.logsumexp(-1).sum(), weights)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_position_sees_the_future(architecture):
    model, tokens = small(architecture).double(), some_tokens()
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 61
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert (before[:, 10:] - after[:, 10:]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_is_the_mean_cross_entropy_and_starts_near_uniform(architecture):
    model, tokens = small(architecture), some_tokens(length=25)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss = model.loss(inputs, targets)
    expected = -model(inputs).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).mean()
    torch.testing.assert_close(loss, expected)
    # GPT+ starts with logits of unit variance, half a nat above uniform; nGPT and anGPT with logits of at most 1.
    above = loss.item() - math.log(61)
    assert (0.1 < above < 0.8) if architecture in GPT_PLUS_FAMILY else abs(above) < 0.1


@pytest.mark.parametrize(("architecture", "ablation"), WITH_ABLATIONS)
def test_every_parameter_learns_and_none_is_a_scalar(architecture, ablation):
    model, tokens = small(architecture, ablation=ablation), some_tokens(length=25)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.ndim >= 1
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_weights_are_float32_whatever_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        model = small("angpt")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("architecture", ["angpt", "gpt+"])
def test_compiled_once_for_all_lengths(architecture):
    model, frames = small(architecture, layers=1), []

    def count(graph, _inputs):
        frames.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, dynamic=True, fullgraph=True)
    for length in (5, 9, 12):
        tokens = some_tokens(2, length)
        torch.testing.assert_close(compiled(tokens), model(tokens))
    assert len(frames) == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shapes_of_a_forward_pass_on_meta(architecture):
    with torch.device("meta"):
        model, tokens = build(ModelConfig(architecture=architecture, **SMALL)), torch.zeros(2, 7, dtype=torch.long)
        assert model(tokens).shape == (2, 7, model.config.vocab_size) and model.loss(tokens, tokens).shape == ()


@pytest.mark.parametrize(("architecture", "ablation"), WITH_ABLATIONS)
def test_built_on_meta_then_made_real_it_is_the_same_model(architecture, ablation):
    with torch.device("meta"):
        model = build(ModelConfig(architecture=architecture, ablation=ablation, **SMALL))
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.reset_parameters()
    for name, value in small(architecture, ablation=ablation).state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("architecture", GPT_PLUS_FAMILY)
def test_the_baselines_share_no_class_with_the_method_but_the_skeleton(architecture):
    classes = {type(module) for module in small(architecture).modules()}
    assert not classes & {Linear, Residual, ScaledParameter}


@pytest.mark.parametrize("architecture", GPT_PLUS_FAMILY)
def test_output_projections_start_smaller_in_deep_models_except_with_ln_scaling(architecture):
    model = small(architecture, width=256)
    std = 1 / 16 if architecture == "ln-scaling" else 1 / 16 / math.sqrt(6)
    for block in model.blocks:
        for projection in (block.attention.out_proj, block.mlp.down_proj):
            assert projection.weight.std().item() == pytest.approx(std, rel=0.02)
        assert block.mlp.up_proj.weight.std().item() == pytest.approx(1 / 16, rel=0.02)


def test_ln_scaling_divides_by_the_root_of_the_depth():
    model, seen = small("ln-scaling"), []
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.square().mean().item()))
    with torch.no_grad():
        model(some_tokens())
    assert seen == pytest.approx([1, 1, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1], rel=1e-3)


def test_dyt_starts_from_coordinates_of_variance_one_and_the_given_alpha():
    model = small("dyt", width=256, dyt_alpha_init=0.7)
    assert model.embed(some_tokens()).square().mean().item() == pytest.approx(1, rel=0.05)
    alphas = [value.item() for name, value in model.named_parameters() if name.endswith("alpha")]
    assert alphas == pytest.approx([0.7] * 7)
    assert not [module for module in model.modules() if isinstance(module, torch.nn.RMSNorm)]


# Norms at initialisation, at a width where they concentrate. Sequences have one token, so attention averages nothing.


@pytest.fixture(scope="module")
def activations():
    """Inputs and outputs of each map of a new anGPT on random tokens, by module name."""
    torch.manual_seed(0)
    model = build(ModelConfig(architecture="angpt", vocab_size=4096, width=256, layers=4, context=8))
    norms = {}

    def record(name, head):
        def hook(_module, inputs, output):
            norms[name] = {"out": output, "in": [value for value in inputs if isinstance(value, torch.Tensor)]}
            if head:
                norms[name]["out"] = output.unflatten(-1, (-1, head))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (Linear, Residual)) and not name.startswith("lm_head"):
            module.register_forward_hook(record(name, 64 if name.endswith("qkv_proj") else None))
    with torch.no_grad():
        model(torch.randint(0, 4096, (2000, 1)))
    return norms


def average(x):
    return x.norm(dim=-1).mean().item()


def test_sublayer_inputs_hiddens_and_outputs_start_at_norm_one(activations):
    assert len(activations) == 4 * 7
    for name, norms in activations.items():
        if name.endswith(("up_proj", "gate_proj")):
            continue  # scaled by nu_act and the gate's scale; their product is checked below
        assert average(norms["out"]) == pytest.approx(1, rel=0.05), name
        for value in norms["in"]:
            attention_values = 2 if name.endswith("attention.out_proj") else 1  # four heads of norm 1
            assert average(value) == pytest.approx(attention_values, rel=0.05), name


def test_gate_starts_with_the_intended_variance(activations):
    z = activations["blocks.0.mlp.gate_proj"]["out"]
    assert z.std().item() == pytest.approx(0.5, rel=0.05)  # sqrt_width, the default


@pytest.mark.parametrize("gate_scale", ["none", "sqrt_width", "sqrt_mlp"])
def test_hidden_norm_is_one_whatever_the_gate_scale(gate_scale):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=16, width=256, layers=1, context=8, gate_scale=gate_scale)
    mlp = build(config).blocks[0].mlp
    seen = []
    mlp.down_proj.register_forward_hook(lambda _module, inputs, output: seen.extend([inputs[0], output]))
    with torch.no_grad():
        mlp(F.normalize(torch.randn(2000, 1, 256), dim=-1))
    assert [average(value) for value in seen] == pytest.approx([1, 1], rel=0.05)


def test_residual_stream_stays_near_norm_one_through_depth():
    torch.manual_seed(0)
    model = build(ModelConfig(vocab_size=512, width=256, layers=12, context=64))
    with torch.no_grad():
        assert average(model.hidden(torch.randint(0, 512, (8, 64)))) == pytest.approx(1, rel=0.05)


def test_residual_gradient_keeps_its_norm_through_depth():
    # Each update passes (1 - alpha) nu = 0.9986 of the gradient directly, and a little through the sublayer.
    torch.manual_seed(0)
    model = build(ModelConfig(vocab_size=512, width=256, layers=12, context=64))
    gradients = []
    for block in model.blocks:
        block.register_full_backward_hook(lambda _module, inputs, _outputs: gradients.append(average(inputs[0])))
    tokens = torch.randint(0, 512, (8, 65))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    last_to_first = gradients[-1] / gradients[0]
    assert len(gradients) == 12 and last_to_first == pytest.approx(1, rel=0.15)


def test_ngpt_residual_stream_has_norm_one_exactly():
    with torch.no_grad():
        hidden = stir(small("ngpt")).hidden(some_tokens())
    torch.testing.assert_close(hidden.norm(dim=-1), torch.ones(3, 24))


def test_ngpt_uses_the_absolute_value_of_alpha():
    model, tokens = stir(small("ngpt").double()), some_tokens(batch=1, length=7)
    surrogates = [value for name, value in model.named_parameters() if name.endswith("residual.alpha.value")]
    assert len(surrogates) == 6
    with torch.no_grad():
        for value in surrogates:
            value.abs_()
        logits, mean = model(tokens), mean_alpha(model)
        for value in surrogates:
            value[::2].neg_()
        torch.testing.assert_close(model(tokens), logits, rtol=0, atol=0)
        torch.testing.assert_close(reference_ngpt(model, tokens[0]), logits[0], rtol=1e-6, atol=1e-6)
    assert mean_alpha(model) == mean > 0.04
    assert torch.tensor(layer_alphas(model)).mean().item() == pytest.approx(mean.item())


def test_scaled_parameter_moves_at_the_chosen_speed():
    fast, slow = ScaledParameter(3, 0.05, 0.01), ScaledParameter(3, 0.05, 0.1)
    for parameter in (fast, slow):
        parameter.reset_parameters()
        torch.testing.assert_close(parameter(), torch.full((3,), 0.05))
        optimizer = torch.optim.Adam(parameter.parameters(), lr=0.001)
        parameter().sum().backward()
        optimizer.step()
    assert (0.05 - fast()).mean().item() == pytest.approx(0.001 * 0.05 / 0.01, rel=1e-4)
    assert (0.05 - slow()).mean().item() == pytest.approx(0.001 * 0.05 / 0.1, rel=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_precision_stays_half_and_close(architecture):
    model, tokens = small(architecture), some_tokens()
    with torch.no_grad():
        exact, half = model(tokens), model.bfloat16()(tokens)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=0.07 * exact.std().item() + 0.02)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("cast", ["autocast", "parameters"])  # as in sharded training
def test_the_attention_kernel_gets_half_precision_only(architecture, cast, monkeypatch):
    seen = []
    attention = functional.softmax_attention

    def spy(q, k, v, *options):
        seen.append((q.dtype, k.dtype, v.dtype))
        return attention(q, k, v, *options)

    monkeypatch.setattr(functional, "softmax_attention", spy)
    monkeypatch.setattr(cpu_attention, "is_supported", lambda q, k: False)
    model = small(architecture).to(torch.bfloat16 if cast == "parameters" else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast == "autocast"):
        model.loss(some_tokens(), some_tokens(seed=1)).backward()
    assert set(seen) == {(torch.bfloat16,) * 3} and len(seen) == 3
    if cast == "parameters":
        assert model.hidden(some_tokens()).dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_out_of_range_are_named(architecture):
    model = small(architecture)
    for tokens, parts in (
        (torch.tensor([[3, 61]]), (61,)),
        (torch.tensor([[3, -1]]), (-1, 61)),
        (some_tokens(length=25), (25, 24)),
    ):
        with pytest.raises(ValueError) as error:
            model(tokens)
        assert mentions(error.value, *parts)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"architecture": "gpt2"}, ("gpt2", *ARCHITECTURES)),
        ({"width": 100}, ("width", 100, "head_dim", 64, 128)),
        ({"layers": 0}, ("layers", 0)),
        ({"width": 64.0}, ("width", 64.0)),
        ({"rotary_fraction": 1.5}, ("rotary_fraction", 1.5)),
        ({"head_dim": 2, "rotary_fraction": 0.5}, ("rotary_fraction", 0.5, 2)),
        ({"alpha_init": -0.1}, ("alpha_init", -0.1)),
        ({"gate_scale": "sqrt"}, ("gate_scale", "sqrt", "sqrt_mlp", "sqrt_width", "none")),
        ({"architecture": "gpt+", "gate_scale": "none"}, ("gate_scale", "gpt+")),
        ({"logit_scale": "none"}, ("logit_scale", "none", "vector", "scalar")),
        ({"architecture": "ngpt", "logit_scale": "scalar"}, ("logit_scale", "ngpt")),
        ({"init_std": 0.1}, ("init_std", "angpt")),
        ({"architecture": "gpt", "dyt_alpha_init": 1.0}, ("dyt_alpha_init", "gpt")),
        ({"architecture": "dyt", "dyt_alpha_init": 0}, ("dyt_alpha_init", 0)),
        ({"ablation": "no-alpha"}, ("ablation", "no-alpha", "none", "constant-x0.5")),
        ({"architecture": "ngpt", "ablation": "strict"}, ("ablation", "ngpt")),
    ],
)
def test_impossible_configs_are_refused(settings, parts):
    with pytest.raises(ConfigError) as error:
        ModelConfig(**settings)
    assert mentions(error.value, *parts)


def test_presets():
    config = ModelConfig.preset("125m", architecture="ngpt", vocab_size=100, context=64)
    assert (config.width, config.layers, config.heads, config.context) == (512, 18, 8, 64)
    assert (config.architecture, config.vocab_size) == ("ngpt", 100)
    with pytest.raises(ConfigError) as error:
        ModelConfig.preset("giant")
    assert mentions(error.value, "giant", "pico", "nano", "32m")
    with pytest.raises(ConfigError) as error:
        ModelConfig.preset("nano", widht=3)
    assert mentions(error.value, "widht", "width")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 3
