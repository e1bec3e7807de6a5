"""Architectures are found by name, and one of another package works in every verb."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import antransformer
from antransformer.cli import main
from antransformer.errors import ConfigError
from antransformer.models import ModelConfig, build, registry
from antransformer.models.decoder import Decoder
from antransformer.models.registry import BUILT_IN, Architecture
from antransformer.reporting.labels import style_of
from antransformer.results.comparison import Results
from antransformer.training import defaults
from antransformer.training.checkpointing import checkpoint
from antransformer.training.config import resolve_config
from antransformer.training.metrics import read_metrics
from antransformer.training.muon import build_muon
from antransformer.training.optimizer import make_optimizer
from helpers.messages import mentions
from helpers.small import SMALL_OPTIONS

# GPT+ with one norm fewer in each block: another function, and other parameters.
TOY = """
from torch import nn

from antransformer.models.gpt_plus import OPTIONS, GPTPlus
from antransformer.models.registry import Architecture


class Toy(GPTPlus):
    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.mlp_norm = nn.Identity()


ARCHITECTURE = Architecture(name="toy", label="Toy GPT", description="a toy", cls=Toy, options=OPTIONS)
"""


# A class whose constructor sets a part of the state: tied weights, buffers in and outside the state dict, a tensor, and
# a module that reset_parameters leaves as it is.
STATEFUL = """
import torch
from torch import nn

from antransformer.models.angpt import ARCHITECTURE as ANGPT, AnGPT
from antransformer.models.registry import Architecture


class Toy(AnGPT):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head.weight = self.embedding.weight
        self.norm = nn.LayerNorm(config.width)
        self.register_buffer("scale", torch.full((config.width,), 3.0))
        self.register_buffer("shift", torch.full((config.width,), 0.2), persistent=False)
        self.gain = torch.full((config.width,), 0.5)

    def embed(self, tokens):
        return self.norm(super().embed(tokens)) * self.scale * self.gain + self.shift


ARCHITECTURE = Architecture(
    name="toy", label="Toy", description="a toy", cls=Toy, options=ANGPT.options, defaults_like="angpt"
)
"""


def write_package(folder, name="toy", target="toy_package.toy:ARCHITECTURE", code=TOY):
    """A package with the toy and, next to it, the metadata that an installed package has."""
    (folder / "toy_package").mkdir()
    (folder / "toy_package" / "__init__.py").write_text("")
    (folder / "toy_package" / "toy.py").write_text(code)
    metadata = folder / "toy_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\n{name} = {target}\n")


@pytest.fixture
def fresh(monkeypatch):
    """A registry that has read no entry points; what a test adds is gone afterwards."""
    monkeypatch.setattr(registry, "_loaded", {})
    registry._declared.cache_clear()
    yield
    registry._declared.cache_clear()


@pytest.fixture
def installed(fresh, tmp_path, monkeypatch):
    """Installs the toy for this process and for those that it starts."""

    def install(**entry_point):
        write_package(tmp_path, **entry_point)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
        monkeypatch.chdir(tmp_path)

    yield install
    for name in [name for name in sys.modules if name.startswith("toy_package")]:
        del sys.modules[name]


def test_every_declaration_has_its_name_and_a_decoder():
    for name in BUILT_IN:
        architecture = registry.get(name)
        assert architecture.name == name and issubclass(architecture.cls, Decoder)
        assert type(build(ModelConfig.preset("pico", name, vocab_size=64))) is architecture.cls
        assert architecture.defaults_like in defaults.LR_FITS
        assert style_of(name).label == architecture.label


def test_transformers_has_every_architecture_that_says_so():
    pytest.importorskip("transformers")
    from antransformer.interop.modeling_antransformer import PARTS

    assert set(PARTS) == {name for name in BUILT_IN if registry.get(name).hf_export}


def test_labels_of_other_names():
    assert style_of("angpt-muon").label == "anGPT (Muon)" and style_of("angpt-normuon").label == "anGPT (NorMuon)"
    assert style_of("no-lerp").label == "no-lerp"
    assert style_of("no-lerp") == style_of("no-lerp")


def test_hyperparameters_that_compare_tunes():
    assert {name: registry.get(name).tuned_hyperparameters for name in BUILT_IN} == {
        "angpt": ("model.s_scale",),
        "ngpt": ("model.s_scale",),
        "gpt+": ("model.init_std", "weight_decay"),
        "gpt": ("model.init_std", "weight_decay"),
        "ln-scaling": ("model.init_std", "weight_decay"),
        "dyt": ("model.dyt_alpha_init", "weight_decay"),
    }


def test_names_and_configs_need_no_torch():
    code = (
        "import importlib.machinery, sys, types\n"
        "package = types.ModuleType('antransformer')\n"  # its __init__ offers the whole library, and so imports torch
        f"package.__path__ = [{str(Path(antransformer.__file__).parent)!r}]\n"
        "sys.modules['antransformer'] = package\n"
        "from antransformer.models import PRESETS, config, registry\n"
        "print(*registry.names())\n"
        "assert 'torch' not in sys.modules\n"
    )
    names = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert set(BUILT_IN) <= set(names)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError) as error:
        registry.get("gpt5")
    assert mentions(error.value, "gpt5", *BUILT_IN)


def test_register_in_this_process(fresh):
    plain = registry.get("gpt+")
    toy = Architecture(name="toy", label="Toy", description="a toy", cls=plain.cls, options=plain.options)
    assert registry.register(toy) is registry.get("toy") is toy and "toy" in registry.names()
    assert isinstance(build(ModelConfig.preset("pico", "toy", vocab_size=64)), plain.cls)
    for taken in (toy, plain):
        with pytest.raises(ConfigError, match=taken.name.replace("+", r"\+")):
            registry.register(taken)


def test_defaults_follow_the_named_relative(fresh):
    plain = registry.get("gpt+")
    for name, relative in (("child", "ngpt"), ("orphan", "orphan")):
        registry.register(Architecture(name=name, label="", description="", cls=plain.cls, defaults_like=relative))
    assert defaults.SMALL_LR["child"] == defaults.SMALL_LR["ngpt"] != defaults.SMALL_LR["angpt"]
    assert defaults.WARMUP["child"] == defaults.WARMUP["angpt"]
    with pytest.raises(ConfigError) as error:
        defaults.WARMUP["orphan"]
    assert mentions(error.value, "orphan", "defaults_like", "angpt", "gpt+")


def test_an_option_that_model_config_lacks_is_refused(fresh):
    plain = registry.get("gpt+")
    registry.register(Architecture(name="toy", label="", description="", cls=plain.cls, options={"beta_init": 1.0}))
    with pytest.raises(ConfigError) as error:
        ModelConfig(architecture="toy")
    assert mentions(error.value, "toy", "beta_init")


@pytest.mark.parametrize(
    "entry_point",
    [{"target": "toy_package.missing:ARCHITECTURE"}, {"target": "toy_package.toy:Toy"}, {"name": "other"}],
)
def test_a_wrong_entry_point_is_named(installed, entry_point):
    installed(**entry_point)
    name = entry_point.get("name", "toy")
    assert name in registry.names()
    with pytest.raises(ConfigError) as error:
        registry.get(name)
    assert mentions(error.value, name, entry_point.get("target", "toy_package.toy:ARCHITECTURE"))


def test_a_toy_of_another_package_in_every_verb(installed, corpus, capfd):
    installed()
    run = ["--data", str(corpus), "--batch-tokens=256", "--eval-tokens=512", *SMALL_OPTIONS]
    assert main(["train", "--architecture=toy", "--tokens=1280", "--out=run", *run]) == 0
    assert main(["generate", "--checkpoint=run", "--prompt=def", "--max-new-tokens=5"]) == 0
    effort = ["--seeds=1", "--lr-trials=1", "--tuning-trials=1", "--budgets", "512", "--workers=2"]
    assert main(["compare", "--architectures", "angpt", "toy", "--out=compared", *effort, *run]) == 0
    variants = Results.load(Path("compared")).variants
    assert [item.name for item in variants] == ["angpt", "toy"] and variants[0].parameters != variants[1].parameters
    assert "Toy GPT" in Path("compared/report.html").read_text()
    capfd.readouterr()
    assert main(["export", "--checkpoint=run", "--out=exported"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and mentions(lines[0], "toy", "modeling_antransformer.py") and not Path("exported").exists()


def test_state_that_the_constructor_sets_is_trained_saved_and_loaded(installed, corpus):
    installed(code=STATEFUL)
    run = ["train", "--architecture=toy", "--data", str(corpus), "--tokens=1280", "--batch-tokens=256", "--ema=0.3"]
    run += ["--eval-tokens=512", "--sample-every=2", "--seed=3", *SMALL_OPTIONS]
    losses = []
    for processes in (1, 2):
        words = [*run, f"--out=run{processes}", *(["--processes=2", "--device=cpu"] if processes == 2 else [])]
        assert main(words) == 0
        model, _ = antransformer.load(f"run{processes}")
        assert model.lm_head.weight is model.embedding.weight
        values = [float(value.unique()) for value in (model.scale, model.shift, model.gain)]
        assert values == pytest.approx([3.0, 0.2, 0.5])
        assert float((model.norm.weight - 1).abs().max()) < 0.1
        lines = read_metrics(Path(f"run{processes}", "metrics.jsonl"))
        losses.append(lines[-1]["val_loss"])
        assert all(len(line["samples"]) == 2 for line in lines if "samples" in line)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert (
        main(["train", "--init=run1", "--data", str(corpus), "--tokens=512", "--batch-tokens=256", "--out=tuned"]) == 0
    )


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_run_with_a_parameter_that_gets_no_gradient_resumes(fresh, tmp_path, optimizer):
    class Toy(registry.get("gpt+").cls):
        def __init__(self, config):
            super().__init__(config)
            self.first = nn.Parameter(torch.ones(4))
            self.blocks[0].frozen = nn.Parameter(torch.ones(8, 8), requires_grad=False)

    registry.register(replace(registry.get("gpt+"), name="toy", cls=Toy))
    settings = {"preset": "pico", "model": {"architecture": "toy"}, "optimizer": optimizer}
    config = resolve_config(settings, vocab_size=64)
    tokens, states = torch.arange(20).view(2, 10), []
    for resumed in (False, True):
        model = build(config.model)
        made = make_optimizer(model, config)
        if resumed:
            saved = checkpoint.newest(tmp_path, print)
            model.load_state_dict(checkpoint.restore(saved, torch.device("cpu")).state_dict())
            checkpoint.load_optimizer(saved, model, made)
        else:
            model.loss(tokens, tokens).backward()
            made.step()
            checkpoint.save(tmp_path, 1, model, made, {}, keep=1)
        made.zero_grad()
        model.loss(tokens, tokens).backward()
        made.step()
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_muon_takes_a_projection_of_grouped_queries_as_one_matrix(fresh):
    class Grouped(registry.get("gpt+").cls):
        def __init__(self, config):
            super().__init__(config)
            self.blocks[0].other = nn.ModuleDict({"qkv_proj": nn.Linear(config.width, 2 * config.width, bias=False)})

    registry.register(replace(registry.get("gpt+"), name="toy", cls=Grouped))
    config = resolve_config({"preset": "pico", "model": {"architecture": "toy"}, "optimizer": "muon"}, vocab_size=64)
    model = build(config.model)
    optimizer = build_muon(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = model.blocks[0].other["qkv_proj"].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.blocks[0].other["qkv_proj"].weight, before)


def test_muon_refuses_weights_in_blocks_that_are_not_matrices(fresh):
    class Experts(registry.get("gpt+").cls):
        def __init__(self, config):
            super().__init__(config)
            self.blocks[0].experts = nn.Parameter(torch.zeros(2, 8, 8))

    registry.register(replace(registry.get("gpt+"), name="toy", cls=Experts))
    config = resolve_config({"preset": "pico", "model": {"architecture": "toy"}, "optimizer": "muon"}, vocab_size=64)
    with pytest.raises(ConfigError) as error:
        build_muon(build(config.model), config)
    assert mentions(error.value, "blocks.0.experts", "--optimizer adam")


def test_a_class_that_is_no_decoder_is_refused(monkeypatch):
    plain = Architecture(name="plain", label="Plain", description="a module", cls=lambda _: nn.Linear(2, 2))
    monkeypatch.setitem(registry._loaded, "plain", plain)
    with pytest.raises(ConfigError) as error:
        build(ModelConfig.preset("pico", "plain", vocab_size=64))
    assert mentions(error.value, "plain", "Linear", "Decoder")
