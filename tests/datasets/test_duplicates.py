"""Near-duplicates: exactly the pairs that brute force finds, chained, never more memory than blocks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from ado_tasks.datasets.duplicates import digests, duplicate_groups, thumbnails
from ado_tasks.errors import DataError


def groups_of(images: np.ndarray, rms: float) -> np.ndarray:
    return duplicate_groups(thumbnails(images), digests(images), lambda rows: images[rows], rms)


def brute_force(images: np.ndarray, rms: float) -> np.ndarray:
    x = images.reshape(len(images), -1).astype(float) / 255
    near = np.sqrt(((x[:, None] - x[None]) ** 2).mean(-1)) <= rms
    component = connected_components(csr_matrix(near))[1]
    return np.array([np.flatnonzero(component == c)[0] for c in component])


def perturbed(rng: np.random.Generator, count: int, height: int, width: int, channels: int) -> np.ndarray:
    """Images of which about half are copies of others with a little noise, at distances around the thresholds."""
    images = rng.integers(0, 256, (count, height, width, channels))
    for row in range(1, count, 2):
        noise = rng.normal(size=images[0].shape) * rng.choice([0, 2, 4, 6, 8])
        images[row] = np.clip(images[rng.integers(0, row)] + noise, 0, 255)
    return images.astype(np.uint8)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(4, 21), st.integers(4, 21), st.sampled_from([1, 3]),
    st.sampled_from([0.0, 0.01, 0.02, 0.03]),
)  # fmt: skip
def test_equals_brute_force(seed, height, width, channels, rms):
    images = perturbed(np.random.default_rng(seed), 60, height, width, channels)
    expected = brute_force(images, rms)
    if np.bincount(expected).max() > 6:  # chained into more than a tenth: refused, see below
        with pytest.raises(DataError):
            groups_of(images, rms)
    else:
        np.testing.assert_array_equal(groups_of(images, rms), expected)


def test_finds_pairs_across_blocks_of_rows():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1500, 8, 8, 1)).astype(np.uint8)
    images[1400:] = np.clip(images[:100].astype(int) + rng.integers(-3, 4, (100, 8, 8, 1)), 0, 255)
    found = groups_of(images, 0.02)
    np.testing.assert_array_equal(found[1400:], np.arange(100))
    assert (np.bincount(found) > 1).sum() == 100


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(4, 30), st.integers(4, 30), st.sampled_from([1, 3]))
def test_thumbnails_are_never_farther_apart_than_images(seed, height, width, channels):
    images = perturbed(np.random.default_rng(seed), 12, height, width, channels)
    x = images.reshape(12, -1).astype(float) / 255
    small = thumbnails(images).astype(float)
    full_distance = np.sqrt(((x[:, None] - x[None]) ** 2).mean(-1))
    small_distance = np.linalg.norm(small[:, None] - small[None], axis=-1)
    assert (small_distance <= full_distance + 1e-6).all()


@pytest.mark.parametrize(("height", "width"), [(8, 8), (13, 30), (64, 5)])
def test_thumbnails_of_images_a_constant_apart_are_exactly_as_far_apart(height, width):
    """Where the bound is tight it must be met: a larger distance would lose pairs, a smaller one sieve less."""
    image = np.random.default_rng(0).integers(0, 200, (1, height, width, 3)).astype(np.uint8)
    one, other = thumbnails(np.concatenate([image, image + 51]))
    assert np.linalg.norm(one - other) == pytest.approx(51 / 255, rel=1e-5)


def test_threshold_is_inclusive_and_exact():
    images = np.full((20, 8, 8, 1), 0, np.uint8)
    images[:] = (np.arange(20) * 13)[:, None, None, None]  # far apart
    images[1] = images[0] + 5  # 5 levels everywhere: an RMS of exactly 5 / 255
    assert groups_of(images, 5 / 255)[1] == 0
    assert groups_of(images, 4.999 / 255)[1] == 1


def test_many_exact_copies_are_told_not_compared():
    images = np.zeros((30_000, 8, 8, 1), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.arange(30_000) % 251, np.arange(30_000) // 251
    images[5_000:] = images[0]
    with pytest.raises(DataError, match=r"25001 or more of 30000 images.*image 0\).*near_duplicate_rms = 0.0"):
        groups_of(images, 0.0)
