"""What every source of images looks like to `prepare`, and the embedded default: handwritten digits."""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

DIGIT_LEVELS = 16  # the digits count the black pixels of 4x4 blocks: 0..16 (sklearn.datasets.load_digits, DESCR)


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


def digits() -> Source:
    """1,797 real handwritten digits, 8x8 grey, from scikit-learn; the levels 0..16 become 0..255."""
    before = random.getstate()  # importing rich, which scikit-learn does, draws from Python's global generator
    from sklearn.datasets import load_digits  # noqa: PLC0415  (0.5 s that other sources need not pay)

    random.setstate(before)
    bunch: Any = load_digits()
    images = np.rint(bunch.images * (255 / DIGIT_LEVELS)).astype(np.uint8)[..., None]
    return Source(
        count=len(images),
        shape=(8, 8, 1),
        chunks=lambda: iter([images]),
        description="Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak, 1998), test part, as in "
        "scikit-learn",
        licence="CC BY 4.0 (UCI Machine Learning Repository, doi:10.24432/C50P49)",
        labels=bunch.target.astype(np.int64),
        classes=tuple(str(name) for name in bunch.target_names),
    )
