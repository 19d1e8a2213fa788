"""LaTeX tables: every name is text, every row has all columns, braces balance."""

import re

import pytest
from test_report import write_run

from flyp_saflex.reporting.latex import ESCAPES, escape, latex
from flyp_saflex.reporting.report import report
from flyp_saflex.reporting.tables import Table

EVIL = "50% of_a&b #1 {$x^2$} \\input{/etc/passwd} ~<é域>"


def bare(text):
    """Return the text without escaped characters and the commands that `escape` writes."""
    for command in sorted((value for value in ESCAPES.values() if len(value) > 1), key=len, reverse=True):
        text = text.replace(command, "")
    return text


def test_no_character_of_a_name_is_a_command():
    escaped = escape(EVIL)
    assert not set(bare(escaped)) & set("\\{}$&#%_~^<>"), escaped
    assert "é域" in escaped
    assert r"\textbackslash{}input\{/etc/passwd\}" in escaped


@pytest.mark.parametrize(
    ("text", "shown"), [("-1.5 [-2.0, +0.1] (3)", "$-$1.5 [$-$2.0, +0.1] (3)"), ("52.0 ± 2.0", r"52.0 $\pm$ 2.0")]
)
def test_numbers_have_minus_signs_and_plus_minus(text, shown):
    table = latex([Table("t", ("", "a"), (("x", text),))], [])
    assert f"x & {shown} \\\\" in table


def test_row_that_begins_with_a_bracket_is_no_option_of_the_row_before():
    assert "\n{[a]} & 1" in latex([Table("t", ("", "a"), (("x", "1"), ("[a]", "1")))], [])


def test_report_as_tex_has_all_tables_and_rows(tmp_path, capsys):
    runs = [write_run(tmp_path, name, 0, 0.5, 0.6, wise=0.1) for name in ("plain", "50%_a&b")]
    out = tmp_path / "tables.tex"
    text = report(runs, out=out, baseline="plain")
    assert out.read_text() == text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == report(runs, baseline="plain").count("### ") > 4
    body = re.sub(r"^%.*$", "", text, flags=re.MULTILINE)
    tabulars = re.findall(r"\\begin\{tabular\}\{(lr*)\}(.*?)\\end\{tabular\}", body, re.DOTALL)
    assert len(tabulars) == text.count(r"\begin{table}")
    for columns, content in tabulars:
        rows = [line for line in content.splitlines() if line.endswith(r"\\")]
        assert len(rows) > 1
        assert all(len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1 for row in rows)
    assert r"50\%\_a\&b" in body
    plain = re.sub(r"\\[{}]", "", body)
    assert plain.count("{") == plain.count("}")


def test_remarks_stay_comments():
    text = latex([], ["one\ntwo", "three"])
    assert all(line.startswith("%") for line in text.splitlines() if line)
    assert "% one two" in text
