"""The settings of a run: what the user wrote, checked and completed into one ``TrainConfig``.

Settings come from a YAML file and from the command line as the same thing, a nested mapping of text and numbers;
``resolve`` turns it into a config in which nothing is left open, and which repeats the run when written to a file.
"""

import difflib
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import yaml

from antransformer.errors import ConfigError
from antransformer.files import read_text
from antransformer.models import ModelConfig
from antransformer.models.config import preset_sizes, setting
from antransformer.models.registry import BUILT_IN, get
from antransformer.training import defaults

COUNT_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

# Short names of model settings at the top level, as on the command line.
ALIASES = ("architecture", "context")


class Count(int):
    """A whole number that users may write as 60K or 2.5B."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, complete. Counts of tokens, steps and sequences; learning rates as Adam takes them.

    Raises:
        ConfigError: a value is out of range.
    """

    model: ModelConfig
    data: str = setting("prepared data folder, or python-stdlib for the built-in corpus", "python-stdlib")
    init: str | None = setting(
        "run folder or checkpoint whose model and weights the run starts from (default: drawn with the seed)", None
    )
    preset: str = setting("size: pico, nano, 32m, 62m, 125m, 250m, 0.5b, 1b", "nano")
    tokens: Count = setting("tokens to train on, such as 60K or 2.5B (default: by the size)", 0)
    batch_tokens: Count = setting("tokens of one step (default: by architecture and size)", 0)
    micro_batch_size: int = setting(
        "sequences in one forward pass; a step accumulates over them (default: by memory)", 0
    )
    optimizer: Literal["adam", "muon"] = setting(
        "adam; or muon for the blocks' matrices, and adam for embedding, head and vectors", "adam"
    )
    lr: float = setting("peak learning rate of adam (default: by architecture and size)", 0.0)
    lr_width: int = setting(
        "width that lr is for: at another adam's rate for embedding and head is lr * sqrt(lr_width / width), for the "
        "blocks' matrices lr * lr_width / width; 0: lr is for this width (default: 128 below 30M parameters, else 0)",
        0,
    )
    muon_lr: float | None = setting("peak learning rate of muon (default: by architecture)", None)
    min_lr_ratio: float = setting("learning rate of the last step as a share of the peak", 0.01)
    warmup_fraction: float = setting(
        "share of the run with a rising learning rate (default: angpt, ngpt 0; others 0.1)", 0.0
    )
    weight_decay: float = setting("decay of the weight matrices (default: angpt, ngpt 0; others 0.1)", 0.0)
    beta1: float = setting("Adam's first-moment decay", 0.9)
    beta2: float = setting("Adam's second-moment decay", 0.95)
    adam_eps: float = setting("Adam's epsilon", 1e-9)
    grad_clip: float = setting("largest gradient norm", 1.0)
    max_skipped_steps: int = setting(
        "steps of the run to leave out, instead of stopping, when a loss or gradient is not finite", 0
    )
    seed: int = setting("seed of the initial weights and of the data order", 0)
    log_every: int = setting("steps between two metrics lines", 10)
    eval_every: int = setting("steps between two validations (default: a tenth of the run)", 0)
    eval_tokens: Count = setting("tokens of one validation, evenly spaced over the split", 131_072)
    checkpoint_every: int = setting("steps between two checkpoints (default: a tenth of the run)", 0)
    keep_checkpoints: int = setting("how many of the newest checkpoints stay on disk", 3)
    keep_every: int | None = setting("steps between two checkpoints that stay for good (default: none do)", None)
    device: str = setting("auto, cpu, cuda, cuda:1, mps", "auto")
    precision: Literal["auto", "float32", "bfloat16", "fp8"] = setting(
        "auto: bfloat16 on a GPU, float32 on a CPU; fp8: bfloat16, and 8 bits in the blocks' linear maps", "auto"
    )
    compile: bool = setting("compile the model with torch.compile", False)
    parallel: Literal["ddp", "fsdp", "hsdp"] = setting(
        "under torchrun: each process has the whole model, or a part of it (FSDP), or a part of that of its machine",
        "ddp",
    )
    tensor_parallel: int = setting(
        "under torchrun: how many neighbouring processes split each layer of the model (angpt, gpt+)", 1
    )
    timeout: int = setting("under torchrun: seconds to wait for a process before it is named and the run ends", 600)
    activation_checkpointing: bool = setting("compute each block again in the backward pass, to save memory", False)
    tensorboard: bool = setting("write TensorBoard events too", False)

    def __post_init__(self) -> None:
        for name in (
            "tokens",
            "batch_tokens",
            "micro_batch_size",
            "log_every",
            "eval_every",
            "eval_tokens",
            "checkpoint_every",
            "keep_checkpoints",
            "keep_every",
            "tensor_parallel",
        ):
            _check(name, getattr(self, name), getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "adam_eps", "grad_clip", "muon_lr"):
            _check(name, getattr(self, name), getattr(self, name) is None or getattr(self, name) > 0, "positive")
        if (self.muon_lr is None) != (self.optimizer == "adam"):
            raise ConfigError("muon_lr is the learning rate of optimizer muon: set both, or leave muon_lr out")
        for name in ("beta1", "beta2", "warmup_fraction"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        _check("min_lr_ratio", self.min_lr_ratio, 0 <= self.min_lr_ratio <= 1, "between 0 and 1")
        _check("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        _check("lr_width", self.lr_width, self.lr_width >= 0, "at least 0")
        _check("max_skipped_steps", self.max_skipped_steps, self.max_skipped_steps >= 0, "at least 0")
        _check("timeout", self.timeout, 1 <= self.timeout <= 10**6, "between 1 and 1,000,000 seconds")
        _check("seed", self.seed, 0 <= self.seed < 2**63, "between 0 and 2^63 - 1")
        if self.batch_tokens % self.model.context:
            raise ConfigError(
                f"batch_tokens {self.batch_tokens:,} is not a multiple of the context of {self.model.context:,} tokens"
            )
        if self.tokens < self.batch_tokens:
            raise ConfigError(
                f"tokens {self.tokens:,} is less than one batch of {self.batch_tokens:,}: raise tokens or lower "
                "batch_tokens"
            )
        model, split = self.model, self.tensor_parallel
        if split > 1 and not get(model.architecture).tensor_parallel:
            supported = " and ".join(name for name in BUILT_IN if get(name).tensor_parallel)
            raise ConfigError(f"tensor_parallel is for {supported}, not {model.architecture}: leave it out")
        if model.heads % split:  # the MLP has a multiple of the heads' coordinates
            raise ConfigError(f"tensor_parallel {split} can not split {model.heads} heads evenly: choose a divisor")

    @property
    def batch_size(self) -> int:
        """Sequences of one step."""
        return self.batch_tokens // self.model.context

    @property
    def matrix_lrs(self) -> tuple[float, float]:
        """Peak learning rates of Adam's matrices: those of embedding and head, and those of the blocks.

        Adam moves every coordinate by about the learning rate, and the coordinates of a row of norm 1 are of the size
        1/sqrt(width): at such a rate rows of any width turn by the same angle. In the blocks 1/width, as in muP
        (arXiv:2203.03466), was measured to be better, with and without bounds. Vectors and scalars take ``lr``.
        """
        ratio = self.lr_width / self.model.width if self.lr_width else 1.0
        return self.lr * math.sqrt(ratio), self.lr * ratio

    @property
    def lr_text(self) -> str:
        """Peak learning rates of Adam, for people."""
        if not self.lr_width or self.lr_width == self.model.width:
            return f"{self.lr:g}"
        outer, blocks = (f"{rate:.3g}" for rate in self.matrix_lrs)
        more = "" if self.optimizer == "muon" else f", matrices of the blocks {blocks}"
        return f"{self.lr:g} (embedding and head {outer}{more})"

    @property
    def steps(self) -> int:
        """Length of the run in steps."""
        return self.tokens // self.batch_tokens


# Settings that may differ when a run is resumed: they change what is written down or how fast, not what is computed,
# or whether it goes on at all.
MUTABLE_ON_RESUME = frozenset(
    (
        "max_skipped_steps",
        "log_every",
        "eval_every",
        "eval_tokens",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_every",
        "device",
        "compile",
        "parallel",
        "tensor_parallel",
        "timeout",
        "activation_checkpointing",
        "tensorboard",
        "data",
    )
)

# Settings that came later than others, and what a run computed that was written down before.
LEGACY_DEFAULTS: dict[str, Any] = {"optimizer": "adam", "lr_width": 0}


def resolve_config(settings: Mapping[str, Any], vocab_size: int, where: str = "settings") -> TrainConfig:
    """Complete what the user set with the defaults of the preset, the architecture and the size.

    Args:
        settings: nested mapping with TrainConfig's keys (``model`` holding ModelConfig's); ``architecture`` and
            ``context`` may stand at the top level too.
        vocab_size: of the data's tokenizer, the default of the model's.
        where: what to call the settings in a message, such as the file's name.

    Raises:
        ConfigError: unknown key (with the nearest right one), a value of the wrong type or out of range.
    """
    given = normalize_settings(settings, where)
    preset = given.get("preset", "nano")
    model_given = given.pop("model", {})
    if given.get("optimizer") == "muon" and "init_std" in get(model_given.get("architecture", "angpt")).options:
        model_given = {"init_std": defaults.MUON_INIT_STD, **model_given}
    model = ModelConfig(**{**preset_sizes(preset), "vocab_size": vocab_size, **model_given})
    if "batch_tokens" in given:
        if given["batch_tokens"] < model.context:
            raise ConfigError(
                f"batch_tokens {given['batch_tokens']:,} is less than one sequence of {model.context:,} tokens"
            )
        given["batch_tokens"] = whole_sequences(given["batch_tokens"], model.context)
    values: dict[str, Any] = {
        "preset": preset,
        "warmup_fraction": defaults.WARMUP[model.architecture],
        "weight_decay": defaults.WEIGHT_DECAY[model.architecture],
        "lr_width": defaults.lr_width(model),
        **given,
    }
    if "lr" not in values:
        values["lr"] = defaults.learning_rate(model)
    if values.get("optimizer") == "muon":
        values.setdefault("muon_lr", defaults.MUON_LR[model.architecture])
    if "batch_tokens" not in values:
        values["batch_tokens"] = whole_sequences(defaults.batch_tokens(model), model.context)
    if "tokens" not in values:
        values["tokens"] = defaults.tokens(model)
    batch_size = values["batch_tokens"] // model.context
    tenth = max(10, values["tokens"] // max(1, values["batch_tokens"]) // 10)
    values.setdefault("eval_every", tenth)
    values.setdefault("checkpoint_every", tenth)
    values.setdefault("micro_batch_size", defaults.micro_batch_size(model, batch_size))
    return TrainConfig(model=model, **values)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Normalised settings of two sources, those of ``above`` winning key by key."""
    return {**below, **above, "model": {**below.get("model", {}), **above.get("model", {})}}


def normalize_settings(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check keys and types of user settings, move aliases into ``model``, and convert values; see ``resolve``."""
    flat = dict(settings)
    model = flat.pop("model", None) or {}
    if not isinstance(model, Mapping):
        raise ConfigError(f"{where}: model must be a mapping of model settings, got {shown(model)}")
    for name in ALIASES:
        if name in flat:
            value = flat.pop(name)
            if model.get(name, value) != value:
                raise ConfigError(f"{where}: {name} and model.{name} disagree: give one of them")
            model = {**model, name: value}
    checked = _check_keys(TrainConfig, flat, where, prefix="", also=(*ALIASES, "model"))
    checked_model = _check_keys(ModelConfig, model, where, prefix="model.")
    return {**checked, "model": checked_model} if checked_model else checked


def to_mapping(config: TrainConfig) -> dict[str, Any]:
    """The config as plain YAML data; ``resolve`` of it gives an equal config."""
    mapping: dict[str, Any] = {
        name: int(value) if isinstance(value, Count) else value
        for name, value in asdict(config).items()
        if value is not None
    }
    return {**mapping, "model": config.model.mapping()}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds no mapping.
    """
    try:
        content = _Loader(read_text(path)).get_single_data()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: can not be read: {reason}") from error
    except Exception as error:  # odd scalars and deep nesting raise anything
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = f" near line {line + 1}" if line is not None else ""
        raise ConfigError(
            f"{path}: not valid YAML{place}: {getattr(error, 'problem', None) or 'syntax error'}"
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path}: must hold settings as key: value")
    return content


class _Loader(yaml.SafeLoader):
    """Aliases of single values only: a few lines of lists of aliases of lists unfold to more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.composer.ComposerError(None, None, "an alias of more than a single value")
        return node


def shipped_configs() -> dict[str, Path]:
    """Configs that come with the package, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))}


def convert(value: Any, hint: Any, key: str) -> Any:
    """``value`` as the type ``hint`` asks for; text is read as a number where one is wanted (60K, 2e-3).

    Raises:
        ConfigError: it can not be.
    """
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        return None if value is None else convert(value, options[0], key)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        raise ConfigError(f"{key} must be one of {', '.join(choices)}, got {shown(value)}")
    reader, wanted = _READERS[hint]
    try:
        return reader(value)
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(f"{key} must be {wanted}, got {shown(value)}") from None


def shown(value: Any) -> str:
    """A value for a message, of which it must not be the greater part."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return "a number of more than 64 bits"  # Python spells none of more than 4,300 digits
    return reprlib.repr(value)


def read_count(value: Any) -> Count:
    """60K, 2.5B, 1e6 or 4096 as a whole number.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool):
        raise ValueError(value)
    text = str(value).strip().replace("_", "").replace(",", "")
    suffix = text[-1:].upper()
    scale = COUNT_SUFFIXES.get(suffix, 1)
    try:  # decimal: 4.1M is 4,099,999.9999999995 in binary floating point
        number = Decimal(text[:-1] if suffix in COUNT_SUFFIXES else text) * scale
        if number != int(number) or abs(number) >= 2**63:
            raise ValueError(value)
    except ArithmeticError:
        raise ValueError(value) from None
    return Count(int(number))


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """``: did you mean X?`` for a misspelt word, or nothing where none is near."""
    match = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f": did you mean {match[0]}?" if match else ""


def _check_keys(
    cls: type, given: Mapping[str, Any], where: str, prefix: str, also: tuple[str, ...] = ()
) -> dict[str, Any]:
    assert is_dataclass(cls)
    hints = typing.get_type_hints(cls)
    known = [item.name for item in fields(cls) if item.name != "model"]
    for key in given:
        if key not in known:
            others = {prefix + name for name in (*known, *also)}
            if not prefix and key in ModelConfig.__dataclass_fields__:
                raise ConfigError(f"{where}: unknown key {key}: did you mean model.{key}?")
            raise ConfigError(f"{where}: unknown key {prefix}{key}{nearest(prefix + str(key), others)}")
    return {key: convert(value, hints[key], f"{where}: {prefix}{key}") for key, value in given.items()}


def whole_sequences(tokens: int, context: int) -> int:
    """The nearest multiple of the context, at least one sequence: 0.5M tokens are 244 sequences of 2,048."""
    return max(1, round(tokens / context)) * context


def _check(name: str, value: Any, ok: bool, wanted: str) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {wanted}, got {shown(value)}")


def _read_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
        raise ValueError(value)
    return int(value)


def _read_float(value: Any) -> float:
    number = float(value) if not isinstance(value, bool) else float("nan")
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(value)
    return number


def _read_bool(value: Any) -> bool:
    words = {"true": True, "false": False}
    if str(value).lower() not in words:
        raise ValueError(value)
    return words[str(value).lower()]


def _read_str(value: Any) -> str:
    if not isinstance(value, (str, Path)):
        raise TypeError(value)
    return str(value)


_READERS: dict[Any, tuple[typing.Callable[[Any], Any], str]] = {
    Count: (read_count, "a count of tokens such as 4096, 60K or 2.5B"),
    int: (_read_int, "a whole number"),
    float: (_read_float, "a number"),
    bool: (_read_bool, "true or false"),
    str: (_read_str, "text"),
}
