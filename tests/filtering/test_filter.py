"""`flyp-saflex filter`: scores, tables, sheets, what training makes of them, and every mistake a user can make."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from children import run_ranks, with_overrides
from PIL import Image

from flyp_saflex import recipe
from flyp_saflex.assets import TINY_CLIP
from flyp_saflex.cli import main
from flyp_saflex.clip.model import load_clip, save_clip
from flyp_saflex.config import Config
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.demo.animals import SPECIES
from flyp_saflex.demo.scene import at, render
from flyp_saflex.demo.world import CLASSES, HOME, TRAIN_PLACES, read_scenes, write_world
from flyp_saflex.filtering import scores
from flyp_saflex.filtering.alia import precision_recall
from flyp_saflex.filtering.filter import filter_edits
from flyp_saflex.storage.augment_cache import AugmentCache
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.training.train import train

TEXTS = """
dataset = "folder"
[[edits]]
domain = "dark"
instruction = "make it dark"
[semantic]
positive = ["a photo of a {}", "a shape"]
negative = ["a photo of a dog", "nothing", "an upside down world"]
"""
COLUMNS = (
    "aug_id", "keep", "reason", "semantic", "semantic_pass", "predicted", "confidence", "threshold", "unchanged", "corrupted",
    "similarity",
)  # fmt: skip


@pytest.fixture
def run(make_config: Callable[..., Config], tmp_path: Path) -> Path:
    """A run folder as `train` leaves it, with the tiny CLIP's own weights."""
    return make_run(make_config(), tmp_path / "run")


def make_run(config: Config, folder: Path) -> Path:
    with RunDir(folder) as run_dir:
        run_dir.write_config(config)
        save_clip(load_clip(config.model.name), run_dir.model)
        run_dir.mark_done()
    return folder


@pytest.fixture
def options(tiny_options: list[str], edits: AugmentCache, run: Path, tmp_path: Path) -> list[str]:
    """`--set` values of the filter on the fixture's edits."""
    (tmp_path / "texts.toml").write_text(TEXTS, encoding="utf-8")
    return [
        *tiny_options,
        f"editor.prompts={tmp_path / 'texts.toml'}",
        f"filter.run={run}",
        "filter.batch_size=7",
        "filter.sheet_rows=0",
    ]


@pytest.fixture
def config(options: list[str]) -> Config:
    return recipe.load("folder", options)


def rows_of(cache: AugmentCache, file: str = "scores.jsonl") -> list[dict]:
    return [msgspec.json.decode(line) for line in (cache.folder / file).read_bytes().splitlines()]


def test_scores_are_what_the_models_say(config: Config, edits: AugmentCache):
    """Every number of scores.jsonl, worked out again one image at a time from the definitions."""
    numbers = filter_edits(config)
    rows = rows_of(edits)
    assert [row["aug_id"] for row in rows] == [edit.aug_id for edit in edits.edits]
    assert all(tuple(row) == COLUMNS for row in rows)

    clip = load_clip(config.model.name)
    dataset = load_dataset(config.data, seed=config.seed)
    sources = {sample.sample_id: sample.path for sample in dataset.train.samples}

    @torch.no_grad()
    def embed(path: Path) -> torch.Tensor:
        with Image.open(path) as image:
            return clip.model.encode_image(clip.preprocess(image.convert("RGB"))[None], normalize=True)[0]

    @torch.no_grad()
    def texts(values: list[str]) -> torch.Tensor:
        return clip.model.encode_text(clip.tokenizer(values), normalize=True)

    scale = clip.model.logit_scale.exp().detach()
    head = texts([f"a photo of a {name}." for name in dataset.class_names])
    assert dataset.templates == ("a photo of a {}.",), "the head above is made with this template"
    positive = texts([*(f"a photo of a {name}" for name in dataset.class_names), "a shape"])
    negative = texts(["a photo of a dog", "nothing", "an upside down world"])

    held_out: dict[int, list[float]] = {}
    for sample in dataset.splits["id_val"].samples:
        held_out.setdefault(sample.label, []).append(float((scale * embed(sample.path) @ head.T).softmax(0)[sample.label]))
    thresholds = {label: sum(values) / len(values) for label, values in held_out.items()}
    assert len(thresholds) == 3

    for row, edit in zip(rows, edits.edits, strict=True):
        feature = embed(edit.path)
        log_odds = float(scale * ((feature @ positive.T).max() - (feature @ negative.T).max()))
        probabilities = (scale * feature @ head.T).softmax(0)
        predicted = int(probabilities.argmax())
        sure = float(probabilities[predicted]) >= thresholds[predicted]
        # float32 features in batches of another size: the last digits differ
        assert row["semantic"] == pytest.approx(log_odds, abs=1e-4)
        assert row["semantic_pass"] == (log_odds >= 0)
        assert row["similarity"] == pytest.approx(float(feature @ embed(sources[edit.source_id])), abs=1e-5)
        assert row["predicted"] == predicted
        assert row["confidence"] == pytest.approx(float(probabilities[predicted]), abs=1e-5)
        assert row["threshold"] == pytest.approx(thresholds[predicted], abs=1e-5)
        assert row["unchanged"] == (sure and predicted == edit.label)
        assert row["corrupted"] == (sure and predicted != edit.label)
        verdicts = {"semantic": not row["semantic_pass"], "unchanged": row["unchanged"], "corrupted": row["corrupted"]}
        assert row["keep"] == (not any(verdicts.values()))
        assert row["reason"] == ", ".join(name for name, flagged in verdicts.items() if flagged)
    counted = {name: sum(bool(row[name]) for row in rows) for name in ("unchanged", "corrupted")}
    assert 0 < sum(counted.values()) < len(rows), "the case tells nothing if all or none are flagged"
    assert numbers["edits"] == len(rows) == 24
    assert numbers["kept"] == sum(row["keep"] for row in rows)
    assert {name: numbers[name] for name in counted} == counted
    assert numbers["semantic"] == sum(not row["semantic_pass"] for row in rows)
    assert {name: table["edits"] for name, table in numbers["classes"].items()} == {"0 circle": 8, "1 square": 8, "2 stripes": 8}
    assert sum(table["kept"] for table in numbers["classes"].values()) == numbers["kept"]


def test_what_is_printed_and_the_sheets(config: Config, edits: AugmentCache, capsys: pytest.CaptureFixture[str]):
    config = replace(config, filter=replace(config.filter, sheet_rows=12))
    numbers = filter_edits(config)
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert ["class", "edits", "semantic", "unchanged", "corrupted", "kept", "kept", "%"] in lines
    for name, row in {**numbers["classes"], "all": numbers}.items():
        counts = [str(row[key]) for key in ("edits", "semantic", "unchanged", "corrupted", "kept")]
        assert [*name.split(), *counts, f"{100 * row['kept'] / row['edits']:.1f}"] in lines
    assert "domain" in printed
    assert "1911.00068" in printed
    groups = {"kept": numbers["kept"], **{name: numbers[name] for name in ("semantic", "unchanged", "corrupted")}}
    expected = {f"filter-{name}.jpg" for name, count in groups.items() if count}
    assert {path.name for path in (edits.folder / "sheets").iterdir()} == expected
    assert len(expected) > 1
    with Image.open(edits.folder / "sheets" / min(expected)) as sheet:
        assert sheet.width > 6 * 192, "three pairs of source and edit in a row"
    filter_edits(replace(config, filter=replace(config.filter, use=("semantic",))))
    left = {path.name for path in (edits.folder / "sheets").iterdir()}
    assert not left & {"filter-unchanged.jpg", "filter-corrupted.jpg"}, "sheets of an earlier run are gone"


def test_hugging_face_still_reads_the_entry(config: Config, edits: AugmentCache):
    datasets = pytest.importorskip("datasets")
    filter_edits(replace(config, filter=replace(config.filter, sheet_rows=2)))
    assert (edits.folder / "sheets").is_dir()
    read = datasets.load_dataset("imagefolder", data_dir=str(edits.folder), cache_dir=str(edits.folder.parent / "hf"))
    assert list(read) == ["train"]
    assert len(read["train"]) == len(edits)
    assert set(read["train"]["aug_id"]) == {edit.aug_id for edit in edits.edits}


def test_only_the_filters_that_are_asked_for(config: Config, edits: AugmentCache, capsys: pytest.CaptureFixture[str]):
    filter_edits(replace(config, filter=replace(config.filter, use=("semantic",), run="")))
    assert all(row["predicted"] is row["unchanged"] is row["corrupted"] is None for row in rows_of(edits))
    assert all(row["keep"] == row["semantic_pass"] for row in rows_of(edits))
    assert "unchanged" not in capsys.readouterr().out.splitlines()[2]
    filter_edits(replace(config, filter=replace(config.filter, use=("confidence",)), editor=replace(config.editor, prompts="")))
    assert "replaced as a whole" in capsys.readouterr().out
    assert all(row["semantic"] is row["semantic_pass"] is None and row["predicted"] is not None for row in rows_of(edits))
    filter_edits(replace(config, filter=replace(config.filter, use=())))
    assert all(row["keep"] and row["similarity"] is not None for row in rows_of(edits))


def test_verdicts_that_do_not_drop(config: Config, edits: AugmentCache):
    filter_edits(replace(config, filter=replace(config.filter, drop=("corrupted",))))
    rows = rows_of(edits)
    assert all(row["keep"] == (not row["corrupted"]) for row in rows)
    assert any(row["keep"] and (row["unchanged"] or not row["semantic_pass"]) for row in rows)


def test_a_copy_of_its_source_has_cosine_one(config: Config, edits: AugmentCache):
    sample = load_dataset(config.data, seed=config.seed).train.samples[0]
    cache = AugmentCache.create(edits.folder, "folder")
    name = AugmentCache.file_name(sample.sample_id, "copy")
    with Image.open(sample.path) as image:
        cache.append(image, {"file_name": name, "source_id": sample.sample_id, "label": sample.label, "instruction": "copy"})
    filter_edits(config)
    by_id = {row["aug_id"]: row["similarity"] for row in rows_of(edits)}
    assert by_id.pop(name) == pytest.approx(1, abs=1e-5)
    assert all(value < 0.9999 for value in by_id.values())


def test_edits_that_cannot_be_read_are_not_kept_and_not_deleted(
    config: Config, edits: AugmentCache, capsys: pytest.CaptureFixture[str]
):
    broken, empty = edits.edits[3].path, edits.edits[10].path
    broken.write_bytes(broken.read_bytes()[:60])
    empty.write_bytes(b"")
    source = next(
        sample
        for sample in load_dataset(config.data, seed=config.seed).train.samples
        if sample.sample_id == edits.edits[20].source_id
    )
    source.path.write_bytes(b"no image")
    numbers = filter_edits(config)
    rows = rows_of(edits)
    assert numbers["unreadable"] == 2
    for row in (rows[3], rows[10]):
        assert row["keep"] is False
        assert row["semantic"] is row["confidence"] is row["similarity"] is row["corrupted"] is None
    assert "the file is empty" in rows[10]["reason"]
    assert str(broken) in rows[3]["reason"]
    assert rows[20]["similarity"] is None
    assert rows[20]["confidence"] is not None, "an edit is judged without its source"
    assert broken.is_file()
    assert empty.is_file()
    printed = capsys.readouterr().out
    assert "2 edits cannot be read" in printed
    assert "edits have no cosine" in printed
    AugmentCache.at(edits.folder).kept()
    for edit in edits.edits:
        edit.path.write_bytes(b"")
    assert main(["filter", "folder", *as_arguments(config)]) == 2


def as_arguments(config: Config) -> list[str]:
    """The options that the tests set, for the command line."""
    values = {
        "data.root": config.data.root,
        "data.train_domains": "day",
        "data.test_domains": "night",
        "data.select_fraction": 0.25,
        "data.test_fraction": 0.25,
        "model.name": config.model.name,
        "model.pretrained": "",
        "cache.root": config.cache.root,
        "editor.prompts": config.editor.prompts,
        "filter.run": config.filter.run,
        "filter.sheet_rows": 0,
        "seed": 3,
    }
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


def test_edits_of_images_that_are_not_trained_on_are_not_kept(config: Config, edits: AugmentCache):
    dataset = load_dataset(config.data, seed=config.seed)
    cache = AugmentCache.create(edits.folder, "folder")
    sample = dataset.splits["id_val"].samples[0]
    row = {"file_name": AugmentCache.file_name(sample.sample_id), "source_id": sample.sample_id, "label": sample.label}
    cache.append(Image.new("RGB", (40, 40), "red"), row)
    numbers = filter_edits(config)
    assert numbers["edits"] == 24
    assert len(rows_of(edits)) == 25
    assert rows_of(edits)[-1]["keep"] is False
    assert "not trained on" in rows_of(edits)[-1]["reason"]


def test_a_quick_look_writes_no_scores(config: Config, edits: AugmentCache, capsys: pytest.CaptureFixture[str]):
    numbers = filter_edits(config, limit=3)
    assert numbers["edits"] == 6
    assert not (edits.folder / "scores.jsonl").exists()
    assert "--limit: only 6 of 24 edits are scored" in capsys.readouterr().out


def test_a_few_shot_recipe_scores_every_edit(config: Config, edits: AugmentCache):
    filter_edits(replace(config, data=replace(config.data, shots=2)))
    assert len(rows_of(edits)) == len(edits)
    assert not any("not trained on" in row["reason"] for row in rows_of(edits))


def test_a_dry_run_loads_and_writes_nothing(
    config: Config, edits: AugmentCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a dry run loads no weights")

    monkeypatch.setattr(scores, "load_clip", refuse)
    monkeypatch.setattr("flyp_saflex.tasks.clip_task.load_clip", refuse)
    before = sorted(edits.folder.rglob("*"))
    assert filter_edits(config, dry_run=True) == {"edits": 24}
    assert sorted(edits.folder.rglob("*")) == before
    printed = capsys.readouterr().out
    assert "would score 24 edits" in printed
    assert "4 positive, 3 negative texts" in printed


def test_training_reads_the_choice(config: Config, edits: AugmentCache, options: list[str], tmp_path: Path):
    """Without the filter every edit is drawn from, with it the kept ones only; with none kept, training says so."""
    filter_edits(config)
    kept = {row["aug_id"] for row in rows_of(edits) if row["keep"]}
    assert 0 < len(kept) < len(edits)
    drawn = {}
    for choice in ("none", "scores"):
        asked = ["augment.upstream=cache", f"augment.filter={choice}", "train.log_augmented=true", "train.steps=8"]
        train(recipe.load("folder", [*options, *asked]), tmp_path / choice)
        drawn[choice] = {row["id"] for row in RunDir(tmp_path / choice, lock=False).read_rows("augmented.jsonl")}
    assert drawn["scores"] == kept
    assert drawn["none"] == {edit.aug_id for edit in edits.edits}
    edits.write_scores({"aug_id": edit.aug_id, "keep": False} for edit in edits.edits)
    train_options = [*options, "augment.upstream=cache", "augment.filter=scores"]
    arguments = [part for option in train_options for part in ("--set", option)]
    assert main(["train", "folder", "--run-dir", str(tmp_path / "none-kept"), *arguments]) == 2


def test_runs_that_may_be_no_good_judge_are_named(
    make_config: Callable[..., Config], options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    trained_on_edits = make_run(make_config("augment.upstream=cache"), tmp_path / "with-edits")
    filter_edits(recipe.load("folder", [*options, f"filter.run={trained_on_edits}"]), dry_run=True)
    assert "was itself trained on edits" in capsys.readouterr().out
    on_other_images = make_run(make_config("data.split_seed=7"), tmp_path / "other-split")
    filter_edits(recipe.load("folder", [*options, f"filter.run={on_other_images}"]), dry_run=True)
    assert "images of id_val: thresholds come out too high" in capsys.readouterr().out


def test_a_run_with_a_linear_head_and_stored_activations(
    make_config: Callable[..., Config], options: list[str], edits: AugmentCache, tmp_path: Path
):
    """Activations are stored for the dataset's images, not for edits: the filter does without."""
    asked = ["train.method=linear-probe", f"train.frozen_cache={tmp_path / 'activations'}", "augment.on_train="]
    train(make_config(*asked), tmp_path / "linear")
    filter_edits(recipe.load("folder", [*options, f"filter.run={tmp_path / 'linear'}"]))
    assert all(row["predicted"] in (0, 1, 2) for row in rows_of(edits))


MISTAKES = {
    "no run": ("filter.run=", "filter.run is empty", "augment.upstream=[]"),
    "no such run": ("filter.run=nowhere", "there is no such folder", "flyp-saflex train"),
    "no run folder": ("filter.run={images}", "is not a run folder", "flyp-saflex train"),
    "test split": ("filter.threshold_split=night", "filter.threshold_split = night", "id_val"),
    "unknown split": ("filter.threshold_split=id_vol", "has no split 'id_vol'", "did you mean 'id_val'"),
    "unknown filter": ("filter.use=semantics", "filter.use", "semantic"),
    "no such entry": ("cache.key=v2", "no entry 'v2'", "cache.key"),
    "no cache": ("cache.root={images}", "holds no entry", "cache.root"),
    "texts without semantic": ("editor.prompts={plain}", "has no texts for the semantic filter", 'filter.use=["confidence"]'),
    "no texts": ("editor.prompts=", "there is no file of texts", "prompts/README.md"),
    "scores elsewhere": ("cache.scores=../scores.jsonl", "cache.scores = ../scores.jsonl", "for example scores.jsonl"),
    "scores onto the manifest": ("cache.scores=metadata.jsonl", "holds no scores", "choose another name"),
    "unknown model": ("filter.model=ViT-B-99", "filter.model = ViT-B-99", "no such model"),
    "no weights": ("filter.model=local-dir:{images}", "filter.model = local-dir", "cannot be loaded"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_answered_in_one_line(
    case: str, options: list[str], edits: AugmentCache, tiny_images_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    option, *told = MISTAKES[case]
    (tmp_path / "plain.toml").write_text(TEXTS.partition("[semantic]")[0], encoding="utf-8")
    option = option.format(images=tiny_images_dir, plain=tmp_path / "plain.toml")
    arguments = [part for value in [*options, option] for part in ("--set", value)]
    assert main(["filter", "folder", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert all(text in error for text in told), error
    assert not (edits.folder / "scores.jsonl").exists()
    assert len(AugmentCache.at(edits.folder)) == 24


def test_a_run_of_other_classes_is_refused(
    options: list[str], run: Path, tiny_images_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = tmp_path / "other_images"
    for domain in ("day", "night"):
        (other / domain).mkdir(parents=True)
        for old, new in (("circle", "ring"), ("square", "square"), ("stripes", "stripes")):
            os.symlink(tiny_images_dir / domain / old, other / domain / new)
    text = (run / "config.toml").read_text(encoding="utf-8").replace(str(tiny_images_dir), str(other))
    (run / "config.toml").write_text(text, encoding="utf-8")
    assert main(["filter", "folder", *(part for value in options for part in ("--set", value))]) == 2
    assert "not on the 3 of 'folder' (first difference: class 0 was 'ring' and is 'circle')" in capsys.readouterr().err


def test_an_unfinished_run_and_an_empty_cache(
    options: list[str], run: Path, edits: AugmentCache, capsys: pytest.CaptureFixture[str]
):
    arguments = ["filter", "folder", *(part for value in options for part in ("--set", value))]
    (run / "model" / "open_clip_model.safetensors").unlink()
    assert main(arguments) == 2
    assert "its training has not finished" in capsys.readouterr().err
    (edits.folder / "metadata.jsonl").write_text("", encoding="utf-8")
    assert main(arguments) == 2
    assert "holds no edit" in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_scores(
    config: Config, edits: AugmentCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    filter_edits(config)
    before = (edits.folder / "scores.jsonl").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["filter", "folder", *as_arguments(config)]) == 2
    assert "No space left on device; free disk space" in capsys.readouterr().err
    assert (edits.folder / "scores.jsonl").read_bytes() == before


@pytest.mark.slow
def test_two_processes_equal_one(config: Config, options: list[str], edits: AugmentCache, tmp_path: Path):
    filter_edits(config)
    one = rows_of(edits)
    (edits.folder / "scores.jsonl").unlink()
    out, _ = run_ranks(with_overrides("filter", "folder", overrides=options), tmp_path)
    assert out.count("scoring 24 edits") == 1, "only the first process prints"
    for alone, together in zip(one, rows_of(edits), strict=True):
        for name in COLUMNS:
            if isinstance(alone[name], float):  # batches hold other images: the last digits differ
                assert together[name] == pytest.approx(alone[name], abs=1e-4)
            else:
                assert together[name] == alone[name]


@pytest.mark.slow
def test_foreign_classes_in_the_cache_are_seen_by_filter_and_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """In a drawn world 40 % of the edits show another species, so the truth is known.

    The confidence filter asks a tiny CLIP finetuned on the clean pictures; training reads the cache with and without it.
    """
    root = write_world(tmp_path, num_images=400, seed=0)
    model = TINY_CLIP
    options = [
        f"data.root={root}",
        f"data.prompts={root / 'prompts'}",
        f"model.name=local-dir:{model}",
        f"cache.root={tmp_path / 'cache'}",
        "cache.key=drawn",
        "train.steps=30",
        "train.checkpoint_every=0",
        'filter.use=["confidence"]',
        'filter.drop=["corrupted"]',  # "unchanged" would take faithful edits out as well, and the foreign part would stay
        f"filter.run={tmp_path / 'clean'}",
    ]
    clean = recipe.load("demo", [*options, "augment.upstream="])
    cache, foreign = draw_edits(clean, root)
    train(clean, tmp_path / "clean")
    filter_edits(clean)
    by_id = {row["aug_id"]: row for row in rows_of(cache)}
    is_foreign = np.array([foreign[aug_id] for aug_id in by_id])
    corrupted = np.array([row["corrupted"] for row in by_id.values()])
    found = precision_recall(corrupted, is_foreign)
    assert is_foreign.mean() == pytest.approx(0.4, abs=0.01)
    # Measured: precision 0.94, recall 0.39, 2 % of the others flagged. A filter without any idea has a precision of 0.4.
    assert found.precision is not None
    assert found.precision > 0.8
    assert corrupted[is_foreign].mean() > 3 * corrupted[~is_foreign].mean()
    assert found.recall is not None
    assert found.recall > 0.25
    shares = {}
    for choice in ("none", "scores"):
        asked = ["augment.upstream=cache", f"augment.filter={choice}", f"recipe={choice}"]
        train(recipe.load("demo", [*options, *asked]), tmp_path / choice)
        rows = RunDir(tmp_path / choice, lock=False).read_rows("augmented.jsonl")
        assert len(rows) > 500
        shares[choice] = float(np.mean([foreign[row["id"]] for row in rows]))
    assert shares["none"] == pytest.approx(0.4, abs=0.05)
    assert shares["scores"] < shares["none"] - 0.05, "the filter takes foreign edits out of training"
    capsys.readouterr()


def draw_edits(config: Config, root: Path) -> tuple[AugmentCache, dict[str, bool]]:
    """One edit of every training picture at another place; in every second or third of them stands another species."""
    scenes = read_scenes(root)
    cache = AugmentCache.create(Path(config.cache.root) / config.data.name / "drawn", config.data.name)
    foreign = {}
    for number, sample in enumerate(load_dataset(config.data).train.samples):
        rng = np.random.default_rng(number)
        scene = scenes[Path(sample.sample_id).name]
        place = str(rng.choice([name for name in TRAIN_PLACES if name != scene.place]))
        name = AugmentCache.file_name(sample.sample_id, place)
        foreign[name] = number % 5 < 2
        moved = at(scene, place)
        if foreign[name]:
            others = [species for species in SPECIES if species != CLASSES[sample.label] and HOME.get(species) != scene.place]
            moved = replace(moved, species=str(rng.choice(others)))
        row = {"file_name": name, "source_id": sample.sample_id, "label": sample.label, "domain": place}
        cache.append(render(moved, 64), row)
    cache.finish()
    return cache, foreign


def test_the_released_rule_takes_thresholds_from_training_images(
    make_config: Callable[..., Config], options: list[str], edits: AugmentCache, capsys: pytest.CaptureFixture[str]
):
    config = recipe.load("folder", [*options, "filter.rule=alia", "filter.use=confidence"])
    filter_edits(config)
    printed = capsys.readouterr().out
    assert "threshold of the source's class, from training images" in printed
    assert "thresholds come out too high" not in printed
    train = load_dataset(config.data, seed=config.seed).train
    assert f"thresholds from {len(train)} images of train" in printed
    rows = rows_of(edits)
    by_class = {
        edit.label: {row["threshold"] for row, other in zip(rows, edits.edits, strict=True) if other.label == edit.label}
        for edit in edits.edits
    }
    assert all(len(values) == 1 for values in by_class.values()), "one threshold per class of the source"
    for row, edit in zip(rows, edits.edits, strict=True):
        sure = row["confidence"] > row["threshold"]
        assert (row["unchanged"], row["corrupted"]) == (
            sure and row["predicted"] == edit.label,
            sure and row["predicted"] != edit.label,
        )
