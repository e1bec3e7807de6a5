"""One short run, shared by the tests of the verbs that need a trained model."""

import pytest

from antransformer.cli import main
from helpers.commands import TEN_STEPS


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """Run folder of ten steps on the small corpus."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--data", str(corpus), "--out", str(folder), *TEN_STEPS]) == 0
    return folder
