"""Export of a checkpoint: a Hugging Face folder, with our code or in a standard architecture, or a GGUF file."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
import torch

from antransformer.data import Tokenizer
from antransformer.data.pad_token import PAD_TOKEN, with_pad_token
from antransformer.data.tokenizers import CONFIG_FILE
from antransformer.errors import CheckpointError, ConfigError, UsageError
from antransformer.extras import require
from antransformer.files import quoted, read_json
from antransformer.interop.formats import FORMATS
from antransformer.interop.import_hf import exported_name
from antransformer.interop.model_card import card
from antransformer.interop.new_folder import new_folder
from antransformer.interop.progress_bars import progress_bars_disabled
from antransformer.interop.register import register
from antransformer.interop.stock_export import check_form, export_gguf, write_stock_model
from antransformer.interop.stock_folder import write_json
from antransformer.interop.verification import Verification, reference, verify_folder
from antransformer.models.registry import get
from antransformer.training.checkpointing.checkpoint import Checkpoint, restore
from antransformer.training.run_folder import CHECKPOINTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from antransformer.interop.modeling_antransformer import AntransformerForCausalLM

SHARD_SIZE = "5GB"


def export(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    target: Path,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    summary: str | None = None,
    figures: Sequence[Path] = (),
    format: str = "native",
) -> Verification:
    """Write a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load, or a GGUF file.

    Args:
        checkpoint: verified checkpoint.
        tokenizer: tokenizer of its run.
        target: folder to create, which may exist if it is empty, or GGUF file. After an error it does not exist.
        dtype: dtype of the weights, one of ``FORMATS[format]``; None for the first of them.
        max_shard_size: maximum size of a weight file, such as 5GB or 200MB; None for 5GB. Not with gguf.
        summary: summary of the experiment that the run belongs to, for the model card.
        figures: image files for the model card, which are copied to the folder.
        format: one of ``FORMATS``.

    Returns:
        The comparison of the files with the checkpoint.

    Raises:
        MissingExtraError: transformers or gguf is not installed.
        UsageError: transformers is too old.
        CheckpointError: the model is an ablation, or has no such form.
        ConfigError: the target exists, cannot be created or is among the checkpoints, or the format, dtype or size is
            unknown.
        MachineError: the files cannot be written, or the exported model differs from the checkpoint.
    """
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    dtype = FORMATS[format][0] if dtype is None else dtype
    if dtype not in FORMATS[format]:
        raise ConfigError(f"dtype of format {format} must be one of {', '.join(FORMATS[format])}, got {dtype!r}")
    if format == "gguf" and max_shard_size is not None:
        raise ConfigError("max_shard_size is not an option of format gguf, which is one file: leave it out")
    max_shard_size = max_shard_size or SHARD_SIZE
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", max_shard_size):
        raise ConfigError(f"max_shard_size must be a size such as 5GB or 200MB, got {max_shard_size!r}")
    check_outside_checkpoints(checkpoint, target)
    if format == "gguf":
        return export_gguf(checkpoint, tokenizer, target, dtype)
    if format == "native":
        check_native(checkpoint)
    else:
        check_form(checkpoint, format)
        require("transformers", "hf")
    if Path(target).suffix == ".gguf":
        raise ConfigError(f"--out {quoted(target)} ends in .gguf, and format {format} is a folder: add --format gguf")
    with new_folder(target) as folder:
        name, images = Path(os.path.realpath(target)).name, [figure.name for figure in figures]
        rows = checkpoint.model.vocab_size if format == "native" else None
        library = transformers_tokenizer(tokenizer, checkpoint.model.context, rows)
        library.save_pretrained(folder)
        # transformers 5 writes the name of a class that transformers 4 and engines built on it do not have.
        settings = read_json(folder / CONFIG_FILE)
        write_json(folder / CONFIG_FILE, {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
        if format == "native":
            write_model(checkpoint, tokenizer, library.pad_token_id, folder, getattr(torch, dtype), max_shard_size)
            verification = verify_native(folder, checkpoint, dtype)
        else:
            verification = write_stock_model(checkpoint, tokenizer, folder, dtype, max_shard_size)
        make_readable(folder)
        page = card(checkpoint, tokenizer, name, format, dtype, str(verification), summary, images)
        for figure in figures:
            shutil.copyfile(figure, folder / figure.name)
        (folder / "README.md").write_text(page, encoding="utf-8")
    return verification


def check_outside_checkpoints(checkpoint: Checkpoint, target: Path) -> None:
    """Raise ConfigError if a target is among the checkpoints of a run, since training lists and deletes these."""
    folder = checkpoint.path.resolve().parent
    if folder.name == CHECKPOINTS and folder in Path(os.path.realpath(target)).parents:
        raise ConfigError(f"--out {quoted(target)} is among the checkpoints of a run: choose a path outside {folder}")


def write_model(
    checkpoint: Checkpoint, tokenizer: Tokenizer, pad_token: int, folder: Path, dtype: torch.dtype, max_shard_size: str
) -> None:
    """Write the weights, the configuration, the generation configuration and the code of the model."""
    model = transformers_model(checkpoint, tokenizer, dtype)
    model.config.pad_token_id = model.generation_config.pad_token_id = pad_token
    # The folder has a head and a base model, and save_pretrained adds only the class that it saves.
    model.config.auto_map = {"AutoModel": "modeling_antransformer.AntransformerModel"}
    # Logits of ids that the tokenizer does not have were never trained.
    unused = range(tokenizer.vocab_size, checkpoint.model.vocab_size)
    if unused:
        model.generation_config.suppress_tokens = list(unused)
    with progress_bars_disabled():
        model.save_pretrained(folder, max_shard_size=max_shard_size)


def verify_native(folder: Path, checkpoint: Checkpoint, dtype: str) -> Verification:
    """Load a written folder and compare its logits with the checkpoint's.

    Raises:
        MachineError: the error is NaN or too large.
    """
    model = restore(checkpoint, torch.device("cpu")).double()
    verification = verify_folder(folder, reference(model, checkpoint))
    verification.require_accurate(dtype)
    return verification


def make_readable(folder: Path) -> None:
    """Give weight files the permissions of config.json, since safetensors lets only their owner read them."""
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / "config.json").stat().st_mode)


def check_native(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint can become a transformers model, and register our classes.

    Raises:
        MissingExtraError: transformers is not installed.
        UsageError: transformers is too old.
        CheckpointError: the model is an ablation, or modeling_antransformer.py does not implement its architecture.
    """
    architecture, ablation = checkpoint.model.architecture, checkpoint.model.ablation
    if not get(architecture).hf_export:
        raise CheckpointError(
            f"{checkpoint.path}: architecture {architecture} cannot be exported or evaluated: "
            "modeling_antransformer.py does not implement it"
        )
    if ablation not in (None, "none"):
        raise CheckpointError(
            f"{checkpoint.path}: the ablation {ablation} cannot be exported or evaluated, only unablated models can"
        )
    require("transformers", "hf")
    try:
        register()
    except ImportError as error:
        hint = "pip install --upgrade 'antransformer[hf]'"
        raise UsageError(f"this version of transformers does not work, it may be too old ({error}): {hint}") from error


def transformers_model(
    checkpoint: Checkpoint, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32
) -> "AntransformerForCausalLM":
    """Return the model of a checkpoint as a transformers model, on the CPU; raises the errors of ``check_native``."""
    check_native(checkpoint)
    from antransformer.interop.configuration_antransformer import AntransformerConfig
    from antransformer.interop.modeling_antransformer import AntransformerForCausalLM

    end = tokenizer.end_of_text
    options = {name: value for name, value in asdict(checkpoint.model).items() if name != "ablation"}
    config = AntransformerConfig(**options, bos_token_id=end, eos_token_id=end, pad_token_id=end)
    with torch.device("meta"):  # no memory and no initialization: the weights are assigned below
        model = AntransformerForCausalLM(config)
    weights = restore(checkpoint, torch.device("cpu")).state_dict()
    names = model.state_dict()
    model.load_state_dict(
        {exported_name(name, names): weight.to(dtype) for name, weight in weights.items()}, assign=True
    )
    return model


def transformers_tokenizer(tokenizer: Tokenizer, context: int, rows: int | None = None) -> "PreTrainedTokenizerFast":
    """Return a transformers tokenizer with the same ids as ``tokenizer`` for every text.

    Special tokens in a text are encoded as plain text, and no tokens are added before or after it.

    Args:
        tokenizer: tokenizer of the run.
        context: maximum sequence length in tokens.
        rows: vocabulary size of the model, to have a pad token of its own as ``with_pad_token`` finds one. Without it,
            or if no id is free, the pad token is the end of text, which collators then leave out of the loss.
    """
    from transformers import PreTrainedTokenizerFast

    # A post-processor could add tokens around every text, which training data does not have.
    content = {**json.loads(tokenizer.to_json()), "post_processor": None}
    library = tokenizers.Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
    if rows is not None:
        library = with_pad_token(library, rows)
    end = tokenizer.end_of_text_token
    return PreTrainedTokenizerFast(
        tokenizer_object=library,
        bos_token=end,
        eos_token=end,
        pad_token=end if library.token_to_id(PAD_TOKEN) is None else PAD_TOKEN,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        padding_side="left",  # generation continues at the right end
        model_max_length=context,
    )
