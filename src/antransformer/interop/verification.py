"""Check of exported models: an engine loads the files, and its logits are compared with the checkpoint's."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from antransformer.data import Dataset, Tokenizer
from antransformer.data.mixture_spec import parse_mixture
from antransformer.data.stdlib import is_prepared, open_data
from antransformer.errors import CheckpointError, MachineError, MissingExtraError, UsageError
from antransformer.extras import require
from antransformer.interop.gguf_writer import tensor_name
from antransformer.interop.llama_cpp import next_token_log_probabilities, start_server, tokenize
from antransformer.interop.progress_bars import progress_bars_disabled
from antransformer.interop.stock_weights import StockModel
from antransformer.models import Decoder
from antransformer.training.checkpointing.checkpoint import Checkpoint
from antransformer.training.run_folder import run_folder_of, saved_settings

# Texts on which tokenizers differ most easily: Unicode, code, runs of white space, and spelled-out special tokens.
HARD_TEXTS = (
    " na\u00efve \u65e5\u672c \U0001f389!\r\n\t x's 'm .\x00",
    "a <|endoftext|> b<|endoftext|>",
    "def f(x):\n        return x  # 12345678\n\n\n    y\t\t= 3.14e-10  ",
    "I'LL we'Ve DON'T can't \u02bcs \n\n \n  \n",
    "\u0967\u0968\u0969 \u0663\u0664 \u00bd \u2167 \ufb01 \ud55c\uad6d \u0e44\u0e17\u0e22",
    "\u00a0\u2003\u3000x\u0085y\u2028z \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    " " * 60 + "x" * 300,
)
ROWS, LENGTH = 4, 128  # sequences of random ids and as many of held-out text, and their length
# Largest error as a fraction of the largest logit, by dtype of the weights. Right exports in half precision differed by
# 0.09 at most, with random weights and small widths. 4 bits can change a small model completely.
TOLERANCES = {"float32": 1e-3, "f32": 1e-3, "q4_0": math.inf}
HALF_TOLERANCE = 0.3  # of all others


@dataclass(frozen=True)
class Verification:
    """Comparison of an export with its checkpoint.

    Attributes:
        engine: name of the program that loaded the files, or None if only the tensors were read back.
        predictions: number of next-token predictions compared, or of tensors.
        error: worst error relative to the largest logit; of tensors, relative to the largest weight of each.
        agreement: share of predictions with the same most likely token.
    """

    engine: str | None
    predictions: int
    error: float
    agreement: float

    def __str__(self) -> str:
        """Return one line for the terminal."""
        if self.engine is None:
            return (
                f"no engine checked the file, since xllamacpp is not installed; {self.predictions} tensors read back, "
                f"largest error {self.error:.1e} of the largest weight"
            )
        return (
            f"checked with {self.engine} on {self.predictions:,} predictions: largest error {self.error:.1e} of the "
            f"largest logit, same most likely token in {self.agreement:.2%}"
        )

    def require_accurate(self, dtype: str) -> None:
        """Raise MachineError if the error is NaN or above the tolerance of the dtype of the weights."""
        if not math.isfinite(self.error) or self.error > TOLERANCES.get(dtype, HALF_TOLERANCE):
            raise MachineError(
                f"the exported model differs from the checkpoint ({self}); nothing was written: use another "
                "--format or --dtype, and report this as a bug"
            )


@dataclass(frozen=True)
class Reference:
    """Token ids (rows, T) and the logits (rows, T, V) of the checkpoint for them, in float64."""

    tokens: Tensor
    logits: Tensor


@torch.no_grad()
def reference(model: Decoder, checkpoint: Checkpoint) -> Reference:
    """Compute the logits of a float64 model on random ids, and on held-out text where the run's data is present."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (ROWS, min(LENGTH, config.context)), generator=generator)
    text = held_out(checkpoint, tokens.numel())
    if text is not None:
        tokens = torch.cat([tokens, text.view_as(tokens)])
    return Reference(tokens, model(tokens))


def held_out(checkpoint: Checkpoint, count: int) -> Tensor | None:
    """Return the first ids [count] of the validation data of a run, or None if they are not at hand."""
    try:
        data = saved_settings(run_folder_of(checkpoint)).get("data")
        source = parse_mixture(str(data))[0].source
        dataset = open_data(source, verify=False) if is_prepared(source) else Dataset.open(source, verify=False)
        ids = dataset.split("val").arrays[0][:count]
    except (UsageError, OSError):
        return None
    tokens = torch.from_numpy(ids.astype("int64"))
    return tokens if len(tokens) == count and int(tokens.max()) < checkpoint.model.vocab_size else None


@torch.no_grad()
def verify_folder(folder: Path, expected: Reference) -> Verification:
    """Load a folder with transformers and compare all logits."""
    from transformers import AutoModelForCausalLM

    with progress_bars_disabled():
        model = AutoModelForCausalLM.from_pretrained(folder)
    logits = model(expected.tokens, use_cache=False).logits.double()
    error = (logits - expected.logits).abs().max() / expected.logits.abs().max()
    agreement = (logits.argmax(-1) == expected.logits.argmax(-1)).double().mean()
    return Verification("transformers", expected.tokens.numel(), float(error), float(agreement))


def verify_gguf(file: Path, stock: StockModel, tokenizer: Tokenizer, expected: Reference) -> Verification:
    """Load a file with llama.cpp and compare ids and log-probabilities; without llama.cpp, read the tensors back.

    Raises:
        CheckpointError: llama.cpp gives a text other ids.
        MachineError: llama.cpp cannot load the file.
    """
    try:
        require("xllamacpp", "serve")
    except MissingExtraError:
        return read_back(file, stock)
    server, worst, equal, prompts = start_server(file, exact=True), 0.0, 0, 0
    for text in HARD_TEXTS:
        if tokenize(server, text) != tokenizer.encode(text):
            raise CheckpointError(f"llama.cpp gives the text {text!r} other ids than tokenizer {tokenizer.name}")
    [printable] = tokenizer.encode("a")
    # llama.cpp takes at most context - 1 tokens.
    for row, logits in zip(expected.tokens, expected.logits.log_softmax(-1), strict=True):
        for length in sorted({len(row) // 8 or 1, len(row) // 2 or 1, max(1, len(row) - 1)}):
            ids, values = next_token_log_probabilities(
                server, row[:length].tolist(), stock.config.vocab_size, printable
            )
            errors = (values - logits[length - 1, ids]).abs()
            worst = max(worst, float(errors.max())) if errors.isfinite().all() else math.nan
            equal += int(ids[0] == logits[length - 1].argmax())
            prompts += 1
    return Verification("llama.cpp", prompts, worst / float(expected.logits.abs().max()), equal / prompts)


def read_back(file: Path, stock: StockModel) -> Verification:
    """Compare the tensors in a file with the weights that it was written from."""
    gguf = require("gguf", "gguf")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    worst = 0.0
    for key, weight in stock.weights.items():
        tensor = stored[tensor_name(key, stock.layout)]
        values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).view_as(weight)
        worst = max(worst, float((values - weight).abs().max() / weight.abs().max().clamp_min(1e-30)))
    return Verification(None, len(stock.weights), worst, 1.0)
