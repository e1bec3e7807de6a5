"""The Python interface: every function, quiet unless asked, with the errors and results of the command line."""

import inspect
import json
import math
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import antransformer
from antransformer.cli import main
from antransformer.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingExtraError,
    RunStoppedError,
    UsageError,
)
from antransformer.runs import provenance
from antransformer.training.dry_run import NullReporter
from antransformer.training.metrics import read_metrics
from helpers.commands import TEN_STEPS, write_documents
from helpers.messages import mentions
from helpers.small import SMALL

FUNCTIONS = ["prepare", "train", "load", "generate", "export", "evaluate", "compare", "ablate", "sweep", "fit", "plan"]
FUNCTIONS.append("verify")
SETTINGS = {"precision": "float32", "batch_tokens": 256, "eval_tokens": 1024, "log_every": 1, "model": SMALL}


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A run of ten steps."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return antransformer.train(data=str(corpus), tokens=2560, out=out, **SETTINGS)


@pytest.fixture(autouse=True)
def quiet(request, capfd):
    """A function prints nothing unless progress is requested."""
    yield
    captured = capfd.readouterr()
    if "prints" not in request.node.name:  # the command line, and progress=True
        assert captured.out == captured.err == ""


def test_importing_the_package_is_lazy_and_names_resolve():
    code = """
import sys
import antransformer
assert "torch" not in sys.modules and "transformers" not in sys.modules
assert set(antransformer.__all__) <= set(dir(antransformer))
from antransformer.derive import derive  # the import binds the submodule to the name of the function
assert antransformer.derive is derive
for name in antransformer.__all__:
    getattr(antransformer, name)
assert callable(antransformer.derive) and "transformers" not in sys.modules
try:
    antransformer.nothing
except AttributeError as error:
    assert "nothing" in str(error)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_functions_are_documented_and_typed():
    for name in (
        "ablate",
        "compare",
        "evaluate",
        "export",
        "fit",
        "generate",
        "load",
        "plan",
        "prepare",
        "sweep",
        "train",
        "verify",
    ):
        function = getattr(antransformer, name)
        signature = inspect.signature(function)
        assert function.__doc__ and signature.return_annotation is not inspect.Signature.empty
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty
            assert name == "prepare" or parameter.name in function.__doc__


def test_train_returns_what_the_command_line_prints(run, corpus, tmp_path):
    out = tmp_path / "run"
    assert run.result.step == 10 and run.result.checkpoint.is_dir()
    assert main(["train", "--data", str(corpus), "--out", str(out), *TEN_STEPS]) == 0
    *_, line = read_metrics(out / "metrics.jsonl")
    assert run.result.val_loss == line["val_loss"] and run.result.bits_per_byte == line["bits_per_byte"]


def test_train_resumes_and_reports_to_an_object(run):
    class Steps(NullReporter, list):
        def step(self, step):
            self.append(step)

    steps = Steps()
    again = antransformer.train(out=run.folder, resume=True, progress=steps)
    assert steps == [10] and again.result.val_loss == pytest.approx(run.result.val_loss)


def test_train_takes_a_config_file_and_settings_that_override_it(corpus, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(f"data: {corpus}\nlr: 2e-3\ntokens: 2K\nmodel: {{layers: 1}}\n")
    run = antransformer.train(config=config, out=tmp_path / "run", **{**SETTINGS, "tokens": "512", "lr": "1e-3"})
    written = (run.folder / "config.yaml").read_text()
    for line in ("lr: 0.001", "tokens: 512", "layers: 2"):
        assert line in written


def test_train_prints_progress_if_asked(corpus, tmp_path, capfd):
    antransformer.train(data=str(corpus), tokens=512, out=tmp_path / "run", progress=True, **SETTINGS)
    assert mentions(capfd.readouterr().out, tmp_path / "run", "1/2", "2/2")


@pytest.mark.parametrize(
    ("call", "error", "facts"),
    [
        (lambda: antransformer.train(lrr=1), ConfigError, ["lrr", "lr"]),
        (lambda: antransformer.train(model={"widht": 1}), ConfigError, ["model.widht", "model.width"]),
        (lambda: antransformer.train(tokens="many"), ConfigError, ["tokens", "many"]),
        (lambda: antransformer.train(resume=True), CheckpointError, ["--out"]),
        (lambda: antransformer.load("nowhere"), CheckpointError, ["nowhere"]),
        (lambda: antransformer.generate("nowhere"), CheckpointError, ["nowhere"]),
        (lambda: antransformer.export("nowhere", "out"), CheckpointError, ["nowhere"]),
        (lambda: antransformer.evaluate("nowhere"), CheckpointError, ["nowhere"]),
        (lambda: antransformer.compare(lr=1, out="out"), ConfigError, ["lr"]),
        (lambda: antransformer.compare(model={"s_scale": 1}, out="out"), ConfigError, ["model.s_scale"]),
        (lambda: antransformer.compare(["angpt"], out="out"), ConfigError, ["angpt"]),
        (lambda: antransformer.compare(budgets=[1000, 1000], out="out"), ConfigError, ["1000"]),
        (lambda: antransformer.compare(tuning_trials=0, out="out"), ConfigError, ["0"]),
        (lambda: antransformer.compare(tokens=0, out="out"), ConfigError, ["0"]),
        (lambda: antransformer.compare(workers=0, out="out"), ConfigError, ["workers", "0"]),
        (lambda: antransformer.ablate(tokens=0, out="out"), ConfigError, ["0"]),
        (lambda: antransformer.ablate(["nothing"], out="out"), ConfigError, ["nothing"]),
        (lambda: antransformer.sweep(preset="pico", out="out"), ConfigError, ["preset"]),
        (lambda: antransformer.sweep(sizes=["mega"], out="out"), ConfigError, ["mega", "nano"]),
        (lambda: antransformer.sweep(seeds=0, out="out"), ConfigError, ["seeds", "0"]),
        (lambda: antransformer.sweep(lr_trials=-1, out="out"), ConfigError, ["lr_trials", "-1"]),
        (lambda: antransformer.sweep(workers=-1, out="out"), ConfigError, ["workers", "-1"]),
        (lambda: antransformer.fit(), ConfigError, ["--optima"]),
        (lambda: antransformer.plan(), ConfigError, ["--flops", "--hours", "--tokens"]),
        (lambda: antransformer.plan(flops=1e18, mfu=2), ConfigError, ["--mfu", "2"]),
        (lambda: antransformer.plan(flops=1e18, gpus=0), ConfigError, ["--gpus", "0"]),
        (lambda: antransformer.plan(flops=1e18, gpus_per_machine=0), ConfigError, ["--gpus-per-machine", "0"]),
        (lambda: antransformer.plan(flops=1e18, gpu="abacus"), ConfigError, ["--gpu", "abacus", "h100"]),
        (lambda: antransformer.plan(flops=1e18, gpus="many"), ConfigError, ["gpus", "many"]),
        (lambda: antransformer.compare("gpt+", out="out"), ConfigError, ["gpt+"]),
        (lambda: antransformer.compare(architectures=3, out="out"), ConfigError, ["3"]),
        (lambda: antransformer.compare(budgets="1K", seeds=1.5, out="out"), ConfigError, ["seeds", "1.5"]),
        (lambda: antransformer.sweep(sizes="mega", out="out"), ConfigError, ["mega", "nano"]),
        (lambda: antransformer.sweep(sizes=[], out="out"), ConfigError, ["sizes"]),
        (lambda: antransformer.compare(tokens=-5, out="out"), ConfigError, ["--tokens", "-5"]),
        (lambda: antransformer.compare(budgets=[-5, 1000], out="out"), ConfigError, ["--budgets", "-5"]),
        (lambda: antransformer.evaluate("run", limit=1.5), ConfigError, ["limit", "1.5"]),
        (lambda: antransformer.generate("run", b"text"), ConfigError, ["prompt", "b'text'"]),
        (lambda: antransformer.generate("run", top_p=None), ConfigError, ["top_p", "None"]),
        (lambda: antransformer.fit("t.csv"), DataError, ["t.csv"]),
    ],
)
def test_wrong_input_raises_a_usage_error(call, error, facts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, UsageError) and mentions(caught.value, *facts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["train", "export", "verify"])
def test_a_path_of_another_type_is_named(name):
    arguments = {"train": {"out": 3}, "export": {"checkpoint": "run", "out": None}, "verify": {"data": 3}}[name]
    with pytest.raises(TypeError, match=list(arguments)[-1]):
        getattr(antransformer, name)(**arguments)


def test_numbers_of_other_types_and_single_values_are_converted(run, corpus, tmp_path):
    text = antransformer.generate(str(run.folder), "to be", max_new_tokens=np.int64(5), seed="3", top_k=np.int64(4))
    assert text == antransformer.generate(run.folder, "to be", max_new_tokens=5, seed=3, top_k=4)
    file = tmp_path / "text.txt"
    file.write_text("to be or not to be " * 40)
    scores = antransformer.evaluate(run.folder, texts=file, out=tmp_path / "scores.json").scores
    assert scores == antransformer.evaluate(run.folder, texts=[str(file)], out=tmp_path / "scores.json").scores


def test_training_runs_in_a_thread(corpus, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(antransformer.train, data=str(corpus), tokens=512, out=tmp_path / "run", **SETTINGS).result()
    assert math.isfinite(run.result.val_loss)


@pytest.mark.parametrize(
    "error", [ConfigError("wrong"), MissingExtraError("scipy", "analysis"), RunStoppedError("at step 3", 15)]
)
def test_errors_survive_a_process_pool(error):
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is type(error) and str(copied) == str(error) and vars(copied) == vars(error)


def test_prepare_returns_the_dataset(tmp_path):
    dataset = antransformer.prepare([write_documents(tmp_path / "text")], tmp_path / "data", val_fraction=0.4)
    assert dataset.path == tmp_path / "data" and dataset.vocab_size == 257
    assert sum(split.documents for split in dataset.splits.values()) == 12


def test_load_and_generate(run):
    model, tokenizer = antransformer.load(run.folder, device="cpu")
    assert not model.training and model.config.width == SMALL["width"]
    assert antransformer.load(run.result.checkpoint)[0].config == model.config
    pieces = []
    text = antransformer.generate(run.folder, "def ", max_new_tokens=20, on_text=pieces.append)
    assert text.startswith("def ") and pieces[0] == "def " and "".join(pieces) == text
    assert antransformer.generate((model, tokenizer), "def ", max_new_tokens=20) == text
    assert antransformer.generate((model, tokenizer), "def ", max_new_tokens=20, seed=1) != text


def test_export_and_evaluate(run, tmp_path):
    pytest.importorskip("lm_eval")
    checkpoint = antransformer.export(run.folder, tmp_path / "hf")
    assert checkpoint.step == 10 and (tmp_path / "hf/model.safetensors").is_file()
    (tmp_path / "text.txt").write_text("to be or not to be")
    evaluation = antransformer.evaluate(run.folder, texts=[tmp_path / "text.txt"], out=tmp_path / "scores.json")
    assert {score.metric for score in evaluation.scores} >= {"bits_per_byte"}
    assert all(math.isfinite(score.value) for score in evaluation.scores)
    assert json.loads((tmp_path / "scores.json").read_text())["step"] == 10


def test_compare_and_fit(corpus, in_process, tmp_path):
    settings = {"data": str(corpus), "batch_tokens": 256, "eval_tokens": 1024, "model": SMALL}
    search = {"lr_trials": 1, "tuning_trials": 1, "seeds": 1}
    results = antransformer.compare(
        ["gpt+", "angpt"], budgets=[2560, 5120], out=tmp_path / "out", workers=2, **search, **settings
    )
    assert [variant.name for variant in results.variants] == ["gpt+", "angpt"] and results.budgets == (2560, 5120)
    assert (tmp_path / "out/report.html").is_file()
    fits = antransformer.fit([tmp_path / "out"])
    lengths = {(fitted.name, tuple(run.tokens for run in fitted.runs)) for fitted in fits}
    assert lengths == {("gpt+", (2560, 5120)), ("angpt", (2560, 5120))}


def test_sweep(corpus, in_process, tmp_path):
    settings = {"data": str(corpus), "eval_tokens": 1024, "model": {"layers": 1, "context": 32, "head_dim": 32}}
    options = {"widths": [32], "tokens": ["2560"], "batch_tokens": [256], "lrs": [1e-3], "out": tmp_path / "out"}
    with pytest.raises(ConfigError, match="--yes"):
        antransformer.sweep(**options, max_hours=0, workers=2, **settings)
    results = antransformer.sweep(**options, workers=2, **settings)
    assert [(run.width, run.lr, run.tokens) for run in results.runs] == [(32, 1e-3, 2560)]
    assert (tmp_path / "out/sweep.json").is_file()


def test_fit_and_plan(tmp_path):
    rows = ["architecture,parameters,batch,lr", "angpt,32e6,31,3.4e-3", "angpt,62e6,39,2.1e-3", "angpt,127e6,120,2e-3"]
    (tmp_path / "optima.csv").write_text("\n".join(rows))
    (fit,) = antransformer.fit(optima=tmp_path / "optima.csv")
    assert fit.name == "angpt" and set(fit.laws) == {"batch", "lr"}
    plan = antransformer.plan(flops="1e18", gpus=1)
    assert plan.compute == pytest.approx(1e18, rel=0.1) and plan.laws is not None
    assert antransformer.plan(tokens="10B", size="125m").tokens == pytest.approx(10e9, rel=0.01)


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/usr/bin/antransformer", "compare", "--quick"], "antransformer compare --quick"),
        (["/site-packages/antransformer/__main__.py", "sweep"], "antransformer sweep"),
        (["study.py", "a b"], "python study.py 'a b'"),
    ],
)
def test_results_record_the_command_or_the_script(argv, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert provenance.command() == command
