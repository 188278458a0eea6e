"""A dataset on disk: `manifest.json`, uint8 NHWC shards that are memory-mapped, and `index.parquet`.

Row order of the index is image order across the shards. Nothing here loads a shard whole; nothing is ever unpickled.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ado_tasks.datasets.splits import PARTS
from ado_tasks.errors import ArtifactError, ConfigError
from ado_tasks.storage import read_json, sha256_file

FORMAT = 1  # raised when the layout changes in a way that older readers cannot read
MANIFEST, INDEX = "manifest.json", "index.parquet"
SHARD_BYTES = 1 << 26  # 64 MiB: what a writer holds in memory, and the unit of verification
_SHARD_NAME = re.compile(r"shard-\d{5}\.npy")
_DIMENSIONS = 4


class ShardWriter:
    """Collects images and writes them as shards of at most `shard_bytes`."""

    def __init__(self, folder: Path, shape: tuple[int, int, int], shard_bytes: int = SHARD_BYTES) -> None:
        """Prepare to write images of `shape` (height, width, channels) into `folder`."""
        self.entries: list[dict[str, Any]] = []
        self.count = 0
        self._folder = folder
        self._buffer = np.empty((max(1, shard_bytes // int(np.prod(shape))), *shape), np.uint8)
        self._filled = 0

    def add(self, images: np.ndarray) -> None:
        """Append uint8 images (n, height, width, channels)."""
        while len(images):
            taken = min(len(images), len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + taken] = images[:taken]
            self._filled += taken
            images = images[taken:]
            if self._filled == len(self._buffer):
                self.flush()

    def flush(self) -> None:
        """Write what is buffered as one shard."""
        if not self._filled:
            return
        images = self._buffer[: self._filled]
        path = self._folder / f"shard-{len(self.entries):05d}.npy"
        # file.write, not np.save: NumPy writes past Python's file object and loses the errno of a full disk.
        with path.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": images.shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.write(images.data)
        self.entries.append({"file": path.name, "count": len(images), "sha256": sha256_file(path)})
        self.count += len(images)
        self._filled = 0


class Shards:
    """Random access to all images of a dataset; a shard is mapped, and its sum verified, when it is first touched."""

    def __init__(self, folder: Path, entries: Sequence[dict[str, Any]], shape: tuple[int, int, int]) -> None:
        """`entries`: file, count and sha256 of each shard, as in the manifest."""
        self.shape = shape
        self._folder = folder
        self._entries = entries
        self._starts = np.cumsum([0, *(entry["count"] for entry in entries)])
        self._mapped: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Images in all shards."""
        return int(self._starts[-1])

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """uint8 (n, height, width, channels) of these rows, in their order."""
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of a dataset of {len(self)} images")
        which = np.searchsorted(self._starts, rows, side="right") - 1
        out = np.empty((len(rows), *self.shape), np.uint8)
        for shard in np.unique(which):
            mine = which == shard
            out[mine] = self._shard(int(shard))[rows[mine] - self._starts[shard]]
        return out

    def verify(self) -> None:
        """Touch every shard. Raises ArtifactError for one whose checksum is wrong."""
        for shard in range(len(self._entries)):
            self._shard(shard)

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._mapped:
            entry = self._entries[number]
            path = self._folder / entry["file"]
            _check_sum(path, entry["sha256"])
            try:
                images = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as problem:
                raise ArtifactError(f"{path}: not a readable array ({problem})") from None
            expected = (entry["count"], *self.shape)
            if images.shape != expected or images.dtype != np.uint8:
                raise ArtifactError(f"{path}: expected uint8 {expected}, found {images.dtype} {images.shape}")
            self._mapped[number] = images
        return self._mapped[number]


@dataclass(frozen=True)
class Images:
    """The images of one part as a lazily gathered array: `images[3]`, `images[10:20]`, `images[indices]` are uint8."""

    shards: Shards = field(repr=False)
    rows: np.ndarray = field(repr=False)  # int64, of the dataset

    def __len__(self) -> int:
        """Images in the part."""
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(n, height, width, channels)."""
        return (len(self.rows), *self.shards.shape)

    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """Read images; an integer gives one image without the first axis."""
        if isinstance(index, int | np.integer):
            return self.shards.gather(self.rows[[index]])[0]
        return self.shards.gather(self.rows[index])

    def __iter__(self) -> Iterator[np.ndarray]:
        """One image after another."""
        return (self[index] for index in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of them, in memory: for parts known to be small."""
        return self[:].astype(dtype or np.uint8, copy=False)


@dataclass(frozen=True)
class Split:
    """One part of a dataset."""

    name: str
    images: Images
    labels: np.ndarray  # int64 (n,); -1 everywhere in a dataset without classes
    index: pd.DataFrame = field(repr=False)  # the rows of index.parquet that belong to the part
    shape: tuple[int, int, int]  # height, width, channels
    num_classes: int  # 0 in a dataset without classes

    def __len__(self) -> int:
        """Images in the part."""
        return len(self.labels)

    @property
    def groups(self) -> np.ndarray:
        """int64 (n,): equal for images that are one observation: near-duplicates, or patches of one block."""
        return self.index["group"].to_numpy(np.int64)

    def batch(self, indices: slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 (n, height, width, channels) in [-1, 1]: x / 127.5 - 1."""
        return to_float(self.images[indices])


@dataclass(frozen=True)
class Dataset:
    """An opened dataset folder."""

    folder: Path
    manifest: dict[str, Any] = field(repr=False)
    shards: Shards = field(repr=False)

    @property
    def name(self) -> str:
        """As in the manifest."""
        return self.manifest["name"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return self.shards.shape

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each label; empty in a dataset without classes."""
        return tuple(self.manifest["classes"])

    @property
    def num_classes(self) -> int:
        """0 in a dataset without classes."""
        return len(self.manifest["classes"])

    @cached_property
    def sha256(self) -> str:
        """Identifies the content: the manifest holds the sums of everything else."""
        return sha256_file(self.folder / MANIFEST)

    @cached_property
    def index(self) -> pd.DataFrame:
        """`index.parquet`, one row an image."""
        path = self.folder / INDEX
        _check_sum(path, self.manifest["index"]["sha256"])
        index = pd.read_parquet(path)
        if len(index) != len(self.shards):
            raise ArtifactError(f"{path}: {len(self.shards)} rows expected, {len(index)} found")
        return index

    def __len__(self) -> int:
        """Images in the dataset, in whichever part."""
        return len(self.shards)

    def split(self, name: str) -> Split:
        """One part: train, selection or report. Raises ConfigError for another name."""
        if name not in PARTS:
            raise ConfigError(f"{name!r} is not a part of a dataset; allowed: {', '.join(PARTS)}")
        rows = np.flatnonzero(self.index["split"].to_numpy() == name)
        part = self.index.iloc[rows].reset_index(drop=True)
        labels = part["label"].to_numpy(np.int64)
        return Split(name, Images(self.shards, rows), labels, part, self.shape, self.num_classes)


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]: x / 127.5 - 1."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Floats in [-1, 1] -> uint8, rounded; what lies outside is clipped. The inverse of `to_float`."""
    return np.rint(np.clip((np.asarray(images, np.float32) + 1) * 127.5, 0, 255)).astype(np.uint8)


def open_dataset(folder: Path, *, verify: bool = False) -> Dataset:
    """Open a dataset that `prepare` made.

    The manifest is checked now; the sum of the index and of each shard when it is first used, or now with `verify`.

    Raises:
        ArtifactError: something is missing, truncated, climbs out of the folder, or is not what its checksum says.
    """
    manifest = read_json(folder / MANIFEST)
    path = folder / MANIFEST
    try:
        if manifest["format"] != FORMAT:
            raise ArtifactError(f"{path}: format {manifest['format']!r}; this version reads format {FORMAT}")
        height, width, channels = (int(side) for side in manifest["shape"])
        entries = [_checked_entry(path, entry) for entry in manifest["shards"]]
        _ = manifest["name"], manifest["classes"], manifest["splits"], manifest["index"]["sha256"]
        if manifest["index"]["file"] != INDEX:
            raise ArtifactError(f"{path}: the index must be {INDEX!r}, not {manifest['index']['file']!r}")
        if sum(entry["count"] for entry in entries) != manifest["count"]:
            raise ArtifactError(f"{path}: the shards do not add up to {manifest['count']} images")
    except (KeyError, TypeError, ValueError) as problem:
        raise ArtifactError(f"{path}: not a dataset manifest ({type(problem).__name__}: {problem})") from None
    dataset = Dataset(folder, manifest, Shards(folder, entries, (height, width, channels)))
    if verify:
        dataset.shards.verify()
        len(dataset.index)
    return dataset


def _checked_entry(manifest: Path, entry: dict[str, Any]) -> dict[str, Any]:
    # A manifest may come from elsewhere: only plain names of this form, never a path.
    if not _SHARD_NAME.fullmatch(entry["file"]):
        raise ArtifactError(f"{manifest}: {entry['file']!r} is not allowed as a shard; allowed: shard-NNNNN.npy")
    return {"file": entry["file"], "count": int(entry["count"]), "sha256": str(entry["sha256"])}


def _check_sum(path: Path, expected: str) -> None:
    found = sha256_file(path)
    if found != expected:
        raise ArtifactError(f"{path}: checksum expected {expected}, found {found}")
