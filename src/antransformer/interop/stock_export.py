"""Export in a standard architecture: derive the weights, write them, and check what was written."""

import logging
import os
from pathlib import Path

import torch

from antransformer.data import Tokenizer
from antransformer.errors import CheckpointError, ConfigError, MachineError
from antransformer.extras import require
from antransformer.files import check_file_target
from antransformer.interop import gguf_writer
from antransformer.interop.exaone4 import exaone4
from antransformer.interop.gguf_tokenizer import gguf_tokenizer
from antransformer.interop.qwen3 import qwen3
from antransformer.interop.stock_folder import write_folder
from antransformer.interop.stock_weights import StockModel
from antransformer.interop.verification import Reference, Verification, reference, verify_folder, verify_gguf
from antransformer.lock import new_path
from antransformer.models.registry import get
from antransformer.training.checkpointing.checkpoint import Checkpoint, restore
from antransformer.training.run_folder import run_folder_of

LOG = logging.getLogger(__name__)

DERIVATIONS = {"exaone4": exaone4, "qwen3": qwen3}
FORMS = {"angpt": "exaone4", "gpt+": "qwen3"}  # architecture -> its standard architecture


def check_form(checkpoint: Checkpoint, format: str) -> None:
    """Check that a checkpoint can be exported as ``exaone4``, ``qwen3`` or ``gguf``.

    Raises:
        CheckpointError: the architecture has no such form, or is an ablation.
    """
    name, ablation = checkpoint.model.architecture, checkpoint.model.ablation
    form = FORMS.get(name)
    if ablation not in (None, "none"):
        raise CheckpointError(f"{checkpoint.path}: ablation {ablation}: only unablated models can be exported")
    if form and format in (form, "gguf"):
        return
    available = [*([form, "gguf"] if form else []), *(["native"] if get(name).hf_export else [])]
    advice = f"use --format {' or '.join(available)}" if available else "it cannot be exported"
    raise CheckpointError(f"{checkpoint.path}: architecture {name} has no {format} form: {advice}")


def stock_model(checkpoint: Checkpoint, float16: bool) -> tuple[StockModel, Reference]:
    """Return a checkpoint in its standard architecture, and its own logits; raises the errors of the derivations."""
    model = restore(checkpoint, torch.device("cpu")).double()
    derive = DERIVATIONS[FORMS[checkpoint.model.architecture]]
    stock = derive(model, str(checkpoint.path), float16)
    return stock, reference(model, checkpoint)


def write_stock_model(
    checkpoint: Checkpoint, tokenizer: Tokenizer, folder: Path, dtype: str, max_shard_size: str
) -> Verification:
    """Write weights and configurations of a checkpoint that ``check_form`` accepts, and check them.

    Raises:
        CheckpointError: as ``exaone4`` and ``qwen3``.
        MachineError: the written model differs from the checkpoint.
    """
    stock, expected = stock_model(checkpoint, dtype == "float16")
    write_folder(stock, tokenizer, folder, getattr(torch, dtype), max_shard_size)
    verification = verify_folder(folder, expected)
    verification.require_accurate(dtype)
    return verification


def export_gguf(checkpoint: Checkpoint, tokenizer: Tokenizer, file: Path, dtype: str) -> Verification:
    """Write a GGUF file and check it; arguments and errors as in ``export``."""
    check_form(checkpoint, "gguf")
    if file.suffix != ".gguf":
        raise ConfigError(f"--out {file}: the name of a GGUF file must end in .gguf")
    check_file_target("--out", file)
    if os.path.lexists(file):
        raise ConfigError(f"{file} exists: choose another --out")
    require("gguf", "gguf")
    where = str(checkpoint.path)
    gguf_writer.check_sizes(checkpoint.model, FORMS[checkpoint.model.architecture], dtype, where)
    vocabulary = gguf_tokenizer(tokenizer, checkpoint.model.vocab_size, where)
    if vocabulary.normalizes:
        LOG.warning("the tokenizer normalizes text to NFC, and llama.cpp does not: normalize prompts to NFC first")
    name = run_folder_of(checkpoint).name
    with new_path(file) as partial:
        stock, expected = stock_model(checkpoint, dtype in gguf_writer.FLOAT16_DTYPES)
        try:
            gguf_writer.write_gguf(stock, vocabulary, tokenizer.end_of_text, partial, name, dtype)
        except OSError as error:
            # Of a full disk numpy reports only the numbers of bytes.
            raise MachineError(f"{file} cannot be written: {error.strerror or f'is the disk full? {error}'}") from error
        verification = verify_gguf(partial, stock, tokenizer, expected)
        verification.require_accurate(dtype)
    return verification
