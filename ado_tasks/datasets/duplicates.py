"""Find images that are the same or nearly so, so that a split can keep them together.

Exact within its stated distance: every pair of images whose root-mean-square pixel difference is at most `rms` (of
the full range 0..255) is found, without comparing all pairs at full resolution. Pairs are chained: if a is near b and
b near c, all three share a group.
"""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from ado_tasks.errors import DataError

_THUMBNAIL = 8  # blocks a side: 64 numbers a channel tell nearly all images apart
_SLACK = 1e-4  # on a distance in [0, 1]: float32 rounding of the sieve must not lose a pair (float32 eps is 1.2e-7)
_BLOCK = 512  # rows compared at a time
_VERIFY_BYTES = 1 << 25  # pixels read at a time to verify candidates
_LARGEST_SHARE = 0.1  # a group with more of the dataset than this would make the parts differ in kind


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Block means, scaled so that the distance of two thumbnails never exceeds the RMS pixel distance of the images.

    With n_b of N pixels in block b, the entry is mean_b sqrt(n_b / N); Cauchy-Schwarz gives the bound.

    Args:
        images: uint8 (n, height, width, channels).

    Returns:
        float32 (n, at most 64 * channels), of images in [0, 1].
    """
    _, height, width, channels = images.shape
    rows, cols = (np.unique(np.arange(_THUMBNAIL) * side // _THUMBNAIL) for side in (height, width))
    sums = np.add.reduceat(np.add.reduceat(images.astype(np.float32) / 255, rows, axis=1), cols, axis=2)
    sizes = np.outer(np.diff([*rows, height]), np.diff([*cols, width]))[..., None]
    return (sums / np.sqrt(sizes * height * width * channels)).reshape(len(images), -1)


def digests(images: np.ndarray) -> list[bytes]:
    """A 16-byte BLAKE2 of each image's pixels: equal where the images are equal."""
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]


def duplicate_groups(
    thumbs: np.ndarray, hashes: list[bytes], read: Callable[[np.ndarray], np.ndarray], rms: float
) -> np.ndarray:
    """The group of each image: the row of the first image of its group.

    Args:
        thumbs: `thumbnails` of all images.
        hashes: `digests` of all images.
        read: rows -> uint8 images, to compare candidates pixel by pixel.
        rms: the largest root-mean-square pixel difference of a near pair, as a fraction of the full range.

    Raises:
        DataError: near pairs chain a tenth of the dataset or more into one group; `rms` is too large for these images.
    """
    first: dict[bytes, int] = {}
    parent = np.array([first.setdefault(digest, row) for row, digest in enumerate(hashes)], dtype=np.int64)
    unique = np.flatnonzero(parent == np.arange(len(parent)))
    for a, b in _near_pairs(thumbs[unique], unique, read, rms):
        _join(parent, a, b)
    groups = np.array([_root(parent, row) for row in range(len(parent))], dtype=np.int64)
    largest = int(np.bincount(groups).max(initial=0))
    if largest > max(2, _LARGEST_SHARE * len(groups)):
        row = int(np.bincount(groups).argmax())
        raise DataError(
            f"{largest} of {len(groups)} images are near-duplicates of one another (the first is image {row}) at "
            f"prepare.near_duplicate_rms = {rms}; at most {_LARGEST_SHARE:.0%} can be kept in one part. Lower the "
            "distance, or remove the copies"
        )
    return groups


def _near_pairs(
    thumbs: np.ndarray, rows: np.ndarray, read: Callable[[np.ndarray], np.ndarray], rms: float
) -> Iterator[tuple[int, int]]:
    """Yield (row, row) of every pair within `rms`: sieved by one projection, then by thumbnails, then by pixels."""
    if len(rows) < 2:
        return
    # |u.(a - b)| <= |a - b| for a unit u: along the direction of most variance few pairs lie within reach.
    centred = thumbs - thumbs.mean(axis=0)
    direction = np.linalg.eigh(centred.T.astype(np.float64) @ centred)[1][:, -1].astype(np.float32)
    along = centred @ direction
    order = np.argsort(along, kind="stable")
    sorted_along, x, rows = along[order], centred[order], rows[order]
    squares = np.einsum("nd,nd->n", x, x)
    for start in range(0, len(x), _BLOCK):
        stop = min(start + _BLOCK, len(x))
        end = int(np.searchsorted(sorted_along, sorted_along[stop - 1] + rms + _SLACK, side="right"))
        squared = squares[start:stop, None] + squares[None, start:end] - 2 * x[start:stop] @ x[start:end].T
        i, j = np.nonzero(squared <= (rms + _SLACK) ** 2 + _SLACK**2)
        later = i < j
        yield from _verified(rows[start + i[later]], rows[start + j[later]], read, rms)


def _verified(
    a: np.ndarray, b: np.ndarray, read: Callable[[np.ndarray], np.ndarray], rms: float
) -> Iterator[tuple[int, int]]:
    if len(a) == 0:
        return
    size = int(np.prod(read(a[:1]).shape))
    step = max(1, _VERIFY_BYTES // size)
    for start in range(0, len(a), step):
        some_a, some_b = a[start : start + step], b[start : start + step]
        difference = read(some_a).astype(np.int32) - read(some_b)
        squared = np.einsum("nhwc,nhwc->n", difference, difference, dtype=np.int64)
        near = squared <= (rms * 255) ** 2 * size
        yield from zip(some_a[near].tolist(), some_b[near].tolist(), strict=True)


def _root(parent: np.ndarray, row: int) -> int:
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = int(parent[row])
    return row


def _join(parent: np.ndarray, a: int, b: int) -> None:
    low, high = sorted((_root(parent, a), _root(parent, b)))
    parent[high] = low
