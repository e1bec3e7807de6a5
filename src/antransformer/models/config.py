"""Model settings: ``ModelConfig`` and the presets."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from antransformer.errors import ConfigError
from antransformer.models.registry import BUILT_IN, get
from antransformer.renamed import new_name
from antransformer.settings import check_settings, setting

PAPER_VOCABULARY = 50_304
MOST_LAYERS = 10_000  # counting parameters builds every layer; a larger number is a typing mistake

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
    "no-bounds",
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


SIZE: dict[str, Any] = {"ge": 1, "lt": 2**31}
POSITIVE: dict[str, Any] = {"gt": 1e-12, "lt": 1e12}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture, sizes and options of one model.

    Defaults are computed once, such as the ``init_std`` of a width, and ``dataclasses.replace`` keeps their values:
    make a new config for another width or architecture.

    Raises:
        ConfigError: a value is out of range, ``width`` is not a multiple of ``head_dim``, or an option is set that
            the architecture does not have.
    """

    architecture: str = setting(f"{', '.join(BUILT_IN)}, or one added by an installed package", "angpt")
    vocab_size: int = setting("vocabulary size (default: the tokenizer's)", PAPER_VOCABULARY, **SIZE)
    width: int = setting("model width, a multiple of head_dim (default: the preset's)", 128, **SIZE)
    layers: int = setting("number of blocks (default: the preset's)", 4, ge=1, le=MOST_LAYERS)
    context: int = setting("maximum sequence length in tokens (default: the preset's)", 2048, **SIZE)
    head_dim: int = setting("width of an attention head", 64, **SIZE)
    mlp_ratio: int = setting("ratio of MLP width to model width", 4, **SIZE)
    rotary_fraction: float = setting("fraction of each head's coordinates with rotary embedding", 0.5, ge=0, le=1)
    rope_theta: float = setting("base of the rotary embedding frequencies", 10_000.0, **POSITIVE)
    # Options of some architectures. None means the default in the architecture's declaration (see ``registry``), or
    # that the architecture does not have the option.
    alpha_init: float = setting("angpt, ngpt: initial residual step size alpha", None, **POSITIVE)
    s_scale: float = setting(
        "angpt, ngpt: internal scale of the learnable parameters alpha and s_Z (ngpt: s_qk, s_u and s_z too). "
        "Smaller values make them learn faster",
        None,
        **POSITIVE,
    )
    gate_scale: str = setting(
        "angpt: constant factor on the gate before SiLU. sqrt_width gives the gate a standard deviation of 1/2 with "
        "mlp_ratio 4, sqrt_mlp of 1, none is the paper's printed form",
        None,
        choices=("sqrt_mlp", "sqrt_width", "none"),
    )
    logit_scale: str = setting(
        "angpt: a learnable s_Z for each id (vector, the default), as published, or one for all ids (scalar)",
        None,
        choices=("vector", "scalar"),
    )
    ablation: str = setting(
        f"angpt: ablation of the method: {', '.join(get_args(Ablation))}", None, choices=get_args(Ablation)
    )
    init_std: float = setting(
        "gpt+, gpt, ln-scaling, dyt: standard deviation of the initial weights (default: 1/sqrt(width); "
        "muon, normuon: 0.02)",
        None,
        **POSITIVE,
    )
    dyt_alpha_init: float = setting("dyt: initial alpha of tanh(alpha x)", None, **POSITIVE)

    def __post_init__(self) -> None:
        options = get(self.architecture).options
        check_settings(self)
        for name, rows in (("vocab_size", self.vocab_size), ("mlp_ratio", self.mlp_hidden)):
            if rows * self.width >= 2**50:
                raise ConfigError(
                    f"width {self.width:,} and {name} {getattr(self, name):,} give a matrix of at least 2^50 elements"
                )
        if unknown := sorted(set(options) - set(OPTION_NAMES)):
            raise ConfigError(f"architecture {self.architecture}: ModelConfig has no option {unknown[0]}")
        for name in OPTION_NAMES:
            if name in options and getattr(self, name) is None:
                default = options[name]
                object.__setattr__(self, name, default(self) if callable(default) else default)
            elif name not in options and getattr(self, name) is not None:
                raise ConfigError(f"{name} is not an option of {self.architecture}: leave it out")
        if self.width % self.head_dim:
            near = max(1, round(self.width / self.head_dim)) * self.head_dim
            raise ConfigError(f"width {self.width} is not a multiple of head_dim {self.head_dim}: use {near}")
        if round(self.head_dim * self.rotary_fraction) % 2:
            raise ConfigError(
                f"rotary_fraction {self.rotary_fraction} of head_dim {self.head_dim} is an odd number of coordinates: "
                "choose one that gives an even number"
            )

    @classmethod
    def preset(
        cls, name: str, architecture: str = "angpt", vocab_size: int = PAPER_VOCABULARY, **overrides: Any
    ) -> "ModelConfig":
        """Config of a shipped size: ``pico`` or ``nano`` for a CPU, or the paper's ``32m 62m 125m 250m 0.5b 1b``.

        Raises:
            ConfigError: unknown preset or field, or a value out of range.
        """
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            hint = new_name(f"model.{unknown[0]}") or f": the options are {', '.join(sorted(known))}"
            raise ConfigError(f"unknown model option {unknown[0]!r}{hint}")
        return cls(**{**preset_sizes(name), "architecture": architecture, "vocab_size": vocab_size, **overrides})

    def mapping(self) -> dict[str, Any]:
        """Fields as plain data, without options that the architecture does not have."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def heads(self) -> int:
        """Number of attention heads n = d / h."""
        return self.width // self.head_dim

    @property
    def mlp_hidden(self) -> int:
        """Width of the hidden layer of the MLP, f."""
        return self.width * self.mlp_ratio

    @property
    def rotary_dim(self) -> int:
        """Number of coordinates of each head with rotary embedding; even."""
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
