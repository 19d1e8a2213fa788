"""Feature cache: activations behind frozen image blocks, computed once and kept on disk.

Frozen blocks on images that are not changed at random give the same activations in every epoch, every run and every
evaluation. They are stored as float32, so results are those of computing them again.

    <folder>/<fingerprint>/rows.bin     one row of fixed size per image, appended
    <folder>/<fingerprint>/index.jsonl  {"key": ..., "row": ...}, appended after its row was flushed

The fingerprint covers frozen weights and preprocessing; a key covers the image's content (sha256) and whether a resized copy
of it is read, so an edited image gets a new row. A killed writer leaves rows that no index line names; they are overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from flyp_saflex.clip.image_tower import ImageTower
from flyp_saflex.clip.model import Clip
from flyp_saflex.config import Config
from flyp_saflex.errors import DataError, RunError
from flyp_saflex.images.loader import ImageLoader
from flyp_saflex.records import Edit, Sample, StoredImage
from flyp_saflex.storage.files import entry_lock


def fingerprint(clip: Clip, tower: ImageTower, *, box_crop: bool, scaled: bool = False) -> str:
    """Return a hash of all that the stored activations depend on but the image: architecture, weights, preprocessing."""
    model = clip.config["model_cfg"]
    # Not a property of the model that was loaded, and left out where one is saved.
    architecture = {key: value for key, value in model.get("vision_cfg", {}).items() if key != "timm_model_pretrained"}
    known = [architecture, bool(model.get("quick_gelu")), clip.config["preprocess_cfg"], tower.num_frozen, box_crop]
    known += ["scaled decoding"] if scaled else []
    known += ["one token"] if tower.lower_gives_one_token else []
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    frozen = {id(parameter) for parameter in tower.frozen_parameters()}
    for name, value in clip.model.visual.state_dict(keep_vars=True).items():
        if id(value) in frozen or not isinstance(value, torch.nn.Parameter):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def open_feature_cache(
    config: Config, clip: Clip, tower: ImageTower, loader: ImageLoader, device: torch.device
) -> FeatureCache | None:
    """Return the cache of activations behind `tower`'s frozen blocks, or None if `train.frozen_cache` is empty."""
    if not config.train.frozen_cache:
        return None
    name = fingerprint(clip, tower, box_crop=config.data.box_crop, scaled=getattr(loader.reader, "scaled", False))
    return FeatureCache(Path(config.train.frozen_cache) / name, lambda images: tower.lower(images.to(device)), loader)


class LoweredImages:
    """Activations of an `ImageLoader`'s images behind a frozen lower image tower, shared by all variants of a model.

    Args:
        loader: reads and preprocesses images.
        lower: images [B, 3, S, S] -> activations [B, ...].
    """

    def __init__(self, loader: ImageLoader, lower: Callable[[Tensor], Tensor]) -> None:
        self.loader, self.lower = loader, lower
        self.batch_size, self.check_unreadable = loader.batch_size, loader.check_unreadable

    @torch.no_grad()
    def batches(self, samples: Sequence[Sample], *, num_in_all: int = 0) -> Iterator[tuple[list[int], Tensor]]:
        """Yield (positions, activations) of the readable samples; arguments as those of `ImageLoader.batches`."""
        for positions, images in self.loader.batches(samples, num_in_all=num_in_all):
            yield positions, self.lower(images)


class FeatureCache:
    """Stored activations of one frozen lower image tower.

    Args:
        folder: of this fingerprint.
        lower: images [B, 3, S, S] -> activations [B, ...], without gradient.
        loader: reads and preprocesses images.

    Attributes:
        unreadable: reason by path of the images that could not be read.
    """

    def __init__(self, folder: Path, lower: Callable[[Tensor], Tensor], loader: ImageLoader) -> None:
        self.folder, self.lower, self.loader = folder, lower, loader
        self.batch_size, self.check_unreadable = loader.batch_size, loader.check_unreadable
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"train.frozen_cache: cannot write {folder}: {error.strerror}; choose another folder") from error
        self.unreadable: dict[str, str] = {}
        self._rows: dict[str, int] = {}
        self._shape: tuple[int, ...] = ()
        self._map: np.memmap | None = None
        self._keys: dict[Path | StoredImage | int, str] = {}
        self._read_index()

    def ensure(self, items: Sequence[Sample | Edit], *, num_in_all: int = 0) -> None:
        """Compute and append what is missing; one process at a time writes. Arguments as those of `ImageLoader.batches`."""
        with entry_lock(self.folder):
            self._read_index(mend=True)
            missing = [item for item in items if self._key(item) not in self._rows]
            for positions, images in self.loader.batches(missing, num_in_all=num_in_all):
                with torch.no_grad():
                    hidden = self.lower(images).float().cpu().contiguous().numpy()
                self._append([self._key(missing[position]) for position in positions], hidden)
            self.unreadable.update(self.loader.unreadable)

    def read(self, item: Sample | Edit) -> Tensor:
        """Return the activations of an image that `ensure` was called with.

        Raises:
            DataError: the image could not be read then.
        """
        row = self._rows.get(self._key(item))
        if row is None:
            raise DataError(self.unreadable.get(str(item.item), f"{item.item}: its activations were never stored"))
        return torch.from_numpy(np.array(self._open()[row]))

    def batches(self, samples: Sequence[Sample], *, num_in_all: int = 0) -> Iterator[tuple[list[int], Tensor]]:
        """Yield (positions, activations) of the readable samples, in order: what an `ImageLoader` yields of images."""
        batch_size = self.batch_size
        self.ensure(samples, num_in_all=num_in_all)
        known = [position for position, sample in enumerate(samples) if self._key(sample) in self._rows]
        for start in range(0, len(known), batch_size):
            positions = known[start : start + batch_size]
            rows = [self._rows[self._key(samples[position])] for position in positions]
            yield positions, torch.from_numpy(self._open()[rows])

    def _key(self, item: Sample | Edit) -> str:
        if item.item not in self._keys:
            self._keys[item.item] = self.loader.reader.key(item)  # empty, if missing: never stored
        return self._keys[item.item]

    def _read_index(self, *, mend: bool = False) -> None:
        """Read what is stored, up to a line cut off by a kill; with `mend`, and the lock, cut that line away."""
        index, good = self.folder / "index.jsonl", 0
        text = index.read_bytes() if index.is_file() else b""
        for line in text.splitlines(keepends=True):
            try:
                entry = msgspec.json.decode(line) if line.endswith(b"\n") else None
            except msgspec.DecodeError:
                entry = None
            if entry is None:
                break
            good += len(line)
            self._rows[entry["key"]] = entry["row"]
            self._shape = tuple(entry["shape"])
        if mend and good < len(text):
            os.truncate(index, good)
        self._map = None

    def _append(self, keys: Sequence[str], hidden: np.ndarray) -> None:
        start = max(self._rows.values(), default=-1) + 1
        self._shape = hidden.shape[1:]
        size = int(np.prod(self._shape)) * 4
        try:
            with open(self.folder / "rows.bin", "r+b" if (self.folder / "rows.bin").exists() else "w+b") as file:
                file.seek(start * size)
                file.write(hidden.astype(np.float32).tobytes())
                file.flush()
                os.fsync(file.fileno())
            with open(self.folder / "index.jsonl", "ab") as file:
                for offset, key in enumerate(keys):
                    file.write(msgspec.json.encode({"key": key, "row": start + offset, "shape": self._shape}) + b"\n")
        except OSError as error:
            raise RunError(
                f"train.frozen_cache: cannot write {self.folder}: {error.strerror}; free disk space or choose another folder"
            ) from error
        for offset, key in enumerate(keys):
            self._rows[key] = start + offset
        self._map = None

    def _open(self) -> np.memmap:
        if self._map is None:
            count = max(self._rows.values()) + 1
            self._map = np.memmap(self.folder / "rows.bin", dtype=np.float32, mode="r", shape=(count, *self._shape))
        return self._map
