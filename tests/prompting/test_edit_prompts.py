"""Files of edit texts: the shipped ones, a round trip, and what is said about wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from flyp_saflex.data.class_prompts import load_prompts, shipped_folder
from flyp_saflex.demo.world import SPECIES, TEST_PLACES, TRAIN_PLACES, VAL_PLACES
from flyp_saflex.errors import DataError, UserError
from flyp_saflex.prompting.edit_prompts import EditPrompts, EditText, available, load_edit_prompts, write_edit_prompts

EDIT = '[[edits]]\ndomain = "at dusk"\ninstruction = "make it dusk"\nprompt = "a {} at dusk"\n'
TEXTS = EditPrompts(
    dataset="folder",
    edits=(EditText(domain="at dusk", instruction="put the {} at dusk", prompt="a photo of a {} at dusk"),),
    positive=("a photo of a {}.",),
    negative=("a photo",),
    made={"seed": 3, "captions": [{"path": "a/b.png", "caption": 'a "b" \\ c'}], "answers": ["- at dusk\n\x00\r'''\"\"\""]},
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_shipped_files():
    assert set(available()) == {
        "iwildcam.alia",
        "iwildcam-mini.alia",
        "cub.alia",
        "waterbirds.alia",
        "demo.places",
        "demo.everywhere",
    }


@pytest.mark.parametrize("name", sorted(available()))
def test_a_shipped_file_is_whole(name: str):
    texts = load_edit_prompts(name, "")
    assert len(texts.edits) >= 4
    assert texts.positive
    assert texts.negative
    assert not set(texts.positive) & set(texts.negative)
    assert len({edit.domain for edit in texts.edits}) == len(texts.edits)
    for edit in texts.edits:
        assert edit.domain
        assert edit.instruction
        assert edit.prompt.endswith(edit.domain) or name == "cub.alia"


def test_each_published_dataset_finds_its_own_file_without_being_told():
    for dataset in ("iwildcam", "iwildcam-mini", "cub"):
        texts = load_edit_prompts("", dataset)
        assert texts.path == shipped_folder() / f"{dataset}.alia.toml"
        assert texts.dataset == dataset


def test_alias_settings_are_there():
    words = {
        "iwildcam.alia": ("grassy field with trees and bushes", "at night", "near a lake", "dirt trail with twigs"),
        "cub.alia": ("flying", "flowers", "water", "branch", "rocks", "birdfeeder", "fence"),
    }
    for name, parts in words.items():
        domains = " | ".join(edit.domain for edit in load_edit_prompts(name, "").edits)
        assert [part for part in parts if part not in domains] == []


def test_the_drawn_worlds_file_names_training_places_only():
    texts = load_edit_prompts("demo.places", "iwildcam")
    domains = " | ".join(edit.domain for edit in texts.edits)
    assert all(place in domains for place in TRAIN_PLACES)
    assert not any(place in domains for place in (*VAL_PLACES, *TEST_PLACES))
    assert texts.positive == tuple(f"a photo of a {name}." for name in SPECIES)


def test_waterbirds_classes():
    assert load_prompts("waterbirds").class_names == ("landbird", "waterbird")


def test_what_is_written_is_read_back(tmp_path: Path):
    path = tmp_path / "new" / "folder.auto.toml"
    write_edit_prompts(TEXTS, path)
    read = load_edit_prompts(str(path), "folder")
    assert (read.dataset, read.edits, read.positive, read.negative) == ("folder", TEXTS.edits, TEXTS.positive, TEXTS.negative)
    assert read.made == TEXTS.made
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path):
    path = tmp_path / "folder.auto.toml"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match="may have been edited by hand: give --force"):
        write_edit_prompts(TEXTS, path)
    assert path.read_text(encoding="utf-8") == "mine"
    write_edit_prompts(TEXTS, path, force=True)
    assert load_edit_prompts(str(path), "folder").edits == TEXTS.edits
    assert [file.name for file in tmp_path.iterdir()] == ["folder.auto.toml"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path):
    (tmp_path / "prompts").write_text("a file", encoding="utf-8")
    with pytest.raises(DataError, match=r"prompts is no folder; run the command where you may write"):
        write_edit_prompts(TEXTS, Path("prompts") / "folder.auto.toml")


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="cannot be written: No space left on device; free disk space"):
        write_edit_prompts(TEXTS, tmp_path / "folder.auto.toml")
    assert list(tmp_path.iterdir()) == []


def test_files_here_come_before_shipped_ones(tmp_path: Path):
    (tmp_path / "prompts").mkdir()
    mine = tmp_path / "prompts" / "cub.alia.toml"
    mine.write_text(EDIT, encoding="utf-8")
    assert load_edit_prompts("", "cub").edits[0].instruction == "make it dusk"
    mine.rename(tmp_path / "prompts" / "cub.mine.toml")
    with pytest.raises(DataError, match=r"several files of texts for 'cub' \(cub.alia, cub.mine\): set editor.prompts to one"):
        load_edit_prompts("", "cub")
    assert load_edit_prompts("cub.mine", "cub").edits[0].domain == "at dusk"


def test_a_dataset_without_a_file_and_a_typo():
    with pytest.raises(DataError, match=r"there is no file of texts for 'table'.*write prompts/table.mine.toml"):
        load_edit_prompts("", "table")
    with pytest.raises(DataError, match=r"'iwildcam.allia' is neither a file nor a known name; did you mean 'iwildcam.alia'"):
        load_edit_prompts("iwildcam.allia", "iwildcam")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[edits]\n", "is not valid TOML: .*line 1"),
        ("", r"holds no \[\[edits\]\]"),
        (f'datset = "x"\n{EDIT}', "unknown key 'datset'; did you mean 'dataset'"),
        (EDIT.replace("instruction", "instructions"), "edit 1: unknown key 'instructions'; did you mean 'instruction'"),
        (EDIT + EDIT.replace("make it dusk", "make it night").replace("a {} at", "a dog at"), "edit 2: prompt = 'a dog at dusk'"),
        (EDIT.replace("a {} at", "a {} {} at"), r"has 2 times \{\}, expected exactly one"),
        (EDIT.replace("a {} at", "a {name} at"), r"has 0 times \{\}, expected exactly one"),
        (EDIT.replace('"at dusk"', '"at {} dusk"'), "domain = .* expected no brace"),
        (EDIT.replace("make it dusk", "turn {} to {}"), "expected at most one"),
        (EDIT.replace("make it dusk", " make it dusk"), "expected one line of text without spaces around it"),
        (EDIT.replace('"make it dusk"', "3"), "instruction = 3, expected one line of text"),
        ('edits = ["at dusk"]', r"edit 1: expected a table \[\[edits\]\]"),
        ('edits = "at dusk"', r"expected dataset = text, \[\[edits\]\] tables"),
        ('[[edits]]\ndomain = "at dusk"\n', "edit 1 has neither an instruction nor a prompt"),
        (EDIT + EDIT, "instruction 'make it dusk' is there 2 times"),
        (EDIT + '[semantic]\npositive = ["a {}"]\n', "needs both positive and negative"),
        (EDIT + '[semantic]\npositive = "a {}"\nnegative = ["x"]\n', "positive = 'a {}', expected a list of texts"),
        (EDIT + '[semantic]\npositive = ["a {x}"]\nnegative = ["x"]\n', "has 'a {x}', expected at most one"),
        (EDIT + '[semantic]\npostive = ["a"]\n', r"\[semantic\] unknown key 'postive'; did you mean 'positive'"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(text: str, message: str, tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_edit_prompts(str(path), "folder")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b'dataset = "\xff"\n')
    with pytest.raises(DataError, match=r"mine.toml is not UTF-8 text \(line 1\)"):
        load_edit_prompts(str(path), "folder")


def test_texts_of_another_dataset_are_refused_where_the_data_are_known():
    with pytest.raises(DataError, match=r"are for 'cub', but data\.name = iwildcam"):
        load_edit_prompts("cub.alia", "iwildcam")
    for name, dataset in (("iwildcam.alia", "iwildcam-mini"), ("waterbirds.alia", "table"), ("cub.alia", "folder")):
        assert load_edit_prompts(name, dataset).edits
