"""Shared by all tests: one thread a worker, a small prepared corpus, a small model."""

import os
import sysconfig
from pathlib import Path

import pytest
import torch

from antransformer.data import prepare

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks at it when it is imported: kernels then run on a CPU

# A model that trains in a second, on the command line and as settings.
SMALL = {"width": 64, "layers": 2, "context": 32, "head_width": 32}
SMALL_OPTIONS = [f"--model.{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared once for all."""
    return make_corpus(tmp_path_factory.mktemp("corpus") / "data")


def make_corpus(folder: Path) -> Path:
    """Twenty modules of the standard library as bytes; about 300,000 tokens."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[10:30]
    prepare(files[4:], folder, tokenizer="byte", val_inputs=files[:4])
    return folder


class Notes(list):
    """A reporter that remembers."""

    def step(self, step):
        pass

    def line(self, line):
        pass

    def note(self, text):
        self.append(text)
