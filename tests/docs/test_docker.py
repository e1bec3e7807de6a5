"""The Dockerfile, which no test builds: its files, extras, build arguments and user exist."""

import re
import tomllib
from pathlib import Path

import pytest

from antransformer.cli import VERBS

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions():
    """Instructions of the Dockerfile as pairs of keyword and arguments."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line and not line.startswith("#")]


def of(keyword):
    return [rest for name, rest in instructions() if name == keyword]


def test_copied_files_exist_and_reach_the_builder():
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [source for line in of("COPY") for source in line.split()[:-1]]
    assert sorted(copied) == sorted(kept)
    assert all((ROOT / source).exists() for source in copied)
    needed = {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "constraints.txt", "src"}
    assert needed <= set(copied)


def test_extras_exist_and_arguments_are_declared_before_their_use():
    declared = dict(line.partition("=")[::2] for line in of("ARG"))
    assert set(declared["EXTRAS"].split(",")) <= set(PROJECT["optional-dependencies"])
    seen = set()
    for keyword, rest in instructions():
        assert set(re.findall(r"\$\{(\w+)\}", rest)) <= seen, rest
        if keyword == "ARG":
            seen.add(rest.partition("=")[0])


def test_the_image_runs_the_command_as_a_user_without_rights():
    names = [name for name, _ in instructions()]
    assert names[-1] == "CMD" and of("ENTRYPOINT") == [f'["{next(iter(PROJECT["scripts"]))}"]']
    [user] = of("USER")
    assert user != "root" and re.search(rf"useradd .*\b{user}\b", " ".join(of("RUN")))
    assert names.index("USER") > max(index for index, name in enumerate(names) if name == "RUN")


def test_constraints_pin_versions_that_the_package_accepts():
    pins = dict(re.findall(r"(?m)^([\w-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text()))
    required = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["hf"]]
    bounds = dict(re.findall(r"([\w-]+)>=([\d.]+)", " ".join(required)))
    for name in pins.keys() & bounds.keys():
        pinned, bound = ([int(part) for part in version.split(".")] for version in (pins[name], bounds[name]))
        assert pinned >= bound, name
    assert "torch" in pins


@pytest.mark.parametrize("name", ["Dockerfile", "examples/launch/kubernetes.yaml", "examples/launch/slurm.sbatch"])
def test_verbs_in_launch_files_exist(name):
    calls = re.findall(r"(?:-m antransformer|antransformer(?::cuda)?) ([a-z]+)\b", (ROOT / name).read_text())
    assert set(calls) - {"train", "plan", "build"} <= set(VERBS)
