"""Find images that are the same or nearly so, so that a split can keep them together.

Exact within its stated distance: every pair of images whose root-mean-square pixel difference is at most `rms` (of
the full range 0..255) is found, without comparing all pairs at full resolution. Pairs are chained: if a is near b and
b near c, all three share a group.
"""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ado_tasks.errors import DataError

_THUMBNAIL = 8  # blocks a side: 64 numbers a channel tell nearly all images apart
_SLACK = 1e-4  # on a distance in [0, 1]: float32 rounding of the sieve must not lose a pair (float32 eps is 1.2e-7)
_BLOCK = 256  # rows compared at a time
_VERIFY_BYTES = 1 << 25  # pixels read at a time to verify candidates
_PAIRS_WAITING = 200_000  # found pairs that are kept before they are merged into groups
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
    groups = np.array([first.setdefault(digest, row) for row, digest in enumerate(hashes)], dtype=np.int64)
    _check_largest(groups, rms)
    unique = np.flatnonzero(groups == np.arange(len(groups)))
    waiting: list[np.ndarray] = []
    for candidates in _candidates(thumbs[unique], unique, rms):
        apart = candidates[:, groups[candidates[0]] != groups[candidates[1]]]
        waiting.append(_verified(apart, read, rms))
        if sum(pairs.shape[1] for pairs in waiting) > _PAIRS_WAITING:
            groups, waiting = _merged(groups, waiting), []
            _check_largest(groups, rms)
    groups = _merged(groups, waiting)
    _check_largest(groups, rms)
    return groups


def _check_largest(groups: np.ndarray, rms: float) -> None:
    sizes = np.bincount(groups)
    if sizes.max(initial=0) > max(2, _LARGEST_SHARE * len(groups)):
        raise DataError(
            f"{sizes.max()} or more of {len(groups)} images are near-duplicates of one another (the first is image "
            f"{sizes.argmax()}) at prepare.near_duplicate_rms = {rms}; at most {_LARGEST_SHARE:.0%} can be kept in one "
            "part. Lower the distance, or remove the copies"
        )


def _merged(groups: np.ndarray, pairs: list[np.ndarray]) -> np.ndarray:
    """Groups after chaining these pairs; a group keeps the number of its first row."""
    a, b = np.concatenate([np.stack([np.arange(len(groups)), groups]), *pairs], axis=1)
    graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(len(groups), len(groups)))
    component = connected_components(graph, directed=False)[1]
    first = np.full(component.max(initial=-1) + 1, len(groups))
    np.minimum.at(first, component, np.arange(len(groups)))
    return first[component]


def _candidates(thumbs: np.ndarray, rows: np.ndarray, rms: float) -> Iterator[np.ndarray]:
    """(2, n) rows of all pairs that may lie within `rms`, sieved by one projection and then by thumbnails."""
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
        yield np.stack([rows[start + i[later]], rows[start + j[later]]])


def _verified(pairs: np.ndarray, read: Callable[[np.ndarray], np.ndarray], rms: float) -> np.ndarray:
    """Those of (2, n) pairs whose pixels lie within `rms`, in exact integer arithmetic."""
    near = np.zeros(pairs.shape[1], bool)
    size = int(np.prod(read(pairs[0, :1]).shape[1:]))
    step = max(1, _VERIFY_BYTES // size)
    for start in range(0, len(near), step):
        a, b = pairs[:, start : start + step]
        difference = read(a).astype(np.int32) - read(b)
        squared = np.einsum("nhwc,nhwc->n", difference, difference, dtype=np.int64)
        near[start : start + step] = squared <= (rms * 255) ** 2 * size
    return pairs[:, near]
