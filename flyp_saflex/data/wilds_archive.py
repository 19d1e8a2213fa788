"""Check of an iWildCam archive: digest, size and official split sizes; nothing is unpacked."""

from __future__ import annotations

import csv
import hashlib
import io
import tarfile
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from flyp_saflex.config import DataConfig
from flyp_saflex.errors import ConfigError, DataError
from flyp_saflex.storage.files import hash_stream

MIRROR = "emmilly/iwildcam-wilds-v2"
"""Dataset on the Hugging Face hub, a third party's copy of WILDS' archive."""
SHA256 = "05c872f46eee44315f79bc90f4098c69ae3799a2b95116db02292ea1b4e370d2"
NUM_BYTES = 11_957_415_473
SPLIT_SIZES = {"train": 129_809, "val": 14_961, "test": 42_791, "id_val": 7_314, "id_test": 8_154}
"""Images of iWildCam v2.0 by split (arXiv 2012.07421)."""


def verify(archive: Path, config: DataConfig) -> None:
    """Compare an archive of iWildCam with the published digest and the official split sizes, and print the result.

    Args:
        archive: the .tar.gz file as it was downloaded.
        config: `name` says which dataset is meant.

    Raises:
        ConfigError: the recipe's dataset is another one.
        DataError: the file cannot be read, or is not WILDS' archive.
    """
    if config.name != "iwildcam":
        raise ConfigError(f"--verify: data.name = {config.name}, expected iwildcam")
    size, digest = _size_and_digest(archive)
    sizes = _split_sizes(archive)
    print(f"{archive}: {size:,} bytes, sha256 {digest}")
    print("splits: " + ", ".join(f"{name} {count:,}" for name, count in sizes.items()))
    if sizes != SPLIT_SIZES:
        different = next(name for name in (*SPLIT_SIZES, *sizes) if sizes.get(name) != SPLIT_SIZES.get(name))
        raise DataError(
            f"{archive}: split '{different}' has {sizes.get(different, 0):,} rows, expected {SPLIT_SIZES.get(different, 0):,} of "
            "iWildCam v2.0; download another copy"
        )
    if (size, digest) != (NUM_BYTES, SHA256):
        raise DataError(
            f"{archive}: {size:,} bytes with the sha256 {digest[:12]}..., expected {NUM_BYTES:,} with {SHA256[:12]}... of the "
            f"copy {MIRROR}; the split sizes are right, so it may be another packing: compare it with its own source's digest"
        )
    print("it is the known copy of WILDS' archive, and the official splits are complete")


def _size_and_digest(archive: Path) -> tuple[int, str]:
    try:
        with open(archive, "rb") as file, tqdm.wrapattr(file, "read", desc="sha256", disable=None) as stream:
            digest = hash_stream(stream, hashlib.sha256())
            return file.tell(), digest
    except OSError as error:
        raise DataError(f"--verify {archive}: cannot be read ({error.strerror}); give the archive's file") from None


def _split_sizes(archive: Path) -> dict[str, int]:
    """Return the rows of the archive's metadata.csv by split."""
    try:
        with tarfile.open(archive, "r|*") as tar:
            for member in tar:
                if Path(member.name).name == "metadata.csv" and (file := tar.extractfile(member)) is not None:
                    rows = csv.DictReader(io.StringIO(file.read().decode("utf-8"), newline=""))
                    return dict(Counter(row.get("split") or "none" for row in rows))
    except (tarfile.TarError, OSError, EOFError, ValueError, csv.Error) as error:
        raise DataError(
            f"--verify {archive}: it is no readable archive ({' '.join(str(error).split())[:100]}); download it again"
        ) from None
    raise DataError(f"--verify {archive}: there is no metadata.csv in it, expected WILDS' iwildcam_v2.0; download it again")
