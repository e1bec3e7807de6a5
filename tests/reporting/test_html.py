import pytest
from jinja2 import UndefinedError

from antransformer.reporting import html

HOSTILE = '</td><script>alert("\'&")</script>'
ESCAPED = "&lt;/td&gt;&lt;script&gt;alert(&#34;&#39;&amp;&#34;)&lt;/script&gt;"


def test_table_cells_titles_and_names_are_escaped():
    text = html.table(HOSTILE, ["variant", HOSTILE], [["a", HOSTILE], [HOSTILE, "b"]])
    assert "<script" not in text and text.count(ESCAPED) == 4


def test_table_rows_have_a_heading_and_line_breaks():
    text = html.table("Losses", ["variant", "loss", "outcome"], [["a", "1.5\n± 0.1", "worse\n<b>"]], ["outcome"])
    assert (
        '<th scope="row">a</th><td>1.5<br>±\N{NO-BREAK SPACE}0.1</td><td class="text">worse<br>&lt;b&gt;</td>' in text
    )
    assert text.count('class="text"') == 2  # the title and the cell


def test_cells_of_larger_tables_carry_their_title_for_narrow_screens():
    text = html.table("Losses", ["a", "b\nc", HOSTILE, "d"], [["1", "2", "3\n4", "5"]], ["d"])
    assert '<td data-label="b c"><span>2</span></td>' in text and '<td class="text" data-label="d">' in text
    assert f'data-label="{ESCAPED}"><span>3<br>4</span>' in text and "<script" not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.61x and < 1.00x", "1.61x and~<~1.00x"),
        ("> 0.76x", ">~0.76x"),
        ("(p = 0.01)", "(p~=~0.01)"),
        ("2.03 ± 0.01", "2.03~±~0.01"),
        ("p < 0.001", "p~<~0.001"),
        ("a <b> c", "a <b> c"),
    ],
)
def test_a_sign_stays_with_its_number(text, expected):
    assert html.unbroken(text) == expected.replace("~", "\N{NO-BREAK SPACE}")


def test_table_refuses_a_row_of_another_length():
    with pytest.raises(ValueError):
        html.table("Losses", ["variant", "loss"], [["a", "1", "2"]])


def test_method_section_shows_the_command_the_rules_and_the_settings():
    setup = {"command": f"antransformer compare {HOSTILE}", "batch_tokens": 4096, "budgets": [1000, 2000]}
    above = html.method_section(setup, [HOSTILE]).above
    assert above.startswith(f"<pre><span>antransformer</span> <span>compare</span> <span>{ESCAPED}</span></pre>")
    assert f"<li>{ESCAPED}</li>" in above and "command" not in above
    assert "<dt>batch tokens</dt><dd>4,096</dd>" in above and "<dt>budgets</dt><dd>1,000, 2,000</dd>" in above


def test_page_escapes_everything_except_the_html_of_sections(tmp_path):
    section = html.Section(HOSTILE, "<p>above</p>", below="<p>below</p>")
    files = html.save(tmp_path, HOSTILE, HOSTILE, [HOSTILE], [section])
    text = files[0].read_text(encoding="utf-8")
    assert files == [tmp_path / "report.html"]
    assert "<script" not in text and text.count(ESCAPED) == 5  # the title twice, the lead, a fact, a heading
    assert text.index("<p>above</p>") < text.index("<p>below</p>") and "color-scheme: light dark" in text


def test_templates_refuse_missing_values():
    with pytest.raises(UndefinedError):
        html._render("page", title="t")
