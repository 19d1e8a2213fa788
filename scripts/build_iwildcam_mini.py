"""Make flyp_saflex/data/iwildcam_mini.csv.gz from the four CSV files of ALIA's release.

    python scripts/build_iwildcam_mini.py FOLDER   # with {train,val,test,train_extra}_subset.csv

Kept are facts only: image id, WILDS' class index y, ALIA's split, WILDS' location. All image ids end alike, so only their
first eight digits are stored.
"""

import csv
import gzip
import sys
from pathlib import Path

HEADER = """\
# ALIA's iWildCam subset (arXiv 2305.16289): image id, WILDS' class index y, ALIA's split, WILDS' location_remapped.
# Source: {train,val,test,train_extra}_subset.csv of ALIA's release, rows of the metadata of WILDS iWildCam v2.0
# (iWildCam 2020; Community Data License Agreement, Permissive, version 1.0: https://cdla.dev/permissive-1-0/).
# Made by scripts/build_iwildcam_mini.py. Every image id ends in -21bc-11ea-a13a-137349068a90, left out here.
"""
SUFFIX = "-21bc-11ea-a13a-137349068a90"
FILES = {"train": "train", "val": "val", "test": "test", "extra": "train_extra"}


def main(folder: Path) -> None:
    """Write the compressed table; the same input gives the same bytes."""
    lines = [HEADER, "image_id,y,split,location\n"]
    for split, name in FILES.items():
        with open(folder / f"{name}_subset.csv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                image_id = row["image_id"]
                if not image_id.endswith(SUFFIX) or row["filename"] != f"{image_id}.jpg":
                    raise SystemExit(f"{name}_subset.csv: unexpected image id {image_id}")
                lines.append(f"{image_id.removesuffix(SUFFIX)},{row['y']},{split},{row['location_remapped']}\n")
    out = Path(__file__).resolve().parent.parent / "flyp_saflex" / "data" / "iwildcam_mini.csv.gz"
    out.write_bytes(gzip.compress("".join(lines).encode(), compresslevel=9, mtime=0))
    print(f"{out}: {len(lines) - 2} rows, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
