"""Export of a checkpoint to a Hugging Face folder: weights, configuration, code, tokenizer and model card."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
import torch
from safetensors import SafetensorError

from antransformer.data import Tokenizer
from antransformer.errors import CheckpointError, ConfigError, MachineError, UsageError
from antransformer.extras import require
from antransformer.interop.model_card import card
from antransformer.interop.register import register
from antransformer.models.registry import get
from antransformer.training.checkpointing.checkpoint import Checkpoint, restore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from antransformer.interop.modeling_antransformer import AntransformerForCausalLM

DTYPES = ("float32", "bfloat16", "float16")
SHARD_SIZE = "5GB"


def export(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    folder: Path,
    dtype: str = "float32",
    max_shard_size: str = SHARD_SIZE,
    summary: str | None = None,
    figures: Sequence[Path] = (),
) -> None:
    """Write a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load.

    Args:
        checkpoint: verified checkpoint.
        tokenizer: tokenizer of its run.
        folder: folder to create; it may exist if it is empty. After an error it does not exist.
        dtype: dtype of the weights, one of ``DTYPES``.
        max_shard_size: maximum size of a weight file, such as 5GB or 200MB.
        summary: summary of the experiment that the run belongs to, for the model card.
        figures: image files for the model card, which are copied to the folder.

    Raises:
        MissingExtraError: transformers is not installed.
        UsageError: transformers is too old.
        CheckpointError: the model is an ablation.
        ConfigError: the folder is not empty or cannot be created, or the dtype or size is unknown.
        MachineError: the files cannot be written.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", max_shard_size):
        raise ConfigError(f"max-shard-size must be a size such as 5GB or 200MB, got {max_shard_size!r}")
    folder = Path(os.path.realpath(folder))  # Path.resolve raises on a loop of links
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder: choose another --out")
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be created: {error.strerror}; choose another --out") from error
    try:  # everything goes to a hidden folder, which is renamed when it is complete
        write_model(checkpoint, tokenizer, partial, getattr(torch, dtype), max_shard_size)
        transformers_tokenizer(tokenizer, checkpoint.model.context).save_pretrained(partial)
        for figure in figures:
            shutil.copyfile(figure, partial / figure.name)
        page = card(checkpoint, tokenizer, folder.name, dtype, summary, [figure.name for figure in figures])
        (partial / "README.md").write_text(page, encoding="utf-8")
        partial.replace(folder)
    except (OSError, SafetensorError) as error:
        raise MachineError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_model(
    checkpoint: Checkpoint, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype, max_shard_size: str
) -> None:
    """Write the weights, the configuration, the generation configuration and the code of the model."""
    model = transformers_model(checkpoint, tokenizer, dtype)
    # Logits of ids that the tokenizer does not have were never trained.
    unused = range(tokenizer.vocab_size, checkpoint.model.vocab_size)
    if unused:
        model.generation_config.suppress_tokens = list(unused)
    with _progress_bars_disabled():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    # safetensors creates files that only their owner can read. Other users can read config.json.
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / "config.json").stat().st_mode)


def transformers_model(
    checkpoint: Checkpoint, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32
) -> "AntransformerForCausalLM":
    """Return the model of a checkpoint as a transformers model, on the CPU.

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
        from antransformer.interop.modeling_antransformer import AntransformerConfig, AntransformerForCausalLM
    except ImportError as error:
        hint = "pip install --upgrade 'antransformer[hf]'"
        raise UsageError(f"this version of transformers does not work, it may be too old ({error}): {hint}") from error
    end = tokenizer.end_of_text
    options = {name: value for name, value in asdict(checkpoint.model).items() if name != "ablation"}
    config = AntransformerConfig(**options, bos_token_id=end, eos_token_id=end, pad_token_id=end)
    with torch.device("meta"):  # no memory and no initialization: the weights are assigned below
        model = AntransformerForCausalLM(config)
    weights = restore(checkpoint, torch.device("cpu")).state_dict()
    model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    return model


def transformers_tokenizer(tokenizer: Tokenizer, context: int) -> "PreTrainedTokenizerFast":
    """Return a transformers tokenizer with the same ids as ``tokenizer`` for every text.

    Special tokens in a text are encoded as plain text, and no tokens are added before or after it.
    """
    from transformers import PreTrainedTokenizerFast

    # A post-processor could add tokens around every text, which training data does not have.
    content = {**json.loads(tokenizer.to_json()), "post_processor": None}
    end = tokenizer.decode([tokenizer.end_of_text])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(content, ensure_ascii=False)),
        bos_token=end,
        eos_token=end,
        pad_token=end,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        padding_side="left",  # generation continues at the right end
        model_max_length=context,
    )


@contextlib.contextmanager
def _progress_bars_disabled() -> Iterator[None]:
    """While entered, transformers shows no progress bars."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
