"""The command line accepts every command in README and docs; the page of the first steps is run."""

import re
import tomllib

import pytest
from torch.distributed.run import get_args_parser

from antransformer.cli import VERBS, main, make_parser
from antransformer.errors import UsageError
from helpers.commands import write_documents
from helpers.pages import PAGES, ROOT, blocks, command_lines, indented_commands, inline_commands, verb_parser

SHELL = ("sh", "bash")
STEPS = ["prepare", "train", "train", "train", "generate", "evaluate", "diagnose", "export"]


def check_command(words):
    """Raise an error unless a command line could be run: known program, options, script, target or extra."""
    program, *rest = words
    if program == "antransformer":
        check_verb(rest)
    elif program == "torchrun":
        at = rest.index("antransformer")
        started = get_args_parser().parse_args(rest[: at + 1])
        assert started.module and started.training_script == "antransformer"
        check_verb(rest[at + 1 :])
    elif program == "python" and rest[0] != "-m":
        assert (ROOT / rest[0]).is_file()
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        assert all(word in targets for word in rest if "=" not in word)
    elif program == "pip":
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        extras = re.findall(r"\[([\w,]+)\]", " ".join(rest))
        assert rest[0] == "install" and all(extra in known for group in extras for extra in group.split(","))
    else:
        raise AssertionError(f"{program} is not run by tests: put <!-- not run: REASON --> above the block")


def check_verb(words):
    """Parse a command completely, or only the names of its options if it is abbreviated with dots."""
    if words[0].startswith("--") or "..." not in words:
        make_parser(next((word for word in words if not word.startswith("-")), None)).parse(words)
    else:
        check_options([word for word in words if word != "..."])


def check_options(words):
    verb, *rest = words
    assert verb in VERBS, verb
    chosen = verb_parser(verb)
    chosen.check_renamed(rest)
    for name in (word.partition("=")[0] for word in rest if word.startswith("--")):
        if name not in ("--help", *chosen._known_options()):
            chosen.refuse(name)


def problems(page, commands, check):
    for words in commands:
        try:
            check(words)
        except (UsageError, AssertionError, SystemExit, ValueError) as error:
            yield f"{page.name}: {' '.join(words)}: {error}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_line_is_taken(page):
    found = blocks(page)
    commands = [words for block in found if block.language in SHELL for words in command_lines(block.code)]
    marked = [words for block in found if block.language in SHELL and block.mark for words in command_lines(block.code)]
    own = [words for words in commands if words not in marked or words[0] in ("antransformer", "torchrun", "pip")]
    listed = [
        *problems(page, own + indented_commands(page), check_command),
        *problems(page, inline_commands(page), lambda words: check_options([word.strip(",") for word in words[1:]])),
    ]
    assert not listed, "\n".join(listed)


def test_a_wrong_command_is_found():
    for words in ("train --tokenz 3", "trian", "export", "generate --checkpoint"):
        with pytest.raises((UsageError, SystemExit)):
            check_verb(words.split())
    with pytest.raises(AssertionError):
        check_command(["pip", "install", "antransformer[datas]"])
    with pytest.raises(AssertionError):
        check_command(["make", "tests"])


def test_the_first_steps_run_as_they_stand(tmp_path, monkeypatch, capsys):
    """Only with fewer tokens, and with a smaller model where one of 125M parameters is previewed."""
    page = ROOT / "docs/getting-started.md"
    run = [block for block in blocks(page) if block.language == "sh" and block.runs]
    commands = [words for block in run for words in command_lines(block.code)]
    verbs = [words[1:] for words in commands if words[0] == "antransformer" and words[1] != "demo"]
    assert [words[0] for words in verbs] == STEPS
    write_documents(tmp_path / "corpus", documents=200)
    (tmp_path / "book.txt").write_text("to be or not to be. " * 50)
    monkeypatch.chdir(tmp_path)
    for words in verbs:
        shorter = [{"500K": "8K", "125m": "pico", "60": "8"}.get(word, word) for word in words]
        assert main(shorter) == 0, (words, capsys.readouterr())
    out = capsys.readouterr().out
    assert "data/mine" in out and "runs/first/checkpoints/step-" in out
    assert (tmp_path / "exported/first/config.json").is_file() and (tmp_path / "runs/first/diagnose.png").is_file()


def test_commands_are_found_in_blocks_indents_and_spans(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Run `antransformer train\n--resume` or:\n\n    antransformer plan \\\n        --flops 1e20  # a budget\n\n"
        "<!-- not run: no GPU -->\n```sh\nOMP_NUM_THREADS=1 antransformer demo\n```\n"
    )
    (block,) = blocks(page)
    assert not block.runs and command_lines(block.code) == [["antransformer", "demo"]]
    assert indented_commands(page) == [["antransformer", "plan", "--flops", "1e20"]]
    assert inline_commands(page) == [["antransformer", "train", "--resume"]]
