import io
import json
import math
import statistics
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch._dynamo.testing import CompileCounter

from antransformer.benchmarks import busy, generate
from antransformer.benchmarks.growth import exponent
from antransformer.benchmarks.loss_and_optimizer import losses
from antransformer.benchmarks.models import BUILDERS, build_variants
from antransformer.benchmarks.settings import MASKED_VARIANTS, VARIANTS
from antransformer.benchmarks.timing import Benchmark, Quartiles, Row, alternate, make_rows, peak_memory, quartiles
from antransformer.cli import main
from antransformer.cli.bench import DEFAULTS, result_table
from antransformer.data import ShuffledWindows
from antransformer.errors import MachineError
from antransformer.inference import fold
from antransformer.inference.sampling import next_logits, window
from antransformer.models import ModelConfig, build
from helpers.exported import make_run
from helpers.messages import mentions

SIZES = {"vocab_size": 50, "width": 64, "layers": 2, "head_dim": 32, "context": 24}
OPTIONS = [f"--model.{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
GENERATE = ["bench", "generate", "--prompt-tokens=8", "--max-new-tokens=4", "--rounds=3", "--batch", "1", "2", *OPTIONS]
OURS = ["folded", "gpt+", "ngpt", "angpt"]
GENERATION_VARIANTS = [*OURS, "qwen3 static", "qwen3"]


def test_names_of_variants_have_builders():
    assert tuple(BUILDERS) == (*VARIANTS, *MASKED_VARIANTS)


def test_quartiles():
    assert quartiles([3.0, 1.0, 2.0, 5.0, 4.0]) == Quartiles(2, 3, 4)
    assert quartiles([1.0, 2.0]) == Quartiles(1.25, 1.5, 1.75)
    assert quartiles([7.0]) == Quartiles(7, 7, 7)


def test_variants_alternate_after_an_uncounted_warm_up():
    order = []

    def call(name):
        order.append(name)
        return {"one": float(len(order)), "two": 0.5}

    times, problems = alternate({name: partial(call, name) for name in "abc"}, rounds=8)
    assert not problems
    rounds = ["".join(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert rounds[0] == "abc" and {"".join(sorted(names)) for names in rounds} == {"abc"}
    assert len(rounds) == 9 and len(set(rounds)) > 3
    for name in "abc":
        assert times["one"][name] == [3 * number + rounds[number].index(name) + 1 for number in range(1, 9)]
        assert times["two"][name] == [0.5] * 8


def test_a_variant_that_raises_is_left_out_and_the_others_are_timed():
    calls = dict.fromkeys("abc", 0)

    def call(name):
        calls[name] += 1
        if name == "a" or (name == "b" and calls[name] == 3):
            raise TypeError(f"{name} expects another dtype\nand more lines")
        return {"total": 1.0}

    lines = []
    times, problems = alternate({name: partial(call, name) for name in "abc"}, rounds=4, log=lines.append)
    assert times == {"total": {"c": [1.0] * 4}} and calls == {"a": 1, "b": 3, "c": 5}
    assert problems == {name: f"TypeError: {name} expects another dtype" for name in "ab"}
    assert len(lines) == 2
    rows = make_rows({"batch": 1}, times["total"], 2, "a", problems)
    assert [(row.variant, row.problem is None) for row in rows] == [("c", True), ("a", False), ("b", False)]
    assert rows[0].ratio == Quartiles(1, 1, 1) and rows[1].speed is None and rows[1].ratio is None
    with pytest.raises(MachineError, match="TypeError"):
        make_rows({"batch": 1}, {}, 2, "a", problems)
    rows = make_rows({"batch": 1}, {}, 2, "a", problems, strict=False)
    assert {row.variant: row.problem for row in rows} == problems


def broken_peers(monkeypatch):
    """One peer that cannot be built, and one whose steps raise."""
    broken = build_variants(["gpt+"], ModelConfig(**SIZES), torch.device("cpu"), print)[0]["gpt+"]

    def loss(tokens):
        raise RuntimeError("expected scalar type Float but found BFloat16")

    def unbuildable(shape):
        raise TypeError("unexpected keyword argument")

    monkeypatch.setitem(BUILDERS, "x-transformers", lambda shape: broken._replace(loss=loss))
    monkeypatch.setitem(BUILDERS, "qwen3", unbuildable)


def test_a_peer_that_fails_is_a_row_with_the_reason(tmp_path, capsys, monkeypatch):
    broken_peers(monkeypatch)
    words = [*STEP, "--variants", "qwen3", "x-transformers", "angpt", "gpt+", "--dtype", "bfloat16"]
    assert main([*words, "--json", str(tmp_path / "speed.json")]) == 0
    rows = {row["variant"]: row for row in json.loads((tmp_path / "speed.json").read_text())["rows"]}
    assert list(rows) == ["angpt", "gpt+", "qwen3", "x-transformers"]
    assert rows["angpt"]["ratio"]["median"] == 1 and rows["gpt+"]["speed"]["median"] > 0
    assert all(rows[name]["problem"] is None for name in ("angpt", "gpt+"))
    assert "TypeError" in rows["qwen3"]["problem"] and "BFloat16" in rows["x-transformers"]["problem"]
    assert all(rows[name]["speed"] is None and not rows[name]["seconds"] for name in ("qwen3", "x-transformers"))
    out = capsys.readouterr().out
    assert mentions(out, "qwen3", "TypeError", "x-transformers", "BFloat16")


def test_a_peer_that_fails_has_no_exponents(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    broken_peers(monkeypatch)
    sizes = {**SIZES, "layers": 1, "width": 32}
    words = [f"--model.{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    words += ["--batch=1", "--rounds=1", "--threads=1", "--variants", "x-transformers", "angpt", "qwen3"]
    words += ["--json", str(tmp_path / "growth.json"), "--sweep", str(tmp_path / "growth")]
    assert main(["bench", "step", *words]) == 0
    content = json.loads((tmp_path / "growth.json").read_text())
    assert {item["variant"] for item in content["growth"]} == {"angpt"}
    assert {row["variant"] for row in content["rows"] if row["problem"]} == {"x-transformers", "qwen3"}
    assert (tmp_path / "growth/growth-eager.png").is_file()


def test_generation_is_timed_where_qwen3_fails(tmp_path, monkeypatch):
    def broken(settings):
        raise ImportError("cannot import name StaticCache")

    monkeypatch.setattr(generate, "_qwen3_variants", broken)
    assert main([*GENERATE, "--dtype=bfloat16", "--json", str(tmp_path / "speed.json")]) == 0
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    failed = [row for row in rows if row["problem"]]
    assert {row["variant"] for row in failed} == {"qwen3"} and len(failed) == len(rows) // 5
    assert all("StaticCache" in row["problem"] for row in failed)


def test_bench_refuses_to_write_over_other_output(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("seed: 1")
    (tmp_path / "other.json").write_text('{"a": 1}')
    for words in (["--sweep", tmp_path / "run"], ["--profile", tmp_path / "run"], ["--json", tmp_path / "other.json"]):
        assert main([*STEP, *map(str, words)]) == 2
        assert mentions(capsys.readouterr().err, words[0], words[1])
    assert (tmp_path / "other.json").read_text() == '{"a": 1}'
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_ratios_are_taken_within_each_round():
    drift = [1.0, 7.0, 2.0, 100.0, 3.0]  # slowdown of the machine, equal for all variants
    seconds = {"base": drift, "half": [2 * second for second in drift]}
    base, half = make_rows({"batch": 3}, seconds, amount=10, baseline="base")
    assert base.ratio == Quartiles(1, 1, 1) and half.ratio == Quartiles(0.5, 0.5, 0.5)
    assert base.speed == quartiles([10 / second for second in drift]) and half.speed.median == base.speed.median / 2
    assert half.task == {"batch": 3} and half.variant == "half" and half.seconds == seconds["half"]


def check(content, modes, variants=GENERATION_VARIANTS, batches=(1, 2)):
    rows = content["rows"]
    tasks = [(mode, batch, part) for mode in modes for batch in batches for part in ("prefill", "decode")]
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


def test_generation_is_timed_for_all_variants(tmp_path, capsys):
    pytest.importorskip("transformers")
    assert main([*GENERATE, "--json", str(tmp_path / "speed.json"), "--threads", "1", "--dtype", "bfloat16"]) == 0
    out, err = capsys.readouterr()
    content = json.loads((tmp_path / "speed.json").read_text())
    check(content, ["eager"])
    assert (
        content["benchmark"] == "generate" and content["dtype"] == "torch.bfloat16" and content["baseline"] == "folded"
    )
    assert (content["unit"], content["prompt_tokens"], content["max_new_tokens"]) == ("tokens/s", 8, 4)
    assert content["model"]["layers"] == 2 and content["machine"]["threads"] == 1
    lines = [line for line in out.splitlines() if line.strip().startswith("eager")]
    for line, row in zip(lines, content["rows"], strict=True):
        start = [*(str(value) for value in row["task"].values()), *row["variant"].split()]
        assert line.split()[: len(start) + 1] == [*start, f"{row['speed']['median']:,.0f}"]
        assert line.split()[-2] == f"{row['ratio']['median']:.2f}"
    for line, batch in zip(err.splitlines(), (1, 2), strict=True):
        assert mentions(line, "eager", batch)


def test_generation_of_some_variants_builds_no_other_library(monkeypatch):
    monkeypatch.setattr(generate, "_qwen3_variants", None)
    settings = generate.GenerationSettings(
        model=ModelConfig(**SIZES),
        device=torch.device("cpu"),
        dtype=torch.float32,
        rounds=1,
        batches=(1,),
        prompt_tokens=4,
        max_new_tokens=2,
        variants=("folded", "gpt+"),
    )
    rows = generate.bench_generate(settings, lambda _: None).rows
    assert [(row.variant, row.problem) for row in rows] == [("folded", None), ("gpt+", None)] * 2


def test_compiled_generation_is_timed_and_qwen3_skipped_if_not_installed(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    assert main([*GENERATE, "--batch", "2", "--mode", "both", "--json", str(tmp_path / "speed.json")]) == 0
    check(json.loads((tmp_path / "speed.json").read_text()), ["eager", "compiled"], OURS, batches=(2,))
    skipped = [line for line in capsys.readouterr().err.splitlines() if "qwen3" in line]
    assert len(skipped) == 1 and mentions(skipped[0], "transformers", "antransformer[hf]")


STEP = ["bench", "step", "--batch", "2", "--rounds", "3", "--threads", "1", *OPTIONS]


def test_training_steps_of_all_variants_are_timed(tmp_path, capsys):
    pytest.importorskip("transformers"), pytest.importorskip("x_transformers"), pytest.importorskip("nGPT_pytorch")
    assert main([*STEP, "--json", str(tmp_path / "speed.json")]) == 0
    content = json.loads((tmp_path / "speed.json").read_text())
    rows = content["rows"]
    assert [row["variant"] for row in rows] == list(VARIANTS) and content["baseline"] == "gpt+"
    assert content["batch"] == 2 and content["versions"]["torch"] == torch.__version__
    for row in rows:
        assert row["speed"]["median"] == pytest.approx(2 * 24 / sorted(row["seconds"])[1])
        assert 0 < row["utilization"]["low"] <= row["utilization"]["median"] <= row["utilization"]["high"]
        # Parameters, both moments of Adam, and gradients.
        assert row["memory"] > 4 * 4 * build(ModelConfig(**SIZES)).parameter_count()
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.strip().startswith("eager")] == list(VARIANTS)


def test_profile_writes_traces_and_prints_the_ten_most_expensive_operations(tmp_path, capsys):
    assert main([*STEP, "--variants", "gpt+", "angpt", "--profile", str(tmp_path / "traces")]) == 0
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == ["eager-angpt.json", "eager-gpt+.json"]
    trace = json.loads((tmp_path / "traces/eager-angpt.json").read_text())
    assert {"aten::mm", "aten::embedding"} <= {event["name"] for event in trace["traceEvents"]}
    lines = [line.split() for line in capsys.readouterr().err.splitlines() if "%" in line]
    shares = [float(share.rstrip("%")) for share, *_ in lines]
    assert len(shares) == 20 and shares[:10] == sorted(shares[:10], reverse=True) and 20 < sum(shares[:10]) <= 100.1


def test_sweep_reports_measured_and_expected_exponents_and_a_figure(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    sizes = {**SIZES, "layers": 1, "width": 32}
    words = [f"--model.{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    words += ["--batch", "2", "--rounds", "2", "--threads", "1", "--json", str(tmp_path / "growth.json")]
    assert main(["bench", "step", *words, "--sweep", str(tmp_path / "growth")]) == 0
    content = json.loads((tmp_path / "growth.json").read_text())
    rows, growth = content["rows"], {(item["axis"], item["variant"]): item for item in content["growth"]}
    measured = [(row["task"]["axis"], row["task"]["size"], row["variant"]) for row in rows]
    bases = {"width": 32, "layers": 1, "context": 24, "batch": 2}
    assert measured == [
        (axis, base * factor, name)
        for axis, base in bases.items()
        for factor in (1, 2, 4, 8)
        for name in ("gpt+", "angpt")
    ]
    assert set(growth) == {(axis, name) for axis in bases for name in ("gpt+", "angpt")}
    for (axis, variant), item in growth.items():
        expected = item["time_expected"]
        assert 0 < item["memory"] < 2.1
        assert expected == pytest.approx(1) if axis == "batch" else 0.5 < expected < 2
        group = [row for row in rows if (row["task"]["axis"], row["variant"]) == (axis, variant)]
        seconds = [statistics.median(row["seconds"]) for row in group]
        slope = statistics.linear_regression(range(4), [math.log2(each) for each in seconds]).slope
        assert item["time"] == pytest.approx(slope)
        assert item["last_time"] == pytest.approx(math.log2(seconds[-1] / seconds[-2]))
    assert (tmp_path / "growth/growth-eager.png").stat().st_size > 10_000
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for item in content["growth"]:
        names, numbers = list(item.values())[:3], list(item.values())[3:]
        assert [*names, *(f"{number:.2f}" for number in numbers)] in lines


def test_exponents_are_those_of_power_laws():
    assert exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    assert exponent([128, 256], [1, 1]) == pytest.approx(0)


def test_prepare_and_loading_are_timed(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / f"text/{number}.txt").write_text(f"number {number} with some more text\n" * 20)
    words = ["bench", "data", "--text", str(tmp_path / "text"), "--rounds", "2", "--batch", "2", *OPTIONS]
    assert main([*words, "--json", str(tmp_path / "speed.json")]) == 0
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    kinds = ["byte", *dict.fromkeys(row["task"]["workload"] for row in rows[2:4]), "training"]
    assert kinds[1].startswith("bpe-")
    pairs = [("tokenizers", "prepare"), ("tokenizers", "prepare"), ("synchronous", "prefetched")]
    expected = [(kind, name) for kind, names in zip(kinds, pairs, strict=True) for name in names]
    assert [(row["task"]["workload"], row["variant"]) for row in rows] == expected
    size = sum(len(path.read_bytes()) + 1 for path in (tmp_path / "text").iterdir())  # and an end of text each
    assert rows[1]["speed"]["median"] == pytest.approx(sum(size / taken for taken in rows[1]["seconds"]) / 2)
    assert rows[4]["waiting"]["median"] > 0 and max(row["waiting"]["high"] for row in rows[4:]) < 1
    out = capsys.readouterr().out
    assert all(f" {row['waiting']['median']:.2%}" in out for row in rows[4:])
    assert main([*words, "--tokenizer", "byte"]) == 0
    capsys.readouterr()
    assert main([*words, "--tokenizer", str(tmp_path / "none.json")]) == 2
    assert mentions(capsys.readouterr().err, tmp_path / "none.json", "byte", "tokenizer.json")


def test_a_thread_reads_the_next_batch_ahead_of_the_timing(tmp_path, monkeypatch):
    steps, read = [], ShuffledWindows.batch

    def batch(windows, step, *arguments, **options):
        steps.append(step)
        return read(windows, step, *arguments, **options)

    monkeypatch.setattr(ShuffledWindows, "batch", batch)
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(map(str, range(30))))
    words = ["bench", "data", "--text", str(tmp_path / "text.txt"), "--tokenizer", "byte", "--batch", "2", *OPTIONS]
    assert main([*words, "--rounds", "3"]) == 0
    assert sorted(steps)[:8] == [0, 0, 1, 1, 2, 2, 3, 3]  # of each variant, the warm-up included


def test_table_fits_into_80_columns():
    row = Row({"mode": "compiled"}, "x-transformers", [1.0], *[Quartiles(1e5, 2e5, 3e5)] * 2, 10**9, Quartiles(0, 1, 1))
    row = replace(row, ratio=Quartiles(0.99, 1, 1.01))
    console = Console(width=80, file=io.StringIO())
    console.print(result_table(Benchmark("step", {}, [row])))
    lines = console.file.getvalue().splitlines()
    expected = ["compiled", "x-transformers", "200,000", "100,000-300,000", "1.00", "0.99-1.01", "954", "100%"]
    assert lines[-1].split() == expected and max(map(len, lines)) <= 80


def test_loss_is_timed_with_and_without_chunks(tmp_path, capsys):
    words = ["bench", "loss", "--preset", "pico", "--model.width", "64", "--batch", "2", "--rounds", "2"]
    assert main([*words, "--json", str(tmp_path / "speed.json")]) == 0
    rows = {
        (row["task"]["vocabulary"], row["variant"]): row
        for row in json.loads((tmp_path / "speed.json").read_text())["rows"]
    }
    assert list(rows)[:2] == [(512, "unchunked"), (512, "chunked")] and (50304, "chunked") in rows
    assert rows[50304, "chunked"]["memory"] < rows[50304, "unchunked"]["memory"]
    assert "50,304" in capsys.readouterr().out
    assert main([*words, "--model.vocab-size", "300"]) == 0
    assert "50,304" not in capsys.readouterr().out


@pytest.mark.parametrize("loss", list(losses().values()), ids=list(losses()))
def test_all_implementations_of_the_loss_agree(loss):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(2, 9, 8), torch.randn(30, 8), torch.randint(30, (2, 9))
    torch.testing.assert_close(loss(hidden, weight, targets), losses()["unchunked"](hidden, weight, targets))


def test_the_optimizer_is_timed_with_and_without_bounds(tmp_path, capsys):
    words = ["bench", "optimizer", "--rounds", "2", *OPTIONS]
    assert main([*words, "--json", str(tmp_path / "speed.json")]) == 0
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    measured = [(row["task"]["architecture"], row["variant"]) for row in rows]
    assert measured == [(name, part) for name in ("angpt", "ngpt") for part in ("optimizer", "with bounds")]
    out = capsys.readouterr().out
    assert rows[0]["ratio"]["median"] == 1 and all(f" {row['speed']['median']:,.0f} " in out for row in rows)


def test_training_is_timed_next_to_busy_processes(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(busy, "SECONDS", 0.05)
    popen = SimpleNamespace(Popen=lambda words: started.append(Process()) or started[-1])
    monkeypatch.setattr(busy, "subprocess", popen)
    file = tmp_path / "busy.json"
    assert main(["bench", "busy", "--processes=2", "--rounds=2", "--batch=1", "--json", str(file), *OPTIONS]) == 0
    rows = [(row["task"]["other processes"], row["variant"]) for row in json.loads(file.read_text())["rows"]]
    assert rows == [(0, busy.FIXED), (0, busy.ADAPTED), (2, busy.FIXED), (2, busy.ADAPTED)]
    assert len(started) == 2 * 2 * 3 and all(process.killed for process in started)


class Process:
    """Another process that never runs."""

    killed = False

    def kill(self):
        self.killed = True

    def wait(self):
        pass


def test_compiled_steps_of_chosen_variants(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    words = [*STEP, "--mode", "compiled", "--variants", "angpt", "gpt+", "--json", str(tmp_path / "speed.json")]
    assert main(words) == 0
    content = json.loads((tmp_path / "speed.json").read_text())
    assert [row["variant"] for row in content["rows"]] == ["angpt", "gpt+"] and content["baseline"] == "angpt"
    assert content["rows"][0]["ratio"] == {"low": 1, "median": 1, "high": 1}


def test_variants_whose_library_is_missing_are_skipped(capsys, monkeypatch):
    for module in ("transformers", "x_transformers", "nGPT_pytorch"):
        monkeypatch.setitem(sys.modules, module, None)
    setups, problems = build_variants(VARIANTS, ModelConfig(**SIZES), torch.device("cpu"), print)
    assert list(setups) == list(VARIANTS)[:3] and not problems
    expected = [
        ("qwen3", "transformers", "antransformer[hf]"),
        ("x-transformers", "antransformer[bench]"),
        ("ngpt-pytorch", "nGPT-pytorch", "antransformer[bench]"),
    ]
    for line, parts in zip(capsys.readouterr().out.splitlines(), expected, strict=True):
        assert mentions(line, *parts)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_the_shape_and_learns(name):
    shape = ModelConfig(**SIZES)
    setup = build_variants([name], shape, torch.device("cpu"), print)[0].get(name)
    if setup is None:
        pytest.skip(f"the library of {name} is not installed")
    ours = build(shape).parameter_count()
    assert sum(parameter.numel() for parameter in setup.model.parameters()) == pytest.approx(ours, rel=0.05)
    tokens = torch.randint(50, (2, 25), generator=torch.Generator().manual_seed(1))
    first = setup.loss(tokens)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 50  # the last token is a target only
    assert first.item() == pytest.approx(math.log(50), rel=0.2) and setup.loss(changed) != first
    for _ in range(10):
        for group in setup.optimizer.param_groups:
            group["lr"] = 1e-2
        setup.loss(tokens).backward()
        setup.optimizer.step()
        setup.optimizer.zero_grad()
    assert setup.loss(tokens) < first - 0.1


def test_peak_memory_is_that_of_all_tensors_at_once():
    def call():
        one = torch.empty(1000, dtype=torch.float64)
        del one
        one = torch.empty(1500, dtype=torch.float64)
        other = torch.empty(500, dtype=torch.float64)
        del one, other

    assert peak_memory(call, torch.device("cpu")) == 16_000
    assert peak_memory(lambda: None, torch.device("cpu")) == 0


EQUAL, UNEQUAL = [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4]]  # lengths of prompts


@pytest.mark.parametrize(("name", "prompts"), [*((name, EQUAL) for name in OURS), ("angpt", UNEQUAL)])
def test_decoding_is_compiled_once_for_all_tokens(name, prompts):
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
    assert counter.frame_count <= 3  # the prompt, the first token, tokens after a prefix of any length


def test_engines_continue_one_prompt_of_a_checkpoint(tmp_path, capsys, monkeypatch):
    pytest.importorskip("xllamacpp")
    monkeypatch.setitem(sys.modules, "mlx", None)
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    make_run(tmp_path / "run")
    words = ["bench", "engines", "--checkpoint", str(tmp_path / "run"), "--rounds", "2", "--prompt-tokens", "8"]
    file = tmp_path / "speed.json"
    assert main([*words, "--max-new-tokens", "39", "--dtype", "float32", "--json", str(file)]) == 0
    assert mentions(capsys.readouterr().err, "mlx")
    rows = json.loads(file.read_text())["rows"]
    names = ["antransformer", "llama.cpp", "llama.cpp q8_0"]
    assert [(row["task"]["part"], row["variant"]) for row in rows] == [
        (part, name) for part in ("prefill", "decode") for name in names
    ]
    for row, tokens in zip(rows, [8] * 3 + [39] * 3, strict=True):
        speeds = [tokens / seconds for seconds in row["seconds"]]
        assert row["problem"] is None and row["speed"]["median"] == pytest.approx(sum(speeds) / 2)

    monkeypatch.setitem(sys.modules, "xllamacpp", None)  # the other engines are optional
    assert main([*words, "--max-new-tokens", "40"]) == 2
    assert mentions(capsys.readouterr().err, 8, 41, 48)
    assert main([*words, "--max-new-tokens", "39", "--json", str(file)]) == 0
    assert {row["variant"] for row in json.loads(file.read_text())["rows"]} == {"antransformer"}
    make_run(tmp_path / "ngpt", "ngpt")
    words[3] = str(tmp_path / "ngpt")
    assert main(words) == 2
    assert mentions(capsys.readouterr().err, "ngpt", "gguf")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["bench"], ("BENCHMARK",)),
        (["bench", "naps"], ("BENCHMARK", "naps", *DEFAULTS)),
        (["bench", "--what", "step"], ("--what", "antransformer bench step")),
        (["bench", "--what=loss", "--rounds=1"], ("--what", "antransformer bench loss")),
        (["bench", "--what"], ("--what", "antransformer bench BENCHMARK")),
        ([*GENERATE, "--new", "4"], ("--new", "--max-new-tokens")),
        ([*GENERATE, "--prompt", "8"], ("--prompt", "--prompt-tokens")),
        ([*STEP, "--contenders", "gpt+"], ("--contenders", "--variants")),
        ([*GENERATE, "--batch", "0"], ("batch", 0)),
        ([*GENERATE, "--max-new-tokens", "0"], ("max_new_tokens", 0)),
        ([*GENERATE, "--prompt-tokens", "0"], ("prompt_tokens", 0)),
        ([*GENERATE, "--rounds", "0"], ("rounds", 0)),
        ([*GENERATE, "--threads", "0"], ("--threads", 0)),
        ([*STEP, "--prompt-tokens", "21"], ("--prompt-tokens", "generate", "step")),
        ([*GENERATE, "--variants", "gpt+"], ("--variants", "step", "generate")),
        ([*STEP, "--variants", "gpt+", "llama"], ("llama", *VARIANTS, *MASKED_VARIANTS)),
        ([*STEP, "--variants", "angpt", "gpt+", "angpt"], ("variants", "angpt")),
        ([*GENERATE, "--batch", "2", "2"], ("batch", 2)),
        (["bench", "data", "--tokenizer", "byte", "byte"], ("tokenizer", "byte")),
        (["bench", "optimizer", "--batch", "2"], ("--batch", "optimizer", "generate")),
        (["bench", "loss", "--rounds", "0"], ("rounds", 0)),
        (["bench", "loss", "--batch", "0"], ("batch", 0)),
        ([*STEP, "--profile", "/dev/null"], ("--profile", "/dev/null")),
        ([*STEP, "--sweep", "/dev/null"], ("--sweep", "/dev/null")),
        (["bench", "engines"], ("engines", "--checkpoint")),
        (["bench", "engines", "--checkpoint", "none"], ("none",)),
        (["bench", "engines", "--checkpoint", "none", "--model.width", "64"], ("--checkpoint", "--model")),
        (["bench", "engines", "--checkpoint", "none", "--preset", "pico"], ("--preset", "engines", "step")),
        (["bench", "step", "--checkpoint", "run"], ("--checkpoint", "engines", "step")),
        ([*GENERATE, "--sweep", "growth"], ("--sweep", "step", "generate")),
        ([*STEP, "--text", "book.txt"], ("--text", "data", "step")),
        (["bench", "data", "--text", "none.txt"], ("none.txt",)),
        (["bench", "data", "--batch", "2", "3"], ("--batch", 2)),
        ([*STEP, "--batch", "2", "3"], ("--batch", 2)),
        ([*STEP, "--batch", "0"], ("batch", 0)),
        ([*STEP, "--rounds", "0"], ("rounds", 0)),
        ([*GENERATE, "--prompt-tokens", "21"], (21, 4, 24, "model.context")),
        ([*GENERATE, "--preset", "huge"], ("huge", "pico", "nano")),
        ([*GENERATE, "--model.width", "60"], ("width", 60, "head_dim", 32, 64)),
        ([*GENERATE, "--model.architecture", "gpt+"], ("--model.architecture",)),
        ([*GENERATE, "--device", "tpu"], ("tpu",)),
        ([*GENERATE, "--json", "nowhere/speed.json"], ("--json", "nowhere/speed.json")),
    ],
)
def test_mistakes_are_one_line_and_status_2(words, parts, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert mentions(err, *parts) and err.count("\n") == 1 and out == ""
