"""Imports: the data package loads torch and tokenizers only when they are used."""

import subprocess
import sys
from pathlib import Path

import antransformer
from antransformer import data

# A stand-in for the package's own __init__, so that the test is about antransformer.data alone.
LAZY = """
import sys, types
package = sys.modules["antransformer"] = types.ModuleType("antransformer")
package.__path__ = sys.argv[1:]
import antransformer.data
assert not {"torch", "tokenizers"} & sys.modules.keys()
from antransformer.data import Dataset, ensure_default, prepare
assert "tokenizers" in sys.modules and "torch" not in sys.modules
from antransformer.data import eval_batches
assert "torch" in sys.modules
"""


def test_torch_and_tokenizers_are_imported_on_first_use() -> None:
    subprocess.run([sys.executable, "-c", LAZY, str(Path(antransformer.__file__).parent)], check=True)


def test_every_public_name_resolves() -> None:
    assert set(data.__all__) == set(data._MODULES) <= set(dir(data))
    assert all(callable(getattr(data, name)) for name in data.__all__)
    assert not hasattr(data, "unknown")
