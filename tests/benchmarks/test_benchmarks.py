import io
import json
import math
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from rich.console import Console
from torch._dynamo.testing import CompileCounter

from antransformer.benchmarks.growth import exponent
from antransformer.benchmarks.loss_and_optimizer import losses
from antransformer.benchmarks.models import TRAINEES, make
from antransformer.benchmarks.timing import Quartiles, Row, alternate, compare, peak_memory, quartiles
from antransformer.cli import main
from antransformer.cli.bench import DEFAULTS, table
from antransformer.inference import fold
from antransformer.inference.sampling import next_logits, window
from antransformer.models import ModelConfig, build
from helpers.messages import mentions

SIZES = {"vocab_size": 50, "width": 64, "layers": 2, "head_dim": 32, "context": 24}
OPTIONS = [f"--model.{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
TINY = ["bench", "--what", "generate", "--prompt", "8", "--new", "4", "--rounds", "3", "--batch", "1", "2", *OPTIONS]
OURS = ["folded", "gpt+", "ngpt", "angpt"]
CONTENDERS = [*OURS, "qwen3 static", "qwen3"]


def test_quartiles():
    assert quartiles([3.0, 1.0, 2.0, 5.0, 4.0]) == Quartiles(2, 3, 4)
    assert quartiles([1.0, 2.0]) == Quartiles(1.25, 1.5, 1.75)
    assert quartiles([7.0]) == Quartiles(7, 7, 7)


def test_contenders_take_turns_and_the_first_turn_does_not_count():
    order = []

    def call(name):
        order.append(name)
        return {"one": float(len(order)), "two": 0.5}

    times = alternate({name: partial(call, name) for name in "abc"}, rounds=8)
    rounds = ["".join(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert rounds[0] == "abc" and {"".join(sorted(turn)) for turn in rounds} == {"abc"}
    assert len(rounds) == 9 and len(set(rounds)) > 3
    for name in "abc":
        assert times["one"][name] == [3 * turn + rounds[turn].index(name) + 1 for turn in range(1, 9)]
        assert times["two"][name] == [0.5] * 8


def test_the_ratio_is_that_within_each_round():
    drift = [1.0, 7.0, 2.0, 100.0, 3.0]  # the machine is slower by so much, for all at once
    seconds = {"base": drift, "half": [2 * second for second in drift]}
    base, half = compare({"batch": 3}, seconds, amount=10, baseline="base")
    assert base.ratio == Quartiles(1, 1, 1) and half.ratio == Quartiles(0.5, 0.5, 0.5)
    assert base.speed == quartiles([10 / second for second in drift]) and half.speed.median == base.speed.median / 2
    assert half.task == {"batch": 3} and half.variant == "half" and half.seconds == seconds["half"]


def check(content, modes, variants=CONTENDERS):
    rows = content["rows"]
    tasks = [(mode, batch, part) for mode in modes for batch in (1, 2) for part in ("prefill", "decode")]
    assert [tuple(row["task"].values()) for row in rows[:: len(variants)]] == tasks
    assert [row["variant"] for row in rows] == variants * len(tasks)
    for number, row in enumerate(rows):
        _mode, batch, part = row["task"].values()
        baseline = rows[number - number % len(variants)]
        speeds = [batch * {"prefill": 8, "decode": 4}[part] / seconds for seconds in row["seconds"]]
        assert len(speeds) == 3 and min(speeds) > 0
        assert row["speed"]["median"] == pytest.approx(sorted(speeds)[1])
        ratios = [one / other for one, other in zip(baseline["seconds"], row["seconds"], strict=True)]
        assert row["ratio"]["median"] == pytest.approx(sorted(ratios)[1])
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]


def test_generation_is_timed_for_all_contenders(tmp_path, capsys):
    pytest.importorskip("transformers")
    assert main([*TINY, "--json", str(tmp_path / "speed.json"), "--threads", "1", "--dtype", "bfloat16"]) == 0
    out, err = capsys.readouterr()
    content = json.loads((tmp_path / "speed.json").read_text())
    check(content, ["eager"])
    assert content["what"] == "generate" and content["dtype"] == "torch.bfloat16" and content["baseline"] == "folded"
    assert content["model"]["layers"] == 2 and content["machine"]["threads"] == 1
    lines = [line for line in out.splitlines() if line.strip().startswith("eager")]
    for line, row in zip(lines, content["rows"], strict=True):
        start = [*(str(value) for value in row["task"].values()), *row["variant"].split()]
        assert line.split()[: len(start) + 1] == [*start, f"{row['speed']['median']:,.0f}"]
        assert line.split()[-2] == f"{row['ratio']['median']:.2f}"
    for line, batch in zip(err.splitlines(), (1, 2), strict=True):
        assert mentions(line, "eager", batch)


def test_compiled_generation_is_timed_too_and_qwen3_left_out_where_it_is_not_installed(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    assert main([*TINY, "--mode", "both", "--json", str(tmp_path / "speed.json")]) == 0
    check(json.loads((tmp_path / "speed.json").read_text()), ["eager", "compiled"], OURS)
    noted = [line for line in capsys.readouterr().err.splitlines() if "qwen3" in line]
    assert len(noted) == 1 and mentions(noted[0], "transformers", "antransformer[hf]")


STEP = ["bench", "--what", "step", "--batch", "2", "--rounds", "3", "--threads", "1", *OPTIONS]


def test_training_steps_of_ours_and_of_others_are_timed(tmp_path, capsys):
    pytest.importorskip("transformers"), pytest.importorskip("x_transformers"), pytest.importorskip("nGPT_pytorch")
    assert main([*STEP, "--json", str(tmp_path / "speed.json")]) == 0
    content = json.loads((tmp_path / "speed.json").read_text())
    rows = content["rows"]
    assert [row["variant"] for row in rows] == list(TRAINEES) and content["baseline"] == "gpt+"
    assert content["batch"] == 2 and content["versions"]["torch"] == torch.__version__
    for row in rows:
        assert row["speed"]["median"] == pytest.approx(2 * 24 / sorted(row["seconds"])[1])
        assert 0 < row["utilization"]["low"] <= row["utilization"]["median"] <= row["utilization"]["high"]
        # Parameters, both moments of Adam and gradients, of which the largest is there beside what made it.
        assert row["memory"] > 4 * 4 * build(ModelConfig(**SIZES)).parameter_count()
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.strip().startswith("eager")] == list(TRAINEES)


def test_a_profile_is_a_trace_and_the_ten_dearest_operations(tmp_path, capsys):
    assert main([*STEP, "--variants", "gpt+", "angpt", "--profile", str(tmp_path / "traces")]) == 0
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == ["eager-angpt.json", "eager-gpt+.json"]
    trace = json.loads((tmp_path / "traces/eager-angpt.json").read_text())
    assert {"aten::mm", "aten::embedding"} <= {event["name"] for event in trace["traceEvents"]}
    lines = [line.split() for line in capsys.readouterr().err.splitlines() if "%" in line]
    shares = [float(share.rstrip("%")) for share, *_ in lines]
    assert len(shares) == 20 and shares[:10] == sorted(shares[:10], reverse=True) and 20 < sum(shares[:10]) <= 100.1


def test_growth_has_exponents_beside_those_of_operations_and_memory_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    sizes = {**SIZES, "layers": 1, "width": 32}
    words = [f"--model.{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    words += ["--batch", "2", "--rounds", "2", "--threads", "1", "--json", str(tmp_path / "growth.json")]
    assert main(["bench", "--what", "step", *words, "--sweep", str(tmp_path / "growth")]) == 0
    content = json.loads((tmp_path / "growth.json").read_text())
    rows, growth = content["rows"], {(it["axis"], it["name"]): it for it in content["growth"]}
    found = [(row["task"]["axis"], row["task"]["size"], row["variant"]) for row in rows]
    bases = {"width": 32, "layers": 1, "context": 24, "batch": 2}
    assert found == [
        (axis, base * factor, name)
        for axis, base in bases.items()
        for factor in (1, 2, 4, 8)
        for name in ("gpt+", "angpt")
    ]
    assert set(growth) == {(axis, name) for axis in bases for name in ("gpt+", "angpt")}
    for (axis, _), it in growth.items():
        assert 0 < it["time"] < it["asked"] + 1 and 0 < it["memory"] < 2.1
        assert it["asked"] == pytest.approx(1) if axis == "batch" else 0.5 < it["asked"] < 2
        mine = [row for row in rows if (row["task"]["axis"], row["variant"]) == (axis, it["name"])]
        slope = math.log2(sorted(mine[-1]["seconds"])[0] / sorted(mine[-2]["seconds"])[0])
        assert it["end"] == pytest.approx(slope, abs=1)
    assert (tmp_path / "growth/growth-eager.png").stat().st_size > 10_000
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    for it in content["growth"]:
        numbers = [it[key] for key in ("time", "asked", "end", "end_asked", "memory", "memory_asked")]
        assert [it["mode"], it["axis"], it["name"], *(f"{number:.2f}" for number in numbers)] in shown


def test_exponents_are_those_of_power_laws():
    assert exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    assert exponent([128, 256], [1, 1]) == pytest.approx(0)


def test_data_is_timed_from_text_to_tokens_and_from_tokens_to_steps(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / f"text/{number}.txt").write_text(f"number {number}, and a few words more\n" * 20)
    words = ["bench", "--what", "data", "--text", str(tmp_path / "text"), "--rounds", "2", "--batch", "2", *OPTIONS]
    assert main([*words, "--json", str(tmp_path / "speed.json")]) == 0
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    kinds = ["byte", *dict.fromkeys(row["task"]["of"] for row in rows[2:4]), "training"]
    assert kinds[1].startswith("bpe-")
    pairs = [("tokenizers", "prepare"), ("tokenizers", "prepare"), ("in turn", "ahead")]
    expected = [(kind, name) for kind, names in zip(kinds, pairs, strict=True) for name in names]
    assert [(row["task"]["of"], row["variant"]) for row in rows] == expected
    size = sum(len(path.read_bytes()) + 1 for path in (tmp_path / "text").iterdir())  # and an end of text each
    assert rows[1]["speed"]["median"] == pytest.approx(sum(size / taken for taken in rows[1]["seconds"]) / 2)
    assert rows[4]["waiting"]["median"] > 0 and max(row["waiting"]["high"] for row in rows[4:]) < 1
    out = capsys.readouterr().out
    assert all(f" {row['waiting']['median']:.2%}" in out for row in rows[4:])
    assert main([*words, "--tokenizer", "byte", "byte"]) == 0
    capsys.readouterr()
    assert main([*words, "--tokenizer", str(tmp_path / "none.json")]) == 2
    assert mentions(capsys.readouterr().err, tmp_path / "none.json", "byte", "tokenizer.json")


def test_a_table_is_whole_in_80_columns_and_where_nobody_looks(monkeypatch):
    row = Row({"mode": "compiled"}, "x-transformers", [1.0], *[Quartiles(1e5, 2e5, 3e5)] * 2, 10**9, Quartiles(0, 1, 1))
    row = replace(row, ratio=Quartiles(0.99, 1, 1.01))
    console = Console(width=80, file=io.StringIO())
    console.print(table([row]))
    lines = console.file.getvalue().splitlines()
    assert "compiled x-transformers  200,000 100,000-300,000  1.00 0.99-1.01 954 100%" in lines[-1]


def test_the_loss_is_timed_whole_and_in_chunks(tmp_path, capsys):
    words = ["bench", "--what", "loss", "--preset", "pico", "--model.width", "64", "--batch", "2", "--rounds", "2"]
    assert main([*words, "--json", str(tmp_path / "speed.json")]) == 0
    rows = {
        (row["task"]["vocabulary"], row["variant"]): row
        for row in json.loads((tmp_path / "speed.json").read_text())["rows"]
    }
    assert list(rows)[:2] == [(512, "whole"), (512, "chunks")] and (50304, "chunks") in rows
    assert rows[50304, "chunks"]["memory"] < rows[50304, "whole"]["memory"]
    assert "50,304" in capsys.readouterr().out
    assert main([*words, "--model.vocab-size", "300"]) == 0
    assert "50,304" not in capsys.readouterr().out


@pytest.mark.parametrize("loss", list(losses().values()), ids=list(losses()))
def test_the_losses_that_are_timed_are_the_same(loss):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(2, 9, 8), torch.randn(30, 8), torch.randint(30, (2, 9))
    torch.testing.assert_close(loss(hidden, weight, targets), losses()["whole"](hidden, weight, targets))


def test_the_optimizer_is_timed_with_and_without_bounds(tmp_path, capsys):
    words = ["bench", "--what", "optimizer", "--rounds", "2", *OPTIONS]
    assert main([*words, "--json", str(tmp_path / "speed.json")]) == 0
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    found = [(row["task"]["architecture"], row["variant"]) for row in rows]
    assert found == [(name, part) for name in ("angpt", "ngpt") for part in ("optimizer", "with bounds")]
    out = capsys.readouterr().out
    assert rows[0]["ratio"]["median"] == 1 and all(f" {row['speed']['median']:,.0f} " in out for row in rows)


def test_compiled_steps_of_chosen_contenders(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    words = [*STEP, "--mode", "compiled", "--variants", "angpt", "gpt+", "--json", str(tmp_path / "speed.json")]
    assert main(words) == 0
    content = json.loads((tmp_path / "speed.json").read_text())
    assert [row["variant"] for row in content["rows"]] == ["angpt", "gpt+"] and content["baseline"] == "angpt"
    assert content["rows"][0]["ratio"] == {"low": 1, "median": 1, "high": 1}


def test_what_is_not_installed_is_left_out(capsys, monkeypatch):
    for module in ("transformers", "x_transformers", "nGPT_pytorch"):
        monkeypatch.setitem(sys.modules, module, None)
    trainees = make(list(TRAINEES), ModelConfig(**SIZES), torch.device("cpu"), print)
    assert list(trainees) == list(TRAINEES)[:3]
    expected = [
        ("qwen3", "transformers", "antransformer[hf]"),
        ("x-transformers", "antransformer[bench]"),
        ("ngpt-pytorch", "nGPT-pytorch", "antransformer[bench]"),
    ]
    for line, parts in zip(capsys.readouterr().out.splitlines(), expected, strict=True):
        assert mentions(line, *parts)


@pytest.mark.parametrize("name", TRAINEES)
def test_all_that_is_trained_has_the_shape_and_learns_from_the_same_tokens(name):
    shape = ModelConfig(**SIZES)
    trainee = make([name], shape, torch.device("cpu"), print).get(name) or pytest.skip(f"{name} is not installed")
    ours = build(shape).parameter_count()
    assert sum(parameter.numel() for parameter in trainee.model.parameters()) == pytest.approx(ours, rel=0.05)
    tokens = torch.randint(50, (2, 25), generator=torch.Generator().manual_seed(1))
    first = trainee.loss(tokens)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 50  # the last is a target, and nothing follows from it
    assert first.item() == pytest.approx(math.log(50), rel=0.2) and trainee.loss(changed) != first
    for _ in range(10):
        for group in trainee.optimizer.param_groups:
            group["lr"] = 1e-2
        trainee.loss(tokens).backward()
        trainee.optimizer.step()
        trainee.optimizer.zero_grad()
    assert trainee.loss(tokens) < first - 0.1


def test_peak_memory_is_that_of_all_tensors_at_once():
    def call():
        one = torch.empty(1000, dtype=torch.float64)
        del one
        one = torch.empty(1500, dtype=torch.float64)
        other = torch.empty(500, dtype=torch.float64)
        del one, other

    assert peak_memory(call, torch.device("cpu")) == 16_000
    assert peak_memory(lambda: None, torch.device("cpu")) == 0


@pytest.mark.parametrize("prompts", [[[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4]]])
@pytest.mark.parametrize("name", OURS)
def test_a_compiled_step_is_compiled_once_for_all_tokens(name, prompts):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = build(ModelConfig(**SIZES, architecture="angpt" if name == "folded" else name)).eval()
    model = fold(model) if name == "folded" else model
    counter = CompileCounter()
    step = torch.compile(partial(next_logits, model), backend=counter, fullgraph=True)
    (new, cache), (_, other) = window(model, prompts), window(model, prompts)
    for _ in range(8):
        logits = step(new, cache)
        torch.testing.assert_close(logits, next_logits(model, new, other))
        new = logits.argmax(-1, keepdim=True)
    assert cache.length == other.length == 10
    assert counter.frame_count <= 3  # the prompt, a token, a token behind any number of others


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["bench"], ("--what",)),
        (["bench", "--what", "naps"], ("--what", "naps", *DEFAULTS)),
        ([*TINY, "--batch", "0"], ("batch", 0)),
        ([*TINY, "--new", "0"], ("new", 0)),
        ([*TINY, "--prompt", "0"], ("prompt", 0)),
        ([*TINY, "--rounds", "0"], ("rounds", 0)),
        ([*TINY, "--threads", "0"], ("--threads", 0)),
        ([*STEP, "--prompt", "21"], ("--prompt", "generate", "step")),
        ([*TINY, "--variants", "gpt+"], ("--variants", "step", "generate")),
        ([*STEP, "--variants", "gpt+", "llama"], ("llama", *TRAINEES)),
        (["bench", "--what", "optimizer", "--batch", "2"], ("--batch", *DEFAULTS)),
        (["bench", "--what", "loss", "--rounds", "0"], ("rounds", 0)),
        (["bench", "--what", "loss", "--batch", "0"], ("batch", 0)),
        ([*STEP, "--profile", "/dev/null"], ("--profile", "/dev/null")),
        ([*STEP, "--sweep", "/dev/null"], ("--sweep", "/dev/null")),
        ([*TINY, "--sweep", "growth"], ("--sweep", "step", "generate")),
        ([*STEP, "--text", "book.txt"], ("--text", "data", "step")),
        (["bench", "--what", "data", "--text", "none.txt"], ("none.txt",)),
        (["bench", "--what", "data", "--batch", "2", "3"], ("--batch", 2)),
        ([*STEP, "--batch", "2", "3"], ("--batch", 2)),
        ([*STEP, "--batch", "0"], ("batch", 0)),
        ([*STEP, "--rounds", "0"], ("rounds", 0)),
        ([*TINY, "--prompt", "21"], (21, 4, 24, "model.context")),
        ([*TINY, "--preset", "huge"], ("huge", "pico", "nano")),
        ([*TINY, "--model.width", "60"], ("width", 60, "head_dim", 32, 64)),
        ([*TINY, "--model.architecture", "gpt+"], ("--model.architecture",)),
        ([*TINY, "--device", "tpu"], ("tpu",)),
        ([*TINY, "--json", "nowhere/speed.json"], ("--json", "nowhere/speed.json")),
    ],
)
def test_what_can_not_be_measured_is_refused_in_one_line(words, parts, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert mentions(err, *parts) and err.count("\n") == 1 and out == ""
