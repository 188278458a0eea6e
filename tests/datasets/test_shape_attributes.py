"""What is read off pictures of drawn shapes is what was drawn: exact, soft and noisy, and by an independent drawing."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ado_tasks.datasets.shape_attributes import Reading, Tolerance, agree, moments, read_colour, read_shapes
from ado_tasks.datasets.shapes import BACKGROUND, RGB, Attributes, coverage, draw, sample_attributes
from ado_tasks.errors import DataError


def floats(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / 127.5 - 1


def errors(found: Reading, known: Attributes, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels by which places and radii are off."""
    place = np.hypot(found.x - known.cx * width, found.y - known.cy * height)
    return place, np.abs(found.radius - known.size * min(height, width))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 36)])
def test_exact_on_drawn_images(height, width):
    known = sample_attributes(90, height, width, seed=3)
    found = read_shapes(floats(draw(known, height, width)), threads=2)
    np.testing.assert_array_equal(found.label, known.label)
    place, radius = errors(found, known, height, width)
    assert np.median(place) < 0.002
    assert place.max() < 0.05
    assert radius.max() < 0.05
    turned = known.label >= 6
    assert np.abs(found.turn - known.turn)[turned].max() < 0.02
    assert np.median(found.misfit) < 0.3  # rounding to levels leaves 0.29 where a pixel is mixed


def test_soft_and_noisy_pictures_are_read_within_a_fifth_of_the_tolerance():
    """As soft as few steps make them, and noise of 8 levels: the reader's own error decides nothing."""
    known = sample_attributes(180, 32, 32, seed=4)
    noise = np.random.default_rng(0).normal(scale=8 / 127.5, size=(180, 32, 32, 3))
    found = read_shapes(gaussian_filter(floats(draw(known, 32, 32)), (0, 0.7, 0.7, 0)) + noise)
    np.testing.assert_array_equal(found.label, known.label)
    place, radius = errors(found, known, 32, 32)
    assert np.quantile(place, 0.95) < 0.2 * Tolerance().place
    assert np.quantile(radius, 0.95) < 0.3 * Tolerance().radius


def test_a_disc_and_a_square_that_another_program_drew():
    """Coverage by counting 16x16 points a pixel, from the forms' definitions alone."""
    fine = (np.arange(32 * 16) + 0.5) / 16
    y, x = fine[:, None], fine[None, :]
    disc = np.hypot(x - 13.3, y - 17.6) <= 6.2
    side = np.sqrt(np.pi) * 5.5  # of the area of a disc of radius 5.5
    square = (np.abs(x - 20.4) <= side / 2) & (np.abs(y - 11.9) <= side / 2)
    covered = np.stack([one.reshape(32, 16, 32, 16).mean(axis=(1, 3)) for one in (disc, square)])
    colours = RGB[[4, 1]]
    pictures = BACKGROUND + covered[..., None] * (colours[:, None, None, :] - BACKGROUND)
    found = read_shapes(pictures / 127.5 - 1)
    np.testing.assert_array_equal(found.shape, [0, 1])
    np.testing.assert_array_equal(found.colour, [4, 1])
    np.testing.assert_allclose(found.radius, [6.2, 5.5], atol=0.05)
    np.testing.assert_allclose(found.x, [13.3, 20.4], atol=0.05)
    np.testing.assert_allclose(found.y, [17.6, 11.9], atol=0.05)


def test_moments_of_a_block_of_pixels():
    mixing = np.zeros((1, 12, 20))
    mixing[0, 2:6, 7:12] = 1  # 20 pixels, centre at row 4, column 9.5
    np.testing.assert_allclose(moments(mixing), [[np.sqrt(20 / np.pi), 9.5, 4.0]])


def test_pale_colours_and_their_shares():
    """A shape of 60 % of its colour keeps its name, and the share says 60 %."""
    known = sample_attributes(60, 24, 24, seed=5)
    full = draw(known, 24, 24).astype(np.float64)
    colour, share = read_colour(BACKGROUND + 0.6 * (full - BACKGROUND))
    np.testing.assert_array_equal(colour, known.label % 6)
    np.testing.assert_allclose(share, 0.6 * coverage(known, 24, 24), atol=0.005)


def test_a_background_that_is_too_dark_names_no_colour():
    """It lies on the other side of every colour: a share under 0 explains nothing, or the background would decide."""
    known = sample_attributes(36, 24, 24, seed=6)
    drawn = draw(known, 24, 24).astype(np.float64)
    drawn[coverage(known, 24, 24) == 0] = 4
    np.testing.assert_array_equal(read_colour(drawn)[0], known.label % 6)


def test_what_shows_no_shape_has_a_large_misfit():
    noise = np.random.default_rng(1).uniform(-1, 1, (20, 32, 32, 3))
    drawn = read_shapes(floats(draw(sample_attributes(20, 32, 32, 0), 32, 32)))
    found = read_shapes(noise)
    assert found.misfit.min() > 20 * drawn.misfit.max()
    assert np.isfinite([found.radius, found.x, found.y]).all()
    empty = read_shapes(np.full((2, 32, 32, 3), BACKGROUND / 127.5 - 1))
    assert empty.radius.max() < 1.5


def test_threads_and_batches_change_nothing(monkeypatch):
    from ado_tasks.datasets import shape_attributes

    pictures = floats(draw(sample_attributes(30, 16, 16, seed=0), 16, 16))
    whole = read_shapes(pictures)
    monkeypatch.setattr(shape_attributes, "_AT_A_TIME", 7)
    pieces = read_shapes(pictures, threads=3)
    for name in Reading.__dataclass_fields__:
        np.testing.assert_allclose(getattr(whole, name), getattr(pieces, name), atol=1e-9)


def test_agreement_is_of_place_and_radius():
    def reading(x: list[float], y: list[float], radius: list[float]) -> Reading:
        zeros = np.zeros(len(x))
        return Reading(zeros, zeros, np.array(radius), np.array(x), np.array(y), zeros, zeros)

    one = reading([10.0] * 5, [10.0] * 5, [5.0] * 5)
    other = reading([10.7, 10.8, 10.0, 10.0, 9.5], [10.7, 10.5, 10.0, 10.0, 10.0], [5.0, 5.0, 5.49, 4.4, 5.3])
    assert agree(one, other, Tolerance(1.0, 0.5)).tolist() == [True, True, True, False, True]
    assert agree(one, other, Tolerance(0.95, 0.5)).tolist() == [False, True, True, False, True]
    assert agree(one, other, Tolerance(1.0, 0.25)).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("pictures", [np.zeros((2, 8, 8, 1)), np.zeros((8, 8, 3)), np.full((1, 8, 8, 3), np.nan)])
def test_what_is_no_picture_is_named(pictures):
    with pytest.raises(DataError, match="pictures of drawn shapes"):
        read_shapes(pictures)
