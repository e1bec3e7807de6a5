"""Every figure is drawn in one style."""

import ast
from pathlib import Path

import pytest

import antransformer
from antransformer import figure_style
from antransformer.diagnostics.diagnosis import LEGEND, MAPS

pytest.importorskip("matplotlib")
PACKAGE = Path(antransformer.__file__).parent


def test_only_the_style_makes_and_saves_figures():
    """A figure outside of it would have matplotlib's own colours, grid and labels."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        saving = [call for call in calls if isinstance(call, ast.Attribute) and call.attr == "savefig"]
        making = [call for call in calls if isinstance(call, ast.Name) and call.id == "Figure"]
        allowed = {"figure_style.py": (1, 1), "reporting/figure.py": (1, 0), "diagnostics/figure.py": (0, 1)}
        found = len(saving), len(making)
        assert found == allowed.get(str(path.relative_to(PACKAGE)), (0, 0)), path


def test_the_style_applies_inside_its_context_only(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    with figure_style.style():
        figure, axes = figure_style.new_figure()
        colours = [axes.plot([0, 1])[0].get_color() for _ in figure_style.SERIES]
        figure_style.reference_line(axes, 0.5, label="half")
        figure_style.save(figure, tmp_path / "figure.svg")
    assert dict(matplotlib.rcParams) == before
    assert tuple(colours) == figure_style.SERIES and not axes.spines["top"].get_visible()
    text = (tmp_path / "figure.svg").read_text().lower()
    assert all(colour in text for colour in (*figure_style.SERIES, figure_style.INK))


def test_maps_of_the_diagnosis_have_names_in_words():
    symbols = {name.strip() for part in LEGEND.split(";") for name in part.partition(":")[0].split(",")}
    assert symbols == set(MAPS)
    assert all(len(name) > 2 and "_" not in name for name in MAPS.values())
