"""Files that `predict` writes: table of predictions, image features.

Shapes: N images, n of them readable, T classes told, D embedding.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flyp_saflex.errors import ConfigError
from flyp_saflex.storage.files import atomic_write

TABLES = (".csv", ".parquet")
FEATURES = (".npz", ".parquet")


def check_place(option: str, path: Path, suffixes: Sequence[str]) -> None:
    """Check that a file can be written before anything is computed.

    Args:
        option: its name on the command line.
        path: the file.
        suffixes: endings that say a known format.

    Raises:
        ConfigError: an unknown ending, a folder of this name, or no folder to write to.
    """
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f"{option} {path}: the ending '{path.suffix}' is unknown, expected {' or '.join(suffixes)}; rename it")
    if path.is_dir():
        raise ConfigError(f"{option} {path}: there is a folder of this name, expected a file; choose another name")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.parent}; make it first")


def prediction_columns(
    names: Sequence[str],
    positions_n: NDArray[np.int64],
    probabilities_nK: NDArray[np.float64],
    reasons: Mapping[int, str],
    class_names: Sequence[str],
    *,
    top_k: int,
    calibrated: bool,
) -> dict[str, list[Any]]:
    """Return the columns of the table: one row per image, the unreadable ones with their reason instead of a class.

    Args:
        names: of all N images.
        positions_n: of the readable images among them.
        probabilities_nK: of the readable images.
        reasons: of the others, by position.
        class_names: by index.
        top_k: number of classes told, most likely first; of equal probabilities the first class.
        calibrated: whether the probabilities are.
    """
    order_nT = np.argsort(-probabilities_nK, axis=1, kind="stable")[:, :top_k]
    values_nT = np.take_along_axis(probabilities_nK, order_nT, axis=1)
    columns: dict[str, list[Any]] = {"image": list(names)}
    for rank in range(top_k):
        suffix = "" if rank == 0 else f"_{rank + 1}"
        classes, values = [None] * len(names), [None] * len(names)  # type: list[Any], list[Any]
        for position, k, value in zip(positions_n.tolist(), order_nT[:, rank].tolist(), values_nT[:, rank].tolist(), strict=True):
            classes[position], values[position] = class_names[k], value
        columns[f"class{suffix}"], columns[f"probability{suffix}"] = classes, values
    columns["calibrated"] = [calibrated] * len(names)
    columns["error"] = [reasons.get(position) for position in range(len(names))]
    return columns


def write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns as CSV (empty cells for None) or Parquet, as the file's name says.

    Raises:
        RunError: the file cannot be written; a file of this name is then as before.
    """
    if path.suffix.lower() == ".csv":
        with atomic_write(path) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = [name for name in columns if name.startswith(("image", "class", "label", "error", "suggested"))]
    arrays = {name: pa.array(values, type=pa.string() if name in text else None) for name, values in columns.items()}
    with atomic_write(path, "wb") as file:
        pq.write_table(pa.table(arrays), file)


def write_features(path: Path, names: Sequence[str], features_nD: NDArray[np.float32]) -> None:
    """Write image features as .npz (`images`, `embeddings` [n, D]) or Parquet (columns `image`, `embedding`).

    Raises:
        RunError: the file cannot be written.
    """
    with atomic_write(path, "wb") as file:
        if path.suffix.lower() == ".npz":
            np.savez(file, images=np.asarray(names, dtype=np.str_), embeddings=features_nD)
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        flat = pa.array(np.ascontiguousarray(features_nD).reshape(-1), type=pa.float32())
        vectors = pa.FixedSizeListArray.from_arrays(flat, features_nD.shape[1] or 1)
        pq.write_table(pa.table({"image": pa.array(list(names), type=pa.string()), "embedding": vectors}), file)
