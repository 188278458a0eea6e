"""The complexity measure: exact on images whose gradient is known, and in agreement with compressed length."""

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import sobel
from scipy.stats import spearmanr

from ado_tasks.datasets.complexity import complexity


def test_constant_images_have_none():
    images = np.full((3, 9, 7, 3), [[[[0]]], [[[128]]], [[[255]]]], np.uint8)
    np.testing.assert_array_equal(complexity(images), 0)


def test_agrees_with_scipys_sobel_in_float64():
    images = np.random.default_rng(0).integers(0, 256, (5, 12, 9, 3)).astype(np.uint8)
    # One plane at a time: SciPy smooths along every other axis it is given.
    planes = (images / 255.0).transpose(0, 3, 1, 2).reshape(-1, 12, 9)
    magnitude = [np.hypot(sobel(p, axis=0, mode="nearest"), sobel(p, axis=1, mode="nearest")) / 4 for p in planes]
    expected = np.mean(magnitude, axis=(1, 2)).reshape(5, 3).mean(axis=1) / np.sqrt(2)
    np.testing.assert_allclose(complexity(images), expected, rtol=1e-5)


def test_a_ramp_has_the_gradient_of_its_slope():
    ramp = np.broadcast_to((np.arange(16) * 16)[None, None, :, None], (1, 16, 16, 1)).astype(np.uint8)
    inner = 2 * 16 / 255  # a Sobel response over 4 is the difference across two pixels
    border = 16 / 255  # a repeated border halves it
    assert complexity(ramp)[0] == pytest.approx((14 * inner + 2 * border) / 16 / np.sqrt(2), rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(4, 20), st.integers(4, 20), st.sampled_from([1, 3]))
def test_lies_between_0_and_1_and_ignores_turns(seed, height, width, channels):
    rng = np.random.default_rng(seed)
    # Two levels, as steep as images can be.
    images = (rng.integers(0, 2, (4, height, width, channels)) * 255).astype(np.uint8)
    score = complexity(images)
    assert ((score >= 0) & (score <= 1)).all()
    np.testing.assert_allclose(complexity(images[:, ::-1, ::-1]), score, rtol=1e-5)
    np.testing.assert_allclose(complexity(images.transpose(0, 2, 1, 3)), score, rtol=1e-5)


def test_ranks_texture_as_compression_does():
    """On images with more and more noise the measure rises as zlib's length does."""
    rng = np.random.default_rng(0)
    images = np.stack([128 + rng.integers(-level, level + 1, (32, 32, 1)) for level in range(1, 100)]).astype(np.uint8)
    length = [len(zlib.compress(image.tobytes(), 9)) for image in images]
    assert spearmanr(complexity(images), length).statistic > 0.99
