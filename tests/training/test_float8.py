"""FP8 linear layers: rounding, scales, and models that use them."""

import re

import pytest
import torch
import torch.nn.functional as F

from antransformer import functional
from antransformer.errors import ConfigError
from antransformer.models import ModelConfig, build
from antransformer.nn import Linear
from antransformer.training import float8
from antransformer.training.device import choose_precision

SIZES = {"vocab_size": 50, "width": 64, "layers": 2, "context": 16, "head_dim": 32}
ARCHITECTURES = ["angpt", "ngpt", "gpt+", "gpt", "ln-scaling", "dyt"]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rounded(x, scale, bits, largest):
    """Round normal numbers x / scale to a number of mantissa bits in float64, and scale them back."""
    step = torch.exp2(torch.floor(torch.log2((x.double() / scale).abs())) - bits)
    return ((x.double() / scale / step).round() * step).clamp(-largest, largest) * scale


def test_compress_rounds_and_clamps():
    x = random(1000) * 0.25
    x = x[x.abs() > 0.25 * 2**-6]  # the smallest normal number of e4m3 is 2^-6
    compressed, scale = float8.compress(x, torch.float8_e4m3fn, 0.25)
    torch.testing.assert_close(compressed.double() * scale, rounded(x, 0.25, 3, 448))
    compressed, scale = float8.compress(x, torch.float8_e5m2, 0.25)
    torch.testing.assert_close(compressed.double() * scale, rounded(x, 0.25, 2, 57344))
    outside = torch.tensor([-1e9, 1e9])
    assert float8.compress(outside, torch.float8_e4m3fn, 1.0)[0].tolist() == [-448, 448]
    assert float8.compress(outside, torch.float8_e5m2, 1.0)[0].tolist() == [-57344, 57344]


def test_dynamic_scale_uses_the_full_range():
    x = random(7, 9) * 1e-12
    compressed, scale = float8.compress(x, torch.float8_e4m3fn, None)
    assert compressed.double().abs().max() == 448
    torch.testing.assert_close(compressed.double() * scale, x.double(), rtol=0.07, atol=1e-16)
    zero, scale = float8.compress(torch.zeros(3), torch.float8_e4m3fn, None)
    assert (zero.float() * scale).tolist() == [0, 0, 0]


def model_of(architecture, **sizes):
    torch.manual_seed(0)
    return build(ModelConfig(architecture=architecture, **{**SIZES, **sizes}))


def converted(architecture, **sizes):
    model = model_of(architecture, **sizes)
    float8.convert(model, torch.device("cpu"))
    return model


def tokens(batch=4, length=17):
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model):
    data = tokens()
    loss = model.loss(data[:, :-1], data[:, 1:])
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_product_and_gradients_use_rounded_numbers(factor):
    module = Linear(64, 48, factor)
    module.__class__, module.scales = float8.StaticLinear, float8.unit_scales(64, *module.weight.shape)
    assert module.scales == (1 / 2, 1 / 8, 1 / 8)  # the last one for gradients of one token
    x, gradient = (
        functional.normalize(random(5, 3, 64)).requires_grad_(),
        functional.normalize(random(5, 3, 48, seed=1)) / 15,
    )
    y = module(x)
    y.backward(gradient)

    def compressed(value, dtype, scale):
        return float8.compress(value.detach(), dtype, scale)[0].double() * scale

    x8 = compressed(x, torch.float8_e4m3fn, 1 / 2)
    w8 = compressed(module.weight, torch.float8_e4m3fn, 1 / 8)
    g8 = compressed(gradient, torch.float8_e5m2, 1 / 8 / 15)
    torch.testing.assert_close(y.double(), factor * x8 @ w8.T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), factor * g8 @ w8, rtol=1e-5, atol=1e-7)
    expected = factor * g8.flatten(0, 1).T @ x8.flatten(0, 1)
    torch.testing.assert_close(module.weight.grad.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_simulation_equals_torchs_fp8_product(dtype):
    a = float8.compress(random(48, 32), torch.float8_e5m2, 1.0)[0]
    b = float8.compress(random(64, 32, seed=1), torch.float8_e4m3fn, 1.0)[0]
    for first, second in ((a, b.T), (b, a.T)):  # transposed as in forward and backward
        product, simulated = (
            multiply(first, second, 0.3, dtype) for multiply in (float8.scaled_product, float8.multiply)
        )
        assert product.dtype == simulated.dtype == dtype
        torch.testing.assert_close(product, simulated)


def test_constant_scales_fit_activations_weights_and_gradients(monkeypatch):
    ratios = []

    def compress(x, dtype, scale):
        ratios.append(x.double().square().mean().sqrt().item() / scale)
        return original(x, dtype, scale)

    original = float8.compress
    monkeypatch.setattr(float8, "compress", compress)
    loss_and_gradients(converted("angpt", width=128, context=64))
    inputs, weights, gradients = ratios[:20:2], ratios[1:20:2], ratios[20:]
    assert len(gradients) == 2 * 5
    assert all(0.7 < ratio < 1.5 for ratio in weights)  # apart from rounding to a power of two
    assert all(2**-6 < ratio < 1 for ratio in inputs)  # e4m3 ranges from 2^-6 to 2^8
    assert all(2**-8 < ratio < 2 for ratio in gradients)  # e5m2 ranges from 2^-14 to 2^15


@pytest.mark.parametrize("architecture", ["angpt", "ngpt"])
def test_the_scale_of_out_proj_fits_values_of_unit_norm_and_of_unit_heads(architecture):
    """Heads of nGPT share a norm of 1, so their elements have deviation 1 / sqrt(width)."""
    model = converted(architecture, width=256, head_dim=16)
    width = {"angpt": 16, "ngpt": 256}[architecture]
    for block in model.blocks:
        (out_proj,) = (module for name, module in block.named_modules() if name.endswith("out_proj"))
        assert out_proj.scales[0] == float8.HEADROOM / width**0.5


def test_the_scale_of_gradients_does_not_depend_on_the_micro_batch():
    data, gradients = tokens(), []
    for parts in (1, 4):
        model = model_of("angpt")
        float8.convert(model, torch.device("cpu"), batch_tokens=4 * 16)
        for part in data.chunk(parts):
            (model.loss(part[:, :-1], part[:, 1:]) / parts).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fp8_changes_loss_and_gradients_only_slightly(architecture):
    (loss, gradients), (plain_loss, plain) = (loss_and_gradients(make(architecture)) for make in (converted, model_of))
    assert loss.item() == pytest.approx(plain_loss.item(), rel=0.01) and loss != plain_loss
    for name, gradient in plain.items():
        if gradient.numel() > 1:
            assert F.cosine_similarity(gradients[name].flatten(), gradient.flatten(), 0) > 0.9, name


def test_only_linear_layers_of_blocks_are_converted():
    for architecture in ARCHITECTURES:
        plain, model = model_of(architecture), converted(architecture)
        changed = {name for name, module in model.named_modules() if hasattr(module, "scales")}
        changed |= {name for name, module in model.named_modules() if isinstance(module, float8.DynamicLinear)}
        parts = ("attention.qkv_proj", "attention.out_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")
        assert changed == {f"blocks.{index}.{part}" for index in range(2) for part in parts}
        for (name, value), (converted_name, converted_value) in zip(
            plain.state_dict().items(), model.state_dict().items(), strict=True
        ):
            assert name == converted_name and torch.equal(value, converted_value)
        model.reset_parameters()


def assert_refused(config, device, *parts):
    with pytest.raises(ConfigError) as error:
        float8.check(config, torch.device(device))
    for part in parts:
        assert re.search(rf"\b{re.escape(part)}\b", str(error.value)), part


def test_unsupported_devices_and_sizes_are_refused(monkeypatch):
    config = ModelConfig(architecture="angpt", **SIZES)
    assert_refused(config, "mps", "fp8", "mps", "bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert_refused(config, "cuda:1", "fp8", "8.9", "cuda:1", "bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    float8.check(config, torch.device("cuda"))
    for name, size in (("head_dim", 8), ("context", 20)):
        assert_refused(ModelConfig(architecture="angpt", **{**SIZES, name: size}), "cpu", "fp8", name, "16", str(size))
    assert choose_precision("fp8", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize("kind", [float8.StaticLinear, float8.DynamicLinear])
def test_a_bias_does_not_promote_the_output(kind):
    layer = Linear(32, 16, bias=True) if kind is float8.StaticLinear else torch.nn.Linear(32, 16)
    layer.__class__ = kind
    if kind is float8.StaticLinear:
        layer.scales = float8.unit_scales(32, 16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(16, 32))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.bias.grad.dtype == torch.float32
