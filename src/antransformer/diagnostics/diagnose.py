"""What a trained model does with norms: the appendix tables of arXiv:2505.22014, for any checkpoint, and a picture.

Norms of the residual stream on text and on a repeated token (table O.1), what blocks and sublayers do to the norm of
their input (table N.1), and how far the constant factors are from those that the measured norms ask for (table N.2).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antransformer import factors
from antransformer.data import Dataset, Tokenizer, eval_batches
from antransformer.diagnostics.probes import layer_alphas, length, row_norms, stream
from antransformer.errors import CheckpointError, ConfigError, DataError
from antransformer.functional import normalize, split_heads
from antransformer.models import Decoder, ModelConfig
from antransformer.models.angpt import AnGPT, Block, gate_scale
from antransformer.nn import Residual

REPEATS = 512  # as the paper's table O.1
REPEATED_IDS = 8
RANDOM_INPUTS = 4096
RANDOM_SEED = 250522014  # no run's seed: its weights would be drawn from the same numbers as the inputs
FORWARD_TOKENS = 4096  # of one forward pass, and at least one sequence
HISTOGRAM_BINS = 50  # about

# What the words of ``meaning`` stand for.
COMPACT = 4.0  # largest mean norm of the stream over the smallest
ACCURATE = 0.05  # error of a factor
CONCENTRATED = 0.2  # standard deviation of a norm over its mean; 32 random coordinates have 0.125
NEAR_BOUND = 0.95

# The factors by the name of their map; exact norms cancel all but the effective ones.
LEGEND = (
    "q, k, v: heads of the attention input; p: attention output; u, z: MLP up and gate; act: u * SiLU(z); d: MLP down; "
    "nu_A, nu_M: nu(alpha) of attention and MLP"
)
EFFECTIVE = ("z", "nu_A", "nu_M")
PROJECTIONS = {"p": "attention.out_proj", "u": "mlp.up_proj", "z": "mlp.gate_proj", "d": "mlp.down_proj"}
RESIDUALS = {"nu_A": "attention_residual", "nu_M": "mlp_residual"}


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over tokens."""

    mean: float
    std: float


@dataclass(frozen=True)
class FactorError:
    """One factor of one layer, beside what the measured norms ask for.

    Attributes:
        factor: the one in use.
        needed: the one that would bring the root mean square of the output's norm to where the theory wants it.
        error: factor / needed - 1, positive where the factor is too large.
        spread: standard deviation over mean of the output's norm relative to the input's; 0 where it concentrates.
    """

    factor: float
    needed: float
    error: float
    spread: float


@dataclass(frozen=True)
class Diagnosis:
    """All figures of one model; ``dataclasses.asdict`` makes JSON of them.

    Attributes:
        architecture: of the model.
        tokens: how many tokens of text were looked at.
        residual_norm: of ``text`` and ``repeated``, after the embedding and after each block.
        repeated_ids: the tokens that were repeated, each by itself: the most frequent ones of the text.
        repeated_length: how many times.
        norm_ratio: ||output|| / ||input|| of ``block``, ``attention`` and ``mlp`` on text, by layer. A sublayer's input
            is what it is given (behind a norm layer where there is one), its output is before any norm and residual.
        factors: by map (``LEGEND``), kind of input (``random``, ``text``) and layer; empty for a model without.
        alpha: mean residual step by layer, [attention's, MLP's]; None for a model without.
        alpha_start: what alpha was at initialisation.
        bound: ``at most 1``, ``exactly 1`` or ``none``, of the weight vectors.
        row_norm: of all weight vectors: ``mean``, ``min``, ``max``, ``near_bound`` (share at 0.95 or more), and a
            histogram as ``edges`` and ``counts``.
    """

    architecture: str
    tokens: int
    residual_norm: dict[str, list[Spread]]
    repeated_ids: list[int]
    repeated_length: int
    norm_ratio: dict[str, list[Spread]]
    factors: dict[str, dict[str, list[FactorError]]]
    alpha: list[list[float]] | None
    alpha_start: float | None
    bound: str
    row_norm: dict[str, Any]


class Moments:
    """Mean, root mean square and standard deviation of numbers that come in portions."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        """Take in one portion, of any shape."""
        values = values.cpu().double()
        self.count += values.numel()
        self.total += float(values.sum())
        self.squares += float(values.square().sum())

    def rms(self) -> float:
        """Root mean square."""
        return math.sqrt(self.squares / self.count)

    def spread(self) -> Spread:
        """Mean and standard deviation."""
        mean = self.total / self.count
        return Spread(mean, math.sqrt(max(0.0, self.squares / self.count - mean**2)))


Found = defaultdict[tuple[str, int], Moments]  # by what was measured, and layer


class Call(NamedTuple):
    """What a module was last called with, and what came of it."""

    inputs: tuple[Any, ...]
    output: Any


def text_tokens(dataset: Dataset, tokenizer: Tokenizer, config: ModelConfig, count: int) -> Tensor:
    """Sequences of the validation split, spread evenly over it: ids (at most count // context, context).

    Args:
        dataset: where the text is.
        tokenizer: the one that the model was trained with.
        config: of the model.
        count: how many tokens.

    Raises:
        ConfigError: count is less than one sequence.
        DataError: the data has another vocabulary, or no sequence is long enough.
    """
    if dataset.max_token >= config.vocab_size:
        raise DataError(
            f"{dataset.path}: token id {dataset.max_token} is outside the model's vocabulary of {config.vocab_size}: "
            "give --data that was prepared with the run's tokenizer"
        )
    if dataset.vocab_size != tokenizer.vocab_size:
        raise DataError(
            f"{dataset.path}: its tokenizer has {dataset.vocab_size:,} ids, the run's {tokenizer.vocab_size:,}: "
            "give --data that was prepared with the run's tokenizer"
        )
    if count < config.context:
        raise ConfigError(f"tokens must be at least one sequence of {config.context:,}, got {count:,}")
    windows = eval_batches(dataset.split("val"), config.context, batch_size=1, max_tokens=count)
    return torch.cat([tokens for tokens, _ in windows])


@torch.no_grad()
def diagnose(model: Decoder, tokens: Tensor) -> Diagnosis:
    """Measure a model; it is left as it was.

    Args:
        model: any architecture.
        tokens: ids (sequences, T) of text.

    Raises:
        CheckpointError: a weight is not finite.
    """
    if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
        raise CheckpointError("the model's weights are not finite: they are not those of a sound run")
    layers = range(len(model.blocks))
    tokens = tokens.to(model.embedding.weight.device)
    wanted = wanted_gains(model.config) if isinstance(model, AnGPT) else {}
    text = on_text(model, tokens, wanted)
    ids = torch.bincount(tokens.flatten()).argsort(descending=True, stable=True)[:REPEATED_IDS]
    repeated = ids.unsqueeze(1).expand(-1, min(REPEATS, model.config.context))
    return Diagnosis(
        architecture=model.config.architecture,
        tokens=tokens.numel(),
        residual_norm={
            "text": [text["residual", layer].spread() for layer in (-1, *layers)],
            "repeated": [Spread(float(x.mean()), float(x.std())) for x in map(length, stream(model, repeated))],
        },
        repeated_ids=ids.tolist(),
        repeated_length=repeated.shape[1],
        norm_ratio={name: [text[name, layer].spread() for layer in layers] for name in ("block", "attention", "mlp")},
        factors=factor_errors(model, wanted, {"random": on_random(model, wanted), "text": text}) if wanted else {},
        alpha=layer_alphas(model),
        alpha_start=model.config.alpha_init,
        bound=_bound(model),
        row_norm=_row_norm(model),
    )


def on_text(model: Decoder, tokens: Tensor, wanted: Mapping[str, float]) -> Found:
    """Norms of the stream (layer -1 is the embedding), norm ratios, and the gains of the maps, if some are wanted."""
    found: Found = defaultdict(Moments)
    for part in tokens.split(max(1, FORWARD_TOKENS // tokens.shape[1])):
        with record(model.blocks) as calls:
            for layer, x in enumerate(stream(model, part), start=-1):
                found["residual", layer].add(length(x))
                if layer < 0:
                    continue
                for name, module in (("block", ""), ("attention", "attention"), ("mlp", "mlp")):
                    found[name, layer].add(length(calls[module].output) / length(calls[module].inputs[0]))
                if wanted:
                    _add(found, layer, gains(model.blocks[layer], calls, calls["mlp.gate_proj"].output, wanted))
                calls.clear()
    return found


def on_random(model: Decoder, wanted: Mapping[str, float]) -> Found:
    """Gains of the maps on what the theory assumes: random directions, each map by itself, its weights as they are."""
    found: Found = defaultdict(Moments)
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    width, hidden = model.config.width, model.config.mlp_hidden

    def direction(size: int) -> Tensor:
        return normalize(torch.randn(RANDOM_INPUTS, size, generator=generator)).to(model.embedding.weight.device)

    for layer, block in enumerate(model.blocks):
        x = direction(width)
        inputs = {
            "attention.qkv_proj": (x,),
            "attention.out_proj": (direction(width),),
            "mlp.up_proj": (x,),
            "mlp.gate_proj": (x,),
            "mlp.down_proj": (direction(hidden),),
            "attention_residual": (x, direction(width)),
            "mlp_residual": (x, direction(width)),
        }
        calls = {name: Call(given, block.get_submodule(name)(*given)) for name, given in inputs.items()}
        z = (
            normalize(calls["mlp.gate_proj"].output) * wanted["z"]
        )  # the activation gets the norm that the gate should have
        _add(found, layer, gains(block, calls, z, wanted))
    return found


@contextmanager
def record(blocks: Iterable[nn.Module]) -> Iterator[dict[str, Call]]:
    """While entered, keeps the last call of each module in the blocks by its name in its block, "" for a block.

    Modules of the same name in two blocks share a place: clear it after each block.
    """
    calls: dict[str, Call] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls[name] = Call(inputs, output)

        return hook

    named = [item for block in blocks for item in block.named_modules()]
    handles = [module.register_forward_hook(keep(name)) for name, module in named]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def wanted_gains(config: ModelConfig) -> dict[str, float]:
    """||output|| / ||input|| that the theory wants of each map of anGPT with its factor.

    It is 1, unit norm in and unit norm out, but for what a constant is meant to change: nu_p, since the heads that come
    in have unit norm each, the gate's scale before SiLU, and nu_act, which rides on u and makes up
    for SiLU.
    """
    z = gate_scale(config)
    std = factors.linear(config.width, config.mlp_hidden) * z / math.sqrt(config.width)
    nu_act = factors.activation(F.silu, std=std)
    nu_p = math.sqrt(config.head_dim / config.width)
    return {"q": 1.0, "k": 1.0, "v": 1.0, "p": nu_p, "u": nu_act, "z": z, "act": 1 / nu_act, "d": 1.0}


def gains(
    block: nn.Module, calls: Mapping[str, Call], z: Tensor, wanted: Mapping[str, float]
) -> Iterator[tuple[str, Tensor]]:
    """||output|| of each map of a block of anGPT over what the theory wants, 1 where its factor is right, by token.

    For a residual update that is the norm that comes out if x and norm(y) are uncorrelated: 1 if x has norm 1.

    Args:
        block: the block.
        calls: of its modules.
        z: the gate, as the activation gets it.
        wanted: see ``wanted_gains``.
    """
    assert isinstance(block, Block)
    (x,), qkv = calls["attention.qkv_proj"]
    for name, head in zip("qkv", split_heads(qkv, block.attention.head_dim), strict=True):
        yield name, length(head) / (wanted[name] * length(x).unsqueeze(-1))
    for name, module in PROJECTIONS.items():
        (x,), y = calls[module]
        yield name, length(y) / (wanted[name] * length(x))
    u = calls["mlp.up_proj"].output
    yield "act", length(u * F.silu(z)) / (wanted["act"] * length(u))
    for name, residual in _residuals(block):
        (x, _), out = calls[RESIDUALS[name]]
        alpha = residual.alpha()
        nu = factors.residual(alpha)
        keep, move = ((1 - alpha) * nu).square().mean(), (alpha * nu).square().mean()
        yield name, length(out) / (keep * length(x).square() + move).sqrt()


def factor_errors(
    model: Decoder, wanted: Mapping[str, float], found: Mapping[str, Found]
) -> dict[str, dict[str, list[FactorError]]]:
    """The factors in use beside those that the gains ask for: by map, kind of input (that of ``found``) and layer."""
    in_use = [_factors_in_use(block, wanted) for block in model.blocks]
    return {
        name: {
            kind: [_factor_error(used[name], table[name, layer]) for layer, used in enumerate(in_use)]
            for kind, table in found.items()
        }
        for name in in_use[0]
    }


def mean_error(layers: Iterable[FactorError]) -> float:
    """Mean over layers of the error's size."""
    errors = [abs(layer.error) for layer in layers]
    return sum(errors) / len(errors)


def meaning(diagnosis: Diagnosis) -> list[str]:
    """What the figures say, in sentences."""
    sentences = [_stream_in_words(diagnosis)]
    if diagnosis.factors:
        sentences += _factors_in_words(diagnosis.factors)
    if diagnosis.alpha:
        layers = [value for layer in diagnosis.alpha for value in layer]
        sentences.append(
            f"The residual steps began at {diagnosis.alpha_start:.2f} and are now {min(layers):.2f} to "
            f"{max(layers):.2f}, by layer."
        )
    return [*sentences, _rows_in_words(diagnosis)]


def number(value: float, like: float | None = None) -> str:
    """A positive number with three significant digits and at most three decimals, or with as many as ``like`` has."""
    exponent = int(f"{like or value:.2e}".partition("e")[2])
    return f"{value:,.{min(max(2 - exponent, 0), 3)}f}"


def _add(found: Found, layer: int, figures: Iterable[tuple[str, Tensor]]) -> None:
    for name, values in figures:
        found[name, layer].add(values)


def _residuals(block: Block) -> list[tuple[str, Residual]]:
    """The interpolations of a block by the name of their factor; an ablation may have none."""
    both = [(name, block.get_submodule(module)) for name, module in RESIDUALS.items()]
    return [(name, module) for name, module in both if isinstance(module, Residual)]


def _factors_in_use(block: nn.Module, wanted: Mapping[str, float]) -> dict[str, float]:
    """By map; constants that u and z carry beside their own factor are taken out."""
    assert isinstance(block, Block)
    attention, mlp = block.attention, block.mlp
    qkv = attention.qkv_proj.factor
    found = {"q": qkv, "k": qkv, "v": qkv, "p": attention.out_proj.factor, "u": mlp.up_proj.factor / wanted["u"]}
    found |= {"z": mlp.gate_proj.factor / wanted["z"], "act": 1 / wanted["act"], "d": mlp.down_proj.factor}
    for name, residual in _residuals(block):
        x = normalize(torch.ones_like(block.mlp.gate_proj.weight[0]))
        found[name] = float((residual(x, x) / x).mean())  # between equal vectors only the factor is left to see
    return found


def _factor_error(factor: float, gain: Moments) -> FactorError:
    spread = gain.spread()
    return FactorError(factor, factor / gain.rms(), gain.rms() - 1, spread.std / spread.mean)


def _bound(model: Decoder) -> str:
    bounds = model.bounds()
    if not bounds:
        return "none"
    return "exactly 1" if all(bound.strict for bound in bounds) else "at most 1"


def _row_norm(model: Decoder) -> dict[str, Any]:
    rows = row_norms(model).float().cpu()
    low, high = float(rows.min()), float(rows.max())
    first, last = math.floor(10 * low), math.ceil(10 * high)
    bins = max(1, HISTOGRAM_BINS // max(1, last - first))  # in a tenth; each tenth is the middle of one
    edges = (torch.arange(first * bins, last * bins + 2) - 0.5) / (10 * bins)
    return {
        "mean": float(rows.mean()),
        "min": low,
        "max": high,
        "near_bound": float((rows >= NEAR_BOUND).float().mean()),
        "edges": edges.tolist(),
        "counts": torch.histogram(rows, edges).hist.int().tolist(),
    }


def _stream_in_words(diagnosis: Diagnosis) -> str:
    means = [spread.mean for spread in diagnosis.residual_norm["text"]]
    ratio = means[-1] / diagnosis.residual_norm["repeated"][-1].mean
    compact = max(means) / min(means) <= COMPACT and 1 / COMPACT <= ratio <= COMPACT
    return (
        f"The residual stream {'is' if compact else 'is not'} compact: its mean norm on text goes from "
        f"{number(means[0])} after the embedding to {number(means[-1])} after the last block, "
        f"{number(ratio)} times that on a repeated token."
    )


def _factors_in_words(by_map: Mapping[str, Mapping[str, list[FactorError]]]) -> list[str]:
    random = {name: mean_error(kinds["random"]) for name, kinds in by_map.items()}
    text = {name: mean_error(kinds["text"]) for name, kinds in by_map.items()}
    spread = {name: max(layer.spread for layer in kinds["random"]) for name, kinds in by_map.items()}
    outside = [name for name in by_map if random[name] > ACCURATE or spread[name] > CONCENTRATED]
    worst, widest, farthest = (max(found, key=found.__getitem__) for found in (random, spread, text))
    effective = [name for name in EFFECTIVE if name in text]
    harmful = max(effective, key=text.__getitem__)
    return [
        f"On random inputs the factors are within {random[worst]:.1%} of what the weights need (worst: {worst}), and "
        f"norms scatter by up to {spread[widest]:.0%} ({widest}): that norms concentrate, where the theory says, holds "
        f"for all{' but ' + ', '.join(outside) if outside else ''}.",
        f"On text the worst is {farthest}, off by {text[farthest]:.0%} on average over layers; among those that "
        f"no exact norm cancels, {', '.join(effective)}, it is {harmful}, off by {text[harmful]:.0%}.",
    ]


def _rows_in_words(diagnosis: Diagnosis) -> str:
    rows = diagnosis.row_norm
    if diagnosis.bound == "none":
        return f"Weight vectors have no bound: their norms lie between {number(rows['min'])} and {number(rows['max'])}."
    if diagnosis.bound == "exactly 1":
        return f"Weight vectors are held at norm 1, to within {max(rows['max'] - 1, 1 - rows['min']):.0e}."
    return (
        f"Weight vectors may not be longer than 1: their norms average {rows['mean']:.3f}, the shortest is "
        f"{rows['min']:.2f}, and {rows['near_bound']:.0%} are {NEAR_BOUND} or more."
    )
