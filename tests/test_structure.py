import ast
import re
from pathlib import Path

import pytest

import antransformer

PACKAGE = Path(antransformer.__file__).parent
FLOORS = [
    "errors",
    "files",
    "factors",
    "kernels",
    "functional",
    "nn",
    "blocks",
    "bounds",
    "models",
    "data",
    "inference",
    "training",
    "interop",
    "analysis",
    "cli",
]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in FLOORS)


def floor(parts):
    return FLOORS.index(parts[0])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_floors_below_or_its_own(path):
    own = floor(path.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{name.name}" for name in node.names]
        modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            package, *rest = module.split(".")
            if package == "antransformer" and rest[0] != "__version__":
                assert floor(rest) <= own, f"{path.name} imports {module}"


def test_models_do_not_branch_on_the_architecture():
    for name in ("angpt", "ngpt", "gpt_plus", "gpt", "ln_scaling", "dyt", "decoder"):
        assert "architecture ==" not in (PACKAGE / f"models/{name}.py").read_text()


def test_nothing_is_unpickled():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert not re.search(
            r"\btorch\.load\(|\bpickle\b.*import|import pickle|np\.load\(|yaml\.load\(|\bexec\(", text
        ), path
