"""No command writes into the output of another."""

import pytest

from antransformer.errors import ConfigError
from antransformer.results.folder import require_own_folder, writer_of
from helpers.commands import refused

CONTENTS = {
    "train": ["config.yaml"],
    "prepare": ["meta.json"],
    "export": ["model.safetensors", "config.json"],
    "selftest": ["results.json:selftest", "compare/runs/angpt-2560-lr0.01-seed0/config.yaml"],
    "sweep": ["sweep.json", "runs/angpt-nano-5120-b256-lr0.01-seed0/config.yaml"],
    "unfinished sweep": ["runs/angpt-nano-5120-b256-lr0.01-seed0/config.yaml"],
    "compare": ["results.json:compare", "runs/angpt-2560-lr0.01-seed0/config.yaml"],
    "unfinished compare": ["runs/angpt-2560-lr0.01-seed0/config.yaml"],
    "ablate": ["results.json:ablate", "runs/default-2560-lr0.01-seed1/config.yaml"],
    "unfinished ablate": ["runs/default-2560-lr0.01-seed1/config.yaml", "runs/no-lerp-2560-lr0.01-seed1/config.yaml"],
}


def fill(folder, names):
    for name in names:
        name, _, kind = name.partition(":")
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"parts": []}' if kind == "selftest" else f'{{"kind": "{kind}"}}')


def files(folder):
    return sorted((str(path.relative_to(folder)), path.stat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.parametrize("content", CONTENTS)
def test_the_writer_of_a_folder_is_known(tmp_path, content):
    fill(tmp_path, CONTENTS[content])
    verb = content.split()[-1]
    assert writer_of(tmp_path) == verb
    require_own_folder(tmp_path, verb)
    for other in {"train", "compare", "ablate", "sweep", "fit"} - {verb}:
        with pytest.raises(ConfigError):
            require_own_folder(tmp_path, other)


def test_new_empty_and_unknown_folders_are_free(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("")
    for folder in (tmp_path / "new/folder", tmp_path / "notes", tmp_path):
        require_own_folder(folder, "compare")
    with pytest.raises(ConfigError):
        require_own_folder(tmp_path / "notes/todo.txt", "compare")


def test_a_report_of_unknown_origin_is_not_replaced(tmp_path):
    fill(tmp_path, ["report.html"])
    require_own_folder(tmp_path, "fit")  # writes no report
    for verb in ("compare", "ablate", "sweep"):
        with pytest.raises(ConfigError, match=r"report\.html"):
            require_own_folder(tmp_path, verb)


@pytest.mark.parametrize("verb", ["compare", "ablate", "sweep", "fit", "train", "prepare", "demo", "selftest"])
@pytest.mark.parametrize("content", ["train", "prepare", "export", "unfinished sweep", "compare", "ablate", "selftest"])
def test_verbs_refuse_the_output_of_another_and_change_nothing(tmp_path, corpus, capsys, monkeypatch, verb, content):
    if verb == content.split()[-1]:
        pytest.skip("its own output")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "full"
    fill(folder, CONTENTS[content])
    (tmp_path / "runs.csv").write_text("")
    (tmp_path / "text.txt").write_text("a text")
    words = {"fit": ["runs.csv"], "prepare": ["text.txt"], "demo": [], "selftest": []}.get(verb, ["--data", corpus])
    before = files(tmp_path)
    refused([verb, *words, "--out", folder], capsys)
    assert files(tmp_path) == before
