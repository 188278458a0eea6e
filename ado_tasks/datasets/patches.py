"""Patches of scikit-learn's two embedded photographs: natural image statistics without a download.

A photograph is cut in square blocks with a guard band between them. Blocks, not patches, are drawn for the parts;
every patch lies wholly in one block, so two parts share no pixel, and no 8x8 square of the files' JPEG compression
where block and guard are multiples of 8. Patches of one block overlap: they are one observation, and the metrics
resample by block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ado_tasks.datasets.folder import Decoding, decode
from ado_tasks.datasets.source import Parted, Source
from ado_tasks.datasets.splits import PARTS, assign, part_sizes
from ado_tasks.errors import ConfigError, DataError

PHOTOGRAPHS = ("china", "flower")  # of scikit-learn's package: datasets/images/<name>.jpg
SIZE = (427, 640)  # pixels, height and width of both
MIN_BLOCKS = 3  # in each part: an interval of KID leaves one out and needs pairs among the others
_LICENCE = "CC BY 2.0 (china: danielbuechele, flower: vultilion; both flickr.com, see scikit-learn's datasets/images)"


@dataclass(frozen=True)
class Cut:
    """How photographs become patches; all in pixels."""

    height: int = 32  # of a patch
    width: int = 32  # of a patch
    block: int = 64  # side of a block
    guard: int = 8  # between two blocks: in no patch
    stride: int = 3  # between the patches of a block
    flips: bool = False  # train: each patch also mirrored left to right


@dataclass(frozen=True)
class Places:
    """Where each patch lies, one entry a patch; those of a block follow one another."""

    photograph: np.ndarray  # int64, of PHOTOGRAPHS
    block: np.ndarray  # int64, counted through both photographs, row by row
    top: np.ndarray  # int64, pixels
    left: np.ndarray  # int64, pixels
    mirrored: np.ndarray  # bool
    part: np.ndarray  # str, as `splits.assign` names them


def block_corners(cut: Cut) -> np.ndarray:
    """int64 (b, 3): photograph, top, left of every block that fits whole.

    Raises:
        ConfigError: a patch does not fit into a block, or no block into a photograph.
    """
    if max(cut.height, cut.width) > cut.block or cut.block > min(SIZE):
        raise ConfigError(
            f"prepare.block: {cut.block} is not allowed: from a patch's longer side, {max(cut.height, cut.width)}, "
            f"to a photograph's shorter, {min(SIZE)}"
        )
    tops, lefts = (np.arange(0, side - cut.block + 1, cut.block + cut.guard) for side in SIZE)
    which, top, left = np.meshgrid(np.arange(len(PHOTOGRAPHS)), tops, lefts, indexing="ij")
    return np.stack([which.ravel(), top.ravel(), left.ravel()], axis=1)


def parted_blocks(corners: np.ndarray, shares: tuple[float, float, float], seed: int) -> np.ndarray:
    """The part of each block: `shares` of the blocks at random, each photograph in proportion.

    Raises:
        ConfigError: shares that are no fractions.
        DataError: fewer than 3 blocks in a part.
    """
    if not all(share < 1 for share in shares):
        raise ConfigError(
            f"prepare.train, prepare.selection, prepare.report: {shares} is not allowed: the source 'patches' parts "
            "blocks, so three fractions under 1"
        )
    sizes = part_sizes(shares, len(corners))
    if min(sizes) < MIN_BLOCKS:
        raise DataError(
            f"{len(corners)} blocks give the parts {sizes}; at least {MIN_BLOCKS} each are needed: lower prepare.block "
            "or prepare.guard"
        )
    return assign(corners[:, 0], np.arange(len(corners)), sizes, seed)


def places(cut: Cut, shares: tuple[float, float, float], seed: int) -> Places:
    """Every patch: block by block, row by row; mirrored ones behind the others of their block, in train only.

    Raises:
        ConfigError, DataError: see `block_corners` and `parted_blocks`.
    """
    corners = block_corners(cut)
    parts = parted_blocks(corners, shares, seed)
    down, right = (np.arange(0, cut.block - side + 1, cut.stride) for side in (cut.height, cut.width))
    inside = np.stack(np.meshgrid(down, right, indexing="ij"), axis=-1).reshape(-1, 2)
    twice = np.where(parts == PARTS[0], 1 + cut.flips, 1)
    block = np.repeat(np.arange(len(corners)), twice * len(inside))
    within = np.concatenate([np.tile(inside, (times, 1)) for times in twice])
    mirrored = np.concatenate([np.repeat(np.arange(times) == 1, len(inside)) for times in twice])
    return Places(
        photograph=corners[block, 0],
        block=block,
        top=corners[block, 1] + within[:, 0],
        left=corners[block, 2] + within[:, 1],
        mirrored=mirrored,
        part=parts[block],
    )


def patches(cut: Cut, shares: tuple[float, float, float], seed: int) -> Source:
    """Patches of both photographs, RGB, without classes, with their parts and, as groups, their blocks.

    The files are read where they lie, as those of `digits` are.

    Raises:
        ConfigError, DataError: see `block_corners` and `parted_blocks`; scikit-learn's photographs are not there.
    """
    where = places(cut, shares, seed)
    files = [_file(name) for name in PHOTOGRAPHS]

    def chunks() -> Iterator[np.ndarray]:
        photographs = [decode(file, SIZE, Decoding()) for file in files]
        for block in np.unique(where.block):
            rows = np.flatnonzero(where.block == block)
            yield np.stack([_cut_out(photographs[where.photograph[row]], where, int(row), cut) for row in rows])

    first = np.searchsorted(where.block, where.block)  # the first row of each one's block: rows follow the blocks
    return Source(
        count=len(where.block),
        shape=(cut.height, cut.width, 3),
        chunks=chunks,
        description=f"patches of scikit-learn's photographs {' and '.join(PHOTOGRAPHS)}, by {len(np.unique(first))} "
        f"blocks of {cut.block}x{cut.block} pixels, {cut.guard} apart",
        licence=_LICENCE,
        columns={
            "photograph": np.array(PHOTOGRAPHS)[where.photograph],
            "block": where.block,
            "top": where.top,
            "left": where.left,
            "mirrored": where.mirrored,
        },
        parted=Parted(where.part, first),
    )


def _file(name: str) -> Path:
    package = find_spec("sklearn")
    file = Path(package.origin if package and package.origin else "sklearn").parent / f"datasets/images/{name}.jpg"
    if not file.is_file():
        raise DataError(f"{file}: scikit-learn's photograph is not there; run `make install`")
    return file


def _cut_out(photograph: np.ndarray, where: Places, row: int, cut: Cut) -> np.ndarray:
    top, left = where.top[row], where.left[row]
    patch = photograph[top : top + cut.height, left : left + cut.width]
    return patch[:, ::-1] if where.mirrored[row] else patch
