"""The settings of a training run.

Settings have two forms. What the user gives (command line, YAML or Python) is a nested mapping, checked by
``normalize_settings``. ``resolve_config`` completes it to a ``TrainConfig``, which repeats the run when saved.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from antransformer.data.mixture_spec import parse_mixture, parse_stage
from antransformer.errors import ConfigError
from antransformer.models.config import ModelConfig, preset_sizes
from antransformer.models.registry import BUILT_IN, get
from antransformer.renamed import new_name, new_value
from antransformer.settings import Count, Words, check_settings, convert_settings, nearest, setting, shown
from antransformer.training import defaults
from antransformer.training.optimizer_registry import OPTIMIZERS
from antransformer.training.recipes import DEFAULT_RECIPE, RECIPES, with_recipe
from antransformer.training.schedule import SHAPES, learning_rate
from antransformer.wording import counted

# Model settings that users may also give at the top level.
ALIASES = ("architecture", "context")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Complete settings of one training run. Learning rates are those of AdamW unless the name says otherwise.

    Raises:
        ConfigError: a value is out of range, or two settings contradict each other.
    """

    model: ModelConfig
    data: Words = setting(
        "folder of prepared data, or python-stdlib for the source of Python's standard library. Several with weights, "
        "such as web:0.7 code:0.3, are mixed",
        "python-stdlib",
    )
    data_from: Words | None = setting(
        "data for the last part of training: the fraction of training at which it begins, then sources as in data, "
        "such as 0.8 web:0.5 code:0.5 (default: data for all of training)",
        None,
    )
    init: str | None = setting(
        "run folder or checkpoint with the model and its initial weights (default: random weights)", None
    )
    preset: str = setting("model size: pico, nano, 32m, 62m, 125m, 250m, 0.5b, 1b", "nano")
    tokens: Count = setting("number of training tokens, such as 60K or 2.5B (default: by model size)", 0, ge=1)
    batch_tokens: Count = setting("tokens per optimizer step (default: by architecture and model size)", 0, ge=1)
    micro_batch_size: int = setting(
        "sequences per forward pass. Gradients are accumulated over the micro-batches of a step (default: by memory)",
        0,
        ge=1,
    )
    recipe: str = setting(
        "defaults of optimizer, schedule, averaging and horizon: best (lowest loss measured) or paper (as published)",
        DEFAULT_RECIPE,
        choices=RECIPES,
    )
    optimizer: str = setting(
        "adam: AdamW for all parameters; muon: Muon for the weight matrices inside the blocks, AdamW for the rest; "
        "normuon: the same with NorMuon, which equalizes the step sizes of rows (default: by recipe)",
        "adam",
        choices=OPTIMIZERS,
    )
    lr: float = setting("peak learning rate of AdamW (default: by architecture and model size)", 0.0, gt=0)
    embed_lr: float | None = setting("peak learning rate of the embedding (default: lr)", None, gt=0)
    head_lr: float | None = setting("peak learning rate of the head (default: lr)", None, gt=0)
    vector_lr: float | None = setting("peak learning rate of scales and other vectors (default: lr)", None, gt=0)
    lr_width: int = setting(
        "model width at which lr was tuned. Other widths scale it: embedding and head by sqrt(lr_width/width), block "
        "matrices by lr_width/width. 0 disables scaling (default: 128 below 30M parameters, otherwise 0)",
        0,
        ge=0,
        lt=2**31,
    )
    lr_horizon: int = setting(
        "number of steps for which the learning rates were tuned. In a longer run all of them are multiplied by "
        "(lr_horizon/steps)^horizon_exponent. 0 disables scaling (default: 600 below 30M parameters, otherwise the "
        "steps that 20 tokens per parameter take; 0 with recipe paper or if a learning rate is given)",
        0,
        ge=0,
        lt=2**31,
    )
    horizon_exponent: float = setting(
        "exponent of lr_horizon (default: by architecture and optimizer)", 0.0, ge=0, le=2
    )
    muon_lr: float | None = setting(
        "peak learning rate of Muon or NorMuon (default: by architecture, falls from 600 steps on; follows a given lr)",
        None,
        gt=0,
    )
    schedule: str = setting(
        "shape of the learning-rate decay after the warm-up: cosine, linear, log (steep at first), sqrt (steeper) or "
        "wsd (linear after a plateau at the peak; needs decay_fraction)",
        "cosine",
        choices=SHAPES,
    )
    decay_fraction: float | None = setting(
        "fraction of training at its end over which the learning rate decays; before that it stays at the peak "
        "(default: all steps after the warm-up)",
        None,
        gt=0,
        le=1,
    )
    min_lr_ratio: float = setting("final learning rate as a fraction of the peak", 0.01, ge=0, le=1)
    warmup_fraction: float = setting(
        "fraction of training used for linear warm-up (default: angpt, ngpt 0; others 0.1)", 0.0, ge=0, lt=1
    )
    weight_decay: float = setting("weight decay of matrices (default: angpt, ngpt 0; others 0.1)", 0.0, ge=0)
    cautious_weight_decay: bool = setting(
        "decay only coordinates of matrices that the optimizer moves towards zero (needs weight_decay)", False
    )
    beta1: float = setting("beta1 of AdamW", 0.9, ge=0, lt=1)
    beta2: float = setting("beta2 of AdamW (default: 0.99 below 100M parameters, otherwise 0.95)", 0.95, ge=0, lt=1)
    adam_eps: float = setting("epsilon of AdamW", 1e-9, gt=0)
    grad_clip: float = setting("maximum gradient norm", 1.0, gt=0)
    max_skipped_steps: int = setting(
        "maximum number of steps with a NaN or Inf loss or gradient that are skipped before the run stops", 0, ge=0
    )
    ema: float = setting(
        "time constant of an exponential moving average of the weights, as a fraction of training. Validation, "
        "generate, evaluate, export, diagnose and --init use the averaged weights. 0 disables averaging",
        0.0,
        ge=0,
        lt=1,
    )
    seed: int = setting("seed of the initial weights and the data order", 0, ge=0, lt=2**63)
    shuffle: str = setting(
        "order of the training data: feistel (constant memory) or argsort (order of older versions; 16 bytes for each "
        "sequence of the data on every rank)",
        "feistel",
        choices=("feistel", "argsort"),
    )
    document_mask: bool = setting(
        "keep documents apart: attention does not cross an end-of-text token, in training and in validation", False
    )
    log_every: int = setting("steps between metrics lines", 10, ge=1)
    eval_every: int = setting("steps between validations (default: a tenth of the run)", 0, ge=1)
    eval_tokens: Count = setting(
        "tokens per validation, evenly spaced over the validation split, for each source of a mixture", 131_072, ge=1
    )
    checkpoint_every: int = setting("steps between checkpoints (default: a tenth of the run)", 0, ge=1)
    keep_checkpoints: int = setting("number of recent checkpoints to keep", 3, ge=1)
    keep_every: int | None = setting(
        "keep the checkpoint of every N-th step permanently (default: keep recent checkpoints only)", None, ge=1
    )
    device: str = setting("auto, cpu, cuda, cuda:1, mps", "auto")
    precision: str = setting(
        "auto: bfloat16 on a CUDA GPU or CPU with instructions for it, otherwise float32. fp8: bfloat16 with FP8 "
        "linear layers in the blocks",
        "auto",
        choices=("auto", "float32", "bfloat16", "fp8"),
    )
    compile: bool | None = setting(
        "compile the model with torch.compile; if the compiler fails, train without it (default: on CUDA GPUs only)",
        None,
    )
    parallel: str = setting(
        "data parallelism of several processes: ddp (replicate the model), fsdp (shard it over all ranks), hsdp (shard "
        "it within a node, replicate across nodes)",
        "ddp",
        choices=("ddp", "fsdp", "hsdp"),
    )
    tensor_parallel: int = setting(
        "number of neighbouring ranks that split each layer, with several processes (angpt and gpt+)", 1, ge=1
    )
    timeout: int = setting(
        "seconds to wait for an unresponsive rank before a run of several processes is aborted", 600, ge=1, le=10**6
    )
    activation_checkpointing: bool = setting("recompute blocks in the backward pass to save memory", False)
    tensorboard: bool = setting("also write TensorBoard events", False)
    track: str | None = setting(
        "also send config, metrics and samples to this tracker: wandb (Weights & Biases; WANDB_MODE=offline keeps them "
        "in the run folder)",
        None,
        choices=("wandb",),
    )
    sample_every: int | None = setting(
        "steps between text samples in terminal, metrics and trackers: a new document, and a continuation of the "
        "validation text (default: no samples)",
        None,
        ge=1,
    )
    initial_tokens: Count | None = setting(
        "tokens of a continued run before it was first extended, for which its warm-up was set",
        None,
        ge=1,
        recorded=True,
    )
    rewarm_from: int | None = setting(
        "step after which the learning rate of a continued run rose again", None, ge=1, recorded=True
    )
    rewarm_ratio: float | None = setting(
        "learning rate at rewarm_from as a fraction of the peak", None, ge=0, le=1, recorded=True
    )
    rewarm_steps: int | None = setting("number of steps of the rise after rewarm_from", None, ge=1, recorded=True)

    def __post_init__(self) -> None:
        check_settings(self)
        self._check_optimizer()
        parse_mixture(self.data)
        if self.batch_tokens % self.model.context:
            raise ConfigError(
                f"batch_tokens {self.batch_tokens:,} is not a multiple of the context of {self.model.context:,} tokens"
            )
        if self.tokens < self.batch_tokens:
            size = "context" if self.batch_tokens == self.model.context else "batch_tokens"
            raise ConfigError(
                f"tokens {self.tokens:,} is less than one batch of {self.batch_tokens:,}: raise tokens or lower {size}"
            )
        self._check_schedule()
        if self.data_from is not None and not 0 < self.data_from_step < self.initial_steps:
            raise ConfigError(
                f"data_from {self.data_from} leaves no step before or after it in "
                f"{counted(self.initial_steps, 'step')}: choose another fraction, or raise tokens"
            )
        model, split = self.model, self.tensor_parallel
        if split > 1 and not get(model.architecture).tensor_parallel:
            supported = " and ".join(name for name in BUILT_IN if get(name).tensor_parallel)
            raise ConfigError(f"tensor_parallel is for {supported}, not {model.architecture}: leave it out")
        if self.document_mask and not get(model.architecture).document_mask:
            supported = ", ".join(name for name in BUILT_IN if get(name).document_mask)
            raise ConfigError(f"document_mask is for {supported}, not {model.architecture}: leave it out")
        if model.heads % split:  # the width of the MLP is a multiple of the number of heads
            raise ConfigError(f"tensor_parallel {split} cannot split {model.heads} heads evenly: choose a divisor")

    def _check_schedule(self) -> None:
        decay = self.decay_fraction
        if self.schedule == "wsd" and decay is None:
            raise ConfigError("schedule wsd needs decay_fraction, such as 0.2, the fraction of the run that decays")
        if self.warmup_fraction + (decay or 0) > 1 + 1e-9:  # 1e-9: rounding of the sum
            raise ConfigError(
                f"warmup_fraction {self.warmup_fraction:g} and decay_fraction {decay:g} exceed 1 together: lower one"
            )
        if not self.batch_tokens <= (self.initial_tokens or self.tokens) <= self.tokens:
            raise ConfigError(
                f"initial_tokens {self.initial_tokens:,} must be at least batch_tokens {self.batch_tokens:,} and at "
                f"most tokens {self.tokens:,}: restore the saved config"
            )
        rewarm = (self.rewarm_from, self.rewarm_ratio, self.rewarm_steps)
        if len({value is None for value in rewarm}) > 1 or (rewarm[0] or 0) + (rewarm[2] or 0) > self.steps:
            raise ConfigError(
                f"rewarm_from, rewarm_ratio and rewarm_steps must be set together and fit into "
                f"{counted(self.steps, 'step')}: restore the saved config"
            )

    def _check_optimizer(self) -> None:
        users: dict[str, list[str]] = {}  # optimizers by the setting of their learning rate
        for name, spec in OPTIMIZERS.items():
            if spec.lr_setting:
                users.setdefault(spec.lr_setting, []).append(name)
        for lr_setting, names in users.items():
            if (getattr(self, lr_setting) is None) == (self.optimizer in names):
                raise ConfigError(
                    f"{lr_setting} is the learning rate of optimizer {' or '.join(names)}: set both or neither"
                )
        if self.cautious_weight_decay and not self.weight_decay:
            raise ConfigError(
                "cautious_weight_decay has no effect at weight_decay 0: set weight_decay, such as 0.1, or omit it"
            )

    @property
    def batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.batch_tokens // self.model.context

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the run."""
        return self.tokens // self.batch_tokens

    @property
    def initial_steps(self) -> int:
        """Number of steps of the run before it was first extended."""
        return (self.initial_tokens or self.tokens) // self.batch_tokens

    @property
    def data_from_step(self) -> int:
        """Number of steps before the mixture of ``data_from``, 0 without one; extending a run does not change it."""
        return 0 if self.data_from is None else round(parse_stage(self.data_from)[0] * self.initial_steps)

    @property
    def warmup_steps(self) -> int:
        """Number of steps with a rising learning rate; extending a run does not change it."""
        if self.rewarm_steps is not None:
            return self.rewarm_steps
        return int(self.warmup_fraction * self.initial_steps)

    @property
    def decay_start(self) -> int:
        """Last step at the peak learning rate. Fractions are of the steps after ``rewarm_from``, if that is set."""
        start = self.rewarm_from or 0
        warmed_up = start + self.warmup_steps
        if self.decay_fraction is None:
            return warmed_up
        return max(warmed_up, self.steps - max(1, round(self.decay_fraction * (self.steps - start))))

    def lr_at(self, step: int, peak: float) -> float:
        """Learning rate of one step for a peak rate."""
        return learning_rate(
            step,
            self.steps,
            peak,
            schedule=self.schedule,
            warmup_steps=self.warmup_steps,
            decay_start=self.decay_start,
            min_lr_ratio=self.min_lr_ratio,
            start=self.rewarm_from or 0,
            start_ratio=self.rewarm_ratio or 0.0,
        )


# Settings that may change when a run resumes. They affect logging, speed or whether the run continues after a failed
# step, but not what it computes.
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
        "micro_batch_size",
        "parallel",
        "tensor_parallel",
        "timeout",
        "activation_checkpointing",
        "tensorboard",
        "track",
        "sample_every",
        "data",
        "data_from",
    )
)

# Settings that older run folders lack, with the value that reproduces those runs.
LEGACY_DEFAULTS: dict[str, Any] = {
    "recipe": "paper",
    "optimizer": "adam",
    "lr_width": 0,
    "lr_horizon": 0,
    "horizon_exponent": 0.0,
    "schedule": "cosine",
    "ema": 0.0,
    "cautious_weight_decay": False,
    "shuffle": "argsort",
    "document_mask": False,
}


def resolve_config(settings: Mapping[str, Any], vocab_size: int, where: str = "settings") -> TrainConfig:
    """Complete user settings with the defaults of the preset, the architecture and the model size.

    Args:
        settings: user settings, see ``normalize_settings``.
        vocab_size: vocabulary size of the data's tokenizer, the default of the model's.
        where: source of the settings for messages, such as a file's name.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type or is out of range.
    """
    user = with_recipe(normalize_settings(settings, where))
    preset, model = user.get("preset", "nano"), _resolve_model(user, vocab_size)
    user.pop("model", None)
    if "batch_tokens" in user:
        if user["batch_tokens"] < model.context:
            raise ConfigError(
                f"batch_tokens {user['batch_tokens']:,} is less than one sequence of {model.context:,} tokens"
            )
        user["batch_tokens"] = round_to_sequences(user["batch_tokens"], model.context)
    values: dict[str, Any] = {
        "preset": preset,
        "warmup_fraction": defaults.WARMUP[model.architecture],
        "weight_decay": defaults.WEIGHT_DECAY[model.architecture],
        "lr_width": defaults.lr_width(model),
        "beta2": defaults.beta2(model),
        **user,
    }
    if "batch_tokens" not in values:
        values["batch_tokens"] = round_to_sequences(defaults.batch_tokens(model), model.context)
    if "tokens" not in values:
        values["tokens"] = defaults.tokens(model)
    values |= _resolve_rates(values, model)
    batch_size = values["batch_tokens"] // model.context
    tenth = max(10, values["tokens"] // max(1, values["batch_tokens"]) // 10)
    values.setdefault("eval_every", tenth)
    values.setdefault("checkpoint_every", tenth)
    values.setdefault("micro_batch_size", defaults.micro_batch_size(model, batch_size))
    return TrainConfig(model=model, **values)


def _resolve_rates(values: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """Learning rates that the user left out, and the horizon of all.

    A given rate is exact, so it switches the default horizon off, and the other rates take their scaled defaults. The
    optimizer's own rate keeps its default ratio to a given ``lr``, and falls with the others from a given horizon on.
    """
    optimizer = OPTIMIZERS[values["optimizer"]]
    own = optimizer.lr_setting
    given = {"lr", "embed_lr", "head_lr", "vector_lr", own} & values.keys()
    steps = max(1, values["tokens"] // values["batch_tokens"])
    horizon, exponent, factor = values.get("lr_horizon", 0), values.get("horizon_exponent", 0.0), 1.0
    if not {"lr_horizon", "horizon_exponent"} <= values.keys():  # a saved config has both, and needs no default
        exponent = values.get("horizon_exponent", defaults.horizon_exponent(model, optimizer))
        if "lr_horizon" not in values and 0 < (reference := defaults.lr_horizon(model)) < steps:
            horizon = 0 if given else reference
            factor = defaults.horizon_factor(reference, steps, exponent) if given else 1.0
    if values.get("horizon_exponent") and not horizon and (given or values.get("lr_horizon") == 0):
        raise ConfigError(
            "horizon_exponent has no effect without lr_horizon, which recipe paper and a given learning rate switch "
            "off: set lr_horizon, or omit horizon_exponent"
        )
    rates: dict[str, float] = {}
    if own and own not in values:
        own_factor = values["lr"] / defaults.learning_rate(model) if "lr" in values else factor
        if values.get("lr_horizon") != 0:
            own_factor *= defaults.optimizer_lr_factor(model, min(steps, values.get("lr_horizon", steps)), exponent)
        rates[own] = _scaled(defaults.optimizer_lr(model, optimizer), own_factor)
    if "lr" not in values:
        rates["lr"] = _scaled(defaults.learning_rate(model), factor)
    return {**rates, "lr_horizon": horizon, "horizon_exponent": exponent if horizon else 0.0}


def _scaled(rate: float, factor: float) -> float:
    """A default learning rate times a factor, rounded to three digits where the factor changes it."""
    return rate if factor == 1 else float(f"{rate * factor:.3g}")


def _resolve_model(user: Mapping[str, Any], vocab_size: int) -> ModelConfig:
    settings = {**preset_sizes(user.get("preset", "nano")), "vocab_size": vocab_size, **user.get("model", {})}
    init_std = OPTIMIZERS[user["optimizer"]].init_std
    if init_std is not None and "init_std" in get(settings.get("architecture", "angpt")).options:
        settings.setdefault("init_std", init_std)
    return ModelConfig(**settings)


def normalize_settings(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check user settings and convert their values; the result may be normalized again.

    Args:
        settings: nested mapping with the keys of ``TrainConfig``; ``model`` holds those of ``ModelConfig``.
            ``architecture`` and ``context`` may also be at the top level. Numbers may be text.
        where: source of the settings for messages, such as a file's name.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type or is out of range.
    """
    train = dict(settings)
    model = train.pop("model", None) or {}
    if not isinstance(model, Mapping):
        raise ConfigError(f"{where}: model must be a mapping of model settings, got {shown(model)}")
    for name in ALIASES:
        if name in train:
            value = train.pop(name)
            if model.get(name, value) != value:
                raise ConfigError(f"{where}: {name} and model.{name} disagree: give one of them")
            model = {**model, name: value}
    model_keys = {item.name for item in fields(ModelConfig)}
    train_keys = {item.name for item in fields(TrainConfig)} - {"model"}
    for key in train.keys() - train_keys:
        hint = nearest(key, {*train_keys, *ALIASES, "model", *(f"model.{name}" for name in model_keys)})
        raise ConfigError(f"{where}: unknown key {key}{new_name(key) or hint}")
    for name in model.keys() - model_keys:
        key = f"model.{name}"
        raise ConfigError(
            f"{where}: unknown key {key}{new_name(key) or nearest(key, {f'model.{n}' for n in model_keys})}"
        )
    for key, value in train.items():
        if hint := new_value(key, value):
            raise ConfigError(f"{where}: {key} {value}{hint}")
    normalized = convert_settings(TrainConfig, train, where)
    if model:
        normalized["model"] = convert_settings(ModelConfig, model, where, prefix="model.")
    return normalized


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Combine normalized settings of two sources; those of ``upper`` win key by key."""
    return {**lower, **upper, "model": {**lower.get("model", {}), **upper.get("model", {})}}


def to_mapping(config: TrainConfig) -> dict[str, Any]:
    """The config as plain YAML data, from which ``resolve_config`` makes an equal config."""
    mapping: dict[str, Any] = {
        name: int(value) if isinstance(value, Count) else value
        for name, value in asdict(config).items()
        if value is not None
    }
    return {**mapping, "model": config.model.mapping()}


def round_to_sequences(tokens: int, context: int) -> int:
    """Nearest multiple of the context, at least one sequence: 0.5M tokens are 244 sequences of 2,048."""
    return max(1, round(tokens / context)) * context
