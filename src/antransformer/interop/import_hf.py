"""Import of exported models into run folders, including models saved again by transformers, which is not required."""

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
    """Create a run folder with the float32 weights of an exported model as checkpoint of step 0, and its tokenizer.

    An exported folder has no training settings. The run can therefore not be resumed, but new runs can start from it.

    Returns:
        Folder of the checkpoint.

    Raises:
        CheckpointError: the source is not an exported model, or its files contradict each other.
        DataError: its tokenizer cannot be read.
        ConfigError: the target is not empty.
    """
    config, tokenizer = read_config(source), Tokenizer.load(source)
    # On the meta device until the shapes are checked: a wrong config must not allocate huge tensors.
    with torch.device("meta"):
        model = build(config)
    weights = TensorFiles(weight_files(source))
    checkpoint.require_shapes(weights, model.state_dict(), source)
    model.to_empty(device="cpu")
    weights.read_into(model.state_dict())
    write_run_folder(target, {"model": config.mapping()}, tokenizer, resumable=False)
    optimizer = torch.optim.Adam(model.parameters())  # a checkpoint needs one; it has no state before the first step
    return checkpoint.save(target / CHECKPOINTS, 0, model, optimizer, extra={"imported": str(source)}, keep=1)


def read_config(source: Path) -> ModelConfig:
    """Read the model's config from config.json; raises CheckpointError."""
    content = read_json(source / "config.json")
    if content.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{source}: model_type is {content.get('model_type')!r}, but must be {MODEL_TYPE!r}")
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
    """Return the paths of the weight files, one or several; raises CheckpointError."""
    if not (source / INDEX_FILE).is_file():
        return [source / WEIGHTS_FILE]
    weight_map = read_json(source / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{source / INDEX_FILE}: weight_map is missing")
    files = sorted({str(name) for name in weight_map.values()})
    for file in files:
        # No separators, so that no entry can point outside the folder.
        if not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise CheckpointError(f"{source / INDEX_FILE}: {file!r} is not a weight file in the same folder")
    return [source / file for file in files]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises CheckpointError."""
    try:
        content = read_json_file(path)
    except OSError as error:
        raise CheckpointError(f"{path.parent}: not an exported model ({path.name}: {error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content
