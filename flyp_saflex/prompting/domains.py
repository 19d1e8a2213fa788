"""Domain descriptions from a language model: the request, and the strict parser of its answer; no torch.

The request shows captions of training images and asks for the settings in them, one a line, each as `- in the forest at
night`, none naming a class (in ALIA, arXiv 2305.16289, a person edits such a list). A line that breaks a rule never
becomes an edit text. It is sent back with the reason, and the model is asked again.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_WORDS = 12
MAX_CAPTION = 200
"""Longest quotation of a caption in the request, in characters."""
MAX_QUOTED = 60
"""Longest quotation of a wrong line, in characters."""
MAX_COMPLAINTS = 10
APOSTROPHES = "['\u2019]"
MARKS = " ,-'\u2019"
"""Characters allowed in a phrase besides letters and digits."""
PREPOSITIONS = frozenset(
    (
        "above", "across", "against", "along", "amid", "among", "around", "at", "atop", "before", "behind", "below", "beneath",
        "beside", "between", "by", "during", "in", "inside", "near", "next", "on", "outside", "over", "through", "under",
        "underneath", "with", "within", "without",
    )
)  # fmt: skip
"""First words of a domain: it is appended to `put the {}`."""
CONNECTORS = frozenset(("of", "with", "without", "in", "on", "from", "at", "and", "or"))
IRREGULAR = {"mouse": "mice", "goose": "geese", "man": "men", "woman": "women", "person": "people", "child": "children"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A parsed answer of the language model.

    Attributes:
        text: the answer as it came.
        domains: the valid domain descriptions, in the order of the answer.
        wrong: (line, reason) of every line that cannot be used.
    """

    text: str
    domains: tuple[str, ...]
    wrong: tuple[tuple[str, str], ...]


def request(captions: Sequence[str], class_names: Sequence[str], max_domains: int) -> str:
    """Return the request to the language model: captions, rules and an example of an answer."""
    shown = "\n".join(f"* {' '.join(caption.split())[:MAX_CAPTION]}" for caption in captions)
    classes = ", ".join(dict.fromkeys(name.replace("_", " ") for name in class_names))
    return (
        "These captions were written by a machine for photographs of one collection:\n"
        f"{shown}\n\n"
        "Which settings do the photographs share? A setting is a place, a background, the weather, the light or the time of "
        f"day. List at most {max_domains} settings that differ clearly from each other, the most frequent first, each such "
        "that any subject of the collection could be photographed in it. Captions may be wrong; leave out what only one of "
        "them mentions.\n\n"
        f"Write one setting per line: a hyphen, a space, and a phrase of 2 to {MAX_WORDS} words in English that begins with a "
        "preposition. For another collection an answer was:\n"
        "- beside a gravel road\n"
        "- on a snowy hill at dawn\n\n"
        "Never name what the photographs are of. These words are forbidden, alone, in parts and in the plural: "
        f"{classes}.\n"
        "Write no introduction, no numbers, no brackets, no full stop, and nothing after the list."
    )


def complaint(answer: Answer) -> str:
    """Return the addition to the request that quotes the wrong lines of an answer with their reasons."""
    wrong = answer.wrong[:MAX_COMPLAINTS]
    more = len(answer.wrong) - len(wrong)
    lines = [f'* "{_quote(line)}": {reason}' for line, reason in wrong] + ([f"* and {more} more lines"] if more else [])
    return (
        "\n\nAn earlier answer broke these rules:\n"
        + "\n".join(lines or ["* it was empty"])
        + "\nWrite the whole list again without such lines."
    )


def parse(text: str, class_names: Sequence[str], max_domains: int, *, complete: bool = True) -> Answer:
    """Parse an answer strictly: every line is a valid domain or a wrong line with its reason.

    Args:
        text: the answer; everything up to `</think>`, the thoughts of a reasoning model, is ignored.
        class_names: names that must not appear.
        max_domains: lines beyond these are wrong.
        complete: whether the model ended the answer itself; if not, its last line may be cut and is not used.
    """
    lines = [line.strip() for line in text.rpartition("</think>")[2].splitlines() if line.strip()]
    forbidden = forbidden_words(class_names)
    domains: dict[str, str] = {}
    wrong: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        phrase = " ".join(line.removeprefix("- ").split())
        if number == len(lines) and not complete:
            reason = "cut off, the answer is too long"
        elif not line.startswith("- "):
            reason = "does not begin with a hyphen and a space"
        elif fault := _fault(phrase, forbidden):
            reason = fault
        elif phrase.casefold() in domains:
            reason = "is there twice"
        elif len(domains) == max_domains:
            reason = f"is one more than the {max_domains} asked for"
        else:
            domains[phrase.casefold()] = phrase[0].lower() + phrase[1:]
            continue
        wrong.append((line, reason))
    return Answer(text=text, domains=tuple(domains.values()), wrong=tuple(wrong))


def forbidden_words(class_names: Iterable[str]) -> dict[str, str]:
    """Return the words that must not appear, each with the class name that it belongs to.

    Forbidden are the head noun of a name (`White-lipped peccary`: peccary) and the whole name written as one word
    (`dik-diks`: dikdik), both in singular and plural.
    """
    found: dict[str, str] = {}
    for name in class_names:
        words = _words(re.sub(r"\(.*?\)|\[.*?\]", " ", name)) or _words(name)
        end = next((index for index, word in enumerate(words) if index and word in CONNECTORS), len(words))
        for word in (words[end - 1], "".join(words[:end])) if words else ():
            for form in _forms(word):
                found.setdefault(form, name)
    return found


def _fault(phrase: str, forbidden: dict[str, str]) -> str:
    """Return why a phrase cannot be used, or the empty string."""
    odd = next((letter for letter in phrase if not (letter.isalnum() or letter in MARKS)), "")
    if odd:
        return f"holds '{odd}', expected letters, spaces, commas and hyphens only"
    words = phrase.split()
    if not 2 <= len(words) <= MAX_WORDS:
        return f"has {len(words)} words, expected 2 to {MAX_WORDS}"
    if words[0].lower() not in PREPOSITIONS:
        return f"begins with '{_quote(words[0])}', expected a preposition such as in, on, near"
    parts = _words(phrase)
    for word in (*parts, *map("".join, itertools.pairwise(parts))):
        if word in forbidden:
            return f"names the class '{forbidden[word]}'"
    return ""


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", re.sub(APOSTROPHES, "", text.casefold().replace("_", " ")))


def _forms(word: str) -> set[str]:
    """Return a word with its likely singulars and plurals; forms that are no English words do no harm."""
    forms = {word, f"{word}s", f"{word}es"}
    for ending, other in (("y", "ies"), ("f", "ves"), ("fe", "ves"), ("ies", "y"), ("ves", "f"), ("es", ""), ("s", "")):
        stem = word.removesuffix(ending)
        if word.endswith(ending) and len(stem) > 1:
            forms.add(stem + other)
    for one, many in IRREGULAR.items():
        if word in (one, many):
            forms |= {one, many}
    return forms


def _quote(text: str) -> str:
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."
