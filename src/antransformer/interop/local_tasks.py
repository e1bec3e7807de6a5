"""Evaluation sets on disk: finds their published files and converts the lines to the rows that lm_eval's tasks expect.

Prompts, choices and metrics come from lm_eval's own tasks. This module only replaces the data of the Hugging Face hub.
"""

import fnmatch
import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from antransformer.data.readers import TEXT_FIELD, data_errors, read, unreadable
from antransformer.errors import DataError
from antransformer.files import require_file
from antransformer.wording import counted

Row = dict[str, Any]


def hellaswag(line: Row) -> Row:
    """Convert a line of the release (ctx_a, ctx_b, ...) or a cleaned line (query, choices, gold)."""
    if "query" in line:
        choices = text_list(line, "choices")
        label = str(choice_index(line, "gold", len(choices)))
        return {"query": text_field(line, "query"), "choices": choices, "label": label}
    endings = text_list(line, "endings")
    contexts = {name: text_field(line, name) for name in ("activity_label", "ctx_a", "ctx_b")}
    return {**contexts, "endings": endings, "label": str(choice_index(line, "label", len(endings)))}


def arc(line: Row) -> Row:
    """Convert a line of the release (question with stem and choices), of the hub, or with the index of gold."""
    if "gold" in line:
        choices = text_list(line, "choices")
        labels = [chr(ord("A") + number) for number in range(len(choices))]
        key = labels[choice_index(line, "gold", len(choices))]
    else:
        nested = isinstance(line["question"], dict)
        options = line["question"]["choices"] if nested else line["choices"]
        columns = {name: [option[name] for option in options] for name in ("text", "label")} if nested else options
        choices, labels, key = text_list(columns, "text"), text_list(columns, "label"), text_field(line, "answerKey")
        if len(labels) != len(choices) or key not in labels:
            raise ValueError(f"answerKey {key!r} is not among {counted(len(labels), 'label')}")
        line = {"question": line["question"]["stem"]} if nested else line
    return {"question": text_field(line, "question"), "choices": {"text": choices, "label": labels}, "answerKey": key}


def piqa(line: Row) -> Row:
    """Convert a line of the release, whose labels are in a separate file, or of the hub."""
    row = {name: text_field(line, name) for name in ("goal", "sol1", "sol2")}
    return {**row, "label": choice_index(line, "label", 2)}


def winogrande(line: Row) -> Row:
    """Convert a line; the release and the hub have the same fields."""
    if "_" not in text_field(line, "sentence"):
        raise ValueError("sentence has no _ to fill in")
    row = {name: text_field(line, name) for name in ("sentence", "option1", "option2", "answer")}
    if row["answer"] not in ("1", "2"):
        raise ValueError(f"answer {row['answer']!r} is neither '1' nor '2'")
    return row


def lambada(line: Row) -> Row:
    """Convert a line of OpenAI's release; the last word of the text is to be predicted."""
    if not text_field(line, "text").strip():
        raise ValueError("text is empty")
    return {"text": line["text"]}


def blimp(line: Row) -> Row:
    """Convert a pair of an acceptable and an unacceptable sentence."""
    return {name: text_field(line, name) for name in ("sentence_good", "sentence_bad")}


def text_field(line: Row, name: str) -> str:
    """Return a field that must be text; raises ValueError for other types and KeyError if it is missing."""
    value = line[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} is not text")
    return value


def text_list(line: Row, name: str) -> list[str]:
    """Return a field that must be a list of two or more non-empty texts; raises the errors of ``text_field``."""
    value = line[name]
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"{name} is not a list of two or more texts")
    return value


def choice_index(line: Row, name: str, count: int) -> int:
    """Return a field that must be an index below ``count`` (number or digits); raises the errors of ``text_field``."""
    value = str(line[name])
    if not value.isdecimal() or int(value) >= count:
        raise ValueError(f"{name} {value!r} is not an index into {counted(count, 'answer')}")
    return int(value)


class EvaluationSet(NamedTuple):
    """Files of a task.

    Attributes:
        patterns: file name patterns in order of preference, in lower case and with _ for -; * also matches folders.
        row: converter of a line to a row of lm_eval's task; None for plain text.
    """

    patterns: tuple[str, ...]
    row: Callable[[Row], Row] | None


SETS = {
    "lambada_openai": EvaluationSet(("lambada*test.jsonl", "lambada.jsonl"), lambada),
    "hellaswag": EvaluationSet(("hellaswag*val*.jsonl", "hellaswag.jsonl"), hellaswag),
    "arc_easy": EvaluationSet(
        ("arc_easy*test*.jsonl", "arc_easy*val*.jsonl", "arc_easy*dev*.jsonl", "arc_easy.jsonl"), arc
    ),
    "arc_challenge": EvaluationSet(
        ("arc_challenge*test*.jsonl", "arc_challenge*val*.jsonl", "arc_challenge*dev*.jsonl", "arc_challenge.jsonl"),
        arc,
    ),
    "piqa": EvaluationSet(("piqa*val*.jsonl", "piqa*dev.jsonl", "physicaliqa*dev.jsonl", "piqa.jsonl"), piqa),
    "winogrande": EvaluationSet(("winogrande*val*.jsonl", "winogrande*dev.jsonl", "winogrande.jsonl"), winogrande),
    "wikitext": EvaluationSet(("*wiki.test.raw", "*wiki.test.tokens"), None),
}
BLIMP = "blimp"  # a group of 67 tasks blimp_NAME in files NAME.jsonl


def find_file(task: str, folder: Path) -> Path:
    """Return the file of a task in a folder, at most two subfolders deep.

    Raises:
        DataError: no file or more than one file matches.
    """
    name = task.removeprefix(f"{BLIMP}_").lower()
    patterns = SETS[task].patterns if task in SETS else (f"blimp*/{name}.jsonl", f"blimp_{name}.jsonl")
    if not folder.is_dir():
        raise DataError(f"--task-data {folder}: no such folder")
    paths = [path for depth in ("*", "*/*", "*/*/*") for path in sorted(folder.glob(depth)) if path.is_file()]
    # Releases spell names differently: ARC-Easy-Test.jsonl, arc_easy_test.jsonl.
    names = {path: str(path.relative_to(folder)).lower().replace("-", "_") for path in paths}
    for pattern in patterns:
        matches = [path for path, name in names.items() if fnmatch.fnmatch(f"/{name}", f"*/{pattern}")]
        if len(matches) > 1:
            found = ", ".join(str(path.relative_to(folder)) for path in matches)
            raise DataError(f"{folder}: more than one file for {task}: {found}; keep only one of them")
        if matches:
            return matches[0]
    raise DataError(f"{folder}: no file for {task}; expected {', '.join(patterns)}")


def rows(task: str, path: Path) -> list[Row]:
    """Return the rows of a task's file.

    Raises:
        DataError: the file cannot be read or is empty, or a line is broken.
    """
    row = SETS[task].row if task in SETS else blimp
    converted = (
        [{"page": page} for page in split_articles(read_utf8(path))] if row is None else list(json_rows(path, row))
    )
    if not converted:
        raise DataError(f"{path}: empty")
    # lm_eval builds a table of the rows, whose columns must not differ.
    if any(other.keys() != converted[0].keys() for other in converted):
        raise DataError(f"{path}: lines have different fields; convert all of them to one form")
    return converted


def json_rows(path: Path, row: Callable[[Row], Row]) -> Iterator[Row]:
    """Yield JSON lines through ``row``, with labels of any FILE-labels.lst; raises the errors of ``rows``."""
    lines = [(number, line) for number, line in enumerate(read_utf8(path).split("\n"), 1) if line.strip()]
    label_file = path.with_name(f"{path.stem}-labels.lst")
    labels = read_utf8(label_file).split() if label_file.is_file() else None
    if labels is not None and len(labels) != len(lines):
        raise DataError(
            f"{label_file}: {counted(len(labels), 'label')} for {counted(len(lines), 'line')} of {path.name}"
        )
    for index, (number, line) in enumerate(lines):
        try:
            content = json.loads(line)
            if not isinstance(content, dict):
                raise ValueError("not a JSON object")
            # A label in the line takes precedence over the label file.
            converted = row({"label": labels[index], **content} if labels else content)
            # JSON can spell half of a surrogate pair, which UTF-8 cannot encode.
            json.dumps(converted, ensure_ascii=False).encode()
            yield converted
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: line {number} is not JSON: {error.msg}, column {error.colno}") from error
        except KeyError as error:
            raise DataError(f"{path}: line {number} has no {error.args[0]}") from error
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number}: {error}") from error


def split_articles(content: str) -> list[str]:
    """Split a WikiText file at its titles ``= Title =``; headings of sections have more than one sign."""
    articles = re.split(r"\n(?= *= [^=\s](?:[^\n]*[^=\s])? = *\n)", content)
    return [article for article in articles if article.strip()]


def documents(path: Path, field: str = TEXT_FIELD, limit: int | None = None) -> list[Row]:
    """Return the first ``limit`` documents of a file that ``prepare`` reads: plain text, JSON lines or parquet.

    Args:
        path: the file. In plain text the literal ``<|endoftext|>`` separates documents.
        field: field of JSON lines or column of parquet that holds the text.
        limit: maximum number of documents; the file is not read further.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or is empty.
        MissingExtraError: the file needs pyarrow or zstandard, which is not installed.
    """
    with data_errors(path):
        require_file(path)
    if reason := unreadable(path, field):
        raise DataError(f"{path}: {reason}; give a file of text, JSON lines or parquet")
    # lm_eval scores whole documents.
    found = ({"text": text} for text, _ in read(path, field, whole=True) if text.strip())
    rows = list(islice(found, limit))
    if not rows:
        raise DataError(f"{path}: contains no text")
    return rows


def read_utf8(path: Path) -> str:
    """Return the content of a UTF-8 file with its line ends unchanged; raises DataError."""
    with data_errors(path):
        require_file(path)
        return path.read_bytes().decode("utf-8-sig")
