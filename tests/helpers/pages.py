"""Code blocks and commands of the documentation.

A comment on the line above a block says why no test runs it as it stands, or which test does:

    <!-- not run: needs a GPU -->
    <!-- run by tests/docs/test_guide.py -->
"""

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

from antransformer.cli import make_parser
from antransformer.cli.options import Parser

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?:(?P<comment> *<!-- [^\n]* -->)\n)?(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$",
    re.M | re.S,
)
MARK = re.compile(r" *<!-- (not run: \w.+|run by (?P<test>tests/\S+\.py)) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        page: its file.
        line: number of its first line.
        language: word behind the fence; may be empty.
        code: its text.
        mark: the comment above it, or "".
    """

    page: Path
    line: int
    language: str
    code: str
    mark: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether it has no comment that excludes it."""
        return not self.mark


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start("code")),
            found["language"],
            textwrap.dedent(found["code"]),
            found["comment"] or "",
        )
        for found in FENCE.finditer(text)
    ]


def command_lines(text: str) -> list[list[str]]:
    """Words of each command of a shell block, without comments, variables in front, and redirections."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    commands = [without_variables(words) for words in found if words]
    return [words[: words.index(">")] if ">" in words else words for words in commands]


def without_variables(words: list[str]) -> list[str]:
    return without_variables(words[1:]) if words and re.match(r"[A-Z_]+=", words[0]) else words


def indented_commands(page: Path) -> list[list[str]]:
    """Commands of this package in blocks that are indented instead of fenced."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [shlex.split(line, comments=True) for line in lines if re.match(r"    (antransformer|torchrun) ", line)]


def inline_commands(page: Path) -> list[list[str]]:
    """Commands of this package in code spans, such as `antransformer train --resume`."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(span.split()).split(" ") for span in re.findall(r"`(antransformer [a-z][^`]*)`", text)]


def verb_parser(verb: str) -> Parser:
    """Parser of one verb."""
    (verbs,) = (action for action in make_parser(verb)._actions if action.dest == "verb")
    assert isinstance(verbs.choices, dict)
    return verbs.choices[verb]
