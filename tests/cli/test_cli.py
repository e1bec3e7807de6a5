import errno
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from antransformer.cli import VERBS, main
from antransformer.inference import generate
from antransformer.training.lock import lock
from antransformer.training.metrics import read_metrics
from antransformer.training.profiling import report
from helpers.messages import mentions
from helpers.small import SMALL_OPTIONS

QUICK = ["--batch-tokens=256", "--tokens=2560", "--eval-tokens=1024", "--log-every=1", *SMALL_OPTIONS]


def text_folder(folder, documents=12):
    folder.mkdir()
    for number in range(documents):
        (folder / f"{number}.txt").write_text(f"document {number}: to be or not to be, that is the question. " * 40)
    return folder


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A short run made by the command line."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--data", str(corpus), "--out", str(folder), *QUICK]) == 0
    return folder


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_fits_a_terminal_and_names_every_option(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*([verb] if verb else []), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: antransformer")
    if verb in ("prepare", "train", "generate"):
        assert re.search(rf"^  antransformer {verb}\b", text, re.M)  # an example on a line of its own
    if verb == "train":
        assert mentions(text, *["--config", "--resume", "--model.gate-scale", "--no-compile"])
        for option in ("--lr", "--muon-lr", "--keep-every", "--tokens"):
            assert re.search(rf"^ +{option} [A-Z]+\b", text, re.M), option  # takes a value


def test_the_module_runs_too():
    output = subprocess.run([sys.executable, "-m", "antransformer", "--version"], capture_output=True, text=True)
    assert output.returncode == 0 and re.fullmatch(r"antransformer \d+\.\d+\.\d+\n", output.stdout)


def test_importing_needs_no_optional_dependency_and_no_cuda():
    blocked = ["matplotlib", "tensorboard", "pyarrow", "zstandard", "transformers", "wandb", "lm_eval"]
    code = f"""
import sys
from types import SimpleNamespace
for name in {blocked}: sys.modules[name] = None
import antransformer, antransformer.cli, torch
assert not torch.cuda.is_initialized()
assert antransformer.cli.main(["train", "--tokens", "1K"]) == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("tokenizer", [[], ["--bpe-vocab-size", "300"]])
def test_prepare_train_generate(tmp_path, capsys, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    text_folder(tmp_path / "text")
    assert main(["prepare", "text", "--out", "data/mine", "--val-fraction", "0.4", *tokenizer]) == 0
    out = capsys.readouterr().out
    first, *_, last = out.splitlines()
    assert "bpe-" in first if tokenizer else mentions(first, *["data/mine", "byte", "257"])
    assert last.split()[-4:] == ["antransformer", "train", "--data", "data/mine"]
    assert main(["train", "--data", "data/mine", "--architecture", "gpt+", *QUICK]) == 0
    out = capsys.readouterr().out
    *_, line = read_metrics(tmp_path / "runs/gpt+-nano/metrics.jsonl")
    assert mentions(out, *f"10/10 {line['val_loss']:.4f} {line['bits_per_byte']:.4f}".split())
    assert main(["generate", "--checkpoint", "runs/gpt+-nano", "--prompt", "to be", "--max-new-tokens", "20"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("to be") and len(first) > 10
    checkpoint = sorted((tmp_path / "runs/gpt+-nano/checkpoints").iterdir())[-1]
    assert main(["generate", "--checkpoint", str(checkpoint), "--prompt", "to be", "--max-new-tokens", "20"]) == 0
    assert capsys.readouterr().out == first  # the same seed


def test_on_a_device_what_spans_other_operations_is_not_counted_again(tmp_path):
    def event(key, device, *, spans=False):
        return SimpleNamespace(
            key=key, self_device_time_total=device, self_cpu_time_total=1.0, is_user_annotation=spans
        )

    events = [event("ProfilerStep*", 100.0, spans=True), event("aten::mm", 75.0), event("aten::add", 25.0)]
    recorded = SimpleNamespace(key_averages=lambda: events, export_chrome_trace=lambda path: None)
    notes = []
    report(recorded, tmp_path / "trace.json", notes.append)
    assert [note.split() for note in notes[1:]] == [["75.0%", "aten::mm"], ["25.0%", "aten::add"]]


def test_a_profile_of_a_run_is_a_trace_and_the_ten_dearest_operations(tmp_path, capsys, corpus):
    words = ["train", "--data", str(corpus), "--out", str(tmp_path / "run"), *QUICK, "--profile"]
    assert main(words) == 0
    out = capsys.readouterr().out
    names_traced = [event["name"] for event in json.loads((tmp_path / "run/profile.json").read_text())["traceEvents"]]
    assert names_traced.count("data") == 4 and {"aten::mm", "ProfilerStep#7"} < set(names_traced)
    assert not {"ProfilerStep#3", "ProfilerStep#8"} & set(names_traced)  # they count from 0
    lines = [line.split() for line in out.splitlines() if line.lstrip()[:1].isdigit() and "%" in line]
    shares = [float(share.rstrip("%")) for share, *_ in lines]
    assert len(shares) == 10 and shares == sorted(shares, reverse=True) and 20 < sum(shares) <= 100.1
    # The time of a step outside of its operations has another name than the profiler's, ProfilerStep.
    assert "ProfilerStep" not in out and len({" ".join(name) for _, *name in lines} - set(names_traced)) == 1
    assert str(tmp_path / "run/profile.json") in out
    assert main([*words[:4], str(tmp_path / "short"), *QUICK, "--tokens=1024", "--profile"]) == 2
    assert mentions(capsys.readouterr().err, *["--profile", "5", "8", "4"])
    assert not (tmp_path / "short").exists()


def test_generate_folds_an_angpt_to_the_same_text_and_says_what_it_sees_of_a_long_prompt(run, capsys, monkeypatch):
    words = ["generate", "--checkpoint", str(run), "--prompt", "x = 1\n" * 10, "--max-new-tokens", "40"]
    kinds = []

    def spied(model, *arguments, **options):
        kinds.append(type(model).__name__)
        return generate(model, *arguments, **options)

    monkeypatch.setattr("antransformer.cli.generate.generate", spied)
    assert main(words) == 0
    folded = capsys.readouterr()
    assert folded.out.startswith("x = 1\n" * 10) and len(folded.out) > 70
    assert folded.err.count("\n") == 1 and mentions(
        folded.err, *["61", "32"]
    )  # 60 bytes and the start of the text; the context
    monkeypatch.setattr("antransformer.cli.generate.folded_where_possible", lambda model: model)
    assert main(words) == 0
    assert capsys.readouterr().out == folded.out
    assert kinds == ["FoldedAnGPT", "AnGPT"]


def test_train_numbers_its_default_folders(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["train", "--data", str(corpus), *QUICK]) == 0
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


def test_training_with_muon_says_both_rates_and_so_does_the_card(corpus, tmp_path, capsys):
    pytest.importorskip("transformers")
    options = ["--data", str(corpus), "--batch-tokens", "256", "--tokens", "512", "--eval-tokens", "2048"]
    run = str(tmp_path / "run")
    assert main(["train", "--optimizer", "muon", "--muon-lr", "3e-2", *options, *SMALL_OPTIONS, "--out", run]) == 0
    assert any(mentions(line, *["0.012", "0.017", "0.03"]) for line in capsys.readouterr().out.splitlines())
    assert main(["export", "--checkpoint", run, "--out", str(tmp_path / "hf")]) == 0
    (row,) = re.findall(r"^\| optimizer \|.*", (tmp_path / "hf/README.md").read_text(), re.M)
    assert mentions(row, *["Muon", "0.03", "0.9", "0.95"]) and "Adam" in row
    capsys.readouterr()
    assert main(["train", "--muon-lr", "3e-2", *options, "--out", str(tmp_path / "other")]) == 2
    assert mentions(capsys.readouterr().err, *["muon_lr", "optimizer", "muon"])


def test_resume_of_a_finished_run_says_so_and_changes_nothing(run, capsys):
    before = (run / "metrics.jsonl").read_text()
    assert main(["train", "--out", str(run), "--resume"]) == 0
    assert str(run / "checkpoints/step-00000010") in capsys.readouterr().out.splitlines()[0]
    assert (run / "metrics.jsonl").read_text() == before


def test_demo_goes_all_the_way(corpus, tmp_path, monkeypatch, capsys):
    from antransformer.cli import common, demo

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "DEFAULT_DATA", "somewhere else")
    settings = {"data": str(corpus), "batch_tokens": 256, "tokens": 5120, "context": 32, "model": {"layers": 1}}
    monkeypatch.setattr(demo, "read_config", lambda name: settings)
    assert main(["demo", "--out", "runs/demo"]) == 0
    out = capsys.readouterr().out
    gzip = float(re.search(r"gzip -9\D*(\d\.\d+)", out)[1])
    assert 1 < gzip < 4
    picture = (tmp_path / "runs/demo/loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert re.search(r"^def .", out, re.M)  # the sample


def wrong(arguments, capsys):
    """Run a verb that must end with status 2; returns its one line."""
    status = main([str(word) for word in arguments])
    captured = capsys.readouterr()
    assert status == 2, captured.err
    assert captured.err.startswith("antransformer: ") and captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["fly"], "fly prepare train demo"),
        ([], "VERB"),
        (["train", "--lrr", "3"], "--lrr --lr"),
        (["train", "--model.widht=3"], "--model.widht --model.width"),
        (["train", "--lr"], "--lr"),
        (["train", "--lr", "fast"], "lr fast"),
        (["train", "--preset", "mega"], "preset mega pico nano 1b"),
        (["train", "--architecture", "gpt2"], "architecture gpt2 angpt ngpt gpt+ gpt"),
        (["train", "--model.width", "100"], "width 100 head_dim 64 128"),
        (["train", "--architecture", "gpt+", "--model.gate-scale", "none"], "gate_scale gpt+"),
        (["train", "--tokens", "1K"], "tokens 1,000 2,048 batch_tokens"),
        (["train", "--config", "dmo"], "config dmo demo"),
        (["train", "--config", ""], "config demo"),
        (["train", "stray"], "stray"),
        (["train", "--data", "nowhere"], "nowhere"),
        (["train", "--resume"], "--resume --out"),
        (["train", "--resume", "--out", "nowhere"], "nowhere config.yaml"),
        (["generate", "--checkpoint", "nowhere"], "nowhere"),
        (["generate"], "--checkpoint"),
        (["prepare", "nowhere.txt", "--out", "x"], "nowhere.txt"),
        (["prepare", "x"], "--out"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(arguments, facts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mentions(wrong(arguments, capsys), *facts.split())
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_mistakes_that_need_a_run(run, corpus, capsys, tmp_path):
    train = ["train", "--data", corpus, *QUICK]
    before = sorted(path.name for path in run.rglob("*"))
    assert mentions(wrong([*train, "--out", run], capsys), *f"{run} --out --resume".split())
    resume = ["train", "--out", run, "--resume"]
    with lock(run):
        assert mentions(wrong(resume, capsys), *f"{run} {os.getpid()}".split())
    assert mentions(wrong([*resume, "--architecture=ngpt"], capsys), *f"{run} model.architecture angpt ngpt".split())
    assert mentions(wrong([*resume, "--model.width=128"], capsys), *f"{run} model.width 64 128".split())
    text_folder(tmp_path / "text")
    assert main(["prepare", str(tmp_path / "text"), "--out", str(tmp_path / "other"), "--val-fraction", "0.4"]) == 0
    assert mentions(wrong([*resume, "--data", tmp_path / "other"], capsys), *f"{run} {tmp_path / 'other'}".split())
    new = [*train, "--out", tmp_path / "run"]
    assert mentions(wrong([*new, "--model.vocab-size=200"], capsys), *f"{corpus} 256 200 model.vocab_size 257".split())
    long = wrong([*new, "--model.context=500000", "--batch-tokens=500000", "--tokens=1M"], capsys)
    assert mentions(long, *["context", "500000", "500001", "train"])
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("checkpoints/*"))
    generate_from = ["generate", "--checkpoint", run]
    assert mentions(wrong([*generate_from, "--temperature=-1"], capsys), *["temperature", "-1.0"])
    assert mentions(wrong([*generate_from, "--top-p=0"], capsys), *["top_p", "0.0"])
    assert mentions(wrong([*generate_from, "--device=tpu"], capsys), *["device", "tpu", "cpu"])
    assert mentions(wrong([*generate_from, "--seed=-1"], capsys), *["seed", "-1"])
    assert mentions(wrong([*generate_from, "--prompt=\udcff"], capsys), *["prompt", "UTF-8"])
    file = tmp_path / "file"
    file.write_text("text")
    assert mentions(wrong([*train, "--out", file], capsys), *f"{file} --out".split())
    assert mentions(
        wrong([*train, "--out", file / "run"], capsys), *f"{file / 'run'} {os.strerror(errno.ENOTDIR)}".split()
    )
    assert mentions(wrong(["train", "--data", file], capsys), *f"{file} prepare".split())
    assert mentions(wrong(["train", "--data", run], capsys), *f"{run} meta.json".split())
    assert sorted(path.name for path in run.rglob("*")) == before


def test_a_shard_that_changed_is_refused(tmp_path, capsys):
    text_folder(tmp_path / "text")
    assert main(["prepare", str(tmp_path / "text"), "--out", str(tmp_path / "data"), "--val-fraction", "0.4"]) == 0
    shard = tmp_path / "data/train-00000.bin"
    content = shard.read_bytes()
    train = ["train", "--data", tmp_path / "data", "--out", tmp_path / "run", *QUICK]
    shard.write_bytes(content[:-2])
    assert "train-00000.bin" in wrong(train, capsys)
    shard.write_bytes(content[:100] + b"\x01" + content[101:])
    assert "train-00000.bin" in wrong(train, capsys)
    shard.write_bytes(content)
    assert main([str(word) for word in train]) == 0


def test_a_reader_that_goes_away_does_not_end_a_run(corpus, tmp_path):
    words = ["train", "--data", str(corpus), "--out", str(tmp_path / "run"), *QUICK]
    command = [sys.executable, "-m", "antransformer", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
    assert (tmp_path / "run/checkpoints/step-00000010").is_dir()


def test_a_model_that_does_not_fit_is_status_1(corpus, tmp_path, capsys):
    words = ["train", "--data", str(corpus), "--out", str(tmp_path / "run"), *QUICK, "--model.vocab-size=2000000000"]
    assert main([*words, "--model.width=64000", "--lr=1e-3"]) == 1
    assert mentions(capsys.readouterr().err, "--micro-batch-size")
    assert not (tmp_path / "run").exists()


def test_a_failure_of_the_machine_is_status_1(corpus, tmp_path, capsys, monkeypatch):
    failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(*_arguments, **_options):
        raise failure

    monkeypatch.setattr("antransformer.training.metrics.MetricsLog.write", full)
    assert main(["train", "--data", str(corpus), "--out", str(tmp_path / "run"), *QUICK]) == 1
    error = capsys.readouterr().err
    assert error.startswith("antransformer: ") and error.endswith(f"{failure}\n") and error.count("\n") == 1
