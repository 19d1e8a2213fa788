"""ImageNet's shifts and folders of the user's own: classes, subsets, and accuracy before and after finetuning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from flyp_saflex.cli import main
from flyp_saflex.clip.imagenet import imagenet_classes
from flyp_saflex.clip.model import load_clip
from flyp_saflex.config import DataConfig
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import DataError
from flyp_saflex.evaluation.other_sets import losses
from flyp_saflex.storage.results import Results


def folders(root: Path, names) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / f"{name}_0.jpg").touch()
    return root


def read(name: str, root: Path):
    return load_dataset(DataConfig(root=str(root)), test_set=name)


def test_imagenets_classes_are_in_the_order_of_their_wordnet_ids():
    names = imagenet_classes()
    assert list(names) == sorted(names)
    assert (len(names), names["n01440764"], names["n15075141"]) == (1000, "tench", "toilet paper")
    assert list(names.values())[1] == "goldfish"


@pytest.mark.parametrize("subset", ["r", "a"])
def test_subsets_have_200_classes_in_imagenets_order(subset: str):
    names, every = imagenet_classes(subset), imagenet_classes()
    assert len(names) == 200
    assert [wnid for wnid in every if wnid in names] == list(names)


def test_folders_by_index_are_numbers_and_not_in_the_order_of_text(tmp_path: Path):
    """ImageNet-V2 names its folders 0..999: in the order of text 10 comes before 2."""
    dataset = read("imagenet-v2", folders(tmp_path, map(str, range(1000))))
    assert all(int(Path(sample.sample_id).parent.name) == sample.label for sample in dataset.splits["test"].samples)
    assert dataset.class_names[2] == "great white shark"


def test_folders_by_wordnet_id_have_the_labels_of_the_subset(tmp_path: Path):
    wnids = list(imagenet_classes("a"))
    dataset = read("imagenet-a", folders(tmp_path, wnids))
    found = {Path(sample.sample_id).parent.name: sample.label for sample in dataset.splits["test"].samples}
    assert found == {wnid: label for label, wnid in enumerate(wnids)}
    assert dataset.splits["test"].role == "test"


def test_a_wrong_or_missing_class_is_told_in_one_line(tmp_path: Path):
    wnids = list(imagenet_classes("r"))
    with pytest.raises(DataError, match=r"the folder 'n01440764' is no class of imagenet-r \(one of 1; it has 200 classes\)"):
        read("imagenet-r", folders(tmp_path / "more", [*wnids, "n01440764"]))
    with pytest.raises(DataError, match=r"1 of 200 classes of imagenet-r have no folder \(n01443537\)") as caught:
        read("imagenet-r", folders(tmp_path / "less", wnids[1:]))
    assert "\n" not in str(caught.value)


def test_a_run_is_tested_on_other_classes_before_and_after(tmp_path: Path, tiny_options, tiny_images_dir: Path, capsys):
    run = tmp_path / "run"
    assert main(["train", "folder", *(f"--set={option}" for option in tiny_options), f"--run-dir={run}"]) == 0
    assert main(["evaluate", str(run)]) == 0
    own = (run / "results.json").read_bytes()
    for name, shade in (("wolf", 10), ("fox", 200)):
        for number in range(3):
            (tmp_path / "pets" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (shade, 9 * number, 50)).save(tmp_path / "pets" / name / f"{number}.png")
    capsys.readouterr()
    assert main(["evaluate", str(run), "--on", f"pets={tmp_path / 'pets'}", "--on", f"night={tiny_images_dir / 'night'}"]) == 0
    out = capsys.readouterr().out
    assert "set    images  before  after  change" in out
    found = json.loads((run / "results-on-pets.json").read_text(encoding="utf-8"))
    rows = {row["wise_alpha"]: row for row in found["results"]}
    assert set(rows) == {0.0, 1.0}
    assert rows[1.0]["n"] == 6
    change = 100 * (rows[1.0]["accuracy"] - rows[0.0]["accuracy"])
    assert f"{100 * rows[0.0]['accuracy']:.1f}" in out
    assert f"{change:+.1f}" in out
    assert (run / "results.json").read_bytes() == own
    assert main(["evaluate", str(run), "--on", "a=b", "--split", "test"]) == 2
    assert "--on tests other sets: it goes without --split" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--on", "pets"]) == 2
    assert "--on pets: expected NAME=PATH" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--on", f"pets={tmp_path / 'nowhere'}"]) == 2
    assert "is not there" in capsys.readouterr().err


def rows_of(**accuracy: float) -> dict[str, object]:
    """Results of one set with the accuracy at each alpha (`at_50`: alpha 0.5)."""
    return {"results": [{"split": "test", "wise_alpha": int(k[3:]) / 100, "accuracy": v} for k, v in accuracy.items()]}


def test_forgetting_is_the_largest_loss_on_any_set() -> None:
    """Pets lose 1, 4 and 10 points, cars gain 2, lose 5 and lose 6."""
    pets = rows_of(at_0=0.80, at_25=0.79, at_50=0.76, at_100=0.70)
    cars = rows_of(at_0=0.60, at_25=0.62, at_50=0.55, at_100=0.54)
    assert losses({"pets": pets, "cars": cars}) == pytest.approx({0.0: 0.0, 0.25: 0.01, 0.5: 0.05, 1.0: 0.10})
    assert losses({"cars": cars})[0.25] == pytest.approx(-0.02), "a gain is a negative loss"


@pytest.mark.parametrize(("limit", "alpha"), [(1.0, 1.0), (0.09, 0.5), (0.05, 0.5), (0.049, 0.25), (0.0, 0.0)])
def test_alpha_is_the_best_of_those_within_the_limit(tmp_path: Path, limit: float, alpha: float) -> None:
    """The more finetuned, the better on id_val and the more is lost; alpha 0.75 is the best, but its loss was not measured."""
    results = Results(tmp_path, recipe="r", seed=0, order=["id_val"], select_split="id_val", select_metric="accuracy")
    base = {"split": "id_val", "role": "select", "shift": "id", "n": 9, "macro_f1": 0.5}
    scores = {0.0: 0.5, 0.25: 0.6, 0.5: 0.7, 0.75: 0.9, 1.0: 0.8}
    results.add(base | {"wise_alpha": a, "accuracy": score} for a, score in scores.items())
    assert results.chosen_alpha == 0.75
    lost = {"0.0": 0.0, "0.25": 0.01, "0.5": 0.05, "1.0": 0.10}
    results.values["forgetting"] = {"limit": limit, "sets": ["pets"], "by_alpha": lost}
    assert results.chosen_alpha == alpha
    results.write()
    again = Results(tmp_path, recipe="r", seed=0, order=["id_val"], select_split="", select_metric="accuracy")
    assert again.chosen_alpha == alpha, "a later evaluation keeps the limit"
    assert f"losing at most {100 * limit:.1f} points on pets" in again.table(["id_val"])


COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200), "grey": (90, 90, 90)}


@pytest.fixture
def forgetful(tmp_path: Path, tiny_options, tiny_clip_dir: Path) -> Path:
    """Run far from its start, and a folder of pictures, each in the class that the pretrained model takes it for."""
    clip = load_clip(f"local-dir:{tiny_clip_dir}")
    pictures = [Image.new("RGB", (40, 40), shade) for shade in COLOURS.values()]
    with torch.no_grad():
        texts = clip.model.encode_text(clip.tokenizer([f"a photo of a {name}." for name in COLOURS]), normalize=True)
        images = clip.model.encode_image(torch.stack([clip.preprocess(picture) for picture in pictures]), normalize=True)
    for name in COLOURS:
        (tmp_path / "colours" / name).mkdir(parents=True)
        pictures[0].save(tmp_path / "colours" / name / "any.png")
    for number, (picture, label) in enumerate(zip(pictures, (images @ texts.T).argmax(dim=1).tolist(), strict=True)):
        for copy in range(3):
            picture.save(tmp_path / "colours" / list(COLOURS)[label] / f"{number}-{copy}.png")
    options = [*tiny_options, "train.lr=1e-2", "train.steps=12", "train.warmup_steps=1"]
    assert main(["train", "folder", *(f"--set={option}" for option in options), f"--run-dir={tmp_path / 'run'}"]) == 0
    return tmp_path / "run"


def test_a_run_that_may_lose_little_takes_an_alpha_that_loses_little(forgetful: Path, capsys) -> None:
    colours = f"colours={forgetful.parent / 'colours'}"
    command = ["evaluate", str(forgetful), "--on", colours, "--wise-alphas", "0,0.25,0.5,0.75,1"]
    assert main([*command, "--set", "evaluate.max_forgetting=0"]) == 0
    out = capsys.readouterr().out
    on = json.loads((forgetful / "results-on-colours.json").read_text(encoding="utf-8"))
    own = json.loads((forgetful / "results.json").read_text(encoding="utf-8"))
    kept = {row["wise_alpha"]: row["accuracy"] for row in on["results"]}
    chosen_on = {row["wise_alpha"]: row["accuracy"] for row in own["results"] if row["split"] == "id_val"}
    assert set(kept) == set(chosen_on) == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert kept[1.0] < kept[0.0], "the finetuned model has forgotten"
    assert own["forgetting"]["by_alpha"] == {str(alpha): kept[0.0] - value for alpha, value in kept.items()}
    within = {alpha: value for alpha, value in chosen_on.items() if kept[alpha] >= kept[0.0]}
    assert own["chosen_alpha"] == max(within, key=lambda alpha: (within[alpha], alpha))
    assert f"alpha {own['chosen_alpha']:g} is the best on id_val among those that lose at most 0.0 points on each set" in out
    assert len(within) < len(kept), "the limit leaves some alphas out"
    assert "forgetting, the largest loss on any set, points by alpha: 0 0.0, 0.25 " in out
    limited = ["evaluate", str(forgetful), "--wise-alphas", "0,1", "--set", "evaluate.max_forgetting=0.5"]
    assert main(limited) == 0
    assert "limits no alpha here" not in capsys.readouterr().out, "the limit that was measured still holds"
    assert main(command) == 0  # without a limit
    free = json.loads((forgetful / "results.json").read_text(encoding="utf-8"))["chosen_alpha"]
    assert free == max(chosen_on, key=lambda alpha: (chosen_on[alpha], alpha))


def test_a_limit_without_sets_or_without_a_select_split_is_told(forgetful: Path, capsys) -> None:
    assert main(["evaluate", str(forgetful), "--wise-alphas", "0", "--dry-run", "--set", "evaluate.max_forgetting=0.1"]) == 0
    assert "note: evaluate.max_forgetting limits no alpha here: give the sets by --on NAME=PATH" in capsys.readouterr().out
    options = ["evaluate.max_forgetting=0.1", "train.select_split="]
    arguments = [word for option in options for word in ("--set", option)]
    assert main(["evaluate", str(forgetful), "--on", f"colours={forgetful.parent / 'colours'}", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "evaluate.max_forgetting chooses alpha by the select split" in error
