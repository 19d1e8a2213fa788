"""Class names and templates: what is shipped, and bad lines named by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from flyp_saflex.data import class_prompts
from flyp_saflex.data.class_prompts import load_prompts, read_classes, read_templates, shipped
from flyp_saflex.errors import DataError


def test_shipped_prompts():
    assert shipped() == ["camelyon17", "cub", "default", "fmow", "iwildcam", "iwildcam-mini", "pacs", "waterbirds"]
    assert load_prompts("iwildcam").templates == ("a photo of {}.", "{} in the wild.")
    assert load_prompts("cub").templates == ("a photo of a {}, a type of bird.",)
    assert load_prompts("default").templates == ("a photo of a {}.",)
    assert load_prompts("default").class_names == ()
    counts = {name: len(load_prompts(name).class_names) for name in ("iwildcam", "iwildcam-mini", "cub", "pacs")}
    assert counts == {"iwildcam": 182, "iwildcam-mini": 7, "cub": 200, "pacs": 7}
    assert load_prompts("iwildcam-mini").class_keys == ("0", "24", "32", "36", "48", "49", "52")
    cub = load_prompts("cub")
    assert (cub.class_keys[2], cub.class_names[2]) == ("003.Sooty_Albatross", "Sooty Albatross")


def test_prompts_inside_an_installed_package_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "flyp_saflex"
    (package / "prompts" / "mine").mkdir(parents=True)
    (package / "prompts" / "mine" / "templates.txt").write_text("a {}\n")
    monkeypatch.setattr(class_prompts, "__file__", str(package / "data" / "class_prompts.py"))
    assert shipped() == ["mine"]
    assert load_prompts("mine").templates == ("a {}",)


def test_own_folder_with_keys_comments_and_a_byte_order_mark(tmp_path: Path):
    (tmp_path / "templates.txt").write_text("# why\n\na {}\n  the {} again \n", encoding="utf-8-sig")
    (tmp_path / "classes.txt").write_text("# source\nn01\tGünther's dik-dik\nplain\n\n", encoding="utf-8")
    prompts = load_prompts(str(tmp_path))
    assert prompts.templates == ("a {}", "the {} again")
    assert prompts.class_keys == ("n01", "plain")
    assert prompts.class_names == ("Günther's dik-dik", "plain")


TEMPLATES = {
    "no place": ("a {}\na photo\n", r"templates\.txt line 2: the template 'a photo' has 0 times \{\}"),
    "two places": ("a {} and a {}\n", "line 1: .* has 2 times"),
    "another brace": ("# c\na {name} {}\n", "line 2: .*expected exactly one and no other brace"),
    "twice": ("a {}\na {}\n", "line 2: the template 'a {}' is there twice"),
    "none": ("# only a comment\n", "holds no template"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_bad_templates_name_file_and_line(case: str, tmp_path: Path):
    text, message = TEMPLATES[case]
    path = tmp_path / "templates.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_templates(path)
    assert "\n" not in str(caught.value)


CLASSES = {
    "gap": ("cat\n\ndog\n", "line 2: no class name"),
    "key without name": ("cat\t \ndog\n", "line 1: no class name|holds no class"),
    "key twice": ("# c\na\tcat\na\tdog\n", "line 3: the key 'a' is already on line 2"),
    "none": ("\n", "holds no class"),
}


@pytest.mark.parametrize("case", CLASSES)
def test_bad_classes_name_file_and_line(case: str, tmp_path: Path):
    text, message = CLASSES[case]
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_classes(path)
    assert "\n" not in str(caught.value)


def test_missing_folder_and_files(tmp_path: Path):
    with pytest.raises(DataError, match="neither a folder nor a shipped name; did you mean 'iwildcam'"):
        load_prompts("iwildcan")
    with pytest.raises(DataError, match=r"has no templates\.txt"):
        load_prompts(str(tmp_path))
    (tmp_path / "templates.txt").write_bytes(b"a {} \xff\n")
    with pytest.raises(DataError, match="is not UTF-8"):
        load_prompts(str(tmp_path))
