"""Completion scripts, of which bash runs its own."""

import re
import shutil
import subprocess
import sys

import pytest

from antransformer.cli import VERBS, main
from antransformer.cli.completion import SHELLS
from antransformer.models.config import PRESETS
from antransformer.models.registry import BUILT_IN
from helpers.commands import refused
from helpers.messages import mentions

pytest.importorskip("shtab")


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """Function that returns what bash offers for the last word of a line."""
    if not shutil.which("bash"):
        pytest.skip("needs bash")
    script = tmp_path_factory.mktemp("completion") / "antransformer"
    words = [sys.executable, "-m", "antransformer", "completion", "bash"]
    script.write_text(subprocess.run(words, capture_output=True, text=True, check=True).stdout)

    def answers(*line, folder=script.parent):
        code = f'. {script}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_antransformer; echo "${{COMPREPLY[@]}}"'
        arguments = ["bash", "-c", code, "bash", "antransformer", *line]
        result = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=folder)
        return set(result.stdout.split())

    return answers


def test_bash_completes_verbs_options_and_values(complete, tmp_path):
    assert complete("") >= set(VERBS)
    assert complete("ev") == {"evaluate"}
    assert complete("train", "--mu") >= {"--muon-lr"} and not complete("serve", "--mu")
    assert complete("train", "--preset", "") >= set(PRESETS)
    assert complete("train", "--architecture", "") >= set(BUILT_IN)
    assert complete("train", "--tokens", "1M", "--recipe", "p") == {"paper"}
    assert complete("bench", "st") == {"step"}
    assert complete("export", "--format", "g") == {"gguf"} and complete("serve", "--dtype", "q") == {"q4_0", "q8_0"}
    (tmp_path / "runs").mkdir()
    (tmp_path / "a file.yaml").touch()
    assert complete("generate", "--checkpoint", "r", folder=tmp_path) == {"runs"}
    assert complete("train", "--config", "a", folder=tmp_path) == {"a", "file.yaml"}


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_all_verbs(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(re.search(rf"\b{verb}\b", script) for verb in VERBS)
    assert "--muon-lr" in script or shell in ("tcsh", "fish")


def test_wrong_shells_and_a_missing_extra_are_refused(capsys, monkeypatch):
    assert mentions(refused(["completion", "csh"], capsys), "csh")
    assert mentions(refused(["completion"], capsys), "SHELL")
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert mentions(refused(["completion", "bash"], capsys), "shtab", "antransformer[completion]")
