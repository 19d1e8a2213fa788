"""Several writers of one cache entry: nothing is lost when one dies, and nobody is in two places."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from flyp_saflex.errors import DataError
from flyp_saflex.storage.augment_cache import AugmentCache
from flyp_saflex.storage.augment_cache_files import read_rejected, state_settings
from flyp_saflex.storage.augment_cache_writer import CacheWriter

NAMES = [AugmentCache.file_name(f"{number}.jpg") for number in range(6)]
PLAN = [(name, f"{number}.jpg") for number, name in enumerate(NAMES)]


def edit(number: int) -> tuple[Image.Image, dict[str, object]]:
    row = {"file_name": NAMES[number], "source_id": f"{number}.jpg", "label": 0, "instruction": "", "seed": number}
    return Image.new("RGB", (4, 4), (number, 0, 0)), row


def refuse(number: int, reason: str = "black", *, unreadable: bool = False) -> dict[str, object]:
    return {"aug_id": None if unreadable else NAMES[number], "source_id": f"{number}.jpg", "reason": reason}


def numbers(entry: Path) -> list[int]:
    return [json.loads(line)["seed"] for line in (entry / "metadata.jsonl").read_text().splitlines()]


def die(writer: CacheWriter) -> None:
    """Leave a writer's files as a kill does: its lock is free, nothing is tidied up."""
    assert writer._lock is not None
    writer._lock.release()


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "key"


def test_the_finished_manifest_has_the_plans_order(entry: Path):
    with CacheWriter(entry, "folder", index=1, count=2) as writer:
        writer.write([edit(5), edit(1)], [refuse(3)])
        assert not writer.finish(PLAN, 0)
    assert not (entry / ".writers").exists()
    assert numbers(entry) == [5, 1]
    with CacheWriter(entry, "folder", index=0, count=2) as writer:
        assert writer.made == {NAMES[5], NAMES[1]}
        assert writer.rejected == {NAMES[3]}
        writer.write([edit(4), edit(0)], [refuse(2, "of one colour")])
        assert writer.finish(PLAN, 0)
    assert numbers(entry) == [0, 1, 4, 5]
    assert [json.loads(line)["reason"] for line in (entry / "rejected.jsonl").read_text().splitlines()] == [
        "of one colour",
        "black",
    ]
    cache = AugmentCache.at(entry)
    assert cache.done
    assert cache.notes == ()


def test_what_a_dead_writer_had_is_merged_by_the_next(entry: Path):
    dead = CacheWriter(entry, "folder", index=2, count=3).__enter__()
    dead.write([edit(0)])
    dead.write([edit(1)], [refuse(2)])
    with open(entry / ".writers" / "2-of-3" / "rows.jsonl", "ab") as file:
        file.write(b'{"file_name":"images/')
    (entry / ".writers" / "2-of-3" / "half.png").write_bytes(b"half")
    (entry / "sheets").mkdir()
    leftovers = [entry / ".metadata.jsonl.99.tmp", entry / ".DONE.99.tmp", entry / "sheets" / ".000200.jpg.99.tmp"]
    strangers = [entry / ".scores.jsonl.99.tmp", entry / "sheets" / ".filter-kept.jpg.99.tmp"]
    for path in (*leftovers, *strangers):
        path.touch()
    die(dead)
    assert [edit.provenance["seed"] for edit in AugmentCache.at(entry).edits] == [0, 1], "readers see its rows at once"
    with CacheWriter(entry, "folder", index=0, count=3) as writer:
        assert writer.made == {NAMES[0], NAMES[1]}
        assert writer.rejected == {NAMES[2]}
        assert [path.name for path in (entry / ".writers").iterdir()] == ["0-of-3"], "and its half image is gone"
    assert numbers(entry) == [0, 1]
    assert not list(entry.rglob("half*"))
    assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in strangers), "another command may be writing these"


def test_living_writers_are_left_alone(entry: Path):
    with CacheWriter(entry, "folder", index=0, count=2) as first:
        first.write([edit(0)])
        with CacheWriter(entry, "folder", index=1, count=2) as second:
            second.write([edit(1)])
            for index, count in ((0, 2), (1, 2), (0, 1), (1, 3)):
                with pytest.raises(DataError, match=r"is being written by another process \(part [01] of 2\)"):
                    CacheWriter(entry, "folder", index=index, count=count).__enter__()
        first.write([edit(2)])
        assert [edit.provenance["seed"] for edit in AugmentCache.at(entry).edits] == [0, 1, 2]
        assert first.finish(PLAN[:3], 0)
    assert numbers(entry) == [0, 1, 2]


def test_an_entry_is_finished_by_whoever_comes_last_while_others_are_still_there(entry: Path):
    with CacheWriter(entry, "folder", index=0, count=2) as first:
        first.write([edit(1)])
        assert not first.finish(PLAN[:2], 0)
        with CacheWriter(entry, "folder", index=1, count=2) as second:
            second.write([edit(0)])
            assert second.finish(PLAN[:2], 0)
        finished = (entry / "metadata.jsonl").read_bytes()
    assert (entry / "metadata.jsonl").read_bytes() == finished
    assert numbers(entry) == [0, 1]


def test_unreadable_sources_count_as_done_up_to_a_number(entry: Path):
    with CacheWriter(entry, "folder") as writer:
        writer.write(
            [edit(number) for number in range(4)], [refuse(4, "empty", unreadable=True), refuse(5, "cut", unreadable=True)]
        )
        assert writer.rejected == set(), "they are tried again"
        with pytest.raises(DataError, match=r"2 sources cannot be read, more than data\.max_unreadable allows"):
            writer.finish(PLAN, 1)
        assert not AugmentCache.at(entry).done
        assert writer.finish(PLAN, 2)
    assert set(read_rejected(entry)[1]) == {"4.jpg", "5.jpg"}
    with CacheWriter(entry, "folder") as writer:
        assert AugmentCache.at(entry).done
        writer.write([edit(4)])
        assert not AugmentCache.at(entry).done, "more to come"
        assert writer.finish(PLAN, 1)
    assert set(read_rejected(entry)[1]) == {"5.jpg"}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to tell which file is flushed")
def test_rows_are_written_wholly_or_not_at_all(entry: Path, monkeypatch: pytest.MonkeyPatch):
    with CacheWriter(entry, "folder") as writer:
        writer.write([edit(0)])
        before, real = (entry / "metadata.jsonl").read_bytes(), os.fsync

        def fsync(descriptor: int) -> None:
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith("metadata.jsonl"):
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(DataError, match="No space left on device"):
            writer.write([edit(1)])
        monkeypatch.setattr(os, "fsync", real)
        assert (entry / "metadata.jsonl").read_bytes() == before
        assert NAMES[1] not in writer.made
        writer.write([edit(1)])
    assert numbers(entry) == [0, 1]


def test_bad_rejections_and_settings_are_one_line(entry: Path):
    entry.mkdir(parents=True)
    state_settings(entry, {"steps": 2}, write=False)
    assert not list(entry.iterdir())
    state_settings(entry, {"steps": 2}, write=True)
    state_settings(entry, {"steps": 2, "identity": {"model": "m"}}, write=True)
    state_settings(entry, {"steps": 2}, write=True)
    assert json.loads((entry / "settings.json").read_text()) == {"steps": 2, "identity": {"model": "m"}}
    with pytest.raises(DataError, match=r'other settings \(steps: 2 -> 3, identity: \{"model":"m"\} -> \{"model":"n"\}\)'):
        state_settings(entry, {"steps": 3, "identity": {"model": "n"}}, write=True)
    (entry / "settings.json").write_text("{")
    with pytest.raises(DataError, match=r"settings\.json cannot be read"):
        state_settings(entry, {"steps": 2}, write=True)
    (entry / "rejected.jsonl").write_text('{"aug_id": 1}\n')
    with pytest.raises(DataError, match=r"rejected\.jsonl line 1: no row with aug_id and source_id"):
        read_rejected(entry)
    (entry / "rejected.jsonl").unlink()
    (entry / "metadata.jsonl").write_text('{"file_name": 3}\n')
    with pytest.raises(DataError, match=r"metadata\.jsonl line 1: 'file_name' is 3"), CacheWriter(entry, "folder"):
        pass
    (entry / "metadata.jsonl").write_text("")
    with CacheWriter(entry, "folder"):
        pass  # the failed start left no lock behind


@pytest.mark.parametrize("link", [".writers", ".writers/0-of-2", "images", "images/deep", "sheets", "metadata.jsonl", ".lock"])
def test_a_link_in_an_entry_changes_no_file_elsewhere(link: str, entry: Path):
    with CacheWriter(entry, "folder") as writer:
        writer.write([edit(5)])
    elsewhere = entry.parents[1] / "elsewhere"
    name = NAMES[1].split("/")
    if link == "metadata.jsonl":
        elsewhere.write_bytes((entry / link).read_bytes())
        (entry / link).unlink()
    else:
        (elsewhere / name[1]).mkdir(parents=True)
        for kept in (elsewhere / "lock", elsewhere / "rows.jsonl", elsewhere / name[1] / name[2], elsewhere / name[2]):
            kept.write_text("kept")
    place = entry / (f"images/{name[1]}" if link == "images/deep" else link)
    if link == "images":
        place.rename(entry.parent / "moved")
    place.unlink(missing_ok=True)
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(elsewhere)

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (elsewhere, *elsewhere.rglob("*")) if path.is_file()}

    before = files()
    for index, count in ((0, 1), (0, 2), (1, 2)):
        writer = CacheWriter(entry, "folder", index=index, count=count)
        with pytest.raises(DataError, match="is a symbolic link, so files elsewhere would be changed") as error, writer:
            writer.write([edit(1)])
        assert "\n" not in str(error.value)
        assert files() == before
    if link != "images/deep":  # what is written below images/ is known only when it is written
        with pytest.raises(DataError, match="is a symbolic link"):
            state_settings(entry, {"seed": 1}, write=True)
        with pytest.raises(DataError, match="is a symbolic link"):
            AugmentCache.create(entry, "folder")
    else:
        cache = AugmentCache.create(entry, "folder")
        with pytest.raises(DataError, match="is a symbolic link"):
            cache.append(*edit(1))
    assert files() == before


def test_an_entry_may_be_a_link_to_another_disk(entry: Path):
    (entry.parents[1] / "disk").mkdir()
    entry.parent.mkdir()
    entry.symlink_to(entry.parents[1] / "disk")
    with CacheWriter(entry, "folder") as writer:
        writer.write([edit(1)])
    assert numbers(entry) == [1]
