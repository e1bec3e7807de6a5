import doctest
import math
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import antransformer
from antransformer import derive, factors
from antransformer.blocks import EncoderBlock
from antransformer.errors import ConfigError, MissingExtraError
from antransformer.nn import MLP, Attention


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Layer(nn.Module):
    """A block that mixes modules and functional calls."""

    def __init__(self, width=256, hidden=1024, inplace=False):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.act = nn.ReLU(inplace=inplace)
        self.down = nn.Linear(hidden, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, *, gain=1.0):
        y = self.down(self.act(self.up(self.norm(x)) * gain))
        return x + self.drop(F.gelu(y))


def torch_layer(width=256, **more):
    return nn.TransformerEncoderLayer(width, 4, 4 * width, activation="gelu", batch_first=True, **more)


def test_rows_agree_with_a_computation_by_hand():
    layer, x = Layer(), torch.randn(20, 30, 256) + 0.5
    rows = {(row.name, row.kind): row for row in derive(layer, x).rows}
    assert list(rows) == [
        ("up", "linear"), ("act", "relu"), ("down", "linear"), ("Layer", "gelu"), ("Layer", "residual")
    ]  # fmt: skip
    layer.eval()
    with torch.no_grad():
        normed = layer.norm(x)
        hidden = layer.up(normed)
        active = F.relu(hidden)
        y = F.gelu(layer.down(active))
        weight = layer.down.weight / layer.down.weight.square().sum(1).mean().sqrt()
        unit = F.normalize(active, dim=-1)
        gain = (unit @ weight.T).norm(dim=-1).flatten()
        sides = (F.normalize(x, dim=-1) + F.normalize(y, dim=-1)).norm(dim=-1).flatten()
    down, act, residual = rows["down", "linear"], rows["act", "relu"], rows["Layer", "residual"]
    assert down.predicted == 2.0
    assert down.data == pytest.approx(gain.square().mean().rsqrt().item(), rel=1e-4)
    assert down.data_scatter == pytest.approx((gain.std() / gain.mean()).item(), rel=1e-2)
    assert down.correlation == pytest.approx(unit.flatten(0, 1).mean(0).square().sum().item(), rel=1e-4)
    std = hidden.square().mean().sqrt().item()
    assert act.predicted == pytest.approx(math.sqrt(2) / std, rel=1e-4)
    assert act.data == pytest.approx(math.sqrt(1024) / active.square().sum(-1).mean().sqrt().item(), rel=1e-4)
    assert residual.predicted == pytest.approx(1 / math.sqrt(2))
    assert residual.data == pytest.approx(sides.square().mean().rsqrt().item(), rel=1e-4)
    assert residual.correlation == pytest.approx(F.cosine_similarity(x, y, dim=-1).mean().item(), abs=1e-5)


def test_predicted_factors_hold_on_random_inputs_of_a_wide_model():
    rows = derive(nn.Sequential(torch_layer(), torch_layer(norm_first=True)), torch.randn(16, 20, 256)).rows
    assert [row.kind for row in rows[:7]] == ["linear", "attention", "linear", "residual", "linear", "gelu", "linear"]
    assert len(rows) == 16
    for row in rows:
        if row.kind != "attention":
            assert row.random == pytest.approx(row.predicted, rel=0.01)
            assert 0.01 < row.random_scatter < 0.06
            assert row.data == pytest.approx(row.predicted, rel=0.1)


def test_a_wide_model_gets_no_warnings_and_a_narrow_one_does(capsys):
    wide = derive(torch_layer(), torch.randn(16, 20, 256))
    assert wide.warnings == []
    assert capsys.readouterr().out == f"{wide}\n"
    assert len(str(wide).splitlines()) == 1 + len(wide.rows) + 2  # one line instead of warnings
    narrow = derive(torch_layer(16), torch.randn(16, 20, 16))
    scatter = {row.name: row.random_scatter for row in narrow.rows}["linear2"]
    assert any(all(word in text for word in ("linear2", "16", f"{scatter:.0%}")) for text in narrow.warnings)
    assert capsys.readouterr().out == f"{narrow}\n"
    assert str(narrow).splitlines()[-len(narrow.warnings) :] == narrow.warnings


def test_correlated_inputs_are_named():
    linear = nn.Linear(256, 256)
    with torch.no_grad():
        linear.weight[:, 0] *= 3  # larger in the common direction of the inputs
    offset = torch.zeros(256)
    offset[0] = 20
    found = derive(linear, torch.randn(400, 256) + offset)
    (warning,), (row,) = found.warnings, found.rows
    assert f"{row.predicted / row.data - 1:.0%}" in warning  # by how much the output is too large
    assert 0.6 < row.correlation < 0.7 and f"{row.correlation:.0%}" in warning
    with torch.no_grad():
        linear.weight[:, 0] *= 0.1
    found = derive(linear, torch.randn(400, 256) + offset)
    (opposite,), (row,) = found.warnings, found.rows
    assert row.predicted < row.data and f"{1 - row.predicted / row.data:.0%}" in opposite
    assert re.sub(r"\d+", "", opposite) != re.sub(r"\d+", "", warning)  # too small differs from too large
    with torch.no_grad():
        linear.weight[:, 0] *= 10
    found = derive(linear, torch.randn(400, 256) * (1 + offset))
    (warning,), (row,) = found.warnings, found.rows
    assert re.findall(r"[\d.]+%", warning) == [f"{row.predicted / row.data - 1:.0%}"]


class Echo(nn.Module):
    def forward(self, x):
        return x + (0.5 * x).clone()


def test_einsum_is_a_product_and_a_mask_is_no_residual():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 128))

        def forward(self, x):
            scores = x @ x.transpose(-1, -2)
            scores = scores + torch.full(scores.shape, -math.inf).triu(1)
            return torch.einsum("btd,df->btf", scores.softmax(-1) @ x, self.weight)

    rows = derive(Mixer(), torch.randn(4, 32, 64)).rows
    assert [row.kind for row in rows] == ["attention", "linear"]
    assert rows[1].predicted == factors.linear(64, 128)


def test_correlated_sides_of_a_residual_are_named():
    (row,) = (found := derive(Echo(), torch.randn(100, 256))).rows
    assert (row.data, row.correlation) == pytest.approx((0.5, 1))
    (warning,) = found.warnings
    assert "Echo" in warning and "+1.00" in warning


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_measured_between_dense_and_sparse(fused):
    class Attend(nn.Module):
        def forward(self, q, k, causal=False):
            if fused:
                return F.scaled_dot_product_attention(q, k, k, is_causal=causal)
            scores = q @ k.transpose(-1, -2) / 8
            mask = torch.full(scores.shape[-2:], -math.inf if causal else 0.0).triu(1)
            return (scores + mask).softmax(-1)

    k = torch.randn(8, 4, 32, 64)
    (row,) = derive(Attend(), (torch.zeros_like(k), k)).rows
    assert (row.kind, row.name, row.width) == ("attention", "Attend", 32)
    assert (row.predicted, row.data, row.data_scatter) == pytest.approx((math.sqrt(32), math.sqrt(32), 0), abs=1e-4)
    causal = derive(Attend(), (torch.zeros_like(k), k, True))
    mean = sum(1 / factors.attention(keys) ** 2 for keys in range(1, 33)) / 32
    assert causal.rows[0].predicted == causal.rows[0].data == pytest.approx(mean**-0.5)
    assert causal.warnings == []
    sparse = derive(Attend(), (100 * k, k))
    assert sparse.rows[0].data == pytest.approx(1, abs=0.1) and sparse.rows[0].correlation < 0.05
    (warning,) = sparse.warnings
    assert "Attend" in warning and re.search(r"\b3%.*\b32\b", warning)
    assert f"{sparse.rows[0].predicted / sparse.rows[0].data:.1f}" in warning


@pytest.mark.parametrize("inplace", [False, True])
def test_the_model_is_not_changed(inplace):
    layer, x = Layer(inplace=inplace), torch.randn(4, 30, 256)
    layer.norm.eval()
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in layer.state_dict().items()}
    inputs = x.clone()
    found = derive(layer, x)
    assert [row.kind for row in found.rows] == ["linear", "relu", "linear", "gelu", "residual"]
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, inputs)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert [part.training for part in layer.modules()] == [True, False, True, True, True, True]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in layer.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    assert layer(x).grad_fn is not None


def test_named_arguments_and_a_module_that_is_called_twice():
    layer = Layer()
    twice = derive(nn.Sequential(layer, layer), torch.randn(50, 256)).rows
    assert [row.name for row in twice][::5] == ["0.up", "0.up #2"]
    by_name = derive(layer, {"x": torch.randn(50, 256), "gain": 3.0}).rows
    assert by_name[1].predicted == pytest.approx(twice[1].predicted / 3, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_our_own_blocks_and_other_dtypes(dtype):
    block = EncoderBlock(Attention(256, 4), MLP(256)).to(dtype)
    found = derive(block, torch.randn(8, 20, 256, dtype=dtype))
    predicted = {row.name: row.predicted for row in found.rows if row.kind == "linear"}
    assert predicted.keys() == {
        name.removesuffix(".weight") for name, value in block.named_parameters() if value.ndim > 1
    }
    assert predicted["mlp.down_proj"] == 2.0


def test_a_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    rows = derive(transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(0, 99, (8, 32))}).rows
    kinds = [row.kind for row in rows]
    assert {kind: kinds.count(kind) for kind in kinds} == {"linear": 15, "attention": 2, "residual": 4, "silu": 2}
    assert max(abs(row.predicted / row.data - 1) for row in rows) < 0.1


def test_figure_and_errors(tmp_path, monkeypatch):
    derive(Layer(), torch.randn(50, 256), figure=tmp_path / "derived.png")
    assert (tmp_path / "derived.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"'antransformer\[plots\]'"):
        derive(Layer(), torch.randn(50, 256), figure=tmp_path / "derived.png")
    with pytest.raises(ConfigError, match="LayerNorm"):
        derive(nn.LayerNorm(8), torch.randn(4, 8))
    for batch in (torch.full((50, 256), torch.nan), torch.zeros(0, 256)):
        with pytest.raises(ConfigError, match="Linear"):
            derive(nn.Linear(256, 256), batch)
    with pytest.raises(ConfigError, match=r"\.png"):
        derive(Layer(), torch.randn(50, 256), figure=tmp_path / "derived.doc")
    with pytest.raises(TypeError, match="int"):
        derive(3, torch.randn(4, 8))


def test_worked_example():
    result = doctest.testmod(sys.modules["antransformer.derive"])
    assert result.attempted and not result.failed
    assert antransformer.derive is derive
