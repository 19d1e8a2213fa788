"""iWildCam's archive: digest, size and split sizes, checked without unpacking."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from flyp_saflex.cli import main
from flyp_saflex.config import DataConfig
from flyp_saflex.data import wilds_archive
from flyp_saflex.data.wilds_archive import NUM_BYTES, SHA256, SPLIT_SIZES, verify
from flyp_saflex.errors import DataError

SMALL = {"train": 5, "val": 3, "test": 4, "id_val": 2, "id_test": 1}


def pack(path: Path, sizes=SMALL, name: str = "iwildcam_v2.0/metadata.csv") -> Path:
    text = "".join([",split,y\n", *(f"{n},{split},0\n" for split, count in sizes.items() for n in range(count))]).encode()
    with tarfile.open(path, "w:gz") as tar:
        for member, data in (("iwildcam_v2.0/train/a.jpg", b"x" * 100), (name, text)):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = pack(tmp_path / "iwildcam.tar.gz")
    monkeypatch.setattr(wilds_archive, "SPLIT_SIZES", SMALL)
    monkeypatch.setattr(wilds_archive, "NUM_BYTES", path.stat().st_size)
    monkeypatch.setattr(wilds_archive, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_the_known_numbers_are_those_of_the_release():
    assert sum(SPLIT_SIZES.values()) == 203_029
    assert (len(SHA256), NUM_BYTES) == (64, 11_957_415_473)


def test_a_right_archive_is_said_to_be_right(archive: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "iwildcam", "--verify", str(archive)]) == 0
    out = capsys.readouterr().out
    assert "splits: train 5, val 3, test 4, id_val 2, id_test 1" in out
    assert "the known copy" in out


def test_a_changed_byte_or_row_is_found(archive: Path, tmp_path: Path):
    other = pack(tmp_path / "other.tar.gz", SMALL | {"id_val": 3})
    with pytest.raises(DataError, match=r"split 'id_val' has 3 rows, expected 2 of iWildCam v2\.0"):
        verify(other, DataConfig(name="iwildcam"))
    with open(archive, "ab") as file:
        file.write(b"\0")
    with pytest.raises(DataError, match=r"expected [\d,]+ with .*another packing"):
        verify(archive, DataConfig(name="iwildcam"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot be read"),
        (lambda path: path.write_bytes(b"no archive at all"), "it is no readable archive"),
        (lambda path: pack(path, name="iwildcam_v2.0/other.csv"), r"there is no metadata\.csv in it"),
    ],
)
def test_what_is_no_archive_is_told_in_one_line(tmp_path: Path, make, message: str, capsys: pytest.CaptureFixture[str]):
    make(tmp_path / "x.tar.gz")
    assert main(["data", "iwildcam", "--verify", str(tmp_path / "x.tar.gz")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert message.replace("\\", "") in err[0]


def test_another_dataset_has_no_known_archive(archive: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "cub", "--verify", str(archive)]) == 2
    assert "--verify: data.name = cub, expected iwildcam" in capsys.readouterr().err
