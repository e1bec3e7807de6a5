"""Import of exported folders into run folders."""

import errno
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from antransformer.cli import main
from antransformer.data import Tokenizer, byte_tokenizer
from antransformer.errors import WriteError
from antransformer.interop.import_hf import import_folder
from antransformer.models.registry import BUILT_IN
from antransformer.training import run_folder as runs
from antransformer.training.checkpointing import checkpoint
from antransformer.training.metrics import read_metrics
from helpers.commands import refused
from helpers.exported import exported, has_row, load, rows
from helpers.messages import mentions
from helpers.small import SMALL_OPTIONS

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of an exported anGPT."""
    return exported(tmp_path_factory.mktemp("angpt"))[1]


def test_an_imported_run_is_equal_to_the_exported_one(tmp_path):
    for architecture in BUILT_IN:
        ours, folder = exported(tmp_path / architecture, architecture)
        import_folder(folder, tmp_path / architecture / "back")
        opened, tokenizer = runs.open_checkpoint(tmp_path / architecture / "back")
        assert opened.step == 0 and opened.model == ours.config
        assert tokenizer.vocabulary() == byte_tokenizer().vocabulary()
        back = checkpoint.restore(opened, torch.device("cpu")).state_dict()
        assert all(torch.equal(value, back[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(("before", "after"), [("50KB", "5GB"), ("5GB", "50KB")])
def test_a_folder_that_was_saved_again_in_files_of_another_size_is_imported(tmp_path, before, after):
    folder = exported(tmp_path, max_shard_size=before)[1]
    model = load(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    model.save_pretrained(folder, max_shard_size=after)
    import_folder(folder, tmp_path / "back")
    back = checkpoint.restore(runs.open_checkpoint(tmp_path / "back")[0], torch.device("cpu"))
    assert torch.equal(back.lm_head.weight, model.lm_head.weight)


def test_an_import_that_fails_leaves_nothing(folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise WriteError("no space left")

    with monkeypatch.context() as patch, pytest.raises(WriteError):
        patch.setattr(checkpoint, "save", fail)
        import_folder(folder, tmp_path / "runs/new")
    assert list(tmp_path.iterdir()) == []


def test_an_import_that_was_killed_can_be_repeated(folder, tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from antransformer.interop.import_hf import import_folder
from antransformer.training.checkpointing import checkpoint
checkpoint._publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
import_folder(Path(sys.argv[1]), Path(sys.argv[2]))
"""
    out = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", code, str(folder), str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL and not out.exists() and list(tmp_path.iterdir())
    path = import_folder(folder, out)
    assert runs.open_checkpoint(out)[0].path == path and list(tmp_path.iterdir()) == [out]


def test_training_from_an_imported_run_and_from_its_source_is_identical(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--data", str(corpus), "--batch-tokens=64", "--tokens=448", "--eval-tokens=1024", "--precision=float32"]
    assert main(["train", *quick, "--out", "first", *SMALL_OPTIONS]) == 0
    assert main(["export", "--checkpoint", "first", "--out", "hf"]) == 0
    assert main(["import", "hf", "--out", "back"]) == 0
    weights = []
    for source in ("first", "back"):
        assert main(["train", "--init", source, *quick, "--out", f"second-{source}"]) == 0
        assert main(["export", "--checkpoint", f"second-{source}", "--out", f"hf-{source}"]) == 0
        weights.append(load(tmp_path / f"hf-{source}").state_dict())
    before = load(tmp_path / "hf").state_dict()
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]) and not torch.equal(weight, before[name])


def test_export_import_and_training_from_it(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = ["--batch-tokens=256", "--tokens=5120", "--eval-tokens=1024", "--log-every=1"]
    assert main(["train", "--data", str(corpus), "--out", "runs/first", *quick, *SMALL_OPTIONS]) == 0
    assert main(["export", "--checkpoint", "runs/first", "--out", "hf", "--dtype", "bfloat16"]) == 0
    assert mentions(capsys.readouterr().out, "hf", "angpt", "20", "bfloat16")
    model = load(tmp_path / "hf")  # as a user would save a fine-tuned model
    model.save_pretrained(tmp_path / "hf2")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "hf2")
    assert main(["import", "hf2", "--out", "runs/back"]) == 0
    assert mentions(capsys.readouterr().out, "--checkpoint runs/back", "--init runs/back")
    assert main(["generate", "--checkpoint", "runs/back", "--prompt", "to", "--max-new-tokens", "5"]) == 0
    assert main(["diagnose", "--checkpoint", "runs/back", "--data", str(corpus), "--tokens", "1K"]) == 0
    capsys.readouterr()
    train = ["train", "--init", "runs/back", "--data", str(corpus), "--out", "runs/second", *quick]
    assert main([*train, "--lr", "1e-3"]) == 0
    assert mentions(capsys.readouterr().out, "runs/back/checkpoints/step-00000000")
    lines = [read_metrics(tmp_path / "runs" / name / "metrics.jsonl") for name in ("first", "second")]
    assert lines[1][-1]["val_loss"] < lines[0][-1]["val_loss"]
    assert main(["train", "--out", "runs/second", "--resume"]) == 0  # --init is not read again
    assert "runs/back" not in capsys.readouterr().out
    assert read_metrics(tmp_path / "runs/second/metrics.jsonl") == lines[1]
    pages = []
    for name, out in (("back", "hf3"), ("second", "hf4")):
        assert main(["export", "--checkpoint", f"runs/{name}", "--out", out]) == 0
        pages.append((tmp_path / out / "README.md").read_text())
    imported, trained = pages
    assert has_row(trained, "back") and has_row(trained, corpus.name) and has_row(trained, "5,120", "20", "256")
    assert str(tmp_path) not in trained and str(corpus) not in trained
    assert not has_row(imported, "runs/back") and not has_row(imported, str(corpus))
    assert len(rows(imported)) < len(rows(trained)) - 5  # the training settings are unknown


def test_broken_folders_are_not_imported(folder, tmp_path, capsys):
    words = ["import", tmp_path / "hf", "--out", tmp_path / "run"]

    def error_after(name, change):
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "hf")
        file = tmp_path / "hf" / name
        text = None if name.endswith(".safetensors") else change(file.read_text())
        file.unlink()
        if text is not None:
            file.write_text(text)
        return refused(words, capsys)

    source = str(tmp_path / "hf")
    assert mentions(refused(words, capsys), source, "config.json", os.strerror(errno.ENOENT))
    for content in ('{"width": 6', "[]"):
        assert mentions(error_after("config.json", lambda _, content=content: content), f"{source}/config.json", "JSON")
    other = error_after(
        "config.json", lambda text: text.replace('"model_type": "antransformer"', '"model_type": "gpt2"')
    )
    assert mentions(other, source, "'gpt2'", "'antransformer'", "--format native")
    missing = error_after("config.json", lambda text: text.replace('"hidden_size"', '"hidden"'))
    assert mentions(missing, f"{source}/config.json", "hidden_size")
    spelled = error_after("config.json", lambda text: text.replace(": 64", ': "64"'))
    assert mentions(spelled, f"{source}/config.json", "hidden_size", "'64'")
    later = error_after("config.json", lambda text: text.replace('"format_version": 2', '"format_version": 3'))
    assert mentions(later, f"{source}/config.json", "format_version", 3, 2)
    quantized = error_after("config.json", lambda text: text.replace("{", '{"quantization_config": {}, ', 1))
    assert mentions(quantized, source, "quantized")
    other_shape = error_after("config.json", lambda text: text.replace(": 64", ": 128"))
    assert mentions(other_shape, source)
    for name in ("model.safetensors", "tokenizer.json"):
        assert mentions(error_after(name, lambda text: "{}"), f"{source}/{name}")
    (tmp_path / "hf/tokenizer.json").unlink()
    assert mentions(refused(words, capsys), source, "tokenizer.json") and "save_pretrained" in refused(words, capsys)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes").touch()
    shutil.rmtree(tmp_path / "hf")
    shutil.copytree(folder, tmp_path / "hf")
    assert mentions(refused(words, capsys), str(tmp_path / "run"), "--out")


def test_a_tokenizer_with_more_ids_than_the_model_is_not_imported(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<x{number}>" for number in range(40)])
    tokenizer.save_pretrained(tmp_path / "hf")
    complaint = refused(["import", tmp_path / "hf", "--out", tmp_path / "run"], capsys)
    assert mentions(complaint, str(tmp_path / "hf"), len(tokenizer)) and "resize_token_embeddings" in complaint
    assert not (tmp_path / "run").exists()


def test_weights_of_another_shape_or_tokenizer_are_refused_as_init(folder, corpus, tmp_path, capsys):
    import_folder(folder, tmp_path / "back")
    train = ["train", "--init", tmp_path / "back", "--data", corpus, "--out", tmp_path / "new"]
    back = str(tmp_path / "back")
    assert mentions(refused([*train, "--model.width=128"], capsys), back, "model.width", "64", "128")
    assert mentions(refused([*train, "--architecture=gpt+"], capsys), back, "model.architecture", "angpt", "gpt+")
    assert mentions(refused(["train", "--init", tmp_path / "nowhere"], capsys), str(tmp_path / "nowhere"))
    assert mentions(refused(["train", "--resume", "--out", back], capsys), f"--init {back}")
    (tmp_path / "text").mkdir()
    for number in range(12):
        (tmp_path / f"text/{number}.txt").write_text(f"document {number}: to be or not to be. " * 40)
    prepare = ["prepare", tmp_path / "text", "--out", tmp_path / "bpe", "--bpe-vocab-size=257", "--val-fraction=0.4"]
    assert main([str(word) for word in prepare]) == 0
    capsys.readouterr()
    other = refused([*train[:3], "--data", tmp_path / "bpe", *train[5:], "--batch-tokens=192", "--tokens=1K"], capsys)
    assert mentions(other, str(tmp_path / "bpe"), f"--tokenizer {back}")
    assert Tokenizer.load(tmp_path / "bpe").vocab_size == 257 and not (tmp_path / "new").exists()
