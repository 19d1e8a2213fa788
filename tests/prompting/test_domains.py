"""Reading a language model's list of domains strictly."""

from __future__ import annotations

import re

import pytest

from flyp_saflex.data.class_prompts import load_prompts
from flyp_saflex.prompting.domains import MAX_COMPLAINTS, complaint, forbidden_words, parse, request

CLASSES = ("White-lipped peccary", "fox", "dik-diks", "Lowland paca")


def reasons(text: str, *classes: str, **options: bool) -> list[str]:
    return [reason for _, reason in parse(text, classes or CLASSES, 8, **options).wrong]


def test_valid_lines_come_out_in_order_and_tidied():
    answer = parse("- In the forest  at night\n\n- near a lake, at dawn \n-  on a trail's edge\n", CLASSES, 8)
    assert answer.domains == ("in the forest at night", "near a lake, at dawn", "on a trail's edge")
    assert answer.wrong == ()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("Here are the settings:", "does not begin with a hyphen and a space"),
        ("1. in the forest", "does not begin with a hyphen and a space"),
        ("* in the forest", "does not begin with a hyphen and a space"),
        ("-in the forest", "does not begin with a hyphen and a space"),
        ("- in the forest.", "holds '.'"),
        ("- in the {} forest", "holds '{'"),
        ("- in the **forest**", "holds '*'"),
        ("- in the forest (night)", "holds '('"),
        ("- ", "does not begin with a hyphen and a space"),
        ("- forest", "has 1 words, expected 2 to 12"),
        ("- in a b c d e f g h i j k l", "has 13 words, expected 2 to 12"),
        ("- grassy field", "begins with 'grassy', expected a preposition"),
        ("- with a White-Lipped Peccary", "names the class 'White-lipped peccary'"),
        ("- among many peccaries", "names the class 'White-lipped peccary'"),
        ("- near two foxes", "names the class 'fox'"),
        ("- near the FOX", "names the class 'fox'"),
        ("- near a dik-dik", "names the class 'dik-diks'"),
        ("- near a dikdik", "names the class 'dik-diks'"),
        ("- near the fox's den", "names the class 'fox'"),
    ],
)
def test_a_line_that_breaks_a_rule_is_told_with_its_reason(line: str, reason: str):
    answer = parse(f"- on a hill\n{line}", CLASSES, 8)
    assert answer.domains == ("on a hill",)
    ((told, why),) = answer.wrong
    assert told == line.strip()
    assert why.startswith(reason)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("elephants", "an elephant"),
        ("elephant", "some elephants"),
        ("wolf", "two wolves"),
        ("goose", "wild geese"),
        ("person", "people"),
        ("Red winged Blackbird", "a black bird"),
        ("black bear", "a blackbear"),
        ("bird of paradise", "some birds"),
        ("bat (flying)", "a bat"),
        ("sea_lion", "sea lions"),
    ],
)
def test_class_names_are_found_in_singular_plural_and_joined(name: str, text: str):
    assert reasons(f"- beside {text}", name) == [f"names the class '{name}'"]


def test_words_that_only_look_like_a_class_are_kept():
    assert (
        reasons("- on a foxglove meadow\n- in a white and lowland landscape\n- by the flying dust", "bat (flying)", *CLASSES)
        == []
    )


@pytest.mark.parametrize("dataset", ["iwildcam", "cub", "pacs"])
def test_usual_settings_clash_with_no_shipped_class(dataset: str):
    text = "- in the forest at night\n- near a lake\n- on a dirt trail with twigs\n- in a grassy field with trees and bushes"
    assert parse(text, load_prompts(dataset).class_names, 8).wrong == ()


def test_every_shipped_class_name_is_forbidden_to_be_named():
    for name in load_prompts("cub").class_names:
        assert parse(f"- near a {name}", [name], 8).domains == ()


def test_a_line_twice_and_lines_beyond_the_limit_are_wrong():
    answer = parse("- on a hill\n- On a hill\n- in fog\n- at dusk", CLASSES, 2)
    assert answer.domains == ("on a hill", "in fog")
    assert [reason for _, reason in answer.wrong] == ["is there twice", "is one more than the 2 asked for"]


def test_the_last_line_of_an_answer_that_was_cut_is_not_used():
    answer = parse("- on a hill\n- in the for", CLASSES, 8, complete=False)
    assert answer.domains == ("on a hill",)
    assert answer.wrong == (("- in the for", "cut off, the answer is too long"),)


def test_thinking_aloud_is_no_part_of_the_answer():
    assert parse("<think>\nfoxes?\n- in fog\n</think>\n\n- on a hill", CLASSES, 8).domains == ("on a hill",)
    assert parse("", CLASSES, 8).domains == parse("", CLASSES, 8).wrong == ()


def test_request_holds_captions_classes_and_limit():
    text = request(["a fox\nin snow", "b" * 900], ["red_fox", "cat", "cat"], 5)
    assert "* a fox in snow\n" in text
    assert "b" * 201 not in text
    assert "plural: red fox, cat." in text
    assert "at most 5 settings" in text
    examples = "\n".join(re.findall(r"^- .*$", text, re.MULTILINE))
    assert len(parse(examples, ["red fox"], 5).domains) == 2, "the examples in the request obey its rules"


def test_complaint_quotes_the_wrong_lines_shortened():
    answer = parse("\n".join(["- a" + "b" * 300, *(f"{number}. in fog" for number in range(MAX_COMPLAINTS + 4))]), CLASSES, 8)
    text = complaint(answer)
    assert "expected 2 to 12" in text
    assert "and 5 more lines" in text
    assert "b" * 100 not in text
    assert "it was empty" in complaint(parse("", CLASSES, 8))


def test_a_name_of_marks_only_forbids_nothing():
    assert forbidden_words(["?!", ""]) == {}
