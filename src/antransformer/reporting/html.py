"""HTML reports: one self-contained page, rendered from ``templates``, and its charts as PNG files.

The page has no scripts and loads nothing from elsewhere. Templates escape every value, so names and settings cannot
inject markup; only the HTML of a ``Section`` is inserted unchanged.
"""

import base64
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from antransformer.reporting.figure import Chart
from antransformer.reporting.labels import format_value

FILE = "report.html"


@dataclass(frozen=True)
class Section:
    """One section of a report.

    Attributes:
        title: heading, as plain text.
        above: HTML above the charts; names inside it must be escaped already.
        charts: charts of the section.
        below: HTML below the charts, escaped like ``above``.
    """

    title: str
    above: str
    charts: Sequence[Chart] = ()
    below: str = ""


def save(folder: Path, title: str, lead: str, facts: Iterable[str], sections: Sequence[Section]) -> list[Path]:
    """Write ``report.html`` and one PNG file per chart.

    Args:
        folder: existing folder of the report.
        title: heading of the page.
        lead: main result in one or two sentences.
        facts: short facts about the experiment, such as its number of runs.
        sections: sections of the page, in order.

    Returns:
        The files written, the page first.
    """
    page = folder / FILE
    content = _render("page", title=title, lead=lead, facts=facts, sections=sections)
    page.write_text(content + "\n", encoding="utf-8")
    return [page, *(chart.save_png(folder) for section in sections for chart in section.charts)]


def method_section(setup: Mapping[str, Any], rules: Iterable[str]) -> Section:
    """Section on how the results were measured: the command, the rules, and the settings shared by all runs."""
    shared = dict(setup)
    command = str(shared.pop("command", "")).split(" ")
    facts = [(name.replace("_", " "), format_value(value)) for name, value in shared.items()]
    return Section("Method", _render("method", command=command, rules=rules, facts=facts))


STACKED = {"few": 40, "many": 64, "most": 100}  # size of a table -> page width in rem up to which its rows are stacked


def table(name: str, head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: Collection[str] = ()) -> str:
    """HTML of a table. On a screen that is too narrow for it, each row becomes a list of its cells.

    Args:
        name: accessible name.
        head: column titles.
        rows: cells as plain text, one per column; the first cell of a row is its heading.
        text_columns: titles of columns that hold words and are therefore aligned left.
    """
    cells = [list(zip(head, row, strict=True)) for row in rows]
    size = "" if len(head) < 4 else "few" if len(head) < 7 else "many" if len(head) < 10 else "most"
    return _render("table", name=name, head=head, rows=cells, text_columns=text_columns, size=size)


def unbroken(text: str) -> str:
    """Text in which a sign and its number stay on one line, such as ``< 1.00x``, ``p = 0.01`` and ``2.03 ± 0.01``."""
    text = re.sub(r" ([<>=±]) ", "\N{NO-BREAK SPACE}\\1\N{NO-BREAK SPACE}", str(text))
    return re.sub(r"([<>±]) (?=[\d.])", "\\1\N{NO-BREAK SPACE}", text)


def _render(template: str, **values: Any) -> str:
    return _templates.get_template(f"{template}.html").render(values)


def _data_uri(chart: Chart) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(chart.svg().encode()).decode()}"


_templates = Environment(
    loader=PackageLoader("antransformer.reporting"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters |= {"data_uri": _data_uri, "unbroken": unbroken}
_templates.globals["stacked"] = STACKED
