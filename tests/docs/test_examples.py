import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.mark.parametrize(
    ("name", "chance"), [("digits", 10.0), pytest.param("sequences", 12.5, marks=pytest.mark.slow)]
)
def test_an_example_learns_and_prints_both_curves(name, chance):
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--epochs=2", "--seeds=1"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tables, curves, summary = out.split("\n\n")
    tried = [re.findall(r"([\d.e-]+): \d\.\d+", line) for line in tables.splitlines()]
    assert len(tried) == 4 and len(tried[1]) >= 3 and tried[1] == tried[3]
    assert re.search(r"anTransformer +pre-norm\n", curves)
    first, last = (line.split() for line in curves.splitlines()[-2:])
    assert [first[0], last[0]] == ["1", "2"] and len(last) == 5
    assert float(last[1]) < float(first[1]) and float(last[3]) < float(first[3])
    reached = dict(re.findall(r"^(\S+): .*?([\d.]+)%", summary, re.MULTILINE))
    assert set(reached) == {"anTransformer", "pre-norm"}
    assert all(float(accuracy) > 1.5 * chance for accuracy in reached.values())
