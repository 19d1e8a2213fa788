"""The command generate: the same edits whatever the kills, the processes and the order; bad input ends in one line."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from children import run_ranks, with_overrides
from PIL import Image

from flyp_saflex import cli, recipe
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.editing import generate as module
from flyp_saflex.editing.edit_images import edit_dataset, flaw
from flyp_saflex.editing.editor import load_editor
from flyp_saflex.editing.generate import generate
from flyp_saflex.editing.plan import CHOICE, LATER, Wording, draw_wordings, edit_seed, plan_edits
from flyp_saflex.editing.settings import resolve
from flyp_saflex.errors import ConfigError, DataError, ModelError
from flyp_saflex.offline import EditorConfig
from flyp_saflex.prompting.edit_prompts import EditText
from flyp_saflex.storage.augment_cache import AugmentCache
from flyp_saflex.storage.augment_cache_writer import CacheWriter
from flyp_saflex.storage.edit_times import seconds_of_edits

TEXTS = """dataset = "folder"
[[edits]]
domain = "snow"
instruction = "put the {} in the snow"
prompt = "a photo of a {} in the snow"
[[edits]]
domain = "night"
instruction = "make it night"
prompt = "a photo of a {} at night"
[[edits]]
domain = "lake"
instruction = "put the {} near a lake"
prompt = "a photo of a {} near a lake"
"""
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")


class TintEditor:
    """An instant editor: colours the source by text and seed, and one pixel by its batch, as rounding does."""

    def __init__(self, config, *, seconds: float = 0.0, refuse=lambda text: None) -> None:
        self.settings, self.identity = resolve(config), {"model": "tint", "revision": "1"}
        self.seconds, self.refuse, self.requests = seconds, refuse, []

    def output_size(self, width_px: int, height_px: int) -> tuple[int, int]:
        return 16, 12

    def edit(self, requests):
        time.sleep(self.seconds)
        self.requests += requests
        company = hashlib.sha256("".join(f"{request.text}{request.seed}" for request in requests).encode()).digest()[0]
        outcomes = []
        for request in requests:
            pixels = np.asarray(request.image.convert("RGB").resize((16, 12))).copy()
            pixels[:4] = list(hashlib.sha256(f"{request.text}{request.seed}".encode()).digest()[:3])
            pixels[-1, -1] = company
            outcomes.append(self.refuse(request.text) or Image.fromarray(pixels))
        return outcomes


@pytest.fixture
def options(tiny_images_dir: Path, tmp_path: Path) -> list[str]:
    """12 training images x 3 texts, in batches of 5: sources are split between batches."""
    (tmp_path / "texts.toml").write_text(TEXTS)
    return [
        f"data.root={tiny_images_dir}",
        "data.train_domains=day",
        "data.test_domains=night",
        "data.select_fraction=0.25",
        "data.test_fraction=0.25",
        f"cache.root={tmp_path / 'cache'}",
        f"editor.prompts={tmp_path / 'texts.toml'}",
        "editor.model=an/editor",
        "editor.steps=2",
        "editor.size_px=16",
        "editor.batch_size=5",
        "editor.sheet_every=20",
    ]


@pytest.fixture
def config(options: list[str]):
    return lambda *overrides: recipe.load("folder", [*options, *overrides])


@pytest.fixture
def tint(monkeypatch: pytest.MonkeyPatch):
    """Have generate load a TintEditor, and return the list of those it loaded."""
    loaded = []

    def install(**options):
        def load(config, *, device):
            loaded.append(TintEditor(config, **options))
            return loaded[-1]

        monkeypatch.setattr(module, "load_editor", load)
        return loaded

    install()
    return install


def tree(entry: Path) -> dict[str, bytes]:
    """Files of an entry, without the lock, the times, and the sheets, whose names depend on the process."""
    return {
        str(path.relative_to(entry)): path.read_bytes()
        for path in sorted(entry.rglob("*"))
        if path.is_file() and path.parent.name != "sheets" and path.name != ".lock" and not path.name.startswith("times")
    }


def rows(entry: Path, name: str = "metadata.jsonl") -> list[dict]:
    return [json.loads(line) for line in (entry / name).read_text().splitlines()]


def forked(run) -> int:
    """Run in a child process and return its id; nothing has to be imported again."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
        finally:
            os._exit(0)
    return pid


# The plan


def test_seeds_and_draws_depend_on_nothing_else(config):
    samples = load_dataset(config().data, seed=0).train.samples
    wordings = [Wording("", f"text {n} of {{}}") for n in range(6)]
    names = ("circle", "square", "stripes")

    def planned(*args, **kwargs):
        return {edit.file_name: (edit.seed, edit.text, edit.sample.sample_id) for edit in plan_edits(*args, **kwargs)}

    whole = planned(samples, wordings, names, seed=3, per_text=2)
    assert len(whole) == len(samples) * 6 * 2
    assert len({seed for seed, _, _ in whole.values()}) == len(whole)
    assert planned(samples[::-1][:4], wordings[2:4], names, seed=3, per_text=1).items() <= whole.items()
    assert planned(samples, wordings, names, seed=4, per_text=2).keys() == whole.keys()
    # SHA-256 of "3\nday/a.png\nmake it night\n0", its first eight bytes, halved: the same on every machine, for ever.
    assert (
        edit_seed(3, "day/a.png", "make it night", 0)
        == int(hashlib.sha256(b"3\nday/a.png\nmake it night\n0").hexdigest()[:16], 16) >> 1
    )


def test_texts_are_drawn_alike_for_all_and_in_order():
    wordings = [Wording("", f"text {n}") for n in range(6)]
    drawn = [draw_wordings(wordings, f"{n}.png", seed=0, number=2) for n in range(600)]
    counts = [sum(wording in pair for pair in drawn) for wording in wordings]
    assert sum(counts) == 1200
    assert all(160 < count < 240 for count in counts), "200 each, with a standard deviation of 12"
    assert all(wordings.index(a) < wordings.index(b) for a, b in drawn)
    assert draw_wordings(wordings, "a", seed=0, number=0) == draw_wordings(wordings, "a", seed=0, number=9) == wordings
    assert drawn != [draw_wordings(wordings, f"{n}.png", seed=1, number=2) for n in range(600)]


# What is made


def test_every_row_says_what_made_it(config, tint):
    loaded = tint()
    entry = generate(config())
    made = rows(entry)
    assert len(made) == 36
    assert list(made[0]) == [
        "file_name", "aug_id", "dataset", "source_id", "label", "instruction", "domain", "k", "kind", "model", "revision",
        "steps", "guidance", "image_guidance", "scheduler", "seed", "size", "sha256",
    ]  # fmt: skip
    samples = {sample.sample_id: sample for sample in load_dataset(config().data, seed=0).train.samples}
    names = ("circle", "square", "stripes")
    for row in made:
        assert hashlib.sha256((entry / row["file_name"]).read_bytes()).hexdigest() == row["sha256"]
        assert row["label"] == samples[row["source_id"]].label
        assert row["instruction"] in (
            "make it night",
            f"put the {names[row['label']]} in the snow",
            f"put the {names[row['label']]} near a lake",
        )
        assert row["seed"] == edit_seed(0, row["source_id"], row["instruction"], 0)
    assert [row["source_id"] for row in made] == [name for name in samples for _ in range(3)], "the manifest has the plan's order"
    assert [row["domain"] for row in made[:3]] == ["snow", "night", "lake"]
    assert (entry / "DONE").read_text() == "36 edits\n"
    assert not (entry / ".writers").exists()
    assert [len(editor.requests) for editor in loaded] == [36]
    assert len(AugmentCache.open(config().cache.root, "folder").check_against(load_dataset(config().data, seed=0))) == 36


def test_a_second_start_makes_nothing_and_a_lost_edit_is_made_again(config, tint):
    loaded = tint()
    entry = generate(config())
    before = tree(entry)
    assert generate(config()) == entry
    assert len(loaded) == 1, "no model is loaded when nothing is to do"
    lines = (entry / "metadata.jsonl").read_text().splitlines(keepends=True)
    (entry / "metadata.jsonl").write_text("".join(lines[:9] + lines[11:]))
    generate(config())
    assert tree(entry) == before
    assert len(loaded[1].requests) == 10, "whole batches are made again, so that their company is the same"


def test_other_settings_make_another_entry(config, tint):
    home = generate(config()).parent
    for change in ("editor.steps=3", "seed=1", "editor.per_text=2", "editor.image_format=jpg", "editor.texts_per_image=2"):
        generate(config(change))
    assert len(list(home.iterdir())) == 6
    generate(config("editor.batch_size=3", "editor.sheet_every=1"))
    assert len(list(home.iterdir())) == 6, "neither changes what is made"


def test_settings_of_an_entry_hold_every_option_that_decides_how_an_edit_looks(config, tint):
    entry = generate(config())
    stated = json.loads((entry / "settings.json").read_text())
    assert list(stated) == [
        "dataset", "kind", "model", "revision", "steps", "guidance", "image_guidance", "strength", "negative_prompt", "scheduler",
        "size_px", "precision", "safety_checker", "seed", "per_text", "texts_per_image", "image_format", "texts", "identity",
    ]  # fmt: skip
    without_say = {"prompts", "batch_size", "compile", "sheet_every", "offload"}  # the texts themselves are stated
    without_say |= {*LATER, *CHOICE, "places", "hard_run"}  # stated where they are set, see below
    assert {field.name for field in dataclasses.fields(EditorConfig)} - without_say == stated.keys() & (
        {field.name for field in dataclasses.fields(EditorConfig)}
    )


def test_a_preset_and_a_plan_are_stated_where_they_are_set(config, tint, tmp_path):
    (tmp_path / "places.csv").write_text("domain,place\nday,snow\n")
    plain = generate(config())
    chosen = ("editor.preset=instruct-pix2pix", "editor.plan=bias", "editor.budget=3")
    entry = generate(config(*chosen, f"editor.places={tmp_path / 'places.csv'}"))
    stated = json.loads((entry / "settings.json").read_text())
    assert {name: stated[name] for name in ("preset", "plan", "budget", "places")} == {
        "preset": "instruct-pix2pix", "plan": "bias", "budget": 3, "places": {"day": "snow"},
    }  # fmt: skip
    assert entry != plain
    assert {row["preset"] for row in rows(entry)} == {"instruct-pix2pix"}
    assert {row["domain"] for row in rows(entry)} == {"night", "lake"}
    assert len(rows(entry)) == 3


def test_a_chosen_plan_is_told_and_made_alike_by_any_number_of_processes(config, tint, tmp_path, capsys):
    quota = ("editor.plan=quota", "editor.budget=7")
    generate(config(*quota), dry_run=True)
    out = capsys.readouterr().out
    assert "7 edits of" in out
    lines = [line.split() for line in out.splitlines()]
    head = next(line for line in lines if line[:2] == ["class", "images"])
    assert set(head[2:-4]) <= {"snow", "night", "lake"}
    assert len(head[2:-4]) > 1
    assert head[-4:] == ["edits", "images", "+", "edits"]
    assert ["7", "19"] in [line[-2:] for line in lines if line[:2] == ["all", "12"]]
    whole = tree(generate(config(*quota, f"cache.root={tmp_path / 'one'}")))
    for index in (2, 0, 1):
        entry = generate(config(*quota), shard=(index, 3))
    assert tree(entry) == whole
    assert len(rows(entry)) == 7
    before = tree(entry)
    (entry / rows(entry)[0]["file_name"]).unlink()
    (entry / "metadata.jsonl").write_text("".join((entry / "metadata.jsonl").read_text().splitlines(keepends=True)[1:]))
    assert tree(generate(config(*quota))) == before


@pytest.mark.parametrize(("plan", "count"), [("all", 36), ("quota", 9), ("bias", 9)])
def test_a_dry_run_prints_the_table_of_the_plan(plan, count, config, tint, tmp_path, capsys):
    (tmp_path / "places.csv").write_text("domain,place\nday,snow\n")
    options = [f"editor.plan={plan}", *([f"editor.places={tmp_path / 'places.csv'}"] if plan == "bias" else [])]
    generate(config(*options, *([f"editor.budget={count}"] if count < 36 else [])), dry_run=True)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    head = next(number for number, line in enumerate(lines) if line[:2] == ["class", "images"])
    texts = len(lines[head]) - 6
    assert set(lines[head][2:-4]) <= {"snow", "night", "lake"}
    rows_of = {line[0]: [int(value) for value in line[1:]] for line in lines[head + 1 : head + 5]}
    assert list(rows_of) == ["circle", "square", "stripes", "all"]
    for images, *counts, edits, both in rows_of.values():
        assert sum(counts[:texts]) == edits == both - images
    assert rows_of["all"][-2] == count
    if plan == "bias":
        assert "snow" not in lines[head], "training knows every class in the snow"


def test_settings_of_an_entry_cannot_change(config, tint, tmp_path):
    entry = generate(config("cache.key=mine"))
    with pytest.raises(
        DataError, match=r"mine was made with other settings \(steps: 2 -> 4, per_text: 1 -> 2\): undo the change"
    ):
        generate(config("cache.key=mine", "editor.steps=4", "editor.per_text=2"))
    (tmp_path / "texts.toml").write_text(TEXTS.replace("make it night", "make it dark"))
    with pytest.raises(DataError, match=r"other settings \(texts: "):
        generate(config("cache.key=mine"))
    (entry / "settings.json").unlink()
    with pytest.raises(DataError, match=r"holds edits made otherwise \(it has no settings\.json\)"):
        generate(config("cache.key=mine"))


def test_another_model_under_the_same_name_is_refused(config, tint, monkeypatch):
    entry = generate(config())
    rest = (entry / "metadata.jsonl").read_text().splitlines(keepends=True)[1:]
    (entry / "metadata.jsonl").write_text("".join(rest))
    tint()
    monkeypatch.setattr(
        TintEditor, "identity", property(lambda self: {"model": "tint", "revision": "2"}, lambda *_: None), raising=False
    )
    with pytest.raises(DataError, match=r"made with other settings \(identity: .*\"1\".* -> .*\"2\""):
        generate(config())


def test_jpeg_limit_and_sheets(config, tint):
    entry = generate(config("editor.image_format=jpg"), limit=4)
    assert all(row["file_name"].endswith(".jpg") for row in rows(entry))
    with Image.open(entry / rows(entry)[0]["file_name"]) as image:
        assert image.format == "JPEG"
    assert len(rows(entry)) == 12
    sheets = sorted(path.name for path in (entry / "sheets").iterdir())
    assert sheets == ["000012.jpg"], "fewer than sheet_every: one at the end"
    assert len(rows(generate(config("editor.image_format=jpg")))) == 36, "the other images follow in the same entry"
    sheets = sorted(path.name for path in (entry / "sheets").iterdir())
    assert (sheets[0], sheets[-1]) == ("000012.jpg", "000036.jpg"), "the numbers go on"
    with Image.open(entry / "sheets" / sheets[-1]) as sheet:
        assert sheet.width > 4 * 192, "a source and three edits beside it"


# Kills, processes, order


def kill_and_restart(run, kills: int, killer) -> int:
    """Start a run and kill it `kills` times, then let it end; return how many kills came in time."""
    in_time = 0
    for number in range(kills):
        pid = forked(lambda number=number: (killer(number), run()))
        in_time += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    os.waitpid(forked(run), 0)
    return in_time


def kill_at_write(left: int, *, before: bool) -> None:
    """Kill this process before or after its `left`-th call of fsync, replace or rmtree."""

    def deadly(real):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0 and before:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args, **kwargs)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        return call

    os.fsync, os.replace, shutil.rmtree = deadly(os.fsync), deadly(os.replace), deadly(shutil.rmtree)


def kill_somewhere(number: int) -> None:
    moments = random.Random(number)
    kill_at_write(moments.randint(1, 14), before=moments.random() < 0.5)


@pytest.mark.parametrize("shards", [1, 3])
def test_kills_are_invisible(shards, config, tint, tmp_path):
    whole = tree(generate(config(f"cache.root={tmp_path / 'undisturbed'}")))

    def run():
        for index in range(shards):
            generate(config(), shard=(index, shards))

    assert kill_and_restart(run, 14, kill_somewhere) >= 6
    assert tree(next((tmp_path / "cache" / "folder").iterdir())) == whole


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
def test_a_kill_at_any_single_write_is_invisible(shards, config, tint, tmp_path):
    options = ["editor.sheet_every=6"]
    whole = tree(generate(config(*options, f"cache.root={tmp_path / 'undisturbed'}"), limit=4))
    for number in range(1, 200):
        root = tmp_path / f"killed {number}"

        def run(root=root):
            for index in range(shards):
                generate(config(*options, f"cache.root={root}"), shard=(index, shards), limit=4)

        in_time = kill_and_restart(run, 1, lambda _, number=number: kill_at_write(number // 2 + 1, before=number % 2 == 0))
        entry = next((root / "folder").iterdir())
        assert tree(entry) == whole, f"kill {number}"
        assert not list((entry / "sheets").glob(".*"))
        if not in_time:
            break
    assert number > 40
    assert not in_time, "the last one came after everything was written"


@pytest.mark.slow
def test_ten_kills_of_a_real_editor_are_invisible(config, tiny_editor, tmp_path, monkeypatch):
    """At random moments of a run of real diffusers, from its first line on."""
    options = [f"editor.model={tiny_editor('instruct-pix2pix')}", "editor.steps=12"]
    editor = load_editor(config(*options).editor)
    monkeypatch.setattr(module, "load_editor", lambda *_, **__: editor)
    started = time.monotonic()
    whole = tree(generate(config(*options, f"cache.root={tmp_path / 'undisturbed'}")))
    longest_s = (time.monotonic() - started) / 5  # ten kills fall into one run's time

    def kill_soon(number):
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, random.Random(number).uniform(0.01, longest_s))

    assert kill_and_restart(lambda: generate(config(*options)), 10, kill_soon) >= 5
    assert tree(next((tmp_path / "cache" / "folder").iterdir())) == whole


@pytest.mark.parametrize("shards", [1, 3])
def test_every_edit_has_its_seconds_beside_the_manifest(shards, config, tint):
    tint(seconds=0.01)
    for index in range(shards):
        entry = generate(config(), shard=(index, shards))
    seconds = seconds_of_edits(entry)
    assert seconds.keys() == {row["aug_id"] for row in rows(entry)}
    assert min(seconds.values()) > 0
    assert not any("seconds" in row for row in rows(entry)), "a manifest of the same edits has the same bytes"
    generate(config(), shard=(0, shards))
    assert seconds_of_edits(entry) == seconds, "nothing was made again"


@pytest.mark.parametrize("order", [(0, 1), (3, 1, 0, 2)])
def test_shards_in_any_order_equal_one(order, config, tint, tmp_path):
    whole = tree(generate(config(f"cache.root={tmp_path / 'one'}")))
    for place, index in enumerate(order):
        entry = generate(config(), shard=(index, len(order)))
        assert (entry / "DONE").exists() == (place == len(order) - 1)
    assert tree(entry) == whole


def test_processes_at_the_same_time_equal_one(config, tint, tmp_path):
    tint(seconds=0.02)
    whole = tree(generate(config(f"cache.root={tmp_path / 'one'}")))
    for pid in [forked(lambda index=index: generate(config(), shard=(index, 3))) for index in range(3)]:
        os.waitpid(pid, 0)
    assert tree(next((tmp_path / "cache" / "folder").iterdir())) == whole


@pytest.mark.slow
def test_accelerate_shares_the_work(options, config, tiny_editor, tmp_path):
    """Real diffusers through the command line: two processes share job 1 of 2, parts 2 and 3 of 4."""
    options = [*options, f"editor.model={tiny_editor('instruct-pix2pix')}"]
    whole = tree(generate(recipe.load("folder", [*options, f"cache.root={tmp_path / 'one'}"])))
    out, _ = run_ranks(with_overrides("generate", "folder", "--shard", "1/2", overrides=options), tmp_path)
    assert out.count("to do") == 1, "only the main process prints"
    entry = next((tmp_path / "cache" / "folder").iterdir())
    assert len(AugmentCache.at(entry).edits) == 16
    for index in (0, 1):
        generate(recipe.load("folder", options), shard=(index, 4))
    assert tree(entry) == whole


def test_only_one_process_makes_a_part(config, tint):
    entry = generate(config(), shard=(0, 2))
    with CacheWriter(entry, "folder", index=1, count=2):
        with pytest.raises(DataError, match=r"is being written by another process \(part 1 of 2\)"):
            generate(config(), shard=(1, 2))
        with pytest.raises(DataError, match="part 1 of 2"):
            generate(config())
    assert (generate(config()) / "DONE").exists()


def test_a_signal_stops_after_the_batch(config, tint, capsys):
    told: list[str] = []

    def tell(text):
        if not told:
            os.kill(os.getpid(), signal.SIGTERM)
        told.append(text)

    loaded = tint(refuse=tell)
    with pytest.raises(KeyboardInterrupt):
        generate(config())
    entry = next((Path(config().cache.root) / "folder").iterdir())
    assert len(loaded[0].requests) == len(rows(entry)) == 5
    assert "is not finished: run the same command again to continue" in capsys.readouterr().out
    tint()
    assert len(rows(generate(config()))) == 36
    assert len(loaded[1].requests) == 31


# What cannot be used


def test_rejected_edits_are_noted_and_not_tried_again(config, tint, capsys):
    outcomes = {
        "put the circle in the snow": Image.new("RGB", (16, 12)),
        "put the square in the snow": Image.new("RGB", (16, 12), (90, 90, 90)),
        "put the stripes in the snow": Image.new("RGB", (12, 16)),
        "make it night": "the safety checker flagged it",
    }
    loaded = tint(refuse=outcomes.get)
    entry = generate(config())
    assert len(rows(entry)) == 12
    reasons = {row["instruction"]: row["reason"] for row in rows(entry, "rejected.jsonl")}
    assert reasons == {
        "put the circle in the snow": "black",
        "put the square in the snow": "of one colour",
        "put the stripes in the snow": "12 x 16 px instead of 16 x 12",
        "make it night": "the safety checker flagged it",
    }
    assert len(rows(entry, "rejected.jsonl")) == 24
    assert (entry / "DONE").exists()
    assert "rejected: 24 (12 the safety checker flagged it" in capsys.readouterr().out
    generate(config())
    assert len(loaded) == 1
    assert flaw(Image.fromarray(np.random.default_rng(0).integers(0, 99, (8, 8, 3), dtype=np.uint8)), (8, 8)) == ""


def training_file(config, number: int) -> Path:
    return load_dataset(config().data, seed=0).train.samples[number].path


def test_unreadable_sources_are_skipped_counted_and_tried_again(config, tint, capsys):
    whole, half = training_file(config, 1).read_bytes(), training_file(config, 5).read_bytes()
    training_file(config, 1).write_bytes(b"")
    training_file(config, 5).write_bytes(half[:200])
    entry = generate(config("data.max_unreadable=0.2"))
    refused = rows(entry, "rejected.jsonl")
    assert [row["aug_id"] for row in refused] == [None, None]
    assert "the file is empty" in refused[0]["reason"]
    assert str(Path(config().data.root)) not in json.dumps(refused), "no path of this machine"
    assert len(rows(entry)) == 30
    out = capsys.readouterr().out
    assert out.count("skipped: ") == 2
    assert "cannot be read: 2" in out
    loaded = tint()
    generate(config("data.max_unreadable=0.2"))
    assert not loaded[1:], "still unreadable: nothing to do"
    training_file(config, 1).write_bytes(whole)
    training_file(config, 5).write_bytes(half)
    generate(config())
    assert len(rows(entry)) == 36
    assert not (entry / "rejected.jsonl").exists()


def test_too_many_unreadable_sources_stop_the_run(config, tint):
    for number in (1, 2):
        training_file(config, number).write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"^2 sources cannot be read, more than data.max_unreadable = 0\.1 of them; .* first: image 'day/"
    ):
        generate(config("data.max_unreadable=0.1"))
    for shard in ((0, 2), (1, 2)):
        entry = next((Path(config().cache.root) / "folder").iterdir())
        with pytest.raises(DataError, match="2 sources cannot be read"):
            generate(config("data.max_unreadable=0.1"), shard=shard)
            generate(config("data.max_unreadable=0.1"), shard=(1, 2))
    assert not (entry / "DONE").exists()


def test_odd_sources_are_edited(config, tint):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    odd = {
        0: lambda path: Image.fromarray(pixels).convert("CMYK").save(path, format="TIFF"),
        1: lambda path: Image.fromarray(rng.integers(0, 65535, (40, 48), dtype=np.uint16)).save(path, format="PNG"),
        2: lambda path: Image.fromarray(pixels).save(path, format="JPEG", exif=exif),
        3: lambda path: Image.fromarray(pixels[:1, :1]).save(path, format="PNG"),
    }
    for number, write in odd.items():
        write(training_file(config, number))
    loaded = tint()
    entry = generate(config())
    assert len(rows(entry)) == 36
    sizes = [loaded[0].requests[3 * number].image.size for number in odd]
    assert sizes == [(48, 40), (48, 40), (40, 48), (1, 1)], "the rotated one stands upright"
    assert all(request.image.mode == "RGB" for request in loaded[0].requests)


@pytest.mark.parametrize("shard", [(0, 1), (0, 2)])
def test_a_full_disk_leaves_the_cache_whole(shard, config, tint, monkeypatch):
    left, real = [10], os.fsync

    def fsync(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(
        DataError, match=r"cannot be written: No space left on device; free disk space .* the same command goes on"
    ) as caught:
        generate(config(), shard=shard)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(os, "fsync", real)
    entry = next((Path(config().cache.root) / "folder").iterdir())
    assert len(AugmentCache.at(entry).edits) == 5, "the batch before"
    assert len(rows(generate(config()))) == 36


def test_a_full_disk_for_real(options, tint, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("a small file system cannot be mounted here: that takes root's rights")
    try:
        config = recipe.load("folder", [*options, f"cache.root={disk}"])
        with pytest.raises(DataError, match="cannot be written: No space left on device"):
            generate(config)
        entry = next((disk / "folder").iterdir())
        held = AugmentCache.at(entry).edits
        assert all(edit.path.stat().st_size for edit in held)
        for edit in held:
            with Image.open(edit.path) as image:
                image.load()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_unwritable_cache_is_found_before_a_model_is_loaded(config, tint, tmp_path):
    (tmp_path / "file").touch()
    loaded = tint()
    with pytest.raises(DataError, match=r"cannot be written: .*file: it is a file; choose another cache\.root"):
        generate(config(f"cache.root={tmp_path / 'file' / 'cache'}"))
    assert not loaded


def test_broken_manifests(config, tint):
    entry = generate(config())
    whole, manifest = tree(entry), entry / "metadata.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    generate(config())
    assert tree(entry) == whole, "a last line that was cut off is made again"
    good = manifest.read_text()
    for bad, message in (
        (good.replace('"images/', '"../images/', 1), "line 1: file_name '../images/.*' points outside of the cache entry"),
        (good.replace("{", "", 1), "line 1: no valid JSON row"),
        (good.replace('"aug_id"', '"id"', 1).replace('"source_id"', '"source"', 1), "line 1: 'source_id' is None"),
    ):
        manifest.write_text(bad)
        with pytest.raises(DataError, match=message):
            generate(config())


def test_bad_recipes(config, options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for more in ([], ["--dry-run"]):
        assert cli.main(["generate", "folder", "--set", "editor.kind=pix2pix", *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "editor.kind = 'pix2pix': expected one of instruct-pix2pix, " in line
        assert line.endswith("did you mean 'instruct-pix2pix'?")
    with pytest.raises(ModelError, match=r"^editor\.model = no/such-editor"):
        generate(config("editor.model=no/such-editor"))
    with pytest.raises(ConfigError, match="inpaint needs the object's box, but the images of 'folder' have none"):
        generate(config("editor.kind=inpaint"))
    with pytest.raises(ConfigError, match="box_crop"):
        generate(config("editor.kind=inpaint", "data.box_crop=true"))
    (tmp_path / "texts.toml").write_text(TEXTS.replace('prompt = "a photo of a {} at night"\n', ""))
    with pytest.raises(DataError, match=r"texts\.toml edit 2 has no prompt, which editor\.kind = img2img needs: add prompt = "):
        generate(config("editor.kind=img2img"))
    assert not (tmp_path / "cache").exists()


def test_a_dry_run_writes_nothing(config, tint, tmp_path, capsys):
    generate(config(), dry_run=True)
    out = capsys.readouterr().out
    assert "36 edits of 12 images with 3 texts by instruct-pix2pix (an/editor); 0 made, 0 rejected, 36 to do" in out
    assert "a batch of 5 took" in out
    assert "nothing was written" in out
    assert not (tmp_path / "cache").exists()
    entry = generate(config(), shard=(0, 2))
    before = tree(entry)
    generate(config(), dry_run=True)
    assert "20 made, 0 rejected, 16 to do" in capsys.readouterr().out
    assert tree(entry) == before


# Real editors, other readers


def test_a_real_editor_through_the_command_line(options, tiny_editor, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="the package `datasets` is not installed")
    sets = [part for option in (*options, f"editor.model={tiny_editor('instruct-pix2pix')}") for part in ("--set", option)]
    assert cli.main(["generate", "folder", *sets, "--shard", "1/2"]) == 0
    entry = next((tmp_path / "cache" / "folder").iterdir())
    unfinished = datasets.load_dataset("imagefolder", data_dir=str(entry), cache_dir=str(tmp_path / "hf1"), split="train")
    assert len(unfinished) == len(rows(entry)) == 16
    assert cli.main(["generate", "folder", *sets]) == 0
    table = datasets.load_dataset("imagefolder", data_dir=str(entry), cache_dir=str(tmp_path / "hf2"), split="train")
    made = rows(entry)
    assert [row["aug_id"] for row in table] == [row["aug_id"] for row in made]
    assert set(table.column_names) == {"image", *made[0]} - {"file_name"}
    for row, read in zip(made, table, strict=True):
        with Image.open(entry / row["file_name"]) as image:
            assert np.array_equal(np.asarray(image), np.asarray(read["image"])), "the sheets are no rows of it"
        assert read["instruction"] == row["instruction"]
    assert made[0]["revision"].startswith("sha256:")
    assert "/" not in made[0]["model"]


@pytest.mark.parametrize("kind", ["img2img", "text2img"])
def test_other_kinds_take_the_same_path(kind, config, tiny_editor):
    entry = generate(config(f"editor.kind={kind}", f"editor.model={tiny_editor(kind)}", "editor.steps=4"), limit=3)
    made = rows(entry)
    assert len(made) == 9
    assert made[0]["instruction"] == "a photo of a circle in the snow"
    assert ("strength" in made[0]) == (kind == "img2img")


def test_inpaint_and_the_library(config, tiny_editor):
    from dataclasses import replace

    samples = [replace(sample, box=(8.0, 8.0, 20.0, 20.0)) for sample in load_dataset(config().data, seed=0).train.samples[:3]]
    editor = load_editor(config("editor.kind=inpaint", f"editor.model={tiny_editor('inpaint')}").editor)
    texts = [EditText(domain="snow", instruction="", prompt="a photo of a {} in the snow"), "a {} at night"]
    results = list(edit_dataset(editor, samples, texts, class_names=("circle", "square", "stripes"), per_text=2, batch_size=4))
    assert len(results) == 12
    assert all(result.image is not None for result in results)
    assert [result.planned.k for result in results[:4]] == [0, 1, 0, 1]
    assert results[0].planned.text == "a photo of a circle in the snow"
    with pytest.raises(DataError, match=r"needs the name of class 0 .* give class_names"):
        next(edit_dataset(editor, samples, texts))
    with pytest.raises(DataError, match="has no prompt"):
        next(edit_dataset(editor, samples, [EditText(domain="x", instruction="make it night", prompt="")]))


def test_the_batch_size_changes_no_edit_beyond_rounding(config, tiny_editor, tmp_path):
    """Batches of 16 and 1 sum in another order: in float32 at most 2 of 255, measured 1."""
    options = [f"editor.model={tiny_editor('instruct-pix2pix')}"]
    one = generate(config(*options, "editor.batch_size=1"), limit=6)
    many = generate(config(*options, "editor.batch_size=16", f"cache.root={tmp_path / 'many'}"), limit=6)
    assert one.name == many.name
    for row in rows(one):
        with Image.open(one / row["file_name"]) as a, Image.open(many / row["file_name"]) as b:
            assert np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 2
