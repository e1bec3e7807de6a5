"""Texts in a column of a parquet file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from antransformer.errors import DataError
from antransformer.extras import require

BATCH_ROWS = 256


def parquet_texts(path: Path, column: str, start: float = 0.0) -> Iterator[tuple[str, int]]:
    """Yield (text, estimated bytes of the file read so far) for each row; the text of a null is empty.

    Args:
        path: the file.
        column: name of the column. Dots select a field of a struct.
        start: fraction of the rows to skip.

    Raises:
        DataError: the file is broken, or the column is missing or does not hold text.
        MissingExtraError: pyarrow is not installed.
    """
    with _opened(path, column) as (file, names):
        size, total = path.stat().st_size, max(1, file.metadata.num_rows)
        skipped, rows, first = int(start * file.metadata.num_rows), 0, 0
        while first < file.num_row_groups - 1 and rows + file.metadata.row_group(first).num_rows <= skipped:
            rows += file.metadata.row_group(first).num_rows
            first += 1
        groups = list(range(first, file.num_row_groups))
        for whole in file.iter_batches(batch_size=BATCH_ROWS, row_groups=groups, columns=[column]):
            batch = whole.slice(max(0, skipped - rows))
            rows += whole.num_rows
            # Parquet gives no byte position, so progress is estimated from the rows.
            yield from ((text or "", size * rows // total) for text in _texts(batch.column(names[0]), names[1:]))


def check_parquet(path: Path, column: str) -> None:
    """Check that a file has a column of text, without reading it; arguments and errors as in ``parquet_texts``."""
    with _opened(path, column):
        pass


@contextmanager
def _opened(path: Path, column: str) -> Iterator[tuple[Any, list[str]]]:
    """Open a file, and check its column; yields it with the names of the column and the fields inside it."""
    pyarrow, parquet = require("pyarrow", "data"), require("pyarrow.parquet", "data")
    try:
        with parquet.ParquetFile(path) as file:
            names = [column] if column in file.schema_arrow.names else column.split(".")
            _require_text(path, file.schema_arrow, column, names)
            yield file, names
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a complete parquet file ({' '.join(str(error).split())})") from error


def _require_text(path: Path, schema: Any, column: str, names: list[str]) -> None:
    types = require("pyarrow.types", "data")
    kind: Any = None
    found = list(schema.names)
    for name in names:
        if (count := found.count(name)) != 1:
            raise DataError(
                f"{path}: {count or 'no'} {column!r} columns, found {found[:10]}; choose one with --text-field"
            )
        field = schema.field(name) if kind is None else kind.field(name)
        kind = field.type
        found = [kind.field(number).name for number in range(kind.num_fields)] if types.is_struct(kind) else []
    value = kind.value_type if types.is_dictionary(kind) else kind
    tests = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
        types.is_binary_view,
        types.is_null,
    )
    if not any(test(value) for test in tests):
        raise DataError(f"{path}: column {column!r} must hold strings, not {kind}; choose another with --text-field")


def _texts(array: Any, fields: list[str]) -> list[str | None]:
    pyarrow, compute = require("pyarrow", "data"), require("pyarrow.compute", "data")
    for name in fields:
        array = compute.struct_field(array, name)
    if pyarrow.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    texts: list[str | None] = array.cast(pyarrow.large_string()).to_pylist()
    return texts
