"""The self-test in miniature on a CPU: all parts pass, wrong results fail, and finished parts are kept."""

import json

import pytest

from antransformer import functional
from antransformer.cli import main
from antransformer.selftest import PARTS, checkpoints, program


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """Folder of a self-test with all parts, its JSON file and its exit status."""
    folder = tmp_path_factory.mktemp("selftest")
    file = folder / "all.json"
    status = main(["selftest", "--device", "cpu", "--out", str(folder / "out"), "--json", str(file)])
    return folder / "out", json.loads(file.read_text()), status


def test_all_parts_pass_on_a_cpu(complete):
    folder, content, status = complete
    assert status == 0
    assert [part["part"] for part in content["parts"]] == list(PARTS) == list(program.CHECKS)
    assert not (folder / program.ERRORS).exists()
    outcomes = [check["passed"] for part in content["parts"] for check in part["checks"]]
    assert outcomes.count(True) >= 30
    assert all(part["checks"] for part in content["parts"])
    assert content["machine"]["device"] == "cpu"


def test_the_report_has_a_row_for_every_figure(complete):
    folder, content, _ = complete
    rows = [line for line in (folder / program.REPORT).read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == len(PARTS) + sum(len(part["checks"]) for part in content["parts"])


def test_the_comparison_of_a_finished_self_test_has_its_losses(complete):
    results = json.loads((complete[0] / "compare" / "results.json").read_text())
    losses = [run["loss"] for variant in results["variants"] for run in variant["runs"]]
    assert len(losses) == 6
    figures = next(part for part in complete[1]["parts"] if part["part"] == "training")["checks"]
    assert f"{losses[0]:.4f}" in " ".join(check["figure"] for check in figures)


def test_finished_parts_are_not_run_again(complete, monkeypatch, capsys):
    folder, content, _ = complete
    monkeypatch.setattr(program, "CHECKS", {})
    assert main(["selftest", "--device", "cpu", "--out", str(folder)]) == 0
    assert str(sum(len(part["checks"]) for part in content["parts"])) in capsys.readouterr().out


def test_a_wrong_kernel_fails(tmp_path, monkeypatch, capsys):
    exact = functional.interpolate_norm_forward
    monkeypatch.setattr(functional, "interpolate_norm_forward", lambda x, y, alpha: exact(x, y, 1.001 * alpha))
    arguments = ["selftest", "--device", "cpu", "--parts", "kernels", "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "interpolate_norm forward, float32" in capsys.readouterr().err
    checks = json.loads((tmp_path / "out" / "results.json").read_text())["parts"][0]["checks"]
    assert {check["name"] for check in checks if check["passed"] is False} >= {
        "interpolate_norm forward, float32: error"
    }


def test_a_check_that_raises_is_a_failure_and_the_rest_is_run(tmp_path, monkeypatch, capsys):
    def broken(setup):
        raise RuntimeError("no such device\nmore lines")
        yield

    monkeypatch.setitem(program.CHECKS, "checkpoints", (broken, checkpoints.on_cpu))
    folder = tmp_path / "out"
    assert main(["selftest", "--device", "cpu", "--parts", "checkpoints", "--out", str(folder)]) == 1
    checks = json.loads((folder / "results.json").read_text())["parts"][0]["checks"]
    assert [check["passed"] for check in checks] == [False, True]
    assert "no such device" in checks[0]["figure"]
    assert "test_selftest.py" in (folder / program.ERRORS).read_text()


def test_a_call_without_enough_time_runs_nothing(tmp_path):
    assert main(["selftest", "--device", "cpu", "--minutes", "5", "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "results.json").exists()


def test_results_of_another_machine_are_refused(tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps({"machine": {"name": "other"}, "parts": []}))
    assert main(["selftest", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--parts", "nothing"], ["--minutes", "-1"], ["--device", "cuda:9"]])
def test_mistakes_create_nothing(words, tmp_path, capsys):
    assert main(["selftest", "--out", str(tmp_path / "out"), *words]) == 2
    assert words[1] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
