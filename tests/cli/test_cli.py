"""The command line as a whole: help, lazy imports, mistakes, and options with old names."""

import importlib
import re
import subprocess
import sys

import pytest

from antransformer import renamed
from antransformer.cli import VERBS, main, make_parser
from helpers.commands import refused
from helpers.messages import mentions


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_fits_a_terminal_and_names_every_option(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([*([verb] if verb else []), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: antransformer") and max(map(len, text.splitlines())) <= 80
    if verb in ("prepare", "train", "generate"):
        assert re.search(rf"^  antransformer {verb}\b", text, re.M)  # an example on a line of its own
    if verb == "train":
        assert mentions(text, *["--config", "--resume", "--model.gate-scale", "--no-compile"])
        for option in ("--lr", "--muon-lr", "--keep-every", "--tokens"):
            assert re.search(rf"^ +{option} [A-Z]+\b", text, re.M), option  # takes a value


def test_python_m_antransformer_prints_the_version():
    output = subprocess.run([sys.executable, "-m", "antransformer", "--version"], capture_output=True, text=True)
    assert output.returncode == 0 and re.fullmatch(r"antransformer \d+\.\d+\.\d+\n", output.stdout)


def test_importing_needs_no_optional_dependency_and_no_cuda():
    blocked = ["matplotlib", "tensorboard", "pyarrow", "zstandard", "transformers", "wandb", "lm_eval"]
    code = f"""
import sys
for name in {blocked}: sys.modules[name] = None
import antransformer, antransformer.cli, torch
assert not torch.cuda.is_initialized()
assert antransformer.cli.main(["train", "--tokens", "1K"]) == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["fly"], "fly prepare train demo"),
        (["--", "fly"], "fly prepare train demo"),
        (["trian", "--lr", "0.01"], "trian train"),
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
        (["train", "--config", ""], "--config"),
        (["train", "stray"], "stray"),
        (["train", "--data", "nowhere"], "nowhere"),
        (["train", "--resume"], "resume --out"),
        (["train", "--resume", "--out", "nowhere"], "nowhere"),
        (["generate", "--checkpoint", "nowhere"], "nowhere"),
        (["generate"], "--checkpoint"),
        (["prepare", "nowhere.txt", "--out", "x"], "nowhere.txt"),
        (["prepare", "x"], "--out"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(arguments, facts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mentions(refused(arguments, capsys), *facts.split())
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def loaded_by(*words):
    """Status of a command in a process of its own, its output, and whether it imported torch."""
    code = f"""
import sys
from antransformer.cli import main
try:
    status = main({list(words)})
except SystemExit as stop:
    status = stop.code
print("torch" in sys.modules, status)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, last = result.stdout.splitlines()
    torch, status = last.split()
    return torch == "True", int(status), result.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_does_not_import_torch(verb):
    assert loaded_by(verb, "--help") == (False, 0, "")


@pytest.mark.parametrize(
    ("words", "status"), [(["--help"], 0), (["--version"], 0), (["fly"], 2), ([], 2), (["train", "--lrr", "3"], 2)]
)
def test_help_version_and_mistypes_do_not_import_torch(words, status):
    torch, actual, errors = loaded_by(*words)
    assert (torch, actual) == (False, status) and errors.count("\n") == bool(status)


@pytest.mark.parametrize("verb", VERBS)
def test_the_summary_of_a_verb_is_the_first_line_of_its_module(verb):
    module = importlib.import_module(f"antransformer.cli.{'import_' if verb == 'import' else verb}")
    assert module.__doc__.partition("\n")[0] == VERBS[verb]


def options_of(verb):
    """All option strings of a verb."""
    parser = make_parser(verb)
    verbs = next(action for action in parser._actions if action.dest == "verb")
    return {option for action in verbs.choices[verb]._actions for option in action.option_strings}


RENAMED = [
    (verb, old, new)
    for verb in VERBS
    for old, new in renamed.OPTIONS.items()
    if new in options_of(verb) and old not in options_of(verb)
]


def test_every_renamed_option_is_covered():
    assert {old for _, old, _ in RENAMED} == set(renamed.OPTIONS)


@pytest.mark.parametrize(("verb", "old", "new"), RENAMED)
@pytest.mark.parametrize("form", ["{} 1", "{}=1", "{}"])
def test_an_old_option_gets_one_error_with_the_new_name(verb, old, new, form, capsys):
    error = refused([verb, *form.format(old).split()], capsys)
    assert mentions(error, old, new)


@pytest.mark.parametrize(("old", "new"), renamed.VALUES["parallel"].items())
@pytest.mark.parametrize("form", ["--parallel {}", "--parallel={}"])
def test_an_old_value_gets_one_error_with_the_new_value(old, new, form, capsys):
    assert mentions(refused(["train", *form.format(old).split()], capsys), "--parallel", old, new)


def test_a_removed_option_is_refused_as_such(capsys):
    assert mentions(refused(["train", "--model.nu-p", "one"], capsys), "--model.nu-p")


def test_a_value_that_spells_an_old_option_is_not_one(trained, capsys):
    assert main(["generate", "--checkpoint", str(trained), "--prompt=--max-tokens", "--max-new-tokens=1"]) == 0
    assert capsys.readouterr().out.startswith("--max-tokens")


def test_an_example_of_several_lines_is_one_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    text = capsys.readouterr().out.replace("\\\n", "")
    (command,) = (line.split() for line in text.splitlines() if "--budgets 5M" in line)
    assert command[:2] == ["antransformer", "compare"] and command[-2:] == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize("verb", VERBS)
def test_an_example_breaks_before_an_option_and_not_before_its_value(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    text = capsys.readouterr().out
    broken = re.findall(r"--\S+ \\\n +[^-\s].*", text)
    assert not broken, broken
