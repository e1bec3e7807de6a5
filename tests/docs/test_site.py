"""The site: navigation, links, reference; and that a built page loads nothing from elsewhere."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import antransformer
from antransformer.cli import VERBS
from helpers.pages import FENCE, PAGES, ROOT, verb_parser

SOURCES = [*sorted((ROOT / "src").rglob("*.py")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "Makefile"]
ADDRESS = r"(?:https?:)?//[^\s\"'>)]+"
REMOTE = re.compile(
    rf"""<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=["']?{ADDRESS}|@import|url\(["']?{ADDRESS}"""
)


def anchors(page):
    """Names of the headings of a page, as GitHub and MkDocs make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def test_links_between_pages_lead_somewhere():
    wrong = []
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
            if link.startswith(("http://", "https://")):
                continue
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
                wrong.append(f"{page.relative_to(ROOT)}: {link}")
    assert not wrong, "\n".join(wrong)


def test_pages_that_the_code_names_exist():
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in SOURCES
        for name in re.findall(r"(?<![\w/])docs/[\w/-]+\.(?:md|png|py)", path.read_text(encoding="utf-8"))
        if not (ROOT / name).is_file()
    ]
    assert not wrong, "\n".join(wrong)


def reference():
    """Objects of the reference: module and member."""
    found = set()
    for page in sorted((ROOT / "docs/reference").glob("*.md")):
        for module, options in re.findall(r"^::: (\S+)\n((?: .*\n)*)", page.read_text(), re.M):
            members = yaml.safe_load(options)["options"].get("members") if options else None
            found |= {f"{module}.{member}" for member in members} if members else {module}
    return found


def test_the_reference_has_every_public_name():
    found = reference()
    for name in set(antransformer.__all__) - {"__version__"}:
        assert any(f"{other}.".startswith(f"antransformer.{name}.") or other.endswith(f".{name}") for other in found), (
            name
        )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as ``make docs`` does."""
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def test_the_built_site_loads_nothing_from_elsewhere(site: Path):
    found = {
        (path.name, match[0])
        for path in [*site.rglob("*.html"), *site.rglob("*.css")]
        for match in REMOTE.finditer(path.read_text(encoding="utf-8"))
    }
    assert not found
    assert all(REMOTE.search(text) for text in ('<script defer src="https://a.b/c.js">', "src: url(//a.b/c.woff2)"))


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_page_with_its_options(site, verb):
    text = (site / "commands" / f"{verb}.html").read_text()
    assert f"antransformer {verb}" in text
    assert argparse.SUPPRESS not in text
    for action in verb_parser(verb)._actions:
        if action.dest != "help" and action.help is not argparse.SUPPRESS:
            assert all(name in text for name in action.option_strings), action


def test_files_outside_docs_that_pages_link_to_are_in_the_site(site):
    for name in ("examples/launch/slurm.sbatch", "examples/launch/kubernetes.yaml"):
        assert (site / name).read_text() == (ROOT / name).read_text()
        assert f'href="{name}"' in (site / "distributed.html").read_text()
