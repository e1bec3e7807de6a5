"""What a model is made of: ``ModelConfig`` and the presets."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from antransformer.errors import ConfigError
from antransformer.models.registry import BUILT_IN, get

PAPER_VOCABULARY = 50_304
MOST_LAYERS = 10_000  # counting the parameters makes each of them, and more are a slip of the finger

# What models.ablations can change of anGPT.
Ablation = Literal[
    "none",
    "constant-x0.5",
    "constant-x2",
    "constant-none",
    "all-x0.5",
    "all-x2",
    "all-none",
    "residual-none",
    "no-lerp",
    "scalar-alpha",
    "strict",
    "model-axis",
]

# arXiv:2505.22014, table of model sizes; pico and nano are ours, for a laptop CPU.
PRESETS: dict[str, dict[str, int]] = {
    "pico": {"width": 128, "layers": 2, "context": 128},
    "nano": {"width": 128, "layers": 4, "context": 256},
    "32m": {"width": 256, "layers": 6},
    "62m": {"width": 384, "layers": 10},
    "125m": {"width": 512, "layers": 18},
    "250m": {"width": 768, "layers": 18},
    "0.5b": {"width": 1024, "layers": 24},
    "1b": {"width": 1280, "layers": 36},
}


def setting(text: str, default: Any) -> Any:
    """A config field with its default and the help text that the command line shows."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model. Widths in coordinates, context in tokens.

    Raises:
        ConfigError: a value is out of range, the width is no multiple of the head width, or an option is set that the
            architecture does not have.
    """

    architecture: str = setting(f"{', '.join(BUILT_IN)}, or the name of one that an installed package adds", "angpt")
    vocab_size: int = setting("rows of the embedding and of the head (default: the tokenizer's)", PAPER_VOCABULARY)
    width: int = setting("model width d, a multiple of the head width (default: the preset's)", 128)
    layers: int = setting("number of blocks (default: the preset's)", 4)
    context: int = setting("longest sequence in tokens (default: the preset's)", 2048)
    head_dim: int = setting("head width h", 64)
    mlp_ratio: int = setting("MLP width over model width", 4)
    rotary_fraction: float = setting("share of each head's width with rotary embedding", 0.5)
    rope_theta: float = setting("wavelength base of the rotary embedding", 10_000.0)
    # Options of some architectures. None stands for the default in the architecture's declaration (see ``registry``),
    # and stays None where the architecture does not have the option.
    alpha_init: float = setting("angpt, ngpt: initial residual step alpha", None)
    s_scale: float = setting(
        "angpt, ngpt: surrogate size of alpha and s_Z, in ngpt of s_qk, s_u and s_z too; the smaller, the faster "
        "these move",
        None,
    )
    gate_scale: Literal["sqrt_mlp", "sqrt_width", "none"] = setting(
        "angpt: constant on the gate before SiLU: sqrt_width gives it standard deviation 1/2, sqrt_mlp 1, none is the "
        "printed form",
        None,
    )
    ablation: Ablation = setting(
        f"angpt: what is changed of the method or left out, to see what it is worth: {', '.join(get_args(Ablation))}",
        None,
    )
    init_std: float = setting(
        "gpt+, gpt, ln-scaling, dyt: standard deviation of the initial weights (default: 1/sqrt(width), muon 0.02)",
        None,
    )
    dyt_alpha_init: float = setting("dyt: initial alpha of tanh(alpha x)", None)

    def __post_init__(self) -> None:
        options = get(self.architecture).options
        for name in ("vocab_size", "width", "layers", "context", "head_dim", "mlp_ratio"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                raise ConfigError(f"{name} must be a positive integer below 2^31, got {value!r}")
        if self.layers > MOST_LAYERS:
            raise ConfigError(f"layers must be at most {MOST_LAYERS:,}, got {self.layers:,}")
        for name, rows in (("vocab_size", self.vocab_size), ("mlp_ratio", self.mlp_hidden)):
            if rows * self.width >= 2**50:
                raise ConfigError(f"width {self.width:,} and {name} {getattr(self, name):,} make a matrix too large")
        if unknown := sorted(set(options) - set(OPTION_NAMES)):
            raise ConfigError(f"architecture {self.architecture}: ModelConfig has no option {unknown[0]}")
        for name in OPTION_NAMES:
            if name in options and getattr(self, name) is None:
                default = options[name]
                object.__setattr__(self, name, default(self) if callable(default) else default)
            elif name not in options and getattr(self, name) is not None:
                raise ConfigError(f"{name} is not an option of {self.architecture}: leave it out")
        for name in ("rope_theta", "alpha_init", "s_scale", "init_std", "dyt_alpha_init"):
            value = getattr(self, name)
            if value is not None and not 1e-12 < value < 1e12:
                raise ConfigError(f"{name} must be a positive number of ordinary size, got {value!r}")
        if self.width % self.head_dim:
            near = max(1, round(self.width / self.head_dim)) * self.head_dim
            raise ConfigError(f"width {self.width} is not a multiple of head_dim {self.head_dim}: {near} would be")
        if not 0 <= self.rotary_fraction <= 1 or round(self.head_dim * self.rotary_fraction) % 2:
            raise ConfigError(
                f"rotary_fraction {self.rotary_fraction} must lie in [0, 1] and leave an even number of the head's "
                f"{self.head_dim} coordinates"
            )
        if self.gate_scale not in (None, "sqrt_mlp", "sqrt_width", "none"):
            raise ConfigError(f"gate_scale must be sqrt_mlp, sqrt_width or none, got {self.gate_scale!r}")
        if self.ablation not in (None, *get_args(Ablation)):
            raise ConfigError(f"ablation must be one of {', '.join(get_args(Ablation))}, got {self.ablation!r}")

    @classmethod
    def preset(
        cls, name: str, architecture: str = "angpt", vocab_size: int = PAPER_VOCABULARY, **overrides: Any
    ) -> "ModelConfig":
        """A shipped size: ``nano`` for a laptop CPU, or the paper's ``32m 62m 125m 250m 0.5b 1b``.

        Raises:
            ConfigError: unknown preset or field, or an impossible value.
        """
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise ConfigError(f"unknown model option {unknown[0]!r}: the options are {', '.join(sorted(known))}")
        return cls(**{**preset_sizes(name), "architecture": architecture, "vocab_size": vocab_size, **overrides})

    def mapping(self) -> dict[str, Any]:
        """The fields as plain data, without the options that the architecture does not have."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def heads(self) -> int:
        """Number of attention heads n = d / h."""
        return self.width // self.head_dim

    @property
    def mlp_hidden(self) -> int:
        """MLP width f."""
        return self.width * self.mlp_ratio

    @property
    def rotary_dim(self) -> int:
        """How many coordinates of each head are rotated, an even number."""
        return round(self.head_dim * self.rotary_fraction)


# Options of single architectures are the fields with the default None.
OPTION_NAMES = sorted(item.name for item in fields(ModelConfig) if item.default is None)


def preset_sizes(name: str) -> dict[str, int]:
    """Width, layers and context of a preset.

    Raises:
        ConfigError: unknown preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
    return dict(PRESETS[name])
