"""Tables of a report as LaTeX: booktabs, every name escaped."""

from __future__ import annotations

from collections.abc import Sequence

from flyp_saflex.reporting.html import plain
from flyp_saflex.reporting.tables import Table

HEAD = """\
% Tables of flyp-saflex report. The preamble needs \\usepackage{booktabs}; to shrink a wide table: \\usepackage{graphicx} and
% \\resizebox{\\linewidth}{!}{...} around its tabular. Names that are not in Latin script need LuaLaTeX and a font with them.
"""
ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "±": r"$\pm$",
    "→": r"$\rightarrow$",
    "\N{MINUS SIGN}": "$-$",
    "\n": " ",
    "\t": " ",
}


def latex(tables: Sequence[Table], remarks: Sequence[str]) -> str:
    """Return tables as LaTeX, each in an environment `table`; the remarks are comments.

    Args:
        tables: their titles are the captions; the first column is aligned to the left, the others to the right.
        remarks: what a reader of the numbers has to know.
    """
    lines = [HEAD + "".join(f"% {' '.join(plain(remark).split())}\n" for remark in remarks)]
    lines += [_table(table) for table in tables]
    return "\n".join(lines)


def escape(value: str) -> str:
    """Return a text as LaTeX shows it: no command in it, and minus signs before digits."""
    escaped = "".join(ESCAPES.get(character, character) for character in plain(value))
    return escaped.replace("[-", "[$-$").replace(", -", ", $-$") if _is_number(value) else escaped


def _table(table: Table) -> str:
    columns = "l" + "r" * (len(table.header) - 1)
    rows = [" & ".join(map(_cell, line)) + r" \\" for line in table.lines]
    parts = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(table.title)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(map(_cell, table.header)) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(parts) + "\n"


def _cell(value: str) -> str:
    """Return a cell; braces keep `[` behind a line's end from being read as the option of the line before."""
    text = escape(value)
    if _is_number(value) and text.startswith("-") and len(text) > 1:
        text = f"$-${text[1:]}"
    return f"{{{text}}}" if text.startswith(("[", "*")) else text


def _is_number(value: str) -> bool:
    return value[:1].isdigit() or (value[:1] in ("+", "-") and value[1:2].isdigit())
