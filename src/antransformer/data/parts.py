"""Preparation on several machines: each writes a part, and the parts are joined to what one process would write.

A part is a folder ``OUT.parts/part-00002-of-00004``. Its files are consecutive, so that the joined tokens are in the
order of the inputs.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from antransformer.data.checks import DTYPES, HASH_BYTES, PREPARE_AGAIN
from antransformer.data.dataset import Dataset
from antransformer.data.holdout import Inputs, TrainValSplit
from antransformer.data.preparation import Progress, log_left_out, require_both, write_tokens
from antransformer.data.readers import TEXT_FIELD
from antransformer.data.shards import META_FILE, SHARD_TOKENS, ShardWriter, new_folder, require_unused, write_meta
from antransformer.data.tokenizers import load_encoder
from antransformer.errors import DataError
from antransformer.files import read_json
from antransformer.wording import counted

PART = re.compile(r"part-([0-9]{5})-of-([0-9]{5})")
OPTIONS = ("tokenizer_sha256", "text_field")  # in meta.json of parts only
SHARED = ("dtype", "vocab_size", "end_of_text", "tokenizer", "val_fraction", "val_tail", "sources", *OPTIONS)


def prepare_part(
    inputs: Inputs,
    out: str | Path,
    part: str,
    *,
    tokenizer: str | Path = "byte",
    end_of_text: str | None = None,
    text_field: str = TEXT_FIELD,
    val_fraction: float | None = None,
    val_inputs: Inputs = (),
    progress: Progress | None = None,
) -> Path | None:
    """Tokenize a part of the files; arguments and errors as in ``prepare``.

    Args:
        part: "I/N": part I, from 1 to N, of N parts. All parts must be prepared from the same files, and a finished one
            is not prepared again with other options.

    Returns:
        Folder of the part, or None if it was finished before.
    """
    number, count = _parse(part)
    out = Path(os.path.realpath(out))
    require_unused(out)
    encoder = load_encoder(tokenizer, end_of_text)
    folder = out.with_name(out.name + ".parts") / f"part-{number:05d}-of-{count:05d}"
    split = TrainValSplit.find(inputs, val_inputs, val_fraction, text_field)
    if split.corpus.hub or (split.val_corpus and split.val_corpus.hub):
        raise DataError(f"--part {part}: a dataset of the hub cannot be divided; download its files and prepare them")
    if count > len(split.corpus.files):
        raise DataError(
            f"--part {part}: the input has {counted(len(split.corpus.files), 'file')}, and a part is of whole files"
        )
    digest = hashlib.sha256(encoder.to_json().encode()).hexdigest()
    if (folder / META_FILE).exists():
        saved, sources = _read(folder), json.loads(json.dumps([asdict(source) for source in split.sources]))
        options = {
            "val_fraction": split.val_fraction or None,
            "val_tail": split.val_tail or None,
            "text_field": text_field,
            "end_of_text": encoder.end_of_text,
        }
        for key, value in {"tokenizer_sha256": digest, "sources": sources, **options}.items():
            if _differs(key, saved[key], value):
                raise DataError(f"{folder}: its {key} differs from this call; remove it to prepare it again")
        return None
    log_left_out(split)
    with new_folder(folder) as partial:
        meta = write_tokens(partial, encoder, split.part(number, count), SHARD_TOKENS, progress)
        write_meta(partial, meta | {"part": number, "tokenizer_sha256": digest, "text_field": text_field})
    return folder


def join_parts(out: str | Path, progress: Progress | None = None, shard_tokens: int = SHARD_TOKENS) -> Dataset:
    """Join the parts of ``out`` to a data folder, equal to that of one process, and remove them.

    Raises:
        DataError: a part is missing, damaged or was prepared with other options or files.
    """
    out = Path(os.path.realpath(out))
    require_unused(out)
    root = out.with_name(out.name + ".parts")
    folders = _find(out, root)
    metas = [_read(folder) for folder in folders]
    first = metas[0]
    for folder, meta in zip(folders, metas, strict=True):
        different = [key for key in SHARED if _differs(key, meta[key], first[key])]
        if different:
            raise DataError(
                f"{folder}: its {different[0]} differs from {folders[0].name}; remove it and prepare it again"
            )
    tokens = sum(split["tokens"] for meta in metas for split in meta["splits"].values())
    done = documents = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if progress:
            progress(done, tokens * DTYPES[first["dtype"]].itemsize, documents, done // DTYPES[first["dtype"]].itemsize)

    with new_folder(out) as partial:
        splits = {}
        for name in ("train", "val"):
            with ShardWriter(partial, name, first["dtype"], shard_tokens) as writer:
                for folder, meta in zip(folders, metas, strict=True):
                    entry = meta["splits"][name]
                    writer.add(np.empty(0), meta["max_token"], entry["documents"], entry["bytes"])
                    documents += entry["documents"]
                    for shard in entry["shards"]:
                        _copy(folder / shard["file"], shard["sha256"], writer, first["dtype"], advance)
            splits[name] = writer.meta()
        shutil.copyfile(folders[0] / "tokenizer.json", partial / "tokenizer.json")
        if (folders[0] / "tokenizer_config.json").exists():
            shutil.copyfile(folders[0] / "tokenizer_config.json", partial / "tokenizer_config.json")
        shared = {key: first[key] for key in SHARED if key not in OPTIONS}
        joined = {**shared, "max_token": max(meta["max_token"] for meta in metas), "splits": splits}
        require_both(joined)
        # The order of keys of one process.
        write_meta(partial, {key: joined[key] for key in first if key in joined})
    for folder in folders:
        shutil.rmtree(folder)
    with contextlib.suppress(OSError):  # it holds something that prepare did not write
        root.rmdir()
    return Dataset.open(out, verify=False)


def _parse(part: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", part)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise DataError(f"--part {part}: write I/N for part I of N, such as 2/4")
    return number, count


def _find(out: Path, root: Path) -> list[Path]:
    """Return the folders of all parts, in order."""
    found = sorted(path for path in root.glob("part-*") if PART.fullmatch(path.name))
    if not found:
        raise DataError(f"{root}: no parts to join; write them with antransformer prepare INPUT --out {out} --part I/N")
    counts = {path.name.rpartition("-")[2] for path in found}
    if len(counts) > 1:
        divisions = " and ".join(f"I/{int(count)}" for count in sorted(counts))
        raise DataError(f"{root}: holds parts of different divisions ({divisions}): remove all but one of them")
    count = int(counts.pop())
    expected = [root / f"part-{number:05d}-of-{count:05d}" for number in range(1, count + 1)]
    missing = [str(number) for number, path in enumerate(expected, 1) if path not in found]
    if missing:
        raise DataError(f"{root}: missing parts of {count}: {', '.join(missing[:20])}; prepare them first")
    return expected


def _read(folder: Path) -> dict[str, Any]:
    try:
        meta = read_json(folder / META_FILE)
        if not isinstance(meta, dict) or not {*SHARED, "splits", "max_token"} <= meta.keys():
            raise ValueError("not the meta.json of a part")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: cannot be read ({error}); remove it and prepare this part again") from error
    return meta


def _differs(key: str, value: Any, other: Any) -> bool:
    """Return whether two parts differ in an entry of ``meta.json``. Skipped files may differ: a log, or other parts."""
    if key == "sources":
        value, other = ([{**source, "skipped": None} for source in sources] for sources in (value, other))
    return bool(value != other)


def _copy(path: Path, sha256: str, writer: ShardWriter, dtype: str, advance: Callable[[int], None]) -> None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(HASH_BYTES):
                digest.update(block)
                writer.add(np.frombuffer(block, DTYPES[dtype]), 0, 0, 0)
                advance(len(block))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {PREPARE_AGAIN}") from error
    if digest.hexdigest() != sha256:
        raise DataError(f"{path}: content changed since it was prepared (SHA-256 differs); prepare this part again")
