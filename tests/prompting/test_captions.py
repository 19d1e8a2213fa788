"""Captions from a CSV, and the balanced sample."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from flyp_saflex.config import DataConfig
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import DataError
from flyp_saflex.prompting.captions import draw, draw_captions, read_captions
from flyp_saflex.records import Dataset, Sample


@pytest.fixture
def dataset(tiny_images_dir: Path) -> Dataset:
    return load_dataset(
        DataConfig(root=str(tiny_images_dir), train_domains=("day",), test_domains=("night",), select_per_class=2)
    )


def samples(*counts: int) -> list[Sample]:
    return [
        Sample(sample_id=f"{label}/{number}", item=Path("x"), label=label)
        for label, count in enumerate(counts)
        for number in range(count)
    ]


def test_every_class_has_its_share_as_far_as_it_goes():
    drawn = draw(samples(100, 2, 30), 20, seed=1)
    assert len(set(drawn)) == 20
    assert Counter(sample.label for sample in drawn) == {0: 9, 1: 2, 2: 9}
    assert len(draw(samples(3, 1), 50, seed=1)) == 4
    assert draw([], 5, seed=1) == []


def test_more_classes_than_captions_still_draws_at_random():
    drawn = {tuple(sample.label for sample in draw(samples(*[3] * 30), 4, seed=seed)) for seed in range(5)}
    assert len(drawn) == 5
    assert all(len(set(labels)) == 4 for labels in drawn)


def test_the_sample_depends_on_the_seed_and_not_on_the_order():
    rows = samples(40, 40)
    assert draw(rows, 10, seed=1) == draw(rows[::-1], 10, seed=1) != draw(rows, 10, seed=2)


def test_captions_by_path_are_those_of_training_images(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_images_dir: Path
):
    train = [sample.sample_id for sample in dataset.train.samples]
    table = tmp_path / "captions.csv"
    windows = train[1].replace("/", "\\")
    table.write_text(
        f'\ufeffCaption,path\n"a circle, on  ground",./{train[0]}\nb,{windows}\n\n"c\nd",night/circle/0.png\n', encoding="utf-8"
    )
    captions = read_captions(table, dataset)
    assert [(row.sample_id, row.text) for row in captions] == [(train[0], "a circle, on ground"), (train[1], "b")]
    assert "1 of 3 captions" in capsys.readouterr().out
    assert draw_captions(captions, dataset, 1, seed=0)[0] in captions
    assert len(draw_captions(captions, dataset, 9, seed=0)) == 2


def test_captions_alone(dataset: Dataset, tmp_path: Path):
    table = tmp_path / "captions.csv"
    table.write_text("caption\n" + "".join(f"text {number}\n" for number in range(9)), encoding="utf-8")
    captions = read_captions(table, dataset)
    assert len(captions) == 9
    drawn = draw_captions(captions, dataset, 4, seed=0)
    assert len(set(drawn)) == 4
    assert drawn == draw_captions(captions, dataset, 4, seed=0) != draw_captions(captions, dataset, 4, seed=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1 has the columns none; expected path and caption"),
        ("path,text\na,b\n", "line 1 has the columns path, text; expected path and caption"),
        ("caption,caption\na,b\n", "line 1 has the columns caption, caption"),
        ("caption\n", "has no caption of a training image"),
        ("caption\na\nb, c\n", "line 3 has 2 cells, expected 1 .*double quotes"),
        ("path,caption\nday/circle/0.png\n", "line 2 has 1 cells, expected 2"),
        ("path,caption\nday/circle/0.png,  \n", "line 2, column 'caption' is empty"),
        ("path,caption\n,x\n", "line 2, column 'path' is empty"),
        ("path,caption\nday/circle/99.png,x\n", "line 2, column 'path': there is no image 'day/circle/99.png'"),
        ("path,caption\nnight/circle/1.png,x\n", "has no caption of a training image"),
        ('caption\n"open\n', "line 2: unexpected end of data"),
    ],
)
def test_a_wrong_table_is_one_line_that_names_line_and_column(text: str, message: str, dataset: Dataset, tmp_path: Path):
    table = tmp_path / "captions.csv"
    table.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        read_captions(table, dataset)
    assert "captions.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_that_is_not_there_or_no_text(dataset: Dataset, tmp_path: Path):
    with pytest.raises(DataError, match=r"prompts.captions = .*cannot be read: No such file"):
        read_captions(tmp_path / "none.csv", dataset)
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_captions(tmp_path, dataset)
    (tmp_path / "bytes.csv").write_bytes(b"caption\n\xff\n")
    with pytest.raises(DataError, match="not UTF-8 text"):
        read_captions(tmp_path / "bytes.csv", dataset)
