"""HTML elements of the page: escaped text, scrolling tables, figures, sections.

Text from a run (names of recipes, classes, files, instructions) is a plain `str` and is escaped here, once. `markupsafe.Markup`
is HTML already and is not escaped again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

NOTHING = "\N{EN DASH}"
"""Placeholder of a missing number."""


def text(value: object) -> Markup:
    """Return a value as HTML: escaped, without control characters; `Markup` stays as it is."""
    return value if isinstance(value, Markup) else escape(plain(str(value)))


def plain(value: str) -> str:
    """Replace characters that XML forbids or that change the direction of the line."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}" for character in value
    )


def join(parts: Iterable[object], separator: str = "\n") -> Markup:
    """Join several parts to one."""
    return Markup(separator.join(text(part) for part in parts))


def element(tag: str, content: object = "", **attributes: object) -> Markup:
    """Return `<tag attributes>content</tag>`; `class_` stands for `class`, and attributes that are None are left out."""
    pairs = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{text(value)}"' for name, value in attributes.items() if value is not None
    )
    return Markup(f"<{tag}{pairs}>{text(content)}</{tag}>")


def section(identity: str, title: str, *parts: object) -> Markup:
    """Return a chapter of the page."""
    return element("section", join(["", element("h2", title), *parts, ""]), id=identity)


def paragraph(*parts: object, class_: str | None = None) -> Markup:
    """Return a paragraph."""
    return element("p", join(parts, " "), class_=class_)


def listing(items: Sequence[object], class_: str | None = None) -> Markup:
    """Return a bulleted list; nothing for no items."""
    return element("ul", join(element("li", item) for item in items), class_=class_) if items else Markup("")


def details(summary: object, *parts: object, open_: bool = False) -> Markup:
    """Return a block that the reader can unfold."""
    inside = join([element("summary", summary), *parts])
    return Markup(f"<details{' open' if open_ else ''}>{inside}</details>")


def figure(drawing: Markup, caption: object) -> Markup:
    """Return a drawing with its caption."""
    return element("figure", join([drawing, element("figcaption", caption)]))


def image(uri: str, alt: str) -> Markup:
    """Return a picture with its text alternative."""
    return Markup(f'<img src="{text(uri)}" alt="{text(alt)}" loading="lazy">')


def listed_file(content: object, label: str) -> Markup:
    """Return the text of a file in a box that scrolls and can be reached with the keyboard.

    Args:
        content: text of the file.
        label: name of the box for screen readers; every box of a page needs its own.
    """
    return element("pre", element("code", content), tabindex="0", role="region", aria_label=label)


def cell(value: object, *, share: float | None = None, class_: str | None = None, span: int | None = None) -> Markup:
    """Return a table cell; `share` in 0..1 draws a bar behind the number."""
    style = None if share is None else f"--v:{min(max(share, 0.0), 1.0):.2f}"
    return element("td", value, class_=class_ or ("bar" if share is not None else None), style=style, colspan=span)


def table(
    caption: str,
    header: Sequence[object],
    lines: Iterable[Sequence[object]],
    *,
    groups: Sequence[tuple[object, int]] = (),
    class_: str | None = None,
    seen: str = "",
) -> Markup:
    """Return a table in a box that scrolls on a narrow screen.

    Args:
        caption: complete caption for screen readers.
        header: names of the columns; the first column names the rows.
        lines: cells of every row, from `cell` or plain.
        groups: (name, number of columns) above the header.
        class_: CSS class of the table.
        seen: shorter visible caption, where the heading above says the rest; empty: none is visible.
    """
    rows = [element("caption", element("span", seen or caption), class_=None if seen else "unseen")]
    if groups:
        over = [element("th", name, colspan=span, scope="colgroup", class_="group") for name, span in groups]
        rows.append(element("tr", join([element("td", ""), *over], "")))
    rows.append(element("tr", join((element("th", name, scope="col") for name in header), "")))
    rows[1:] = [element("thead", join(rows[1:]))]
    body = []
    for first, *others in lines:
        cells = (other if isinstance(other, Markup) and other.startswith("<td") else cell(other) for other in others)
        body.append(element("tr", join([element("th", first, scope="row"), *cells], "")))
    made = element("table", join([*rows, element("tbody", join(body))]), class_=class_)
    return element("div", made, class_="scroll", tabindex="0", role="region", aria_label=caption)
