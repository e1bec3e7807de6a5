"""Datasets of the Hugging Face hub, or repositories of the same form in a local folder, as a stream of documents."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from antransformer.data.readers import Documents, select_text, split_long
from antransformer.errors import DataError
from antransformer.extras import require

SCHEME = "hf://"
PARAMETERS = ("name", "split", "field")


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset; ``parse`` makes one of ``hf://DATASET?name=CONFIG&split=train&field=text``.

    Attributes:
        url: the input as the caller wrote it.
        repository: name on the hub, or path of a local folder.
        name: configuration; None for the only one.
        split: split, such as "train".
        field: field with the text.
    """

    url: str = field(compare=False)
    repository: str
    name: str | None
    split: str
    field: str

    @classmethod
    def parse(cls, url: str, text_field: str) -> "HubDataset":
        """Parse the URL of a dataset.

        Raises:
            DataError: it names no dataset, or has an unknown parameter.
            MissingExtraError: the library ``datasets`` is not installed.
        """
        require("datasets", "data")
        repository, _, query = url.removeprefix(SCHEME).partition("?")
        given = dict(parse_qsl(query, keep_blank_values=True))
        unknown = [key for key in given if key not in PARAMETERS]
        if unknown or not repository or not all(given.values()):
            wrong = f"unknown parameter {unknown[0]}" if unknown else "a name or value is empty"
            raise DataError(f"{url}: {wrong}; write hf://DATASET?name=CONFIG&split=train&field=text")
        return cls(url, repository, given.get("name"), given.get("split", "train"), given.get("field", text_field))

    def documents(self) -> Documents:
        """Stream (document, 0): how much of the dataset has been read is unknown.

        Raises:
            DataError: the dataset cannot be found, opened or read, or a record has no text in the field.
        """
        yield from split_long((text, 0) for text in self._texts())

    def _texts(self) -> Iterator[str]:
        datasets = require("datasets", "data")
        with self._errors():
            stream = datasets.load_dataset(self.repository, self.name, split=self.split, streaming=True)
            features = getattr(stream, "features", None)
            first = self.field.split(".")[0]
            if features is not None and self.field not in features and first not in features:
                raise DataError(f"{self.url}: no field {self.field!r}, found {list(features)[:10]}; add &field=NAME")
            records = enumerate(stream, 1)
        while True:
            with self._errors():
                number, record = next(records, (0, None))
            if record is None:
                return
            yield select_text(record, self.field, f"{self.url}, record {number}")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of the library, whose classes are many, into a one-line ``DataError``."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{self.url}: {_explain(error, self.repository)}") from error


def _explain(error: Exception, repository: str) -> str:
    reason = " ".join(str(error).split())[:300]
    if "gated" in reason.lower() or type(error).__name__ == "GatedRepoError":
        return f"gated: accept its terms at huggingface.co/datasets/{repository} and log in with hf auth login"
    if isinstance(error, ConnectionError) or "offline" in type(error).__name__.lower():
        return f"the hub cannot be reached ({reason}); download the files elsewhere and prepare them"
    return f"cannot be read ({type(error).__name__}: {reason})"


def is_hub(name: Any) -> bool:
    """Return whether an input is a dataset of the hub."""
    return str(name).startswith(SCHEME)
