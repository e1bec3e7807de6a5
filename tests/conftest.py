"""Shared by all tests: one thread a worker, a small prepared corpus, a small model."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.small import make_corpus
from helpers.workers import workers_in_process

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks at it when it is imported: kernels then run on a CPU


def pytest_collection_finish() -> None:
    """Keep the garbage collector from the objects of imported packages.

    They took 6% of the CPU time of the tests of models and diagnostics.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared once for all."""
    return make_corpus(tmp_path_factory.mktemp("corpus") / "data")


@pytest.fixture(scope="module")
def in_process() -> Iterator[None]:
    """Train the runs of experiments in this process instead of worker processes."""
    with workers_in_process():
        yield
