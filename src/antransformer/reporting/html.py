"""A report: one page of HTML that needs nothing beside it, and its charts as PNG.

The page has no script and fetches nothing; its charts are SVG inside it.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from antransformer.reporting.figure import Chart

FILE = "report.html"
TEXT = {"setting", "settings", "outcome", "what is changed"}  # columns that are no numbers

STYLE = """
:root { color-scheme: light dark; --ink: #20242a; --soft: #5d6570; --line: #dde1e6; --card: #fdfdfe; --page: #f1f3f5;
  --shade: #0003; --accent: #d4320c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6ea; --soft: #a3abb6; --line: #3a4049; --card: #191c21;
  --page: #101216; --shade: #000a; --accent: #ff7a55; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: break-word; }
main { max-width: 76rem; margin: 0 auto; padding: 1.25rem .75rem 3rem; }
h1 { font-size: 1.15rem; line-height: 1.3; margin: 0 0 .5rem; color: var(--soft); font-weight: 600; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .25rem; }
p, ul { margin: .25rem 0 .75rem; max-width: 46rem; }
ul { padding-left: 1.25rem; }
.verdict { font-size: clamp(1.2rem, 1rem + 1.2vw, 1.6rem); line-height: 1.35; font-weight: 600; margin: 0 0 1rem;
  max-width: 56rem; border-left: .25rem solid var(--accent); padding-left: .9rem; }
.facts { display: flex; flex-wrap: wrap; gap: .4rem; list-style: none; padding: 0; max-width: none; }
.facts li { border: 1px solid var(--line); background: var(--card); border-radius: 1rem; padding: .1rem .7rem;
  font-size: .875rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem;
  margin: .75rem 0; }
figure, .scroll, pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
figure { margin: 0; padding: .75rem .6rem .5rem; min-width: 0; max-width: 40rem; }
img { display: block; width: 100%; height: auto; margin-top: .5rem; }
figcaption p, .note { color: var(--soft); font-size: .875rem; line-height: 1.4; margin: 0 0 .5rem; }
.scroll { overflow-x: auto; margin: .75rem 0 1rem; width: fit-content; max-width: 100%;
  background: linear-gradient(to left, var(--card) 30%, transparent) 100% 0 / 3rem 100% local no-repeat,
  linear-gradient(to left, var(--shade), transparent) 100% 0 / 1.25rem 100% no-repeat, var(--card); }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .65rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-top: 1px solid var(--line); }
thead th { border-top: 0; vertical-align: bottom; color: var(--soft); font-weight: 600; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
tbody th { font-weight: 600; }
.tables { display: flex; flex-wrap: wrap; gap: 0 1rem; }
.text { text-align: left; }
summary { cursor: pointer; font-weight: 600; margin: .5rem 0; }
pre span { display: inline-block; max-width: 100%; }
pre { margin: .5rem 0 1rem; padding: .75rem; font-size: .875rem; white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .2rem 1rem; font-size: .875rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: HTML, charts below it, HTML below them."""

    title: str
    above: str
    charts: Sequence[Chart] = ()
    below: str = ""


def save(folder: Path, title: str, lead: str, facts: Iterable[str], sections: Sequence[Section]) -> list[Path]:
    """Write the page and its charts into the folder; returns the files, the page first."""
    page = folder / FILE
    page.write_text(_page(title, lead, facts, sections), encoding="utf-8")
    return [page, *(chart.save_png(folder) for section in sections for chart in section.charts)]


def how_section(setup: Mapping[str, Any], rules: Iterable[str]) -> Section:
    """How it was made: the command, the rules, and what all runs share."""
    rest = dict(setup)
    command = " ".join(f"<span>{escape(word)}</span>" for word in str(rest.pop("command", "")).split(" "))
    shown = "".join(
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(value_in_words(value))}</dd>"
        for key, value in rest.items()
    )
    listed = "".join(f"<li>{escape(rule)}</li>" for rule in rules)
    return Section("How it was made", f"<pre>{command}</pre><ul>{listed}</ul><dl>{shown}</dl>")


def _page(title: str, lead: str, facts: Iterable[str], sections: Sequence[Section]) -> str:
    listed = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    body = "".join(map(_section, sections))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<header>\n"
        f'<h1>{escape(title)}</h1>\n<p class="verdict">{escape(lead)}</p>\n<ul class="facts">{listed}</ul>\n'
        f"</header>\n{body}</main>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    figures = "".join(map(_figure, section.charts))
    grid = f'<div class="charts">{figures}</div>\n' if figures else ""
    return f"<section>\n<h2>{escape(section.title)}</h2>\n{section.above}\n{grid}{section.below}\n</section>\n"


def _figure(chart: Chart) -> str:
    """As an image, not inline: the ids inside of several SVGs can not clash."""
    image = base64.b64encode(chart.svg().encode()).decode()
    return (
        f"<figure><figcaption><h3>{escape(chart.title)}</h3><p>{escape(chart.note)}</p></figcaption>"
        f'<img alt="{escape(chart.alt)}" src="data:image/svg+xml;base64,{image}"></figure>\n'
    )


def table(name: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Scrolls inside its own box where the screen is narrow; a line break in a cell is one on the page."""

    def cell(text: str) -> str:
        return escape(text).replace("\n", "<br>")

    kinds = [' class="text"' if title in TEXT else "" for title in head]
    titles = "".join(f'<th scope="col"{kind}>{cell(text)}</th>' for kind, text in zip(kinds, head, strict=True))
    body = "".join(
        f'<tr><th scope="row">{cell(row[0])}</th>'
        + "".join(f"<td{kind}>{cell(text)}</td>" for kind, text in zip(kinds[1:], row[1:], strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(name)}" tabindex="0">'
        f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>\n"
    )


def value_in_words(value: Any) -> str:
    """A setting for a reader."""
    if isinstance(value, list | tuple):
        return ", ".join(map(value_in_words, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {value_in_words(item)}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
