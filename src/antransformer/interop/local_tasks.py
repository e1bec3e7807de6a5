"""Evaluation sets on disk: where their files lie, and their published lines as the rows that lm_eval's tasks take.

Prompts, choices and metrics are those of lm_eval's own task of the same name; here is only what its hub would give it.
"""

import fnmatch
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from antransformer.data.readers import SEPARATOR, reading
from antransformer.errors import DataError
from antransformer.files import require_file

Row = dict[str, Any]


def hellaswag(line: Row) -> Row:
    """The release (ctx_a, ctx_b, ...), or lines that are cleaned already (query, choices, gold)."""
    if "query" in line:
        choices = texts(line, "choices")
        return {"query": text(line, "query"), "choices": choices, "label": str(place(line, "gold", len(choices)))}
    endings = texts(line, "endings")
    contexts = {name: text(line, name) for name in ("activity_label", "ctx_a", "ctx_b")}
    return {**contexts, "endings": endings, "label": str(place(line, "label", len(endings)))}


def arc(line: Row) -> Row:
    """The release (a question with stem and choices), the hub's columns, or choices with the place of gold."""
    if "gold" in line:
        choices = texts(line, "choices")
        labels = [chr(ord("A") + number) for number in range(len(choices))]
        key = labels[place(line, "gold", len(choices))]
    else:
        nested = isinstance(line["question"], dict)
        options = line["question"]["choices"] if nested else line["choices"]
        columns = {name: [option[name] for option in options] for name in ("text", "label")} if nested else options
        choices, labels, key = texts(columns, "text"), texts(columns, "label"), text(line, "answerKey")
        if len(labels) != len(choices) or key not in labels:
            raise ValueError(f"answerKey {key!r} is none of its {len(labels)} labels")
        line = {"question": line["question"]["stem"]} if nested else line
    return {"question": text(line, "question"), "choices": {"text": choices, "label": labels}, "answerKey": key}


def piqa(line: Row) -> Row:
    """The release, whose labels lie in a file beside it, or the hub's columns."""
    return {name: text(line, name) for name in ("goal", "sol1", "sol2")} | {"label": place(line, "label", 2)}


def winogrande(line: Row) -> Row:
    """The release and the hub have the same."""
    if "_" not in text(line, "sentence"):
        raise ValueError("sentence has no _ to fill in")
    row = {name: text(line, name) for name in ("sentence", "option1", "option2", "answer")}
    if row["answer"] not in ("1", "2"):
        raise ValueError(f"answer {row['answer']!r} is neither '1' nor '2'")
    return row


def lambada(line: Row) -> Row:
    """OpenAI's release: the last word is to be found."""
    if not text(line, "text").strip():
        raise ValueError("text is empty")
    return {"text": line["text"]}


def blimp(line: Row) -> Row:
    """A pair of sentences."""
    return {name: text(line, name) for name in ("sentence_good", "sentence_bad")}


def text(line: Row, name: str) -> str:
    """A field that is text; raises ValueError if it is none, KeyError where there is no such field."""
    value = line[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} is not text")
    return value


def texts(line: Row, name: str) -> list[str]:
    """A field that is a list of two or more texts, none of them empty; raises as ``text``."""
    value = line[name]
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"{name} is not a list of two or more texts")
    return value


def place(line: Row, name: str, count: int) -> int:
    """A field that is the place, counted from 0, of one of so many answers; raises as ``text``."""
    value = str(line[name])
    if not value.isdecimal() or int(value) >= count:
        raise ValueError(f"{name} {value!r} is not the place of one of {count} answers")
    return int(value)


class Set(NamedTuple):
    """What a task reads.

    Attributes:
        patterns: of its file, the first that fits; in lower case, with _ for -, * spans folders.
        row: a line as lm_eval's task takes it; None for plain text.
    """

    patterns: tuple[str, ...]
    row: Callable[[Row], Row] | None


SETS = {
    "lambada_openai": Set(("lambada*test.jsonl", "lambada.jsonl"), lambada),
    "hellaswag": Set(("hellaswag*val*.jsonl", "hellaswag.jsonl"), hellaswag),
    "arc_easy": Set(("arc_easy*test*.jsonl", "arc_easy*val*.jsonl", "arc_easy*dev*.jsonl", "arc_easy.jsonl"), arc),
    "arc_challenge": Set(
        ("arc_challenge*test*.jsonl", "arc_challenge*val*.jsonl", "arc_challenge*dev*.jsonl", "arc_challenge.jsonl"),
        arc,
    ),
    "piqa": Set(("piqa*val*.jsonl", "piqa*dev.jsonl", "physicaliqa*dev.jsonl", "piqa.jsonl"), piqa),
    "winogrande": Set(("winogrande*val*.jsonl", "winogrande*dev.jsonl", "winogrande.jsonl"), winogrande),
    "wikitext": Set(("*wiki.test.raw", "*wiki.test.tokens"), None),
}
BLIMP = "blimp"  # a group: its 67 tasks are blimp_NAME, their files NAME.jsonl


def find(task: str, folder: Path) -> Path:
    """The file of a task in a folder, or in folders of it.

    Raises:
        DataError: there is none, or more than one.
    """
    name = task.removeprefix(f"{BLIMP}_").lower()
    patterns = SETS[task].patterns if task in SETS else (f"blimp*/{name}.jsonl", f"blimp_{name}.jsonl")
    if not folder.is_dir():
        raise DataError(f"--task-data {folder}: no such folder")
    paths = [path for depth in ("*", "*/*", "*/*/*") for path in sorted(folder.glob(depth)) if path.is_file()]
    files = {str(path.relative_to(folder)).lower().replace("-", "_"): path for path in paths}
    for pattern in patterns:
        found = [files[name] for name in fnmatch.filter(files, pattern)]
        if len(found) > 1:
            several = ", ".join(str(path.relative_to(folder)) for path in found)
            raise DataError(f"{folder}: more than one file for {task}: {several}; leave the one that is meant")
        if found:
            return found[0]
    raise DataError(f"{folder}: no file for {task}; looked for {', '.join(patterns)}")


def rows(task: str, path: Path) -> list[Row]:
    """The rows of a task's file.

    Raises:
        DataError: it can not be read, a line of it is broken, or it is empty.
    """
    row = SETS[task].row if task in SETS else blimp
    found = [{"page": page} for page in pages(read(path))] if row is None else list(json_rows(path, row))
    first = found[0].keys() if found else ()
    if not found or any(other.keys() != first for other in found):
        raise DataError(f"{path}: {'its lines are of two forms' if found else 'empty'}")
    return found


def json_rows(path: Path, row: Callable[[Row], Row]) -> Iterator[Row]:
    """Lines of JSON through ``row``, with the labels of FILE-labels.lst where there is one; raises as ``rows``."""
    lines = [(number, line) for number, line in enumerate(read(path).split("\n"), 1) if line.strip()]
    beside = path.with_name(f"{path.stem}-labels.lst")
    labels = read(beside).split() if beside.is_file() else None
    if labels is not None and len(labels) != len(lines):
        raise DataError(f"{beside}: {len(labels)} labels, for {len(lines)} lines of {path.name}")
    for index, (number, line) in enumerate(lines):
        try:
            content = json.loads(line)
            if not isinstance(content, dict):
                raise ValueError("not a JSON object")
            found = row({"label": labels[index], **content} if labels else content)
            json.dumps(found, ensure_ascii=False).encode()  # JSON can spell half of a surrogate pair
            yield found
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: line {number} is not JSON: {error.msg}, column {error.colno}") from error
        except KeyError as error:
            raise DataError(f"{path}: line {number} has no {error.args[0]}") from error
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number}: {error}") from error


def pages(content: str) -> list[str]:
    """The articles of a WikiText file, each from its heading ``= Title =`` on; sections have more signs."""
    found = re.split(r"\n(?= *= [^=\s](?:[^\n]*[^=\s])? = *\n)", content)
    return [page for page in found if page.strip()]


def documents(path: Path) -> list[Row]:
    """The documents of a text file, separated as ``prepare`` does, by the literal ``<|endoftext|>``.

    Raises:
        DataError: it can not be read, is not UTF-8, or is empty.
    """
    found = [{"text": document} for document in read(path).split(SEPARATOR) if document.strip()]
    if not found:
        raise DataError(f"{path}: no text in it")
    return found


def read(path: Path) -> str:
    """A whole file, of UTF-8, as it is; raises DataError."""
    with reading(path):
        require_file(path)
        return path.read_bytes().decode("utf-8-sig")
