"""The self-test in miniature on a CPU: all parts pass, wrong results fail, and finished parts are kept."""

import json
import math
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch

from antransformer import functional, kernels
from antransformer.benchmarks.timing import Benchmark, machine_info, make_rows
from antransformer.cli import main
from antransformer.errors import MachineError, RunStoppedError
from antransformer.lock import lock
from antransformer.nn import Embedding
from antransformer.selftest import PARTS, checkpoints, models, processes, program, speed, training
from antransformer.selftest.checks import Check, Setup, at_most
from antransformer.selftest.program import Unit
from antransformer.selftest.runs import corpus, run_config
from antransformer.training.compilation import use_cuda_graphs
from helpers.commands import refused
from helpers.messages import mentions

SHORT_PARTS = ("kernels", "checkpoints", "speed-0.5b", "generation")  # the others compile, or train for long


def run_parts(folder, parts):
    """Folder of a self-test with these parts, its JSON file and its exit status."""
    file = folder / "all.json"
    words = ["selftest", "--device", "cpu", "--parts", *parts, "--out", str(folder / "out"), "--json", str(file)]
    status = main(words)
    return folder / "out", json.loads(file.read_text()), status


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    return run_parts(tmp_path_factory.mktemp("selftest"), SHORT_PARTS)


def check_outcomes(result, parts, passed):
    folder, content, status = result
    assert status == 0
    units = [(part, unit.name) for part in parts for unit in program.CHECKS[part]]
    assert [(result["part"], result["unit"]) for result in content["parts"]] == units
    assert len(set(units)) == len(units)
    assert not (folder / program.ERRORS).exists()
    outcomes = [check["passed"] for result in content["parts"] for check in result["checks"]]
    assert outcomes.count(True) >= passed
    assert all(result["checks"] for result in content["parts"])
    assert content["machine"]["device"] == "cpu"


def test_short_parts_pass_on_a_cpu(complete):
    assert list(PARTS) == list(program.CHECKS)
    check_outcomes(complete, SHORT_PARTS, passed=17)


def test_the_report_has_a_row_for_every_figure(complete):
    folder, content, _ = complete
    rows = [line for line in (folder / program.REPORT).read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == len(SHORT_PARTS) + sum(len(result["checks"]) for result in content["parts"])


def test_the_report_of_a_gpu_names_the_versions_of_cuda_and_cudnn(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    text = program.markdown(Setup(torch.device("cuda"), tmp_path, 1.0, lambda _: None), {})
    assert mentions(text, "H200", "13.0", 91900)


@pytest.mark.slow
def test_all_parts_pass_on_a_cpu_and_the_comparison_has_its_losses(tmp_path):
    complete = run_parts(tmp_path, PARTS)
    check_outcomes(complete, PARTS, passed=30)
    results = json.loads((complete[0] / "compare" / "results.json").read_text())
    losses = [run["loss"] for variant in results["variants"] for run in variant["runs"]]
    assert len(losses) == 6
    figures = next(result for result in complete[1]["parts"] if result["part"] == "training")["checks"]
    assert f"{losses[0]:.4f}" in " ".join(check["figure"] for check in figures)


def test_finished_parts_are_not_run_again(complete, monkeypatch, capsys):
    folder, content, _ = complete
    monkeypatch.setattr(program, "run_unit", None)
    assert main(["selftest", "--device", "cpu", "--parts", *SHORT_PARTS, "--out", str(folder)]) == 0
    assert str(sum(len(result["checks"]) for result in content["parts"])) in capsys.readouterr().out


def test_what_failed_is_run_again_after_a_change_of_the_package(tmp_path, monkeypatch):
    calls = []

    def good(setup):
        calls.append("good")
        yield Check("a", "1", "1", True)

    def bad(setup):
        calls.append("bad")
        yield Check("b", "2", "1", len(calls) > 2)

    monkeypatch.setitem(program.CHECKS, "kernels", (Unit(bad), Unit(good)))
    words = ["selftest", "--device", "cpu", "--parts", "kernels", "--out", str(tmp_path / "out")]
    assert [main(words), main(words)] == [1, 1]
    assert calls == ["bad", "good"]
    monkeypatch.setattr(program, "source_digest", lambda: "another")
    assert [main(words), main(words)] == [0, 0]
    assert calls == ["bad", "good", "bad"]
    assert "another" in (tmp_path / "out" / program.REPORT).read_text()


@pytest.mark.parametrize("factor", [1.001, math.nan])
def test_a_wrong_kernel_fails(factor, tmp_path, monkeypatch, capsys):
    exact = functional.interpolate_norm_forward
    monkeypatch.setattr(functional, "interpolate_norm_forward", lambda x, y, alpha: exact(x, y, factor * alpha))
    arguments = ["selftest", "--device", "cpu", "--parts", "kernels", "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "interpolate_norm forward, float32" in capsys.readouterr().err
    checks = json.loads((tmp_path / "out" / "results.json").read_text())["parts"][0]["checks"]
    assert {check["name"] for check in checks if check["passed"] is False} >= {
        "interpolate_norm forward, float32: error"
    }


def test_the_excess_of_a_bounded_norm_that_is_nan_fails():
    model = torch.nn.Sequential(Embedding(4, 8), Embedding(4, 8))
    assert at_most("excess", models._excess(model), 1e-6).passed
    with torch.no_grad():
        model[1].weight.fill_(math.nan)
    assert not at_most("excess", models._excess(model), 1e-6).passed


def test_a_score_scale_without_gradient_fails(tmp_path):
    config = models.small_model(Setup(torch.device("cpu"), tmp_path, 1.0, lambda _: None), "angpt")
    exact = models._outputs(config, models.synthetic_tokens(config, 2, seed=0), torch.device("cpu"))
    wrong = exact._replace(gradients=[gradient * (gradient.numel() > 1) for gradient in exact.gradients])
    for result, limit, passed in (
        (exact, 1e-3, [True] * 3),
        (wrong, 1e-3, [True, True, False]),
        (wrong, 5e-2, [True] * 2),
    ):
        assert [check.passed for check in models._compare("a", result, exact, 1e-4, limit)] == passed


def test_a_run_that_the_compiler_fails_to_compile_fails(tmp_path, monkeypatch):
    setup = Setup(torch.device("cpu"), tmp_path, 1.0, lambda _: None)
    config = run_config(setup, corpus(setup), compile=True)

    def fail(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    with pytest.raises(MachineError, match="no compiler"):
        checkpoints._train(config, corpus(setup), tmp_path / "run")


def test_resumed_runs_use_no_fused_attention():
    """torch sums its gradient in any order on a GPU, even with deterministic algorithms if these only warn."""
    enabled = torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.mem_efficient_sdp_enabled
    with checkpoints._deterministic():
        assert torch.are_deterministic_algorithms_enabled() and not any(kernel() for kernel in enabled)
    assert not torch.are_deterministic_algorithms_enabled() and all(kernel() for kernel in enabled)


def test_a_run_that_does_not_stop_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.signal, "raise_signal", lambda _: None)
    setup = Setup(torch.device("cpu"), tmp_path, 1.0, lambda _: None)
    with pytest.raises(MachineError):
        checkpoints._stop_and_resume(run_config(setup, corpus(setup)), corpus(setup), tmp_path / "run")


def test_runs_use_the_device_under_test_and_processes_one_each(tmp_path, monkeypatch):
    data, devices = corpus(Setup(torch.device("cpu"), tmp_path, 1.0, lambda _: None)), []
    setup = Setup(torch.device("cuda:1"), tmp_path, 1.0, lambda _: None)
    config = run_config(setup, data)
    assert config.device == "cuda:1"
    assert use_cuda_graphs(config, setup.device, min(config.micro_batch_size, config.batch_size))  # if it is compiled
    monkeypatch.setattr(processes, "_compare_runs", lambda setup, name, config, *_: devices.append(config.device) or ())
    for name in processes.RUNS:
        list(processes.replicated(setup, name))
    assert devices == ["cuda", "cuda"]


def test_a_check_that_raises_is_a_failure_and_the_rest_is_run(tmp_path, monkeypatch, capsys):
    def broken(setup):
        raise RuntimeError("no such device\nmore lines")
        yield

    monkeypatch.setitem(program.CHECKS, "checkpoints", (Unit(broken), Unit(checkpoints.on_cpu)))
    folder = tmp_path / "out"
    assert main(["selftest", "--device", "cpu", "--parts", "checkpoints", "--out", str(folder)]) == 1
    results = json.loads((folder / "results.json").read_text())["parts"]
    checks = [check for result in results for check in result["checks"]]
    assert [check["passed"] for check in checks] == [False, True]
    assert "no such device" in checks[0]["figure"]
    assert "test_selftest.py" in (folder / program.ERRORS).read_text()


def test_a_device_that_fails_after_a_part_ends_the_call_and_the_next_one_continues(tmp_path, monkeypatch, capsys):
    def fail(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def first(setup):
        yield Check("a", "1")

    def second(setup):
        yield Check("b", "2")

    monkeypatch.setattr(program, "CHECKS", dict.fromkeys(PARTS, (Unit(first), Unit(second))))
    words = ["selftest", "--device", "cpu", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(program, "release_memory", fail)
        assert main(words) == 1
    kept = [next(iter(PARTS)), "first"]
    assert mentions(capsys.readouterr().err, kept[0], "illegal memory access")
    results = json.loads((tmp_path / "out" / "results.json").read_text())["parts"]
    assert [[result["part"], result["unit"]] for result in results] == [kept]
    assert main(words) == 0
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["parts"]) == 2 * len(PARTS)


def test_a_variant_of_ours_that_fails_is_a_failed_check(tmp_path, monkeypatch):
    """GPT+ fails, so no ratio refers to it; another library may be missing."""
    times = {"angpt": [2.0], "x-transformers": [1.0]}
    problems = {"gpt+": "OutOfMemoryError: no memory", "qwen3": "missing"}
    rows = make_rows({"mode": "compiled"}, times, 100, problems=problems)
    monkeypatch.setattr(speed, "bench_step", lambda *_: Benchmark("step", {}, rows))
    monkeypatch.setattr(speed, "free_memory", lambda device: 141e9)
    monkeypatch.setattr(speed, "find_spec", lambda _: True)  # other libraries are not always installed
    monkeypatch.setattr(speed, "_memory", lambda *_: Check("memory", "1"))
    setup = Setup(torch.device("cuda"), tmp_path, 1.0, lambda _: None)
    passed = {check.name.split()[-1]: check.passed for check in speed.peer(setup, "x-transformers")}
    assert passed == {"x-transformers": None, "gpt+": False, "qwen3": None}
    assert sum("nan" in check.figure for check in speed.peer(setup, "x-transformers")) == 1
    passed = {check.name.split()[-1]: check.passed for check in speed.steps(setup, "125m", "compiled")}
    assert passed["angpt"] is passed["gpt+"] is False


def test_a_library_that_is_missing_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "find_spec", lambda module: None)
    monkeypatch.setattr(speed, "bench_step", None)
    monkeypatch.setattr(speed, "bench_generate", None)
    setup = Setup(torch.device("cuda"), tmp_path, 1.0, lambda _: None)
    checks = [check for name in speed.PEERS for check in speed.peer(setup, name)]
    checks += speed.generation(setup, "compiled", 16, "qwen3")
    assert [check.passed for check in checks] == [None] * 4


@pytest.mark.parametrize(("device", "passed"), [("cuda", False), ("cpu", None)])
def test_a_missing_triton_is_a_failure_on_a_gpu_only(device, passed, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    for name in ("interpolate_norm", "bound", "cross_entropy"):
        monkeypatch.setitem(sys.modules, f"antransformer.kernels.{name}", None)
    setup = Setup(torch.device(device), tmp_path, math.inf, lambda _: None)
    for unit in program.CHECKS["kernels"][:3]:
        result = program.outcome_of(setup, "kernels", unit, "1a")
        assert [check.passed for check in result.checks] == [passed]


@pytest.mark.parametrize(("free", "batch"), [(141e9, 16), (24e9, 8), (1e9, 1)])
def test_the_batch_of_the_speed_parts_fits_the_device(free, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "free_memory", lambda device: free)
    assert speed._batch(Setup(torch.device("cuda"), tmp_path, 1.0, lambda _: None), "125m") == batch


def units_of(folder):
    """Units in the file of results, without their part."""
    return [result["unit"] for result in json.loads((folder / "results.json").read_text())["parts"]]


def test_a_call_starts_nothing_that_should_take_longer_than_the_time_left(tmp_path, monkeypatch, capsys):
    clock = [0.0]

    def work(setup, minutes):
        clock[0] += 60 * minutes
        yield Check("a", "1", "1", True)

    def unknown(setup):
        yield from work(setup, 1)

    units = (*(Unit(work, (minutes,), 1) for minutes in (4, 3, 2)), Unit(unknown, minutes=5))
    monkeypatch.setattr(program, "CHECKS", dict.fromkeys(PARTS, ()) | {"kernels": units})
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    words = ["selftest", "--device", "cpu", "--minutes", "10", "--out", str(tmp_path / "out")]
    assert main(words) == 0  # the third may take 4 minutes, as the first
    assert units_of(tmp_path / "out") == ["work 4", "work 3"]
    assert mentions(capsys.readouterr().out, "kernels", "2 of 4")
    assert main(words) == 0
    assert units_of(tmp_path / "out") == ["work 4", "work 3", "work 2", "unknown"]
    assert "### " in capsys.readouterr().out  # the report, when nothing is left


def test_a_call_runs_one_unit_however_long_it_should_take(tmp_path, monkeypatch):
    units = tuple(Unit(lambda setup, name: iter(()), (name,), 20) for name in "ab")
    monkeypatch.setattr(program, "CHECKS", dict.fromkeys(PARTS, ()) | {"kernels": units})
    words = ["selftest", "--device", "cpu", "--minutes", "10", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert len(units_of(tmp_path / "out")) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RunStoppedError("stopped", signal.SIGINT)])
def test_an_interrupted_unit_is_run_again_after_all_others(error, tmp_path, monkeypatch):
    calls = []

    def first(setup):
        calls.append("first")
        if len(calls) == 1:
            raise error
        yield Check("a", "1", "1", True)

    def second(setup):
        calls.append("second")
        yield Check("b", "1", "1", True)

    monkeypatch.setattr(program, "CHECKS", dict.fromkeys(PARTS, ()) | {"models": (Unit(first), Unit(second))})
    words = ["selftest", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(words) == 130
    assert "FAIL" in (tmp_path / "out" / program.REPORT).read_text()
    assert main(words) == 0
    assert calls == ["first", "second", "first"]
    assert "FAIL" not in (tmp_path / "out" / program.REPORT).read_text()


def test_the_comparison_stops_in_time_or_at_a_signal_of_the_user(tmp_path, monkeypatch):
    setup = Setup(torch.device("cpu"), tmp_path, math.inf, lambda _: None)

    def interrupt(_):
        raise RunStoppedError("stopped", signal.SIGINT)

    monkeypatch.setattr(training.Experiment, "run", interrupt)
    with pytest.raises(RunStoppedError):
        program.outcome_of(setup, "training", Unit(training.comparison), "1a")
    monkeypatch.setattr(training.Experiment, "run", lambda _: time.sleep(60))
    for seconds in (-1.0, 0.5):
        ending = replace(setup, deadline=time.monotonic() + training.STOP_SECONDS + seconds)
        assert program.outcome_of(ending, "training", Unit(training.comparison), "1a") is None


def test_the_data_of_the_training_is_the_source_of_installed_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CORPUS_BYTES", 300_000)
    monkeypatch.setattr(training, "VOCABULARY", 300)
    dataset = training._data(Setup(torch.device("cuda"), tmp_path, math.inf, lambda _: None))
    assert dataset.vocab_size == 300
    assert 100_000 < dataset.split("train").tokens < 400_000


def test_a_second_self_test_of_the_same_folder_is_refused(tmp_path, capsys):
    with lock(tmp_path / "out"):
        program.save(Setup(torch.device("cpu"), tmp_path / "out", 1.0, print), {})
        assert main(["selftest", "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert str(tmp_path / "out") in capsys.readouterr().err


HERE = machine_info(torch.device("cpu"))
PART = {"part": "kernels", "unit": "fp8", "seconds": 1.0, "source": "1a", "checks": []}


def kept(*parts, machine=HERE):
    """Content of ``results.json`` in the folder ``out``."""
    return {"out/results.json": json.dumps({"machine": machine, "parts": parts})}


@pytest.mark.parametrize(
    ("words", "named", "files"),
    [
        (["--parts", "nothing"], "nothing", {}),
        (["--parts", "kernels,models"], "kernels,models", {}),
        (["--parts", "kernels", "kernels"], "--parts", {}),
        (["--parts"], "--parts", {}),
        (["--minutes", "-1"], "-1", {}),
        (["--minutes", "nan"], "nan", {}),
        (["--minutes", "ten"], "ten", {}),
        (["--minutes", "5"], "5", {}),  # less than any part needs
        (["--device", "cuda:9"], "cuda:9", {}),
        (["--device", "cpu:7"], "cpu:7", {}),
        (["--device", "meta"], "meta", {}),
        (["--json", "nowhere/all.json"], "nowhere/all.json", {}),
        (["--json", "all.json"], "all.json", {"all.json": "{}"}),
        (["--json", "out"], "--json", {}),
        (["--part", "kernels"], "--parts", {}),
        (["kernels"], "kernels", {}),
        (["--out", "/proc/selftest"], "/proc/selftest", {}),
        (["--out", "out/deeper"], "out", {"out": "a file"}),
        ([], "out", {"out": "a file"}),
        ([], "out", {"out/notes.txt": "mine"}),
        ([], "out", {"out/config.yaml": "of a run"}),
        ([], "out", {"out/meta.json": "{}"}),
        ([], "out", {"out/report.md/file": "", **kept()}),
        ([], "out", {"out/results.json": "cut {"}),
        ([], "out", {"out/results.json": "[1]"}),
        ([], "out", kept(machine={"name": "other"})),
        ([], "results.json", kept({**PART, "part": "nothing"})),
        ([], "results.json", kept({**PART, "seconds": "long"})),
        ([], "results.json", kept({**PART, "checks": [{"name": "a", "figure": "1", "passed": "yes"}]})),
        ([], "results.json", kept({"part": "kernels"})),
    ],
)
def test_mistakes_are_one_line_and_change_nothing(words, named, files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    defaults = ["selftest", "--device", "cpu", "--out", "out"]
    assert named in refused([*defaults, *words], capsys)
    assert sorted(tmp_path.rglob("*")) == before
