"""The optimizers that ``--optimizer`` offers; importable without torch.

A new optimizer takes one entry here and one module with its builder. If it has a learning rate of its own, it also
takes a field of ``TrainConfig``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class OptimizerSpec:
    """Declaration of an optimizer.

    Attributes:
        label: display name.
        builder: function that builds it from a model and a ``TrainConfig``, as ``module:function``.
        lr_setting: setting with its learning rate for the weight matrices inside the blocks, if it is not ``lr``.
            Optimizers may share one.
        default_lrs: default of ``lr_setting`` by architecture. Other architectures use that of their relative.
        horizon_exponents: default of ``horizon_exponent`` by architecture, likewise.
        init_std: default standard deviation of initial weights where rows are not normalized; None means 1/sqrt(width).
    """

    label: str
    builder: str
    lr_setting: str | None = None
    default_lrs: Mapping[str, float] = field(default_factory=dict)
    horizon_exponents: Mapping[str, float] = field(default_factory=dict)
    init_std: float | None = None


MUON = OptimizerSpec(
    "Muon",
    "antransformer.training.muon:build_muon",
    lr_setting="muon_lr",
    default_lrs={"angpt": 0.04, "gpt+": 0.02},
    horizon_exponents={"angpt": 0.64, "ngpt": 0.55, "gpt+": 0.49},
    # Every step of Muon has the same size, for which weights of size 1/sqrt(width) are too large.
    init_std=0.02,
)
OPTIMIZERS = {
    # Exponents: docs/results.md, "Length of the run".
    "adam": OptimizerSpec(
        "AdamW",
        "antransformer.training.optimizer:build_adamw",
        horizon_exponents={"angpt": 0.42, "ngpt": 0.44, "gpt+": 0.43},
    ),
    "muon": MUON,
    # Its steps are as large as those of Muon, so they share the learning rate.
    "normuon": replace(MUON, label="NorMuon", builder="antransformer.training.muon:build_normuon"),
}
