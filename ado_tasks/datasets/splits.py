"""Three disjoint parts of a dataset: train (models see it), selection (choices are made on it), report (neither)."""

from itertools import pairwise

import numpy as np

from ado_tasks.errors import ConfigError, DataError
from ado_tasks.rng import generator

PARTS = ("train", "selection", "report")
UNUSED = "unused"  # what the parts asked for leave over


def part_sizes(asked: tuple[float, float, float], count: int) -> tuple[int, int, int]:
    """Images in each part.

    Args:
        asked: three fractions (each under 1, together at most 1) or three whole numbers.
        count: images in the dataset.

    Raises:
        ConfigError: neither three fractions nor three whole numbers, or fractions above 1 together.
        DataError: fewer images than the parts need.
    """
    names = "prepare.train, prepare.selection, prepare.report"
    if all(0 < value < 1 for value in asked):
        total = sum(asked)
        if total > 1 + 1e-9:  # rounding of three decimal fractions
            raise ConfigError(f"{names}: {asked} add up to {total:.6g}; fractions must add up to at most 1")
        # Cumulative rounding: parts that add up to 1 use every image.
        edges = [round(sum(asked[:end]) * count) for end in range(4)]
        sizes = tuple(b - a for a, b in pairwise(edges))
    elif all(value >= 1 and float(value).is_integer() for value in asked):
        sizes = tuple(int(value) for value in asked)
    else:
        raise ConfigError(f"{names}: {asked} is not allowed: three fractions under 1, or three whole numbers from 1")
    if sum(sizes) > count or min(sizes) < 1:
        raise DataError(f"fewer images than the parts need: {count} images for {dict(zip(PARTS, sizes, strict=True))}")
    return sizes  # pyright: ignore[reportReturnType]


def assign(labels: np.ndarray, groups: np.ndarray, sizes: tuple[int, int, int], seed: int) -> np.ndarray:
    """The part of each image, stratified by label, each group whole in one part.

    Images are put in an order in which every stretch holds the classes in proportion: an image that is the i-th of n of
    its (shuffled) class gets the position (i + u) / n. Groups of several images are placed first, each into the part
    that is emptiest for its size; the others fill the parts in that order.

    Args:
        labels: int64 (n,); all equal where there are no classes.
        groups: int64 (n,), equal numbers for images that must stay together.
        sizes: images in train, selection and report.
        seed: of the shuffle.

    Returns:
        str (n,): a name of `PARTS`, or `UNUSED`.

    Raises:
        DataError: a group fits no part.
    """
    order = _stratified_order(labels, seed)
    part = np.full(len(labels), len(PARTS))
    room = np.array([*sizes, len(labels) - sum(sizes)])
    wanted = np.maximum(room, 1)
    members = np.bincount(groups, minlength=len(labels))
    for group in _together(groups[order], members):
        size = members[group]
        fits = room >= size
        if not fits.any():
            raise DataError(f"{size} near-duplicates of image {group} must stay together and fit in no part: {sizes}")
        chosen = int(np.argmax(np.where(fits, room / wanted, -1)))
        part[groups == group] = chosen
        room[chosen] -= size
    alone = order[members[groups[order]] == 1]
    part[alone] = np.repeat(np.arange(len(room)), room)
    return np.array([*PARTS, UNUSED])[part]


def _together(ordered_groups: np.ndarray, members: np.ndarray) -> list[int]:
    """Groups of several images, the largest first, ties in stratified order."""
    several = [int(group) for group in dict.fromkeys(ordered_groups.tolist()) if members[group] > 1]
    return sorted(several, key=lambda group: -members[group])


def _stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    rng = generator(seed, "prepare", "split")
    position = np.empty(len(labels))
    for label in np.unique(labels):
        mine = rng.permutation(np.flatnonzero(labels == label))
        position[mine] = (np.arange(len(mine)) + rng.uniform(size=len(mine))) / len(mine)
    return np.argsort(position, kind="stable")
