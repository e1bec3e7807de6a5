"""Every Python block in README and docs runs, in the order of its page, or has a comment that says why not."""

import pytest
import torch

from antransformer.interop.export import export
from antransformer.training import run_folder
from helpers.exported import make_run
from helpers.pages import MARK, PAGES, ROOT, blocks

ALL = [block for page in PAGES for block in blocks(page)]
RUN = sorted({block.page for block in ALL if block.language == "python" and block.runs})
LANGUAGES = {"python", "sh", "diff", "text", "toml", "yaml"}


def test_comments_above_blocks_have_a_reason_or_name_a_test():
    assert len(RUN) >= 4
    for block in ALL:
        assert block.language in LANGUAGES, block.where
        found = MARK.fullmatch(block.mark)
        assert found or block.runs, block.where
        if found and found["test"]:
            assert block.page.name in (ROOT / found["test"]).read_text(), block.where


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Working folder with a run and an exported model of the names that the pages use."""
    make_run(tmp_path / "runs/angpt-nano", head_dim=32)
    export(*run_folder.open_checkpoint(tmp_path / "runs/angpt-nano"), tmp_path / "exported/angpt-nano")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_python_blocks_run(page, folder):
    torch.manual_seed(0)
    scope = {}
    for block in blocks(page):
        if block.language == "python" and block.runs:
            exec(compile(block.code, block.where, "exec"), scope)
