"""A folder that ``export`` wrote, or transformers after it, back to a run folder; transformers is not needed."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from antransformer.data import Tokenizer
from antransformer.errors import CheckpointError, ConfigError
from antransformer.files import read_json as read_json_file
from antransformer.models import ModelConfig, build
from antransformer.models.config import OPTION_NAMES
from antransformer.renamed import upgrade_model
from antransformer.training.checkpointing import checkpoint
from antransformer.training.checkpointing.sharded_safetensors import TensorFiles
from antransformer.training.run_folder import CHECKPOINTS, write_run_folder

MODEL_TYPE = "antransformer"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def import_folder(source: Path, target: Path) -> Path:
    """Make a run folder of an exported model: its weights in float32 as the checkpoint of step 0, and its tokenizer.

    How the model was trained is not in the folder, so the run has no settings but the model's and is not resumed; a run
    may be started from it.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: the source is no such folder, or its files do not fit together.
        DataError: its tokenizer can not be read.
        ConfigError: the target is not empty.
    """
    config, tokenizer = read_config(source), Tokenizer.load(source)
    with torch.device("meta"):
        model = build(config)
    weights = TensorFiles(weight_files(source))
    checkpoint.require_shapes(weights, model, source)
    model.to_empty(device="cpu")
    weights.read_into(model.state_dict())
    write_run_folder(target, {"model": config.mapping()}, tokenizer)
    fresh = torch.optim.Adam(model.parameters())
    return checkpoint.save(target / CHECKPOINTS, 0, model, fresh, extra={"imported": str(source)}, keep=1)


def read_config(source: Path) -> ModelConfig:
    """The model's config; raises as ``import_folder``."""
    content = read_json(source / "config.json")
    if content.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{source}: a model of the type {content.get('model_type')!r}, and not {MODEL_TYPE!r}")
    content = upgrade_model(content)
    names = {item.name for item in fields(ModelConfig)}
    missing = names - content.keys() - set(OPTION_NAMES)
    if missing:
        raise CheckpointError(f"{source / 'config.json'}: {min(missing)} is missing")
    try:
        return ModelConfig(**{name: content[name] for name in names & content.keys()})
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{source / 'config.json'}: {error}") from error


def weight_files(source: Path) -> list[Path]:
    """The file of the weights, or the several; raises as ``import_folder``."""
    places: Any = {"all": WEIGHTS_FILE}
    if (source / INDEX_FILE).is_file():
        places = read_json(source / INDEX_FILE).get("weight_map")
        if not isinstance(places, dict):
            raise CheckpointError(f"{source / INDEX_FILE}: weight_map is missing")
    files = sorted({str(name) for name in places.values()})
    for file in files:
        if not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise CheckpointError(f"{source / INDEX_FILE}: {file!r} is not the name of a file beside it")
    return [source / file for file in files]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises as ``import_folder``."""
    try:
        content = read_json_file(path)
    except OSError as error:
        raise CheckpointError(f"{path.parent}: not an exported model, {path.name}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content
