"""The quickstart notebook: it is committed with the outputs of a run, and runs from the first cell to the last."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent.parent / "examples/quickstart.ipynb"


def text_of(cell):
    """Printed output of a code cell."""
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


def test_the_committed_outputs_are_complete_and_small():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert NOTEBOOK.stat().st_size < 100_000
    assert not re.search(r"/(home|root|tmp|work|usr)/", NOTEBOOK.read_text())  # a path of one machine


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "\n".join(text_of(cell) for cell in notebook.cells if cell.cell_type == "code")
    losses = {name: float(loss) for name, loss in re.findall(r"^(\S+): \D+([\d.]+) nats", printed, re.MULTILINE)}
    assert losses.keys() == {"gpt+", "angpt"} and all(3 < loss < 5 for loss in losses.values())
    norms = {
        line.split()[0]: [float(word) for word in line.split()[1:]]
        for line in printed.splitlines()[-30:]
        if re.match(r"(gpt\+|angpt) +\d", line)
    }
    assert max(norms["angpt"]) < 2 < max(norms["gpt+"])
    assert "def " in printed
