"""Confident mistakes: the most confident wrong ones of every class, at alpha 1, with the other conditions' answers."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flyp_saflex import recipe
from flyp_saflex.reporting.mistakes import mistakes_chapter
from flyp_saflex.reporting.predictions import confident_mistakes, confusions, predicted_names
from flyp_saflex.reporting.runs import Run

NAMES = ["dog", "cat", "élan <b>"]


def write(path, rows, split="far"):
    """Write predictions from (sample_id, label, prediction, confidence, alpha)."""
    (path / "predictions").mkdir(parents=True, exist_ok=True)
    keys = ("sample_id", "label", "prediction", "confidence", "alpha")
    columns = {key: list(values) for key, values in zip(keys, zip(*rows, strict=True), strict=True)}
    columns["label_name"] = [NAMES[k] for k in columns["label"]]
    columns["prediction_name"] = [NAMES[k] for k in columns["prediction"]]
    pq.write_table(pa.table(columns), path / "predictions" / f"{split}.parquet")
    return path


def run(path, name="a"):
    rows = [{"split": "far", "role": "test", "shift": "ood", "wise_alpha": 1.0, "accuracy": 0.5}]
    return Run(path, name, 0, {"results": rows})


@pytest.fixture
def wrong(tmp_path):
    rows = [
        ("d1", 0, 1, 0.7, 1.0),
        ("d2", 0, 2, 0.9, 1.0),
        ("d3", 0, 1, 0.8, 1.0),
        ("d4", 0, 0, 0.99, 1.0),
        ("c1", 1, 0, 0.6, 1.0),
    ]
    return write(tmp_path / "a", [*rows, ("d5", 0, 1, 0.999, 0.5), ("d6", 0, 1, float("nan"), 1.0)])


def test_most_confident_come_first_and_classes_are_bounded(wrong):
    found = confident_mistakes(run(wrong), "far", per_class=2, most_classes=5)
    assert [(m.sample_id, m.label, m.prediction, m.confidence) for m in found] == [
        ("d2", "dog", "élan <b>", 0.9),
        ("d3", "dog", "cat", 0.8),
        ("c1", "cat", "dog", 0.6),
    ]
    assert [m.sample_id for m in confident_mistakes(run(wrong), "far", per_class=9, most_classes=1)] == ["d2", "d3", "d1"]


def test_confusions_count_pairs(wrong):
    assert confusions(run(wrong), "far") == {("dog", "cat"): 3, ("dog", "élan <b>"): 1, ("cat", "dog"): 1}


@pytest.mark.parametrize("content", [None, b"no parquet"])
def test_missing_or_broken_predictions_are_no_mistakes(tmp_path, content):
    if content is not None:
        (tmp_path / "predictions").mkdir()
        (tmp_path / "predictions" / "far.parquet").write_bytes(content)
    assert confident_mistakes(run(tmp_path), "far", per_class=2, most_classes=2) == []
    assert confusions(run(tmp_path), "far") == {}
    assert predicted_names(run(tmp_path), "far", ["a"]) == {}


def test_cards_show_the_picture_and_the_answers_of_the_others(tmp_path):
    for domain in ("here", "far"):
        for name in ("dog", "cat"):
            (tmp_path / "images" / domain / name).mkdir(parents=True)
            for number in range(6):
                Image.new("RGB", (40, 30), (200, 10 * number, 0)).save(tmp_path / "images" / domain / name / f"{number}.png")
    config = recipe.load("folder", [f"data.root={tmp_path / 'images'}", "data.train_domains=here", "data.test_domains=far"])
    ids = ["far/dog/0.png", "far/dog/1.png", "far/dog/2.png"]
    rows = [(name, 0, 1, 0.9 - 0.1 * number, 1.0) for number, name in enumerate(ids)]
    first, second = (
        run(write(tmp_path / "a", rows)),
        run(write(tmp_path / "b", [(ids[0], 0, 0, 0.9, 1.0), (ids[1], 0, 2, 0.9, 1.0)]), "b"),
    )
    first.config = config
    chapter = mistakes_chapter([first, second], "a")
    cards = chapter.split('<article class="card">')[1:]
    assert len(cards) == 2, "two of a class"
    assert "data:image/webp" in cards[0]
    assert 'alt="dog, taken for cat"' in cards[0]
    assert "90 % sure" in cards[0]
    assert "right: b" in cards[0]
    assert "wrong in every other condition" in cards[1]
    first.config = None
    told = mistakes_chapter([first, second], "a")
    assert "config.toml cannot be read" in told
    assert ids[0] in told
    assert "data:image" not in told
