"""Import of exported models into run folders, including models saved again by transformers, which is not required."""

import logging
import re
from collections.abc import Container
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from antransformer.bounds import norms
from antransformer.data import Tokenizer
from antransformer.errors import CheckpointError, ConfigError, DataError
from antransformer.files import read_json as read_json_file
from antransformer.interop.new_folder import new_folder
from antransformer.models import ModelConfig, build
from antransformer.models.config import OPTION_NAMES
from antransformer.models.decoder import Decoder
from antransformer.renamed import upgrade_model
from antransformer.training.checkpointing import checkpoint
from antransformer.training.checkpointing.sharded_safetensors import TensorFiles
from antransformer.training.run_folder import CHECKPOINTS, write_run_folder

LOG = logging.getLogger(__name__)

MODEL_TYPE = "antransformer"
VERSION = 2  # of the folder, the default of AntransformerConfig.format_version
# Fields in config.json since version 2 -> fields of ModelConfig.
FIELDS = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "max_position_embeddings": "context",
    "partial_rotary_factor": "rotary_fraction",
}
PREFIX = "model."  # of the tensors of the base model, since version 2
TOLERANCE = 0.01  # of norms; the rounding of weights to bfloat16 is smaller
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def import_folder(source: Path, target: Path) -> Path:
    """Create a run folder with the float32 weights of an exported model as checkpoint of step 0, and its tokenizer.

    An exported folder has no training settings. The run can therefore not be resumed, but new runs can start from it.
    Weights that were trained outside of their bounds are imported as they are, with a warning.

    Returns:
        Folder of the checkpoint.

    Raises:
        CheckpointError: the source is not an exported model, or its files contradict each other.
        DataError: its tokenizer cannot be read.
        ConfigError, MachineError: as in ``new_folder``.
    """
    config = read_config(source)
    if not (source / "tokenizer.json").is_file():
        raise DataError(
            f"{source}: no tokenizer.json: save the tokenizer next to the model, with "
            f"tokenizer.save_pretrained({str(source)!r})"
        )
    tokenizer = Tokenizer.load(source)
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            f"{source}: its tokenizer has {tokenizer.vocab_size} ids and its model {config.vocab_size}: call "
            "model.resize_token_embeddings(len(tokenizer)) after adding tokens, and save both again"
        )
    # On the meta device until the shapes are checked: a wrong config must not allocate huge tensors.
    with torch.device("meta"):
        model = build(config)
    weights = TensorFiles(weight_files(source))
    names = {name: exported_name(name, weights.shapes) for name in model.state_dict()}
    checkpoint.require_shapes(weights, {names[name]: value for name, value in model.state_dict().items()}, source)
    model.to_empty(device="cpu")
    weights.read_into({names[name]: value for name, value in model.state_dict().items()})
    warn_of_rows_out_of_bounds(model, source)
    optimizer = torch.optim.Adam(model.parameters())  # a checkpoint needs one; it has no state before the first step
    with new_folder(target) as folder:
        write_run_folder(folder, {"model": config.mapping()}, tokenizer)
        path = checkpoint.save(folder / CHECKPOINTS, 0, model, optimizer, extra={"imported": str(source)}, keep=1)
    return target / path.relative_to(folder)


def exported_name(name: str, names: Container[str]) -> str:
    """Return the name of a tensor of our model among the ``names`` in an exported folder of any version."""
    return name if name in names else f"{PREFIX}{name}"


def warn_of_rows_out_of_bounds(model: Decoder, source: Path) -> None:
    """Log a warning if rows of weights violate their bounds: training projects them in its first step."""
    violated = total = 0
    for bound in model.bounds():
        excess = norms(bound) - 1
        violated += int(((excess.abs() if bound.strict else excess) > TOLERANCE).sum())
        total += excess.numel()
    if violated:
        LOG.warning(
            f"{source}: {violated:,} of {total:,} weight vectors are outside of their bounds, and the first training "
            "step projects them: call antransformer.bind(model, optimizer) before fine-tuning"
        )


def read_config(source: Path) -> ModelConfig:
    """Read the model's config from config.json; raises CheckpointError."""
    file = source / "config.json"
    content = read_json(file)
    if content.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{source}: model_type is {content.get('model_type')!r}, but must be {MODEL_TYPE!r}: "
            "export with --format native, and import that folder"
        )
    version = content.get("format_version", 1)
    if version not in (1, VERSION):
        raise CheckpointError(f"{file}: format_version is {version!r}, but must be at most {VERSION}")
    if "quantization_config" in content:
        raise CheckpointError(f"{source}: the weights are quantized: import the folder that they were made from")
    content = upgrade_model(content) if version == 1 else own_fields(content, file)
    names = {item.name for item in fields(ModelConfig)}
    missing = names - content.keys() - set(OPTION_NAMES)
    if missing:
        raise CheckpointError(f"{file}: {min(missing)} is missing")
    try:
        return ModelConfig(**{name: content[name] for name in names & content.keys()})
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def own_fields(content: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return a config of version 2 with the field names of ``ModelConfig``; raises CheckpointError."""
    if missing := {*FIELDS, "intermediate_size"} - content.keys():
        raise CheckpointError(f"{file}: {min(missing)} is missing")
    width, hidden = content["hidden_size"], content["intermediate_size"]
    if not (type(width) is type(hidden) is int) or width < 1 or hidden < 1 or hidden % width:
        raise CheckpointError(f"{file}: intermediate_size {hidden!r} is not a multiple of hidden_size {width!r}")
    return {**{FIELDS.get(name, name): value for name, value in content.items()}, "mlp_ratio": hidden // width}


def weight_files(source: Path) -> list[Path]:
    """Return the paths of the weight files, one or several; raises CheckpointError."""
    single = [source / WEIGHTS_FILE]
    if not (source / INDEX_FILE).is_file():
        return single
    weight_map = read_json(source / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{source / INDEX_FILE}: weight_map is missing")
    files = sorted({str(name) for name in weight_map.values()})
    for file in files:
        # No separators, so that no entry can point outside the folder.
        if not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise CheckpointError(f"{source / INDEX_FILE}: {file!r} is not a weight file in the same folder")
    shards = [source / file for file in files]
    # transformers removes the shards of an earlier save, but not their index.
    return single if single[0].is_file() and not any(shard.exists() for shard in shards) else shards


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
