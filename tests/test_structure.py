"""How the package is laid out: imports go only downwards, models do not branch on their name, nothing is unpickled."""

import ast
import re
from pathlib import Path

import pytest

import antransformer

PACKAGE = Path(antransformer.__file__).parent
# From the bottom to the top: a file imports only from its own floor and from floors before it.
FLOORS = [
    "version",
    "wording",
    "errors",
    "settings",
    "extras",
    "pace",
    "figure_style",
    "files",
    "lock",
    "renamed",
    "factors",
    "kernels",
    "functional",
    "nn",
    "blocks",
    "derive",
    "bounds",
    "models",
    "data",
    "inference",
    "training",
    "interop",
    "reporting",
    "bootstrap",
    "diagnostics",
    "benchmarks",
    "runs",
    "results",
    "scaling",
    "comparison",
    "sweeps",
    "progress",
    "selftest",
    "api",
    "cli",
    "__main__",
]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported_modules(path):
    """Full names of what a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def floor(name):
    return FLOORS.index(name.split(".")[0])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_floors_below_or_its_own(path):
    own = floor(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    for module in imported_modules(path):
        package, _, rest = module.partition(".")
        if package == "antransformer":  # the package itself stands for its public functions
            assert floor(rest or "api") <= own, f"{path.name} imports {module}"


def test_no_two_files_of_a_floor_import_each_other():
    edges = {}
    for path in FILES:
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        found = {module.removeprefix("antransformer.") for module in imported_modules(path)}
        edges[name] = found | {module.rpartition(".")[0] for module in found}
    edges = {name: {module for module in found if module in edges and module != name} for name, found in edges.items()}

    def reachable(name, seen):
        for module in edges[name] - seen:
            seen.add(module)
            reachable(module, seen)
        return seen

    circles = {name for name in edges if name in reachable(name, set())}
    assert not circles


def test_no_verb_imports_another_verb():
    shared = {"options", "tables"}
    for path in (PACKAGE / "cli").glob("*.py"):
        modules = {module.partition("antransformer.cli.")[2].partition(".")[0] for module in imported_modules(path)}
        assert modules - {""} <= shared, path.name


def test_models_do_not_branch_on_the_architecture():
    for name in ("angpt", "ngpt", "gpt_plus", "gpt", "ln_scaling", "dyt", "decoder"):
        assert "architecture ==" not in (PACKAGE / f"models/{name}.py").read_text()


def test_nothing_is_unpickled():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert not re.search(
            r"\btorch\.load\(|\bpickle\b.*import|import pickle|np\.load\(|yaml\.load\(|\bexec\(", text
        ), path
