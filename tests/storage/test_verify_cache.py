"""`data RECIPE --verify-cache`: a changed, missing or odd image is told by name, and nothing else is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from flyp_saflex.cli import main
from flyp_saflex.storage.augment_cache import AugmentCache
from flyp_saflex.storage.augment_cache_writer import CacheWriter

NAMES = [AugmentCache.file_name(f"{number}.jpg") for number in range(5)]


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    folder = tmp_path / "cache" / "folder" / "key"
    with CacheWriter(folder, "folder") as writer:
        rows = [{"file_name": name, "source_id": f"{number}.jpg", "label": 0} for number, name in enumerate(NAMES)]
        writer.write([(Image.new("RGB", (4, 4), (number, 0, 0)), row) for number, row in enumerate(rows)])
    return folder


def verify(entry: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str], list[str]]:
    code = main(["data", "folder", "--verify-cache", "--set", f"cache.root={entry.parent.parent}"])
    told = capsys.readouterr()
    return code, told.out.splitlines(), told.err.splitlines()


def test_an_entry_as_it_was_made_passes(entry: Path, capsys: pytest.CaptureFixture[str]):
    before = {path: path.stat().st_mtime_ns for path in entry.rglob("*")}
    code, out, err = verify(entry, capsys)
    assert (code, err) == (0, [])
    assert out == [f"augment cache {entry}: 5 images have the sha256 of their row"]
    assert {path: path.stat().st_mtime_ns for path in entry.rglob("*")} == before


def test_every_difference_is_one_line_and_the_code_is_2(entry: Path, capsys: pytest.CaptureFixture[str]):
    Image.new("RGB", (4, 4), (200, 0, 0)).save(entry / NAMES[1])
    (entry / NAMES[2]).unlink()
    (entry / NAMES[3]).unlink()
    os.mkfifo(entry / NAMES[3])
    code, out, err = verify(entry, capsys)
    assert code == 2
    assert len(out) == 3
    for line, number, words in zip(out, (1, 2, 3), ("has sha256", "No such file", "no regular file"), strict=True):
        assert line.startswith(f"{entry / 'metadata.jsonl'} line {number + 1}: {entry / NAMES[number]}")
        assert words in line
    assert len(err) == 1
    assert "3 of 5 images are not as metadata.jsonl says" in err[0]


def test_rows_without_a_hash_are_counted_and_do_not_pass_alone(entry: Path, capsys: pytest.CaptureFixture[str]):
    manifest = entry / "metadata.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    del rows[0]["sha256"]
    rows[1]["sha256"] = 7
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = verify(entry, capsys)
    assert code == 2
    assert [line.endswith("the row says 7") for line in out] == [True]
    del rows[1]["sha256"]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = verify(entry, capsys)
    assert (code, out) == (0, [f"augment cache {entry}: 3 images have the sha256 of their row, 2 rows have none"])
    manifest.write_text("".join(json.dumps({**row, "sha256": None}) + "\n" for row in rows))
    code, out, err = verify(entry, capsys)
    assert (code, out) == (2, [])
    assert "no row of metadata.jsonl has a sha256" in err[0]


def test_an_entry_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, _, err = verify(tmp_path / "cache" / "folder" / "key", capsys)
    assert code == 2
    assert len(err) == 1
    assert "holds no entry" in err[0]
