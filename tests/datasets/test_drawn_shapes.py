"""Drawn shapes show what their attributes say: area, place, colour, form; any resolution and aspect."""

import numpy as np
import pytest

from ado_tasks.datasets.shapes import COLOURS, NUM_CLASSES, SHAPES, Attributes, draw, sample_attributes, shapes

BACKGROUND = 32


def coverage(images: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """How much of each pixel the shape covers, from the drawn levels alone."""
    full = np.array([image.reshape(-1, 3)[np.abs(image.reshape(-1, 3).astype(int) - BACKGROUND).sum(1).argmax()]
                     for image in images], float)  # fmt: skip
    ink = np.abs(images.astype(float) - BACKGROUND).sum(-1)
    return ink / np.abs(full - BACKGROUND).sum(-1)[:, None, None]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (96, 40)])
def test_area_and_centroid_are_those_of_the_attributes(height, width):
    known = sample_attributes(180, height, width, seed=3)
    covered = coverage(draw(known, height, width), known.label % len(COLOURS))
    area = covered.sum(axis=(1, 2))
    expected = np.pi * (known.size * min(height, width)) ** 2  # all shapes have the area of the disc
    # Half a level in 255 of the outline, and corners sharper than a pixel: 4 % at the smallest of these sizes.
    assert np.abs(area / expected - 1).max() < 0.04
    cx = (covered * (np.arange(width) + 0.5)).sum(axis=(1, 2)) / area / width
    cy = (covered * (np.arange(height) + 0.5)[:, None]).sum(axis=(1, 2)) / area / height
    assert np.abs(cx - known.cx).max() * width < 0.2  # pixels
    assert np.abs(cy - known.cy).max() * height < 0.2


def test_forms_differ_by_their_moments():
    """The ratio (second moment) / (area²) is 1/(2π) for a disc, 1/6 for a square, √3/9 for an equilateral triangle."""
    size = np.full(3, 0.25)
    known = Attributes(np.array([0, 6, 12]), size, np.full(3, 0.5), np.full(3, 0.5), np.array([0.0, 0.2, -0.1]))
    covered = coverage(draw(known, 128, 128), known.label % 6)
    y, x = np.mgrid[:128, :128] + 0.5 - 64.0
    second = (covered * (x**2 + y**2)).sum(axis=(1, 2)) / covered.sum(axis=(1, 2)) ** 2
    np.testing.assert_allclose(second, [1 / (2 * np.pi), 1 / 6, np.sqrt(3) / 9], rtol=0.01)


def test_a_triangle_stands_on_its_base():
    upright = Attributes(np.array([12]), np.array([0.25]), np.array([0.5]), np.array([0.5]), np.array([0.0]))
    covered = coverage(draw(upright, 64, 64), np.array([0]))[0]
    rows = np.flatnonzero(covered.sum(1) > 0.5)
    assert covered[rows[-2]].sum() > 5 * covered[rows[1]].sum()  # wide at the bottom, pointed at the top


def test_edges_are_anti_aliased_and_move_by_less_than_a_pixel():
    one = Attributes(np.array([0]), np.array([0.25]), np.array([0.5]), np.array([0.5]), np.array([0.0]))
    moved = Attributes(one.label, one.size, one.cx + 0.25 / 32, one.cy, one.turn)  # a quarter of a pixel
    a, b = draw(one, 32, 32), draw(moved, 32, 32)
    assert len(np.unique(a[..., 0])) >= 6
    assert 0 < np.abs(a.astype(int) - b).max() < 0.5 * (230 - BACKGROUND)


def test_every_shape_lies_wholly_inside():
    for height, width in ((16, 16), (16, 48)):
        known = sample_attributes(2000, height, width, seed=0)
        # The same shapes on a canvas with one more pixel all around: nothing may reach it, but for the tip of a
        # triangle that touches the border (its edges' lines pass sin 30° / 2 = 1/4 pixel from the next centre).
        wider = Attributes(
            known.label,
            known.size * 16 / 18,
            (known.cx * width + 1) / (width + 2),
            (known.cy * 16 + 1) / 18,
            known.turn,
        )
        ink = draw(wider, height + 2, width + 2).astype(float) - BACKGROUND
        ring = np.concatenate([ink[:, [0, -1]].reshape(2000, -1), ink[:, :, [0, -1]].reshape(2000, -1)], axis=1)
        most = ring.max(axis=1) / ink.reshape(2000, -1).max(axis=1)
        kind = known.label // 6
        assert most[kind == 0].max() <= 0.01
        assert most[kind == 1].max() <= 0.16  # a corner of 90 degrees: (1 - sin 45 degrees) / 2
        assert most[kind == 2].max() <= 0.26


def test_labels_are_balanced_and_name_shape_and_colour():
    source = shapes(1000, 16, 16, seed=0)
    assert source.labels is not None
    counts = np.bincount(source.labels, minlength=NUM_CLASSES)
    assert counts.max() - counts.min() <= 1
    for label, shape, colour in zip(source.labels, source.columns["shape"], source.columns["colour"], strict=True):
        assert source.classes[label] == f"{colour} {shape}"
        assert label == SHAPES.index(shape) * 6 + COLOURS.index(colour)


def test_colours_are_told_apart_by_the_nearest_mean():
    known = sample_attributes(600, 16, 16, seed=1)
    images = draw(known, 16, 16).reshape(600, -1, 3).astype(int)
    peak = images[np.arange(600), np.abs(images - BACKGROUND).sum(-1).argmax(1)]
    colour = known.label % 6
    means = np.array([peak[colour == c].mean(0) for c in range(6)])
    nearest = np.linalg.norm(peak[:, None] - means, axis=-1).argmin(1)
    assert (nearest == colour).all()


def test_chunks_do_not_change_what_is_drawn():
    source = shapes(40, 256, 512, seed=5)  # 8 images fill a chunk at this size
    chunks = list(source.chunks())
    assert len(chunks) > 1
    whole = draw(sample_attributes(40, 256, 512, seed=5), 256, 512)
    np.testing.assert_array_equal(np.concatenate(chunks), whole)


def test_seed_decides():
    first, again, other = (next(shapes(18, 16, 16, seed=s).chunks()) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
