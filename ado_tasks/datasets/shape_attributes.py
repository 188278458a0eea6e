"""Read shape, colour, size, place and turn off pictures of drawn shapes: by fitting a drawing to each.

Colour: the one whose mixtures with the background leave the least of the picture unexplained. Its mixing share at each
pixel is the coverage, to which each shape is fitted by least squares (Gauss & Newton), from the start that the
coverage's moments give; the shape that fits best is the one read. Nothing is learned, so no generator was trained to
please it.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np

from ado_tasks.datasets.shapes import BACKGROUND, COLOURS, RGB, SHAPES, TURN, Attributes, coverage
from ado_tasks.errors import DataError

_AT_A_TIME = 250  # pictures: 4 derivatives of 32x32 pixels each are 8 MB
_FAINT = 0.15  # coverage under which a pixel counts as background in the moments that a fit starts from
_TURNS = np.linspace(-TURN, TURN, 5)  # where fits of the polygons start
_ROUNDS = 4  # of Gauss-Newton: two more would move places in drawn images by under 0.02 pixels
_STEP = 0.05  # pixels, and of the turn radians: of the differences that derivatives are taken by
_LONGEST = 1.0  # pixels, likewise: a round moves no attribute by more
_RIDGE = 1e-3  # of the mean curvature: a disc's turn has none


@dataclass(frozen=True)
class Reading:
    """What pictures show, one entry a picture."""

    shape: np.ndarray  # int64, of SHAPES
    colour: np.ndarray  # int64, of COLOURS
    radius: np.ndarray  # float64, pixels, of the disc of equal area
    x: np.ndarray  # float64, pixels, of the centre
    y: np.ndarray  # float64, pixels
    turn: np.ndarray  # float64, radians; 0 of a disc
    misfit: np.ndarray  # float64: root mean square difference of picture and fitted drawing, in levels of 255

    @property
    def label(self) -> np.ndarray:
        """The class of each: shape * 6 + colour."""
        return self.shape * len(COLOURS) + self.colour


def read_shapes(pictures: np.ndarray, threads: int = 1) -> Reading:
    """The attributes of each of float (n, height, width, 3) pictures in [-1, 1]; what lies outside is clipped.

    A picture that shows no shape gets the one that fits least badly: `misfit` tells.

    Raises:
        DataError: the pictures have another shape, or a value is not finite.
    """
    if pictures.ndim != 4 or pictures.shape[-1] != RGB.shape[1]:
        raise DataError(f"pictures of drawn shapes: (n, height, width, 3) is needed, got {pictures.shape}")
    if not np.isfinite(pictures).all():
        raise DataError("pictures of drawn shapes: a value is not finite")
    pieces = [pictures[start : start + _AT_A_TIME] for start in range(0, len(pictures), _AT_A_TIME)]
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(_read, pieces))
    return Reading(*(np.concatenate([getattr(one, each.name) for one in found]) for each in fields(Reading)))


def _read(pictures: np.ndarray) -> Reading:
    levels = (np.clip(pictures, -1, 1).astype(np.float64) + 1) * 127.5
    colour, mixing = read_colour(levels)
    fits = [_fitted(kind, mixing) for kind in range(len(SHAPES))]
    shape = np.argmin([left for _, left in fits], axis=0)
    radius, x, y, turn = np.stack([found for found, _ in fits])[shape, np.arange(len(shape))].T
    drawn = coverage(_attributes(shape, np.stack([radius, x, y, turn], axis=1), *mixing.shape[1:]), *mixing.shape[1:])
    ideal = BACKGROUND + drawn[..., None] * (RGB[colour][:, None, None, :] - BACKGROUND)
    misfit = np.sqrt(np.square(levels - ideal).mean(axis=(1, 2, 3)))
    return Reading(shape.astype(np.int64), colour, radius, x, y, np.where(shape == 0, 0.0, turn), misfit)


def read_colour(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The colour of each picture (n, height, width, 3), levels 0..255, and its share at each pixel.

    share = (p - b).(c - b) / |c - b|^2 of a pixel p, background b and colour c; the colour is that with the least
    sum of |p - b - clip(share, 0, 1) (c - b)|^2.

    Returns:
        int64 (n,), float64 (n, height, width); shares are not clipped, so that their noise has mean 0.
    """
    beyond = levels - BACKGROUND
    shares, left = [], []
    for towards in RGB.astype(np.float64) - BACKGROUND:
        share = beyond @ towards / (towards @ towards)
        shares.append(share)
        left.append(np.square(beyond - np.clip(share, 0, 1)[..., None] * towards).sum(axis=(1, 2, 3)))
    colour = np.argmin(left, axis=0)
    return colour, np.stack(shares)[colour, np.arange(len(colour))]


def moments(mixing: np.ndarray) -> np.ndarray:
    """Radius of the disc of equal area, and centre, all in pixels, float64 (n, 3), of coverages (n, height, width)."""
    covered = np.where(mixing < _FAINT, 0, np.minimum(mixing, 1))
    area = np.maximum(covered.sum(axis=(1, 2)), 1)
    height, width = mixing.shape[1:]
    x = (covered.sum(axis=1) @ (np.arange(width) + 0.5)) / area
    y = (covered.sum(axis=2) @ (np.arange(height) + 0.5)) / area
    return np.stack([np.sqrt(area / np.pi), x, y], axis=1)


def _fitted(kind: int, mixing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Radius, x, y, turn (n, 4) of the drawings of a shape that come nearest to coverages, and what is left (n,)."""
    height, width = mixing.shape[1:]

    def render(at: np.ndarray) -> np.ndarray:
        return coverage(_attributes(np.full(len(at), kind), at, height, width), height, width).astype(np.float64)

    begin = moments(mixing)
    turns = _TURNS if kind else np.zeros(1)
    starts = [np.column_stack([begin, np.full(len(begin), turn)]) for turn in turns]
    left = np.array([_left(render(start), mixing) for start in starts])
    best = np.stack(starts)[left.argmin(axis=0), np.arange(len(begin))]
    least, at = left.min(axis=0), best
    for _ in range(_ROUNDS):
        at = _step(render, at, mixing)
        found = _left(render(at), mixing)
        better = found < least
        best, least = np.where(better[:, None], at, best), np.where(better, found, least)
    return best, least


def _left(drawn: np.ndarray, mixing: np.ndarray) -> np.ndarray:
    return np.square(drawn - mixing).sum(axis=(1, 2))


def _step(render: Callable[[np.ndarray], np.ndarray], at: np.ndarray, mixing: np.ndarray) -> np.ndarray:
    """One step of Gauss & Newton, derivatives by forward differences: at + (J'J + ridge)^-1 J' (mixing - drawn)."""
    drawn = render(at)
    slopes = [(render(at + _STEP * towards) - drawn) / _STEP for towards in np.eye(at.shape[1])]
    jacobian = np.stack(slopes, axis=-1).reshape(len(at), -1, at.shape[1])
    curvature = np.einsum("npi,npj->nij", jacobian, jacobian)
    ridge = _RIDGE * np.trace(curvature, axis1=1, axis2=2) / at.shape[1] + 1e-9
    curvature += ridge[:, None, None] * np.eye(at.shape[1])
    towards = np.einsum("npi,np->ni", jacobian, (mixing - drawn).reshape(len(at), -1))
    moved = at + np.clip(np.linalg.solve(curvature, towards[..., None])[..., 0], -_LONGEST, _LONGEST)
    height, width = mixing.shape[1:]
    lowest = np.array([0.5, 0, 0, -2 * TURN])
    return np.clip(moved, lowest, np.array([max(height, width), width, height, 2 * TURN]))


def _attributes(kind: np.ndarray, at: np.ndarray, height: int, width: int) -> Attributes:
    radius, x, y, turn = at.T
    return Attributes(kind * len(COLOURS), radius / min(height, width), x / width, y / height, turn)


@dataclass(frozen=True)
class Tolerance:
    """How far two pictures' shapes may lie apart and still count as agreeing; pixels."""

    place: float = 1.0  # between the centres
    radius: float = 0.5


def agree(one: Reading, other: Reading, tolerance: Tolerance) -> np.ndarray:
    """Whether, (n,), both the place and the size agree within the tolerance. Row i of both is from the same noise."""
    apart = np.hypot(one.x - other.x, one.y - other.y)
    return (apart <= tolerance.place) & (np.abs(one.radius - other.radius) <= tolerance.radius)
