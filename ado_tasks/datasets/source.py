"""What every source of images looks like to `prepare`, and the embedded default: handwritten digits."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ado_tasks.errors import DataError

DIGITS_FILE = "datasets/data/digits.csv.gz"  # in scikit-learn's package: a row an image, 64 levels and the digit
DIGIT_LEVELS = 16  # the digits count the black pixels of 4x4 blocks: 0..16 (sklearn.datasets.load_digits, DESCR)


@dataclass(frozen=True)
class Parted:
    """Parts and groups as the source knows them (blocks of a photograph); near-duplicates are then not looked for."""

    parts: np.ndarray  # str (count,), as `splits.assign` names them
    groups: np.ndarray  # int64 (count,): the first row of each one's group


@dataclass(frozen=True)
class Source:
    """Images that can be read once, in order, without ever being in memory together."""

    count: int  # images
    shape: tuple[int, int, int]  # height, width, channels
    chunks: Callable[[], Iterator[np.ndarray]]  # uint8 (n, height, width, channels), in row order
    description: str  # one line for the manifest
    licence: str  # what the images may be used for, or "unknown"
    labels: np.ndarray | None = None  # int64 (count,), 0 .. len(classes) - 1
    classes: tuple[str, ...] = ()  # the name of each label
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)  # further columns of the index, (count,) each
    parted: Parted | None = None  # where the source itself decides what belongs together and where


def digits() -> Source:
    """1,797 real handwritten digits, 8x8 grey, from scikit-learn; the levels 0..16 become 0..255.

    Its file is read where it lies: importing scikit-learn would take a second, draw from Python's global generator and
    write into the environment, and `prepare` is pure.

    Raises:
        DataError: scikit-learn, or its file, is not there.
    """
    package = find_spec("sklearn")
    file = Path(package.origin if package and package.origin else "sklearn").parent / DIGITS_FILE
    try:
        table = np.loadtxt(file, delimiter=",")
    except (OSError, ValueError, EOFError) as problem:
        raise DataError(f"{file}: scikit-learn's digits cannot be read ({problem}); run `make install`") from None
    images = np.rint(table[:, :-1].reshape(-1, 8, 8, 1) * (255 / DIGIT_LEVELS)).astype(np.uint8)
    return Source(
        count=len(images),
        shape=(8, 8, 1),
        chunks=lambda: iter([images]),
        description="Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak, 1998), test part, as in "
        "scikit-learn",
        licence="CC BY 4.0 (UCI Machine Learning Repository, doi:10.24432/C50P49)",
        labels=table[:, -1].astype(np.int64),
        classes=tuple("0123456789"),
    )
