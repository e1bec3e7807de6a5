"""The pipeline of docs/data.md, run by datatrove's local executor; skipped where datatrove is not installed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from antransformer.cli import main
from antransformer.data import Dataset
from antransformer.data.tokenizers import train_bpe

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_the_pipeline_of_the_docs_gives_the_documents_of_the_tokenizer(tmp_path, monkeypatch):
    pytest.importorskip("datatrove")
    monkeypatch.chdir(tmp_path)
    texts = [f"Document {number} has {number} apples and {'pears ' * (number % 7)}." for number in range(60)]
    tokenizer = train_bpe(["\n".join(texts)], 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "corpus").mkdir()
    for part in range(2):
        lines = [json.dumps({"text": text, "id": str(number)}) for number, text in enumerate(texts[part::2])]
        (tmp_path / f"corpus/{part}.jsonl").write_text("\n".join(lines))
    (pipeline,) = re.findall(r"^```python\n(from datatrove.*?)^```", (ROOT / "docs/data.md").read_text(), re.S | re.M)
    (tmp_path / "pipeline.py").write_text(pipeline)
    subprocess.run([sys.executable, "pipeline.py"], check=True)
    assert main(["prepare", "tokens", "--tokenized", "--tokenizer", "tokenizer.json", "--out", "linked"]) == 0
    expected = sorted((*tokenizer.encode(text), tokenizer.end_of_text) for text in texts)
    assert documents_of(Dataset.open(tmp_path / "linked")) == expected


def documents_of(dataset):
    """All documents of both splits as sorted tuples of ids."""
    ids = np.concatenate([part for split in dataset.splits.values() for part in split.arrays])
    ends = np.flatnonzero(ids == dataset.end_of_text) + 1
    return sorted(tuple(map(int, part)) for part in np.split(ids, ends) if len(part))
