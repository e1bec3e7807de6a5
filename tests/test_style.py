"""The project's English: forms that are banned from source, help and docs, and sentences that tests may not hold."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = sorted((ROOT / "src").rglob("*.py")) + sorted((ROOT / "examples").rglob("*.py")) + [ROOT / "docs/hooks.py"]
DOCS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
TESTS = sorted(
    path for path in (ROOT / "tests").rglob("*.py") if "golden" not in path.relative_to(ROOT / "tests").parts[:1]
)
NOT_OURS = {ROOT / "tests/test_style.py"}  # holds the forms themselves

BANNED = {
    r"can not\b": "cannot",
    r"so many\b": "a number with its noun",
    r"(is|are) none\b": "is not one, are not",
    r"(is|are) no (numbers?|multiple|file|folder)\b": "is not a ...",
    r"goes on (with|from|as|where|training)\b": "continues, resumes",
    r"(that|those) of (a|the|its|those)\b": "the noun",
    r"(dearest|dearer)\b": "most expensive",
    r"(?<!\")([Cc]ontenders?|CONTENDERS|[Ee]ntrants?|[Kk]nobs?|[Vv]erdicts?)\b": "variant, hyperparameter, summary",
    r"[Bb]eside\b": "next to, in addition to",
    r"(lies|lie|stands|stand) (in|on|at|there|beside)\b": "is, is stored, appears",
    r"says so\b": "prints a warning, raises",
    r"hears? (of|from)\b": "receives",
    r"asked for\b": "requested",
    r"by itself alone\b": "alone",
}


def lines_of(path):
    return enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)


@pytest.mark.parametrize("form", BANNED)
def test_no_banned_form(form):
    """The forms of the style guide that a machine can find."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in (*SOURCE, *DOCS, *TESTS)
        if path not in NOT_OURS
        for number, line in lines_of(path)
        if re.search(rf"(?<![\w-]){form}", line)
    ]
    assert not found, f"write {BANNED[form]!r}:\n" + "\n".join(found)


def docstrings(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def test_docstrings_begin_with_a_verb_or_a_noun():
    """No headless relative clause such as "What a run does"."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {text.splitlines()[0]}"
        for path in SOURCE
        for number, text in docstrings(path)
        if re.match(r"(What|Whose|Where|Who|How|Whom|Of|As|With|The same|So)\b(?! many)", text)
    ]
    assert not found, "\n".join(found)


def sentences(text):
    """Sentences of the prose in a docstring: no examples, no lists of names, no code."""
    text = re.sub(r"(?m)^ +(antransformer|torchrun|python|pip) .*$", ".", text.partition("\nexamples:")[0])
    prose = re.sub(r"(?m)^\s*(>>>|\.\.\.|Args:|Attributes:|Returns:|Raises:|\w[\w, ]*:\s).*$", ".", text)
    for sentence in re.split(r"(?<=[.:;?!])\s+|\n\s*\n", prose):
        yield " ".join(sentence.split())


def test_sentences_of_docstrings_are_short():
    """At most 30 words in a sentence, and fewer than 16 on average."""
    found, lengths = [], []
    for path in SOURCE:
        for number, text in docstrings(path):
            for sentence in sentences(text):
                words = len(re.findall(r"[A-Za-z']{2,}", sentence))
                lengths.append(words)
                if words > 30:
                    found.append(f"{path.relative_to(ROOT)}:{number}: {words} words: {sentence}")
    assert not found, "\n".join(found)
    lengths = [length for length in lengths if length > 2]
    assert sum(lengths) / len(lengths) < 16


def paragraphs(page):
    """Prose of a Markdown page by line number: no tables, headings or code blocks; a code span counts as one word."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", lambda block: "\n" * block[0].count("\n"), page.read_text(encoding="utf-8"))
    number, lines = 1, []
    for at, line in enumerate([*text.splitlines(), ""], start=1):
        bare = line.strip()
        ends = not bare or bare[0] in "|#<!" or (line.startswith("    ") and not lines)
        if lines and (ends or re.match(r"([-*]|\d+\.) ", bare)):
            yield number, re.sub(r"`[^`]*`", "code", re.sub(r"\]\([^)]*\)", "]", " ".join(lines)))
            lines = []
        if not ends:
            number, lines = (number if lines else at), [*lines, bare]


def test_sentences_of_pages_are_short():
    """At most 30 words in a sentence of README and docs, where a colon or semicolon ends no sentence."""
    found = [
        f"{page.relative_to(ROOT)}:{number}: {words} words: {sentence}"
        for page in DOCS
        for number, paragraph in paragraphs(page)
        for sentence in re.split(r"(?<=[.?!])\s+|(?<=[.?!]\*\*)\s+", paragraph)
        if (words := len(re.findall(r"[A-Za-z']{2,}", sentence))) > 30
    ]
    assert not found, "\n".join(found)


def literals(node):
    return [item.value for item in ast.walk(node) if isinstance(item, ast.Constant) and isinstance(item.value, str)]


def test_tests_hold_no_sentences():
    """A test asserts classes, keys, paths and numbers, so that wording can improve freely."""
    found = []
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            held = literals(node.value) if isinstance(node, ast.keyword) and node.arg == "match" else []
            if any(len(re.findall(r"[a-z]{3,} (?=[a-z]{3,})", text)) >= 1 for text in held):
                found.append(f"{path.relative_to(ROOT)}:{node.value.lineno}")
    assert not found, "\n".join(found)


def test_tests_import_no_tests():
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in TESTS
        for number, line in lines_of(path)
        if re.match(r"\s*(from|import) (test_|conftest)", line)
    ]
    assert not found
