"""The verb train: settings, output, profiles, resuming, mistakes and failures of the machine."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest

from antransformer.cli import main
from antransformer.lock import lock
from antransformer.training.config import resolve_config
from antransformer.training.launch import law_note
from antransformer.training.metrics import read_metrics
from antransformer.training.profiling import report
from helpers.commands import TEN_STEPS, refused, write_documents
from helpers.messages import mentions
from helpers.small import SMALL_OPTIONS


def test_annotations_that_span_operations_on_a_device_are_not_counted_again(tmp_path):
    def event(key, device, *, spans=False):
        return SimpleNamespace(
            key=key, self_device_time_total=device, self_cpu_time_total=1.0, is_user_annotation=spans
        )

    events = [event("ProfilerStep*", 100.0, spans=True), event("aten::mm", 75.0), event("aten::add", 25.0)]
    recorded = SimpleNamespace(key_averages=lambda: events, export_chrome_trace=lambda path: None)
    notes = []
    report(recorded, tmp_path / "trace.json", notes.append)
    assert [note.split() for note in notes[1:]] == [["75.0%", "aten::mm"], ["25.0%", "aten::add"]]


def test_profile_writes_a_trace_and_prints_the_ten_most_expensive_operations(tmp_path, capsys, corpus):
    words = ["train", "--data", str(corpus), "--out", str(tmp_path / "run"), *TEN_STEPS, "--profile"]
    assert main(words) == 0
    out = capsys.readouterr().out
    names_traced = [event["name"] for event in json.loads((tmp_path / "run/profile.json").read_text())["traceEvents"]]
    assert names_traced.count("data") == 4 and {"aten::mm", "ProfilerStep#7"} < set(names_traced)
    assert not {"ProfilerStep#3", "ProfilerStep#8"} & set(names_traced)  # they count from 0
    lines = [line.split() for line in out.splitlines() if line.lstrip()[:1].isdigit() and "%" in line]
    shares = [float(share.rstrip("%")) for share, *_ in lines]
    assert len(shares) == 10 and shares == sorted(shares, reverse=True) and 20 < sum(shares) <= 100.1
    # The time of a step outside of its operations has another name than the profiler's, ProfilerStep. On a busy machine
    # it may not be among the ten.
    assert "ProfilerStep" not in out and len({" ".join(name) for _, *name in lines} - set(names_traced)) <= 1
    assert str(tmp_path / "run/profile.json") in out
    assert main([*words[:4], str(tmp_path / "short"), *TEN_STEPS, "--tokens=1024", "--profile"]) == 2
    assert mentions(capsys.readouterr().err, *["--profile", "5", "8", "4"])
    assert not (tmp_path / "short").exists()


def test_a_finished_run_tells_how_to_train_longer(corpus, tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["train", "--data", str(corpus), "--out", str(folder), *TEN_STEPS, "--schedule=wsd", "--decay-fraction=0.2"]
    assert main(words) == 0
    result = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("validation loss"))
    assert main(["train", "--out", str(folder), "--resume"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("validation loss")] == [result]
    [advice] = [line for line in lines if "--rewarm" in line]
    command = shlex.split(advice[advice.index("antransformer train") :])[1:]
    assert mentions(advice, folder, 10) and main([*command, "--log-every=10"]) == 0
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 20


def test_default_run_folders_are_numbered(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["train", "--data", str(corpus), *TEN_STEPS]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["angpt-nano", "angpt-nano-2"]


def test_settings_come_from_file_and_command_line(corpus, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(
        f"data: {corpus}\nbatch_tokens: 256\ntokens: 2K\nlr: 2e-3\nmodel: {{width: 64, layers: 1, head_dim: 32}}\n"
        "context: 32\narchitecture: ngpt\n"
    )
    arguments = [
        "train",
        "--config",
        str(tmp_path / "mine.yaml"),
        "--out",
        str(tmp_path / "run"),
        "--model.layers",
        "2",
    ]
    assert main([*arguments, "--tokens", "1024"]) == 0
    config = (tmp_path / "run/config.yaml").read_text()
    for line in ("architecture: ngpt", "layers: 2", "lr: 0.002", "tokens: 1024", "context: 32"):
        assert line in config
    assert any(mentions(line, *["ngpt", "4", "256", "0.002"]) for line in capsys.readouterr().out.splitlines())


def test_both_learning_rates_of_muon_are_printed_and_on_the_model_card(corpus, tmp_path, capsys):
    pytest.importorskip("transformers")
    options = ["--data", str(corpus), "--batch-tokens", "256", "--tokens", "512", "--eval-tokens", "2048"]
    run = str(tmp_path / "run")
    assert main(["train", "--optimizer", "muon", "--muon-lr", "3e-2", *options, *SMALL_OPTIONS, "--out", run]) == 0
    assert any(mentions(line, *["0.012", "0.017", "0.03"]) for line in capsys.readouterr().out.splitlines())
    assert main(["export", "--checkpoint", run, "--out", str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf/README.md").read_text()
    (row,) = re.findall(r"^\| optimizer \|.*", card, re.M)
    assert mentions(row, "Muon", 0.9, 0.99) and "Adam" in row
    (row,) = re.findall(r"^\| learning rate \|.*", card, re.M)
    assert mentions(row, "Muon", 0.012, 0.017, 0.03)
    capsys.readouterr()
    assert main(["train", "--optimizer", "adam", "--muon-lr", "3e-2", *options, "--out", str(tmp_path / "other")]) == 2
    assert mentions(capsys.readouterr().err, *["muon_lr", "optimizer", "muon"])


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, ("batch and learning rate", "50,304")),
        ({"batch_tokens": "8K"}, ("learning rate by", "50,304")),
        ({"batch_tokens": "8K", "lr": 1e-3}, ()),
        ({"model": {"vocab_size": 50_304}}, ()),
        ({"preset": "pico"}, ()),
    ],
)
def test_the_start_says_for_which_size_the_laws_gave_batch_and_learning_rate(settings, parts):
    note = law_note(resolve_config({"preset": "32m", **settings}, 4096))
    assert mentions(note, *parts) if parts else note == ""


def test_normuon_with_cautious_decay_from_the_command_line(corpus, tmp_path, capsys):
    pytest.importorskip("transformers")
    options = ["--data", str(corpus), "--batch-tokens", "256", "--tokens", "512", "--eval-tokens", "2048"]
    options += ["--optimizer", "normuon", "--architecture", "gpt+", "--cautious-weight-decay", *SMALL_OPTIONS]
    run = tmp_path / "run"
    assert main(["train", *options, "--weight-decay", "0", "--out", str(run)]) == 2
    assert mentions(capsys.readouterr().err, "cautious_weight_decay", "weight_decay", 0) and not run.exists()
    assert main(["train", *options, "--weight-decay", "0.2", "--out", str(run)]) == 0
    assert any(mentions(line, "NorMuon", "0.02") for line in capsys.readouterr().out.splitlines())
    config = (run / "config.yaml").read_text()
    assert all(line in config for line in ("optimizer: normuon", "muon_lr: 0.02", "cautious_weight_decay: true"))
    assert main(["export", "--checkpoint", str(run), "--out", str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf/README.md").read_text()
    assert re.search(r"^\| optimizer \| NorMuon", card, re.M)
    assert re.search(r"^\| learning rate \|.*0\.02 for block matrices \(NorMuon\)", card, re.M)
    assert re.search(r"^\| weight decay \| 0\.2, cautious", card, re.M)


def test_resuming_a_finished_run_changes_nothing(trained, capsys):
    before = (trained / "metrics.jsonl").read_text()
    assert main(["train", "--out", str(trained), "--resume"]) == 0
    assert str(trained / "checkpoints/step-00000010") in capsys.readouterr().out.splitlines()[0]
    assert (trained / "metrics.jsonl").read_text() == before


def test_wrong_input_for_an_existing_run(trained, corpus, capsys, tmp_path):
    train = ["train", "--data", corpus, *TEN_STEPS]
    before = sorted(path.name for path in trained.rglob("*"))
    assert mentions(refused([*train, "--out", trained], capsys), *f"{trained} --out --resume".split())
    resume = ["train", "--out", trained, "--resume"]
    with lock(trained):
        assert mentions(refused(resume, capsys), *f"{trained} {os.getpid()}".split())
    assert mentions(
        refused([*resume, "--architecture=ngpt"], capsys), *f"{trained} model.architecture angpt ngpt".split()
    )
    assert mentions(refused([*resume, "--model.width=128"], capsys), *f"{trained} model.width 64 128".split())
    write_documents(tmp_path / "text")
    assert main(["prepare", str(tmp_path / "text"), "--out", str(tmp_path / "other"), "--val-fraction", "0.4"]) == 0
    assert mentions(
        refused([*resume, "--data", tmp_path / "other"], capsys), *f"{trained} {tmp_path / 'other'}".split()
    )
    new = [*train, "--out", tmp_path / "run"]
    assert mentions(
        refused([*new, "--model.vocab-size=200"], capsys), *f"{corpus} 256 200 model.vocab_size 257".split()
    )
    long = refused([*new, "--model.context=1000000", "--batch-tokens=1M", "--tokens=2M"], capsys)
    assert mentions(long, *["context", "1000000", "1000001", "train"])
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("checkpoints/*"))
    generate_from = ["generate", "--checkpoint", trained]
    assert mentions(refused([*generate_from, "--temperature=-1"], capsys), *["temperature", "-1.0"])
    assert mentions(refused([*generate_from, "--top-p=0"], capsys), *["top_p", "0.0"])
    assert mentions(refused([*generate_from, "--device=tpu"], capsys), *["device", "tpu", "cpu"])
    assert mentions(refused([*generate_from, "--seed=-1"], capsys), *["seed", "-1"])
    assert mentions(refused([*generate_from, "--prompt=\udcff"], capsys), *["prompt", "UTF-8"])
    file = tmp_path / "file"
    file.write_text("text")
    assert mentions(refused([*train, "--out", file], capsys), *f"{file} --out".split())
    assert mentions(refused([*train, "--out", file / "run"], capsys), *f"{file} --out".split())
    assert mentions(refused(["train", "--data", file], capsys), *f"{file} prepare".split())
    assert mentions(refused(["train", "--data", trained], capsys), *f"{trained} meta.json".split())
    assert sorted(path.name for path in trained.rglob("*")) == before


def test_a_changed_shard_is_refused(tmp_path, capsys):
    write_documents(tmp_path / "text")
    assert main(["prepare", str(tmp_path / "text"), "--out", str(tmp_path / "data"), "--val-fraction", "0.4"]) == 0
    shard = tmp_path / "data/train-00000.bin"
    content = shard.read_bytes()
    train = ["train", "--data", tmp_path / "data", "--out", tmp_path / "run", *TEN_STEPS]
    shard.write_bytes(content[:-2])
    assert "train-00000.bin" in refused(train, capsys)
    shard.write_bytes(content[:100] + b"\x01" + content[101:])
    assert "train-00000.bin" in refused(train, capsys)
    shard.write_bytes(content)
    assert main([str(word) for word in train]) == 0


def test_a_closed_pipe_does_not_end_a_run(corpus, tmp_path):
    words = ["train", "--data", str(corpus), "--out", str(tmp_path / "run"), *TEN_STEPS]
    command = [sys.executable, "-m", "antransformer", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
    assert (tmp_path / "run/checkpoints/step-00000010").is_dir()


def test_out_of_memory_is_status_1(corpus, tmp_path, capsys):
    words = [
        "train",
        "--data",
        str(corpus),
        "--out",
        str(tmp_path / "run"),
        *TEN_STEPS,
        "--model.vocab-size=2000000000",
    ]
    assert main([*words, "--model.width=64000", "--lr=1e-3", "--muon-lr=1e-2", "--micro-batch-size=1"]) == 1
    assert mentions(capsys.readouterr().err, "--micro-batch-size", "--batch-tokens")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_status_1(corpus, tmp_path, capsys, monkeypatch):
    failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(*_arguments, **_options):
        raise failure

    monkeypatch.setattr("antransformer.training.metrics.MetricsLog.write", full)
    assert main(["train", "--data", str(corpus), "--out", str(tmp_path / "run"), *TEN_STEPS]) == 1
    error = capsys.readouterr().err
    assert error.startswith("antransformer: ") and error.endswith(f"{failure}\n") and error.count("\n") == 1


def test_a_run_with_a_relative_init_resumes_by_its_own_command(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", str(corpus), "--out", "first", *TEN_STEPS]) == 0
    command = ["train", "--init", "first", "--data", str(corpus), "--out", "second", *TEN_STEPS]
    assert main(command) == 0
    assert main([*command, "--resume"]) == 0
