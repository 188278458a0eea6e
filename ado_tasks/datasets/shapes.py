"""Procedurally drawn shapes: one disc, square or triangle in one of six colours, with every attribute known.

They serve where real images cannot: any resolution and aspect ratio, any number, and a truth to compare with.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ado_tasks.datasets.source import Source
from ado_tasks.rng import generator

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
NUM_CLASSES = len(SHAPES) * len(COLOURS)  # label = shape * 6 + colour

# Chosen far apart from one another and from the background: nearest pair (green, cyan) is 150 of 255 apart.
RGB = np.array(
    [(230, 40, 40), (40, 180, 60), (50, 80, 230), (240, 210, 40), (210, 60, 200), (50, 200, 210)], dtype=np.float32
)
BACKGROUND = np.float32(32)  # dark grey: an edge is seen in every channel of every colour
SIZE = (0.14, 0.28)  # radius of the disc of equal area, as a fraction of the shorter side
TURN = np.pi / 12  # a slight rotation, at most 15 degrees either way
_CHUNK_PIXELS = 1 << 20  # drawn at a time: keeps the working arrays under about 50 MB

# At equal area pi r^2 a shape cannot be told by how much of the image it covers.
# Distance of an edge from the centre, in units of r: square sqrt(pi)/2; triangle sqrt(pi / (3 sqrt 3)).
_APOTHEM = np.array([1.0, np.sqrt(np.pi) / 2, np.sqrt(np.pi / (3 * np.sqrt(3)))])
_REACH = _APOTHEM * np.array([1.0, np.sqrt(2), 2.0])  # of the farthest corner, in units of r


@dataclass(frozen=True)
class Attributes:
    """What was drawn, one entry an image."""

    label: np.ndarray  # int64, shape * 6 + colour
    size: np.ndarray  # float64, radius of the disc of equal area / the shorter side
    cx: np.ndarray  # float64, centre, fraction of the width
    cy: np.ndarray  # float64, centre, fraction of the height
    turn: np.ndarray  # float64, radians, clockwise as seen


def sample_attributes(count: int, height: int, width: int, seed: int) -> Attributes:
    """Draw balanced labels, and sizes and places such that every shape lies wholly inside the image."""
    rng = generator(seed, "shapes", "attributes")
    label = rng.permutation(count) % NUM_CLASSES
    size = rng.uniform(*SIZE, count)
    reach = _REACH[label // len(COLOURS)] * size * min(height, width)
    cx = (reach + rng.uniform(size=count) * (width - 2 * reach)) / width
    cy = (reach + rng.uniform(size=count) * (height - 2 * reach)) / height
    return Attributes(label, size, cx, cy, rng.uniform(-TURN, TURN, count))


def draw(attributes: Attributes, height: int, width: int) -> np.ndarray:
    """Draw images: background + coverage (colour - background), rounded.

    Returns:
        uint8 (n, height, width, 3).
    """
    covered = coverage(attributes, height, width)[..., None]
    colour = attributes.label % len(COLOURS)
    return np.rint(BACKGROUND + covered * (RGB[colour][:, None, None, :] - BACKGROUND)).astype(np.uint8)


def coverage(attributes: Attributes, height: int, width: int) -> np.ndarray:
    """How much of each pixel a shape covers, anti-aliased: clip(1/2 - d, 0, 1), d the signed distance in pixels.

    For the polygons d is the distance to the nearest edge's line, so corners stay sharp.

    Returns:
        float32 (n, height, width).
    """
    kind = attributes.label // len(COLOURS)
    radius = attributes.size * min(height, width)
    x = (np.arange(width) + 0.5)[None, None, :] - (attributes.cx * width)[:, None, None]
    y = (np.arange(height) + 0.5)[None, :, None] - (attributes.cy * height)[:, None, None]
    distance = np.hypot(x, y) - radius[:, None, None]
    for index, corners in ((1, 4), (2, 3)):
        mine = kind == index
        # y points down, so the first normal (90 degrees) is the bottom edge's: a triangle stands on its base.
        angles = np.pi / 2 + 2 * np.pi * np.arange(corners) / corners + attributes.turn[mine, None]
        to_edges = [
            np.cos(a)[:, None, None] * x[mine] + np.sin(a)[:, None, None] * y[mine] for a in np.moveaxis(angles, 1, 0)
        ]
        distance[mine] = np.maximum.reduce(to_edges) - (_APOTHEM[index] * radius[mine])[:, None, None]
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def shapes(count: int, height: int, width: int, seed: int) -> Source:
    """`count` images of `height` x `width`, RGB, in 18 classes; deterministic from the seed."""
    known = sample_attributes(count, height, width, seed)
    per_chunk = max(1, _CHUNK_PIXELS // (height * width))

    def chunks() -> Iterator[np.ndarray]:
        for start in range(0, count, per_chunk):
            part = slice(start, start + per_chunk)
            some = Attributes(*(getattr(known, name)[part] for name in Attributes.__dataclass_fields__))
            yield draw(some, height, width)

    kind, colour = np.divmod(known.label, len(COLOURS))
    return Source(
        count=count,
        shape=(height, width, 3),
        chunks=chunks,
        description=f"procedurally drawn shapes, seed {seed}",
        licence="CC0 1.0 (drawn by this program)",
        labels=known.label.astype(np.int64),
        classes=tuple(f"{c} {s}" for s in SHAPES for c in COLOURS),
        columns={
            "shape": np.array(SHAPES)[kind],
            "colour": np.array(COLOURS)[colour],
            "size": known.size,
            "cx": known.cx,
            "cy": known.cy,
            "turn": known.turn,
        },
    )
