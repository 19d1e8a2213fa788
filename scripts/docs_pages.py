"""Pages of the documentation site that are made from the code and from files of the repository (a hook of mkdocs.yml).

No page is written to docs/: options come from `flyp_saflex.option_docs`, commands from the parser, the others are files of
the repository with their links made to fit.
"""

from __future__ import annotations

import argparse
import inspect
import os
import posixpath
import re
from html import escape
from pathlib import Path
from typing import Any

from flyp_saflex.cli import build_parser
from flyp_saflex.option_docs import options, sections

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "scripts/RESULTS.md": "results.md",
    "scripts/LOG.md": "log.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reference/security.md",
    "augment_cache/README.md": "reference/cache.md",
    "prompts/README.md": "reference/edit-texts.md",
}
"""Files of the repository that are pages as they are, with their addresses in the site."""
PICTURE = "flyp_saflex/assets/tiny_editor/edits.jpg"
PART = re.compile(r"<!-- README: (.+?) -->")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages to the site."""
    from mkdocs.structure.files import File

    pages = {page: from_repository(source) for source, page in FILES.items()}
    pages |= {"reference/options.md": options_page(), "reference/commands.md": commands_page()}
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "edits.jpg", abs_src_path=str(ROOT / PICTURE)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put sections of the README where a page names them."""
    address = page.file.src_uri
    return PART.sub(lambda match: with_links_of(readme_section(match[1]), "README.md", address), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Let the keyboard reach tables, which scroll on a narrow screen."""
    return html.replace("<table>", '<table tabindex="0">')


def on_post_page(output: str, **_: Any) -> str:
    """Name the search dialog for screen readers."""
    return output.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )


def from_repository(source: str) -> str:
    """Return a file of the repository as a page."""
    return with_links_of((ROOT / source).read_text(encoding="utf-8"), source, FILES[source])


def with_links_of(text: str, source: str, page: str) -> str:
    """Return text of a file of the repository; links to pages of the site lead from `page`, links to other files become text."""

    def link(match: re.Match[str]) -> str:
        target, _, anchor = match[2].partition("#")
        if "//" in target or not target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        in_site = path.removeprefix("docs/") if path.startswith("docs/") and path.endswith(".md") else FILES.get(path)
        if in_site is None:
            return f"{match[1]} (`{path}`)" if match[1].strip("`") != path else f"`{path}`"
        return f"[{match[1]}]({os.path.relpath(in_site, posixpath.dirname(page) or '.')}{'#' if anchor else ''}{anchor})"

    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", link, text)


def readme_section(title: str) -> str:
    """Return the section of the README below a heading.

    Raises:
        KeyError: there is no such heading.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[title].strip()


def options_page() -> str:
    """Return the page of all options, by section."""
    head = (
        "# Options\n\nSet an option in a recipe's section or with `--set SECTION.FIELD=VALUE`. `flyp-saflex options SECTION` "
        "and `flyp-saflex options WORD` tell the same on the terminal.\n"
    )
    top = [option for option in options() if not option.section]
    parts = [head, "## Above all sections\n", *(_option(option) for option in top)]
    for section, part in sections().items():
        title = (type(part).__doc__ or "").strip().splitlines()[0]
        parts += [f"\n## `[{section}]` {{ #{section} }}\n\n{_plain(title)}\n"]
        parts += [_option(option) for option in options() if option.section == section]
    return "\n".join(parts)


def _option(option: Any) -> str:
    return (
        f"### `{option.key}` {{ #{option.key} }}\n\n{_plain(option.type).capitalize()}; default: `{option.default}`\n\n"
        f"{_plain(option.meaning)}\n"
    )


def _plain(text: str) -> str:
    """Return text with its angle brackets and stars as they are, outside of code."""
    parts = text.split("`")
    outside = [escape(part, quote=False).replace("*", r"\*") for part in parts[::2]]
    return "`".join(part for pair in zip(outside, [*parts[1::2], ""], strict=False) for part in pair).removesuffix("`")


def commands_page() -> str:
    """Return the page of all commands, from the parser."""
    parser = build_parser()
    lines = [
        "# Commands",
        "",
        "Exit codes: 0 done, 1 a failure of ours (with a traceback), 2 a mistake in the input (one line says what and how to "
        "mend it), 130 after Ctrl-C, 141 when the reader of the output is gone. All commands but `demo` run unchanged under "
        "`accelerate launch -m flyp_saflex ...`. `python -m flyp_saflex` is the same as `flyp-saflex`.",
        "",
        "Shell completion: `pip install shtab`, then `shtab --shell=bash flyp_saflex.cli.build_parser` (or `zsh`, `tcsh`) prints "
        "a script for your shell to source.",
        "",
    ]
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        usage = " ".join(command.format_usage().removeprefix("usage: ").split())
        lines += [f"## `{name}`", "", _plain(inspect.cleandoc(command.description or "")), "", f"```text\n{usage}\n```", ""]
        lines += ["| argument | meaning |", "|---|---|"]
        for action in command._actions:
            if action.dest != "help":
                value = str(action.metavar or "/".join(action.choices or ()) or action.dest).replace("|", "or")
                words = [f"`{option}`" for option in action.option_strings] or [f"`{value}`"]
                value = f" `{value}`" if action.option_strings and action.nargs != 0 else ""
                lines.append(f"| {', '.join(words)}{value} | {_plain(action.help or '')} |")
        lines.append("")
    return "\n".join(lines)
