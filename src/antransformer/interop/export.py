"""A checkpoint as a Hugging Face folder: weights, configuration, code, tokenizer, and a card that says what it is."""

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
from safetensors import SafetensorError

from antransformer.data import Tokenizer
from antransformer.errors import CheckpointError, ConfigError, MachineError, MissingExtraError
from antransformer.interop.model_card import card
from antransformer.interop.register import register
from antransformer.models.registry import get
from antransformer.training.checkpointing.checkpoint import Checkpoint, restore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from antransformer.interop.modeling_antransformer import AntransformerForCausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_SIZE = "5GB"


def export(
    found: Checkpoint,
    tokenizer: Tokenizer,
    folder: Path,
    dtype: str = "float32",
    max_shard_size: str = SHARD_SIZE,
    verdict: str | None = None,
    pictures: Sequence[Path] = (),
) -> None:
    """Write the model of a checkpoint where ``AutoModelForCausalLM`` and ``AutoTokenizer`` load it from.

    Args:
        found: verified checkpoint.
        tokenizer: that of its run.
        folder: new, or empty; it is there whole, or not at all.
        dtype: of the weights.
        max_shard_size: largest file of weights, such as 5GB or 200MB.
        verdict: of the experiment that the run belongs to, for the card.
        pictures: of its report, which go with the card.

    Raises:
        MissingExtraError: transformers is not installed, or too old.
        CheckpointError: the model is an ablation.
        ConfigError: the folder is not empty or can not be made, or the size is none.
        MachineError: the weights could not be written.
    """
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", max_shard_size):
        raise ConfigError(f"max-shard-size must be a size such as 5GB or 200MB, got {max_shard_size!r}")
    folder = Path(os.path.realpath(folder))  # Path.resolve raises on a loop of links
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder: choose another --out")
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed export left
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} can not be made: {error.strerror}; choose another --out") from error
    try:
        write_model(found, tokenizer, partial, DTYPES[dtype], max_shard_size)
        transformers_tokenizer(tokenizer, found.model.context).save_pretrained(partial)
        for picture in pictures:
            shutil.copyfile(picture, partial / picture.name)
        names = [picture.name for picture in pictures]
        page = card(found, tokenizer, folder.name, dtype, verdict, names)
        (partial / "README.md").write_text(page, encoding="utf-8")
        partial.replace(folder)
    except (OSError, SafetensorError) as error:
        raise MachineError(f"{folder} could not be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_model(found: Checkpoint, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    """Weights, configuration, generation configuration and the code of both."""
    model = transformers_model(found, tokenizer, dtype)
    unused = range(tokenizer.vocab_size, found.model.vocab_size)
    if unused:  # rows that no text has trained
        model.generation_config.suppress_tokens = list(unused)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / "config.json").stat().st_mode)  # safetensors makes files that only their owner can read


def transformers_model(
    found: Checkpoint, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32
) -> "AntransformerForCausalLM":
    """The model of a checkpoint as transformers has it, on the CPU.

    Raises:
        MissingExtraError: transformers is not installed, or too old.
        CheckpointError: the model is an ablation, or its architecture has no code for transformers.
    """
    if not get(found.model.architecture).hf_export:
        raise CheckpointError(
            f"{found.path}: architecture {found.model.architecture} cannot be exported: "
            "modeling_antransformer.py does not implement it"
        )
    ablation = found.model.ablation
    if ablation not in (None, "none"):
        raise CheckpointError(
            f"{found.path}: the ablation {ablation} can not be exported or evaluated, only a whole architecture"
        )
    try:
        register()
        from antransformer.interop.modeling_antransformer import AntransformerConfig, AntransformerForCausalLM
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
    end = tokenizer.end_of_text
    options = {name: value for name, value in asdict(found.model).items() if name != "ablation"}
    config = AntransformerConfig(**options, bos_token_id=end, eos_token_id=end, pad_token_id=end)
    with torch.device("meta"):
        model = AntransformerForCausalLM(config)
    weights = restore(found, torch.device("cpu")).state_dict()
    model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    return model


def transformers_tokenizer(tokenizer: Tokenizer, context: int) -> "PreTrainedTokenizerFast":
    """A tokenizer that gives the ids that the model was trained on, for any text.

    Text that spells a special token is plain text to it, and nothing is added before or behind.
    """
    from transformers import PreTrainedTokenizerFast

    content = {**json.loads(tokenizer.to_json()), "post_processor": None}
    end = tokenizer.decode([tokenizer.end_of_text])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(content, ensure_ascii=False)),
        bos_token=end,
        eos_token=end,
        pad_token=end,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        padding_side="left",  # a prompt ends where its continuation begins
        model_max_length=context,
    )
