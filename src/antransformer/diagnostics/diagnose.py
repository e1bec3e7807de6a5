"""Norms inside a trained model, as in the appendix tables of arXiv:2505.22014.

Norms of the residual stream on text and on a repeated token (table O.1), norm ratios of blocks and sublayers
(table N.1), and errors of the constant factors (table N.2).
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from antransformer.data import Dataset, Tokenizer, eval_batches
from antransformer.diagnostics.diagnosis import NEAR_BOUND, Diagnosis, Spread
from antransformer.diagnostics.factor_errors import expected_gains, factor_errors, measure_random, relative_gains
from antransformer.diagnostics.measurement import Moments, MomentsByLayer, record
from antransformer.diagnostics.probes import l2_norm, layer_alphas, residual_stream, row_norms
from antransformer.errors import CheckpointError, ConfigError, DataError
from antransformer.models import Decoder, ModelConfig
from antransformer.models.angpt import AnGPT

REPEATS = 512  # as in table O.1 of the paper
REPEATED_IDS = 8
FORWARD_TOKENS = 4096  # per forward pass, but at least one sequence
HISTOGRAM_BINS = 50  # approximate


def text_tokens(dataset: Dataset, tokenizer: Tokenizer, config: ModelConfig, count: int) -> Tensor:
    """Token ids from the validation split of each source, in sequences spread evenly over it.

    Args:
        dataset: prepared data.
        tokenizer: tokenizer of the model.
        config: config of the model.
        count: number of tokens.

    Returns:
        Token ids of shape (N, context), with N at most count // context, but one sequence or more of each source.

    Raises:
        ConfigError: count is less than one sequence.
        DataError: the data has another tokenizer, or no document is long enough.
    """
    if dataset.max_token >= config.vocab_size:
        raise DataError(
            f"{dataset.path}: token id {dataset.max_token} is outside the model's vocabulary of {config.vocab_size}: "
            "give --data that was prepared with the run's tokenizer"
        )
    if dataset.tokenizer().encoding_rules() != tokenizer.encoding_rules():
        raise DataError(
            f"{dataset.path}: its tokenizer differs from the run's: give --data that was prepared with the run's "
            "tokenizer"
        )
    if count < config.context:
        raise ConfigError(f"tokens must be at least one sequence of {config.context:,}, got {count:,}")
    rows = []
    for source, weight in zip(dataset.sources.values(), dataset.weights, strict=True):
        windows = eval_batches(source.split("val"), config.context, batch_size=1, max_tokens=int(count * weight))
        rows += [tokens for tokens, _ in windows]
    return torch.cat(rows)


@torch.no_grad()
def diagnose(model: Decoder, tokens: Tensor) -> Diagnosis:
    """Measure a model without changing it.

    Args:
        model: model of any architecture.
        tokens: token ids of text (N, T).

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
        raise CheckpointError("the model has NaN or infinite weights: its run has diverged or its file is damaged")
    layers = range(len(model.blocks))
    tokens = tokens.to(model.embedding.weight.device)
    expected = expected_gains(model.config) if isinstance(model, AnGPT) else {}
    text = _measure_text(model, tokens, expected)
    ids = torch.bincount(tokens.flatten()).argsort(descending=True, stable=True)[:REPEATED_IDS]
    repeated = ids.unsqueeze(1).expand(-1, min(REPEATS, model.config.context))
    norms = [l2_norm(x) for x in residual_stream(model, repeated)]
    gains = {"random": measure_random(model, expected), "text": text} if expected else {}
    return Diagnosis(
        architecture=model.config.architecture,
        tokens=tokens.numel(),
        residual_norm={
            "text": [text["residual", layer].spread() for layer in (-1, *layers)],
            "repeated": [Spread(float(norm.mean()), float(norm.std())) for norm in norms],
        },
        repeated_ids=ids.tolist(),
        repeated_length=repeated.shape[1],
        norm_ratio={name: [text[name, layer].spread() for layer in layers] for name in _parts(model)},
        factors=factor_errors(model, expected, gains) if gains else {},
        alpha=layer_alphas(model),
        alpha_start=model.config.alpha_init,
        bound=_bound(model),
        row_norm=_row_norm(model),
    )


def _parts(model: Decoder) -> dict[str, str]:
    """Parts of a block and the names of their modules; another package's blocks may not have them all."""
    return {"block": ""} | {name: name for name in ("attention", "mlp") if hasattr(model.blocks[0], name)}


def _measure_text(model: Decoder, tokens: Tensor, expected: Mapping[str, float]) -> MomentsByLayer:
    """Norms of the residual stream (layer -1 is the embedding), norm ratios, and relative gains of expected maps."""
    moments: MomentsByLayer = defaultdict(Moments)
    for batch in tokens.split(max(1, FORWARD_TOKENS // tokens.shape[1])):
        with record(model.blocks) as calls:
            for layer, x in enumerate(residual_stream(model, batch), start=-1):
                moments["residual", layer].add(l2_norm(x))
                if layer < 0:
                    continue
                for name, module in _parts(model).items():
                    moments[name, layer].add(l2_norm(calls[module].output) / l2_norm(calls[module].inputs[0]))
                if expected:
                    z = calls["mlp.gate_proj"].output
                    for name, values in relative_gains(model.blocks[layer], calls, z, expected):
                        moments[name, layer].add(values)
                calls.clear()  # the next block uses the same keys
    return moments


def _bound(model: Decoder) -> str:
    bounds = model.bounds()
    if not bounds:
        return "none"
    return "exactly 1" if all(bound.strict for bound in bounds) else "at most 1"


def _row_norm(model: Decoder) -> dict[str, Any]:
    rows = row_norms(model).float().cpu()
    low, high = float(rows.min()), float(rows.max())
    # Bins are centred on multiples of 0.1, so that norms of exactly 1 fall into the middle of a bin.
    first, last = math.floor(10 * low), math.ceil(10 * high)
    bins_per_tenth = max(1, HISTOGRAM_BINS // max(1, last - first))
    edges = (torch.arange(first * bins_per_tenth, last * bins_per_tenth + 2) - 0.5) / (10 * bins_per_tenth)
    return {
        "mean": float(rows.mean()),
        "min": low,
        "max": high,
        "near_bound": float((rows >= NEAR_BOUND).float().mean()),
        "edges": edges.tolist(),
        "counts": torch.histogram(rows, edges).hist.int().tolist(),
    }
