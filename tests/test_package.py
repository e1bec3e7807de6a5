"""Wheel and source distribution: what is in them, and that the wheel works where it is installed."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from antransformer.version import __version__

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "antransformer"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

pytest.importorskip("hatchling")


def run(*words, **environment):
    """Run a command without this checkout on Python's path and return its output."""
    environment = {**{name: os.environ[name] for name in os.environ.keys() - {"PYTHONPATH"}}, **environment}
    result = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=ROOT, check=True, capture_output=True
    )
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Fresh environment with the wheel and without its dependencies."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    pip = [sys.executable, "-m", "pip", "--python", folder, "install", "--no-deps", "--no-index", "--no-compile"]
    run(*pip, *built.glob("*.whl"))
    return folder


def test_the_wheel_has_every_file_of_the_package_and_no_other(built):
    with zipfile.ZipFile(built / f"antransformer-{__version__}-py3-none-any.whl") as wheel:
        names = {
            Path(name) for name in wheel.namelist() if not name.startswith(f"antransformer-{__version__}.dist-info")
        }
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert names == {path.relative_to(PACKAGE.parent) for path in files}


def test_the_source_distribution_has_the_repository_and_no_junk(built):
    with tarfile.open(built / f"antransformer-{__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        largest = max(member.size for member in archive.getmembers())
    assert {"README.md", "LICENSE", "pyproject.toml", "Makefile", "constraints.txt", "tests/conftest.py"} <= names
    allowed = {"src", "tests", "docs", "examples", "PKG-INFO", ".gitignore"}
    allowed |= {path.name for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")}
    assert {Path(name).parts[0] for name in names} <= allowed
    assert not [name for name in names if name.endswith((".pyc", ".so", "~", ".orig")) or "__pycache__" in name]
    assert largest < 2**20


def test_the_command_works_from_the_wheel(installed):
    command = installed / "bin" / "antransformer"
    assert run(command, "--version").split() == ["antransformer", __version__]
    assert "selftest" in run(command, "--help")


def test_package_data_is_found_in_the_wheel(installed):
    [packages] = installed.glob("lib/*/site-packages")
    code = """
import sys, antransformer
from antransformer.cli import main
from antransformer.reporting import html
from antransformer.training.config_files import read_config
assert antransformer.__file__.startswith(sys.argv[1]), antransformer.__file__
assert read_config("demo") and "<table" in html.table("losses", ["variant", "loss"], [["angpt", "1.0"]])
sys.exit(main(["plan", "--flops", "1e18"]))
"""
    folder = installed / "work"
    folder.mkdir()
    output = subprocess.run(
        [sys.executable, "-c", code, packages],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(packages)},
    )
    assert output.returncode == 0, output.stderr


def test_metadata_names_what_the_environment_has(installed):
    [metadata] = installed.glob("lib/*/site-packages/*.dist-info/METADATA")
    lines = metadata.read_text().splitlines()
    assert f"Version: {__version__}" in lines and "License-Expression: Apache-2.0" in lines
    extras = {line.split()[1] for line in lines if line.startswith("Provides-Extra: ")}
    assert extras == set(PROJECT["optional-dependencies"])
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert f"Classifier: Programming Language :: Python :: {oldest}" in lines
