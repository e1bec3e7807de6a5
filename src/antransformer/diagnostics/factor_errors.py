"""Errors of anGPT's constant factors, measured from the norms that its maps produce (arXiv:2505.22014, table N.2).

The theory assigns each map an expected gain ||output|| / ||input||. A factor is correct if the measured gain, as root
mean square over inputs, equals the expected one.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antransformer import factors
from antransformer.diagnostics.diagnosis import FactorError
from antransformer.diagnostics.measurement import Call, Moments, MomentsByLayer
from antransformer.diagnostics.probes import l2_norm
from antransformer.functional import normalize, split_heads
from antransformer.models import Decoder, ModelConfig
from antransformer.models.angpt import Block, gate_scale
from antransformer.nn import Residual

RANDOM_INPUTS = 4096
RANDOM_SEED = 250522014  # differs from the seeds of runs, whose weights would otherwise equal the inputs

PROJECTIONS = {"p": "attention.out_proj", "u": "mlp.up_proj", "z": "mlp.gate_proj", "d": "mlp.down_proj"}
RESIDUALS = {"nu_A": "attention_residual", "nu_M": "mlp_residual"}


def expected_gains(config: ModelConfig) -> dict[str, float]:
    """Expected gain ||output|| / ||input|| of each map of anGPT, factor included.

    The gain is 1 except for three maps. The attention output (p) gets heads of unit norm each, so its input has norm
    sqrt(heads). The gate (z) is scaled before SiLU. The up projection (u) carries the
    constant nu_act, which compensates SiLU.
    """
    z = gate_scale(config)
    std = factors.linear(config.width, config.mlp_hidden) * z / math.sqrt(config.width)
    nu_act = factors.activation(F.silu, std=std)
    nu_p = math.sqrt(config.head_dim / config.width)
    return {"q": 1.0, "k": 1.0, "v": 1.0, "p": nu_p, "u": nu_act, "z": z, "act": 1 / nu_act, "d": 1.0}


def relative_gains(
    block: nn.Module, calls: Mapping[str, Call], z: Tensor, expected: Mapping[str, float]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each map of an anGPT block and its gain over the expected one, per token.

    A relative gain of 1 means that the factor is correct. For a residual update, the expected output norm is that for
    uncorrelated x and normalized sublayer output: 1 if x has norm 1.

    Args:
        block: block of anGPT.
        calls: last calls of the modules in the block.
        z: gate as the activation function receives it.
        expected: result of ``expected_gains``.
    """
    assert isinstance(block, Block)
    (x,), qkv = calls["attention.qkv_proj"]
    for name, head in zip("qkv", split_heads(qkv, block.attention.head_dim), strict=True):
        yield name, l2_norm(head) / (expected[name] * l2_norm(x).unsqueeze(-1))
    for name, module in PROJECTIONS.items():
        (x,), y = calls[module]
        yield name, l2_norm(y) / (expected[name] * l2_norm(x))
    u = calls["mlp.up_proj"].output
    yield "act", l2_norm(u * F.silu(z)) / (expected["act"] * l2_norm(u))
    for name, residual in _residuals(block):
        (x, _), out = calls[RESIDUALS[name]]
        alpha = residual.alpha()
        nu = factors.residual(alpha)
        keep, move = ((1 - alpha) * nu).square().mean(), (alpha * nu).square().mean()
        yield name, l2_norm(out) / (keep * l2_norm(x).square() + move).sqrt()


def measure_random(model: Decoder, expected: Mapping[str, float]) -> MomentsByLayer:
    """Relative gains under the assumptions of the theory: every map gets its own random directions as input."""
    moments: MomentsByLayer = defaultdict(Moments)
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    width, hidden = model.config.width, model.config.mlp_hidden

    def directions(size: int) -> Tensor:
        return normalize(torch.randn(RANDOM_INPUTS, size, generator=generator)).to(model.embedding.weight.device)

    for layer, block in enumerate(model.blocks):
        x = directions(width)
        inputs = {
            "attention.qkv_proj": (x,),
            "attention.out_proj": (directions(width),),
            "mlp.up_proj": (x,),
            "mlp.gate_proj": (x,),
            "mlp.down_proj": (directions(hidden),),
            "attention_residual": (x, directions(width)),
            "mlp_residual": (x, directions(width)),
        }
        calls = {name: Call(arguments, block.get_submodule(name)(*arguments)) for name, arguments in inputs.items()}
        # A wrong factor of the gate must not count as an error of the activation, so the gate gets its expected norm.
        z = normalize(calls["mlp.gate_proj"].output) * expected["z"]
        for name, values in relative_gains(block, calls, z, expected):
            moments[name, layer].add(values)
    return moments


def factor_errors(
    model: Decoder, expected: Mapping[str, float], gains: Mapping[str, MomentsByLayer]
) -> dict[str, dict[str, list[FactorError]]]:
    """Errors of all factors, by map, kind of input (the keys of ``gains``) and layer."""
    layers = [_factors_in_use(block, expected) for block in model.blocks]
    return {
        name: {
            kind: [_factor_error(in_use[name], moments[name, layer]) for layer, in_use in enumerate(layers)]
            for kind, moments in gains.items()
        }
        for name in layers[0]
    }


def _residuals(block: Block) -> list[tuple[str, Residual]]:
    """Residual interpolations of a block by the name of their factor; some ablations have none."""
    modules = [(name, block.get_submodule(module)) for name, module in RESIDUALS.items()]
    return [(name, module) for name, module in modules if isinstance(module, Residual)]


def _factors_in_use(block: nn.Module, expected: Mapping[str, float]) -> dict[str, float]:
    """Factors of a block by map, without the constants that u and z carry in addition to their own factor."""
    assert isinstance(block, Block)
    attention, mlp = block.attention, block.mlp
    qkv = attention.qkv_proj.factor
    in_use = {"q": qkv, "k": qkv, "v": qkv, "p": attention.out_proj.factor, "u": mlp.up_proj.factor / expected["u"]}
    in_use |= {"z": mlp.gate_proj.factor / expected["z"], "act": 1 / expected["act"], "d": mlp.down_proj.factor}
    for name, residual in _residuals(block):
        x = normalize(torch.ones_like(block.mlp.gate_proj.weight[0]))
        in_use[name] = float((residual(x, x) / x).mean())  # interpolating equal vectors leaves only the factor
    return in_use


def _factor_error(factor: float, gain: Moments) -> FactorError:
    spread = gain.spread()
    return FactorError(factor, factor / gain.rms(), gain.rms() - 1, spread.std / spread.mean)
