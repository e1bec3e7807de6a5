"""Inputs to documents: search for files, cuts of long text, and errors for broken files."""

import bz2
import errno
import gzip
import json
import lzma
import os
import sys
import tracemalloc
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from antransformer.data import readers
from antransformer.data.parquet import parquet_texts
from antransformer.data.sources import Corpus, walk
from antransformer.errors import DataError, MissingExtraError
from helpers.messages import mentions

MAX = readers.MAX_CHARACTERS


def texts(*inputs: str | Path) -> list[str]:
    return [text for text, _ in Corpus.find(inputs).documents()]


def refusal(*inputs: str | Path, error: type[Exception] = DataError) -> str:
    with pytest.raises(error) as caught:
        texts(*inputs)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_separator_splits_plain_text_and_blank_documents_are_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one<|endoftext|>  \n<|endoftext|>two\r\n<|endoftext|>")
    assert texts(path) == ["one", "two\r\n"]


def test_byte_order_mark_is_removed(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")) == ["hello"]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_documents_do_not_depend_on_the_block_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(readers, "MAX_CHARACTERS", 40)
    text = "ä" * 39 + "<|endoftext|>" + "word " * 30 + "\n\n" + "x" * 41 + "<|endoftext|>" + "é\n" * 50
    path = write(tmp_path / "a.txt", text)
    documents = texts(path)
    monkeypatch.setattr(readers, "BLOCK_BYTES", block)
    assert texts(path) == documents
    assert "".join(documents) == text.replace("<|endoftext|>", "")
    assert max(map(len, documents)) <= 40


@pytest.mark.parametrize(
    ("mark", "first"),
    [("\n\n", MAX - 98), ("\n", MAX - 99), ("", MAX)],
)
def test_long_documents_are_cut_at_a_blank_line_or_line_if_possible(tmp_path: Path, mark: str, first: int) -> None:
    line = "a" * (MAX - 100) + mark
    sections = texts(write(tmp_path / "a.txt", line + "b" * MAX))
    assert len(sections[0]) == first
    assert "".join(sections) == line + "b" * MAX


def test_an_early_blank_line_makes_no_tiny_section(tmp_path: Path) -> None:
    sections = texts(write(tmp_path / "a.txt", "Title\n\n" + "a" * MAX))
    assert [len(section) for section in sections] == [MAX, 7]


def test_folder_is_searched_in_order_without_hidden_files(tmp_path: Path) -> None:
    write(tmp_path / "b.md", "b")
    write(tmp_path / "a" / "z.PY", "z")
    write(tmp_path / "a" / "data.jsonl", '{"text": "j"}\n')
    write(tmp_path / ".git" / "c.txt", "hidden")
    write(tmp_path / ".d.txt", "hidden")
    write(tmp_path / "weights.bin", "other ending")
    assert texts(tmp_path) == ["j", "z", "b"]


def test_pipes_and_broken_links_in_a_folder_are_skipped(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "link.txt").symlink_to(tmp_path / "absent")
    assert texts(tmp_path) == ["a"]


def test_links_to_folders_are_followed_and_each_folder_is_read_once(tmp_path: Path) -> None:
    for name in ("corpus/own", "elsewhere/sub"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.txt").write_text("text")
    (tmp_path / "corpus/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus/again").symlink_to(tmp_path / "elsewhere/sub")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "corpus")
    found = [path.resolve() for path in walk(tmp_path / "corpus")]
    assert sorted(found) == [tmp_path / "corpus/own/a.txt", tmp_path / "elsewhere/sub/a.txt"]


def test_the_order_of_files_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link and its target are both in the folder, and the first that is found has the file."""
    for name in ("b/x.txt", "aa.txt", "aaa/y.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    real, orders = os.walk, []
    for reverse in (False, True):

        def in_order(*given: Any, reverse: bool = reverse, **options: Any) -> Any:
            for parent, folders, files in real(*given, **options):
                folders.sort(reverse=reverse)
                yield parent, folders, files

        monkeypatch.setattr(os, "walk", in_order)
        orders.append([path.relative_to(tmp_path) for path in walk(tmp_path)])
    assert orders[0] == orders[1] == [Path("a/x.txt"), Path("aa.txt"), Path("aaa/y.txt")]


def test_a_file_that_a_pattern_matches_by_its_name_is_not_skipped(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    for name in ("x.dat", "s/y.dat"):
        write(tmp_path / name, "text")
    corpus = Corpus.find([tmp_path / "**"])
    assert sorted(path.name for path in corpus.files) == ["x.dat", "y.dat"] and not corpus.sources[0].skipped


@pytest.mark.parametrize("group", [7, 100, 1000])
def test_a_parquet_file_is_read_from_any_row(tmp_path: Path, group: int) -> None:
    rows = [f"row {number}" for number in range(1000)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=group)
    for start in (0.0, 0.25, 0.5, 0.999):
        texts = list(parquet_texts(tmp_path / "a.parquet", "text", start))
        assert [text for text, _ in texts] == rows[int(1000 * start) :]
    size = (tmp_path / "a.parquet").stat().st_size
    assert texts[-1][1] == size and 0 < next(parquet_texts(tmp_path / "a.parquet", "text"))[1] <= size


def test_an_unreadable_folder_is_not_skipped_silently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "a")
    locked, scan = write(tmp_path / "locked" / "b.txt", "b").parent, os.scandir

    def scandir(path: str) -> Any:
        if Path(path) == locked:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert mentions(refusal(tmp_path), *f"{locked} {os.strerror(errno.EACCES)}".split())


def test_globs_match_any_ending_and_a_file_counts_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.notes", "a")
    write(tmp_path / "sub" / "b.notes", "b")
    corpus = Corpus.find([tmp_path / "**" / "*.notes", path])
    assert [text for text, _ in corpus.documents()] == ["a", "b"]
    assert [(source.files, source.bytes) for source in corpus.sources] == [(2, 2), (0, 0)]


def test_undecodable_files_of_a_folder_are_skipped_and_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "good")
    write(tmp_path / "b.txt", b"\xff\xfe\x00")
    write(tmp_path / "c.txt", "x\0y")
    corpus = Corpus.find([tmp_path])
    assert [text for text, _ in corpus.documents()] == ["good"]
    (reason,) = corpus.sources[0].skipped
    assert "UTF-8" in reason and corpus.sources[0].skipped[reason] == {"files": 2, "first": ["b.txt", "c.txt"]}


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


@pytest.mark.parametrize("compression", COMPRESS)
def test_text_and_json_lines_of_any_compression(tmp_path: Path, compression: str) -> None:
    compress = COMPRESS[compression]
    write(tmp_path / f"a.txt{compression}", compress("\ufeffone<|endoftext|>zwölf".encode()))
    for ending in (".jsonl", ".ndjson", ".JSON"):
        write(tmp_path / f"b{ending}{compression}", compress(b'{"text": "three"}\n{"text": "four"}\n'))
    assert texts(tmp_path) == ["three", "four", "one", "zwölf"][2:] + ["three", "four"] * 3
    if compression:
        path = write(tmp_path / f"cut.txt{compression}", compress(Random(0).randbytes(3000).hex().encode())[:-9])
        assert mentions(refusal(path), path)


def test_json_that_is_not_lines_is_refused_or_skipped(tmp_path: Path) -> None:
    pretty = write(tmp_path / "pretty.json", json.dumps({"text": "never read"}, indent=2))
    array = write(tmp_path / "array.json", '[{"text": "never read"}]')
    for path in (pretty, array):
        assert mentions(refusal(path), path, "'text'")
    write(tmp_path / "a.txt", "a")
    corpus = Corpus.find([tmp_path])
    assert [text for text, _ in corpus.documents()] == ["a"]
    ((reason, entry),) = corpus.sources[0].skipped.items()
    assert "JSON" in reason and entry == {"files": 2, "first": ["array.json", "pretty.json"]}


def test_a_null_in_place_of_a_nested_record_is_an_empty_document(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"doc": {"body": "one"}}\n{"doc": null}\n{"doc": {"body": null}}\n')
    assert [text for text, _ in Corpus.find([tmp_path], text_field="doc.body").documents()] == ["one"]
    write(tmp_path / "b.jsonl", '{"doc": {"body": "one"}}\nnull\n')
    with pytest.raises(DataError):
        list(Corpus.find([tmp_path / "b.jsonl"], text_field="doc.body").documents())


def test_text_field_selects_nested_records_and_names_with_dots(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"doc": {"body": "one"}, "text": "other"}\n{"doc.body": "two"}\n')
    struct = pa.array([{"body": "three", "n": 1}, None, {"body": "four", "n": 2}])
    pq.write_table(pa.table({"doc": struct, "text": ["x", "y", "z"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"doc.body": ["five"]}), tmp_path / "c.parquet")
    corpus = Corpus.find([tmp_path], text_field="doc.body")
    assert [text for text, _ in corpus.documents()] == ["one", "two", "three", "four", "five"]
    for name, facts in (("a.jsonl", ["1", "'doc.tail'", "['body']"]), ("b.parquet", ["'doc.tail'", "['body', 'n']"])):
        with pytest.raises(DataError) as error:
            list(Corpus.find([tmp_path / name], text_field="doc.tail").documents())
        assert mentions(error.value, tmp_path / name, "--text-field", *facts)


def test_columns_of_any_kind_that_holds_text(tmp_path: Path) -> None:
    values = ["one", None, "zwölf", "one"]
    plain = pa.array(values)
    kinds = [
        plain.dictionary_encode(),
        plain.cast(pa.large_string()),
        plain.cast(pa.string_view()),
        plain.cast(pa.binary()),
        plain.cast(pa.large_binary()),
    ]
    for number, column in enumerate(kinds):
        pq.write_table(pa.table({"text": column}), tmp_path / f"{number}.parquet")
        assert texts(tmp_path / f"{number}.parquet") == ["one", "zwölf", "one"], column.type
    pq.write_table(pa.table({"text": [b"\xff"]}), tmp_path / "b.parquet")
    assert mentions(refusal(tmp_path / "b.parquet"), tmp_path / "b.parquet")


def test_skipped_files_are_counted_by_reason(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a")
    for number in range(5):
        write(tmp_path / f"{number}.npz", "x")
    write(tmp_path / "latin.txt", "é".encode("latin-1"))
    write(tmp_path / "empty.txt", "")
    skipped = Corpus.find([tmp_path]).sources[0].skipped
    assert {reason.split()[-1]: entry for reason, entry in skipped.items()} == {
        "ending": {"files": 5, "first": ["0.npz", "1.npz", "2.npz"]},
        "text": {"files": 1, "first": ["latin.txt"]},
        "empty": {"files": 1, "first": ["empty.txt"]},
    }
    # A shell expands *.txt to all of these.
    assert texts(tmp_path / "a.txt", tmp_path / "empty.txt") == ["a"]


def test_only_some_blocks_of_a_long_file_are_decoded_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CHECKED_BYTES", 64)
    text = "é" * 100_000
    path = write(tmp_path / "a.txt", text)
    assert texts(path) == [text]
    for position in (0, 100_000, 199_999):
        write(tmp_path / "a.txt", text.encode()[:position] + b"\xff" + text.encode()[position + 1 :])
        refusal(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_positions_are_spread_over_the_files(tmp_path: Path, name: str) -> None:
    documents = [f"document {number}" for number in range(1000)]
    if name == "a.txt":
        write(tmp_path / name, "<|endoftext|>".join(documents))
    elif name == "a.jsonl":
        write(tmp_path / name, "".join(json.dumps({"text": text}) + "\n" for text in documents))
    else:
        pq.write_table(pa.table({"text": documents}), tmp_path / name, row_group_size=10)
    write(tmp_path / "b.txt.gz", gzip.compress(b"packed"))
    found = []
    for path, start, share in Corpus.find([tmp_path]).positions(10):
        assert 0 <= share <= 0.1
        found.append(next(readers.read(path, start=start))[0])
    numbers = [int(text.split()[-1]) for text in found if text != "packed"]
    assert numbers[0] == 0 and numbers == sorted(numbers)
    assert max(np.diff([*numbers, 1000])) < 200 and set(found) <= {*documents, "packed"}


def test_json_lines_plain_and_compressed(tmp_path: Path) -> None:
    lines = b'{"text": "one", "id": 1}\n\n{"text": " "}\n{"text": "<|endoftext|>\\ud800"}'
    write(tmp_path / "a.jsonl", lines)
    write(tmp_path / "b.jsonl.gz", gzip.compress(lines))
    two_frames = b"".join(zstandard.ZstdCompressor().compress(part) for part in (lines[:20], lines[20:]))
    write(tmp_path / "c.jsonl.zst", two_frames)
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        # In JSON lines the separator is plain text. Half a surrogate pair is replaced.
        assert texts(tmp_path / name) == ["one", "<|endoftext|>?"], name


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", None, "two"], "id": [1, 2, 3]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["one", "two"]


@pytest.mark.parametrize("name", ["a.txt", "b.jsonl", "c.jsonl.gz", "d.parquet"])
def test_progress_grows_to_the_size_of_the_files(tmp_path: Path, name: str) -> None:
    records = [f"document {i}" for i in range(1000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in records).encode()
    write(tmp_path / "a.txt", "<|endoftext|>".join(records))
    write(tmp_path / "b.jsonl", lines)
    write(tmp_path / "c.jsonl.gz", gzip.compress(lines))
    pq.write_table(pa.table({"text": records}), tmp_path / "d.parquet")
    corpus = Corpus.find([tmp_path / name, write(tmp_path / "last.txt", "last")])
    done = [position for _, position in corpus.documents()]
    assert len(done) == 1001
    assert done == sorted(done)
    assert done[-2:] == [corpus.bytes - 4, corpus.bytes]


def test_inputs_that_are_not_text_are_refused(tmp_path: Path) -> None:
    for name in ("absent.txt", "*.txt"):
        assert mentions(refusal(tmp_path / name), *f"{tmp_path / name}".split())
    assert mentions(refusal(tmp_path), *f"{tmp_path} .txt .md .py .jsonl .parquet".split())
    assert refusal() != refusal("")  # no input, and an empty name
    for binary in (write(tmp_path / "model.bin", bytes(range(256))), write(tmp_path / "nul.txt", "a\0b")):
        assert mentions(refusal(binary), *f"{binary} UTF-8".split())
    ascii_pdf = write(tmp_path / "paper.pdf", "%PDF-1.7\n1 0 obj\n")
    assert mentions(refusal(ascii_pdf), ascii_pdf, "PDF")
    folder = write(tmp_path / "folder" / "latin.txt", "é".encode("latin-1")).parent
    assert mentions(refusal(folder), *f"{folder} 1 UTF-8 latin.txt".split())
    assert mentions(refusal("/dev/null"), "/dev/null")


def test_empty_inputs_are_refused(tmp_path: Path) -> None:
    for name, content in (("empty.txt", ""), ("blank.txt", " \n<|endoftext|>\n"), ("blank.jsonl", "\n\n")):
        path = write(tmp_path / name, content)
        assert mentions(refusal(path), *f"{path}".split())


@pytest.mark.parametrize(
    ("line", "facts"),
    [
        ('{"text": "cut', "JSON 14"),  # the column
        ("[1, 2]", "list 'text'"),
        ('{"content": "x", "id": 3}', "'text' ['content', 'id']"),
        ('{"text": 5}', "'text' int"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_broken_json_lines_name_file_and_line(tmp_path: Path, line: str, facts: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n\n' + line + "\n")
    assert mentions(refusal(path), *f"{path} 3 {facts}".split())


def test_undecodable_json_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "\xff"}\n')
    assert mentions(refusal(path), *f"{path} 1 JSON".split())


def check_broken(path: Path, cause: type[Exception]) -> None:
    with pytest.raises(DataError) as error:
        texts(path)
    assert mentions(str(error.value), *f"{path}".split()) and "\n" not in str(error.value)
    assert isinstance(error.value.__cause__, cause)


def test_broken_compressed_files(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"text": "one"}\n' * 1000)
    check_broken(write(tmp_path / "cut.jsonl.gz", packed[:-20]), EOFError)
    check_broken(write(tmp_path / "no.jsonl.gz", b"plain"), gzip.BadGzipFile)
    # Lines of 128 bytes end at zstd's block boundaries of 128 KiB, so a truncated file still has complete lines.
    noise = Random(0).randbytes(4096 * 57).hex()
    lines = "".join(f'{{"text":  "{noise[start : start + 114]}"}}\n' for start in range(0, len(noise), 114))
    packed = zstandard.compress(lines.encode())
    for size in (len(packed) * 3 // 4, len(packed) - 1):
        check_broken(write(tmp_path / "cut.jsonl.zst", packed[:size]), EOFError)
    check_broken(write(tmp_path / "no.jsonl.zst", b"plain text"), zstandard.ZstdError)
    check_broken(write(tmp_path / "no.parquet", b"plain text" * 10), pa.ArrowInvalid)


def test_parquet_without_text_names_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["one"]}), tmp_path / "a.parquet")
    assert mentions(refusal(tmp_path / "a.parquet"), *["'text'", "['body']"])
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "b.parquet")
    assert mentions(refusal(tmp_path / "b.parquet"), *["'text'", "int64"])
    pq.write_table(pa.Table.from_arrays([pa.array(["one"])] * 2, names=["text", "text"]), tmp_path / "c.parquet")
    assert mentions(refusal(tmp_path / "c.parquet"), *["2", "'text'"])


def test_a_column_with_a_dot_is_read_next_to_a_struct_of_the_same_path(tmp_path: Path) -> None:
    table = pa.table({"doc": [{"body": "nested"}], "doc.body": ["flat"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [text for text, _ in parquet_texts(tmp_path / "a.parquet", "doc.body")] == ["flat"]


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for name, module in (("a.jsonl.zst", "zstandard"), ("b.parquet", "pyarrow")):
        path = write(tmp_path / name, b"never read")
        with pytest.raises(MissingExtraError, match=rf"{module}.*antransformer\[data\]"):
            Corpus.find([path])


def test_a_file_that_changes_or_disappears_after_the_search(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for change, fact in ((lambda: path.write_bytes(b"\xff"), "UTF-8"), (path.unlink, os.strerror(errno.ENOENT))):
        corpus = Corpus.find([write(path, "a")])
        change()
        with pytest.raises(DataError) as error:
            list(corpus.documents())
        assert mentions(str(error.value), *f"{path} {fact}".split())


def test_a_large_file_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "one_line.txt"
    with path.open("wb") as file:
        for _ in range(60):
            file.write(b"x" * 1_000_000)
    tracemalloc.start()
    try:
        size = sum(len(text) for text, _ in Corpus.find([path]).documents())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == 60_000_000
    assert peak < 12_000_000
