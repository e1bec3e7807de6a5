"""Checkpoints without optimizer state: enough for every use but ``--resume``."""

import json
import shutil

import pytest

from antransformer.cli import main
from antransformer.training.checkpointing import checkpoint
from helpers.messages import mentions
from helpers.small import SMALL_OPTIONS
from helpers.trainers import train_words

KINDS = {"plain": ([], "model"), "averaged": (["--ema=0.3"], "average")}


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Folder of two runs of ten steps, one of them with averaged weights."""
    folder = tmp_path_factory.mktemp("runs")
    for name, (options, _) in KINDS.items():
        assert main(train_words(corpus, folder / name, "--tokens=2560", *options)) == 0
    return folder


@pytest.fixture(params=KINDS)
def light(request, runs, tmp_path):
    """Copy of a run with only the files that its weights need, and their kind."""
    source, step, kind = runs / request.param, "checkpoints/step-00000010", KINDS[request.param][1]
    (tmp_path / "light" / step).mkdir(parents=True)
    for name in ("config.yaml", "tokenizer.json", f"{step}/state.json", f"{step}/{kind}.safetensors"):
        shutil.copy(source / name, tmp_path / "light" / name)
    return tmp_path / "light", source, kind


def test_weights_are_enough_to_generate_export_and_evaluate(light, tmp_path, capsys):
    outputs = {}
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n")
    for folder in light[:2]:
        out = tmp_path / f"out-{folder.name}"
        words = ["--checkpoint", str(folder)]
        capsys.readouterr()
        assert main(["generate", *words, "--prompt=def", "--max-new-tokens=5", "--device=cpu"]) == 0
        text = capsys.readouterr().out
        assert main(["export", *words, "--out", str(out)]) == 0
        scores = out.with_suffix(".json")
        (light[0] / "config.yaml").unlink(missing_ok=True)  # neither evaluate nor --init reads it
        assert main(["evaluate", *words, "--text", str(tmp_path / "text.txt"), "--out", str(scores)]) == 0
        results = json.loads(scores.read_text())["results"]
        outputs[folder] = text, (out / "model.safetensors").read_bytes(), results
    assert outputs[light[0]] == outputs[light[1]]


def test_weights_are_enough_to_start_a_run(light, corpus, tmp_path):
    (light[0] / "config.yaml").unlink()
    words = ["--data", str(corpus), "--tokens=256", "--batch-tokens=256", "--eval-tokens=512", *SMALL_OPTIONS]
    for number, folder in enumerate(light[:2]):
        assert main(["train", "--init", str(folder), "--out", str(tmp_path / f"new-{number}"), *words]) == 0
    first, second = (tmp_path / f"new-{number}/checkpoints/step-00000001/model.safetensors" for number in range(2))
    assert first.read_bytes() == second.read_bytes()


def test_resume_needs_the_optimizer_and_names_its_file(light, capsys):
    folder, _, kind = light
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert main(["train", "--out", str(folder), "--resume"]) == 2
    errors = capsys.readouterr().err.splitlines()
    missing = "optimizer.safetensors" if kind == "model" else "model.safetensors"
    assert len(errors) == 1 and mentions(errors[0], folder / "checkpoints/step-00000010", missing, "--init")
    assert not [path for path in folder.rglob("*") if path not in before and path.suffix == ".safetensors"]


def test_resume_falls_back_to_the_last_whole_checkpoint(runs, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(runs / "plain", folder)
    (folder / "checkpoints/step-00000010/optimizer.safetensors").unlink()
    capsys.readouterr()
    assert main(["train", "--out", str(folder), "--resume"]) == 0
    output = "".join(capsys.readouterr())
    assert mentions(output, "step-00000010", "optimizer.safetensors", "step-00000005")
    whole = checkpoint.read(folder / "checkpoints/step-00000010")
    assert checkpoint.read(runs / "plain/checkpoints/step-00000010").files == whole.files


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_the_needed_weights_are_verified(light, damage, capsys):
    folder, _, kind = light
    file = folder / "checkpoints/step-00000010" / f"{kind}.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"\1")
    capsys.readouterr()
    assert main(["generate", "--checkpoint", str(folder), "--max-new-tokens=1"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and mentions(errors[0], folder / "checkpoints/step-00000010", file.name)
