"""IDX files (the format of MNIST, also gzipped) and npz archives as sources, streamed; nothing is unpickled."""

import gzip
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tokenize import TokenError
from typing import IO

import numpy as np

from ado_tasks.datasets.limits import check_inside, check_total
from ado_tasks.datasets.source import Source
from ado_tasks.errors import DataError

_IDX_UINT8 = 0x08  # third byte of the magic number: unsigned bytes (LeCun, "The MNIST database", file formats)
_GZIP = b"\x1f\x8b"
_CHUNK_BYTES = 1 << 24  # read at a time
_UNKNOWN = "unknown (files of the user's own)"
# What the readers of archives raise where one is damaged, encrypted, or packed in a way that they do not know.
_DAMAGE = (
    EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile, NotImplementedError, RuntimeError,
)  # fmt: skip


@dataclass(frozen=True)
class Packing:
    """What is expected of packed files."""

    labelled: bool = True  # labels must be there
    num_classes: int | None = None  # labels are 0 .. num_classes - 1; None: up to the largest label found
    max_gigabytes: float = 64.0  # of all images, unpacked


def idx(path: Path, packing: Packing) -> Source:
    """One IDX file of images, or a folder of them; the labels of `x-images-idx3-ubyte` are in `x-labels-idx1-ubyte`.

    Images have 3 dimensions (grey) or 4 (the last 1 or 3 channels). Files of a folder follow one another by name.

    Raises:
        DataError: wrong magic number, truncated, too long, sizes that differ, labels missing or out of range.
    """
    files = _idx_image_files(path)
    headers = [_idx_header(file) for file in files]
    shapes = {_image_shape(file, dimensions[1:]) for file, dimensions in zip(files, headers, strict=True)}
    if len(shapes) > 1:
        raise DataError(f"{path}: images of different shapes: {', '.join(map(str, sorted(shapes)))}")
    shape = shapes.pop()
    counts = [dimensions[0] for dimensions in headers]
    check_total(path, sum(counts), shape, packing.max_gigabytes)

    def chunks() -> Iterator[np.ndarray]:
        for file, dimensions in zip(files, headers, strict=True):
            with _idx_opened(file) as stream:
                stream.read(_idx_header_bytes(dimensions))
                yield from _stream(stream, file, dimensions[0], shape)

    labels = None
    if packing.labelled:
        labels = np.concatenate([_idx_labels(file, count) for file, count in zip(files, counts, strict=True)])
    columns = _origin(files, counts)
    return _source(path, sum(counts), shape, chunks, labels=labels, packing=packing, columns=columns)


def npz(path: Path, packing: Packing) -> Source:
    """An npz archive with `images`, uint8 (n, h, w) or (n, h, w, 1 or 3), and `labels`, whole numbers (n,).

    Raises:
        DataError: not an npz archive, pickled content, wrong type or shape, truncated, labels missing or out of range.
    """
    if not path.is_file():
        raise DataError(f"{path}: not a file")
    with _zip_member(path, "images") as (_, dimensions, dtype):
        if dtype != np.uint8 or len(dimensions) not in {3, 4}:
            raise DataError(f"{path}: images are {dtype} {dimensions}; allowed: uint8 (n, h, w) or (n, h, w, 1 or 3)")
        count, shape = dimensions[0], _image_shape(path, dimensions[1:])
    check_total(path, count, shape, packing.max_gigabytes)

    def chunks() -> Iterator[np.ndarray]:
        with _zip_member(path, "images") as (stream, _, _):
            yield from _stream(stream, path, count, shape)

    labels = _npz_labels(path, count) if packing.labelled else None
    return _source(path, count, shape, chunks, labels=labels, packing=packing, columns={})


def _source(
    path: Path,
    count: int,
    shape: tuple[int, int, int],
    chunks: Callable[[], Iterator[np.ndarray]],
    *,
    labels: np.ndarray | None,
    packing: Packing,
    columns: dict[str, np.ndarray],
) -> Source:
    number = 0 if labels is None else _number_of_classes(path, labels, packing.num_classes)
    return Source(
        count=count,
        shape=shape,
        chunks=chunks,
        description=f"{count} images of {path.name}",
        licence=_UNKNOWN,
        labels=labels,
        classes=tuple(str(label) for label in range(number)),
        columns=columns,
    )


def _number_of_classes(path: Path, labels: np.ndarray, stated: int | None) -> int:
    # More classes than images cannot be: without this bound one wild label would ask for a table of its size.
    largest = (stated or len(labels)) - 1
    wrong = np.flatnonzero((labels < 0) | (labels > largest))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(f"{path}: label {labels[row]} of image {row} is out of range; allowed: 0 to {largest}")
    return stated or int(labels.max(initial=-1)) + 1


def _image_shape(path: Path, dimensions: tuple[int, ...]) -> tuple[int, int, int]:
    height, width, channels = (*dimensions, 1)[:3]
    if channels not in {1, 3} or min(height, width) < 1:
        raise DataError(f"{path}: images of shape {dimensions}; allowed: (h, w), (h, w, 1) or (h, w, 3)")
    return height, width, channels


def _stream(stream: IO[bytes], path: Path, count: int, shape: tuple[int, int, int]) -> Iterator[np.ndarray]:
    """Exactly `count` images, a chunk at a time, then the end of the stream."""
    per_chunk = max(1, _CHUNK_BYTES // prod(shape))
    with _damage(path):
        for start in range(0, count, per_chunk):
            wanted = min(per_chunk, count - start) * prod(shape)
            data = stream.read(wanted)
            if len(data) < wanted:
                ends = start + len(data) // prod(shape)
                raise DataError(f"{path}: truncated: {count} images announced, it ends within image {ends}")
            yield np.frombuffer(data, np.uint8).reshape(-1, *shape)
        if stream.read(1):
            raise DataError(f"{path}: longer than the {count} images that its header announces")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn what damaged archives raise into a DataError that names the file."""
    try:
        yield
    except _DAMAGE as problem:
        raise DataError(f"{path}: damaged ({type(problem).__name__}: {problem})") from None
    except OSError as problem:
        raise DataError(f"{path}: cannot be read ({problem.strerror or problem})") from None


# --- IDX ---


def _idx_image_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: neither a file nor a folder")
    with _damage(path):
        files = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
    for file in files:
        check_inside(file, path)
    images = [file for file in files if len(_idx_header(file)) > 1]
    if not images:
        raise DataError(f"{path}: no IDX file of images in the folder")
    return images


def _idx_header(path: Path) -> tuple[int, ...]:
    """The dimensions: one (labels), three or four (images)."""
    with _damage(path), _idx_opened(path) as stream:
        magic = stream.read(4)
        if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != _IDX_UINT8 or magic[3] not in {1, 3, 4}:
            allowed = "00000801 (labels), 00000803 and 00000804 (images)"
            raise DataError(f"{path}: magic number {magic.hex() or 'missing'}; allowed: {allowed}")
        sizes = stream.read(4 * magic[3])
        if len(sizes) < 4 * magic[3]:
            raise DataError(f"{path}: truncated within its header")
        return tuple(int(size) for size in np.frombuffer(sizes, ">u4"))


def _idx_header_bytes(dimensions: tuple[int, ...]) -> int:
    return 4 + 4 * len(dimensions)


@contextmanager
def _idx_opened(path: Path) -> Iterator[IO[bytes]]:
    with _damage(path), path.open("rb") as file:
        zipped = file.read(2) == _GZIP
        file.seek(0)
        if zipped:
            with gzip.GzipFile(fileobj=file) as stream:
                yield stream  # pyright: ignore[reportReturnType]
        else:
            yield file


def _idx_labels(images: Path, count: int) -> np.ndarray:
    name = images.name.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1")
    candidates = [images.with_name(name), images.with_name(name.removesuffix(".gz")), images.with_name(name + ".gz")]
    path = next((c for c in candidates if c != images and c.is_file()), None)
    if path is None:
        raise DataError(f"{images}: no labels: there is no {name} beside it; prepare.labelled: false does without")
    check_inside(path, images.parent)
    dimensions = _idx_header(path)
    if dimensions != (count,):
        raise DataError(f"{path}: dimensions {dimensions}; {count} labels expected, one an image of {images.name}")
    with _damage(path), _idx_opened(path) as stream:
        stream.read(_idx_header_bytes(dimensions))
        labels = np.frombuffer(stream.read(count + 1), np.uint8)
    if len(labels) != count:
        raise DataError(f"{path}: {'truncated' if len(labels) < count else 'longer than its header announces'}")
    return labels.astype(np.int64)


def _origin(files: list[Path], counts: list[int]) -> dict[str, np.ndarray]:
    """Which file an image came from, where there are several (MNIST's own train and test parts)."""
    return {"file": np.repeat([file.name for file in files], counts)} if len(files) > 1 else {}


# --- npz ---


@contextmanager
def _zip_member(path: Path, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
    """A member's stream behind its npy header, its shape and its type. np.load would unpack it whole."""
    with _damage(path), zipfile.ZipFile(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            raise DataError(f"{path}: no array named {name!r}; there: {', '.join(archive.namelist()) or 'nothing'}")
        info = archive.getinfo(f"{name}.npy")
        with archive.open(info) as stream:
            shape, dtype = _npy_header(path, name, stream)
            expected = stream.tell() + prod(shape) * dtype.itemsize
            if expected != info.file_size:
                raise DataError(f"{path}: {name} has {info.file_size} bytes, its header announces {expected}")
            yield stream, shape, dtype


def _npy_header(path: Path, name: str, stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(stream)
        shape, fortran, dtype = readers[version](stream)
    except (ValueError, KeyError, TypeError, SyntaxError, TokenError, RecursionError, MemoryError) as problem:
        raise DataError(f"{path}: {name} is not a NumPy array ({problem})") from None
    if dtype.hasobject:
        raise DataError(f"{path}: {name} holds pickled objects; nothing is ever unpickled. Save plain numbers")
    if fortran:
        raise DataError(f"{path}: {name} is in Fortran order; save np.ascontiguousarray of it")
    return shape, dtype


def _npz_labels(path: Path, count: int) -> np.ndarray:
    with _damage(path), zipfile.ZipFile(path) as archive:
        if "labels.npy" not in archive.namelist():
            raise DataError(f"{path}: no labels: no array named 'labels'; prepare.labelled: false does without")
    with _zip_member(path, "labels") as (stream, shape, dtype):
        if shape != (count,) or dtype.kind not in "iu":
            raise DataError(f"{path}: labels are {dtype} {shape}; {count} whole numbers expected")
        data = stream.read(count * dtype.itemsize + 1)
    if len(data) != count * dtype.itemsize:
        raise DataError(f"{path}: labels are truncated")
    labels = np.frombuffer(data, dtype)
    if labels.max(initial=0) > np.iinfo(np.int64).max:
        raise DataError(f"{path}: label {labels.max()} is out of range")
    return labels.astype(np.int64)
