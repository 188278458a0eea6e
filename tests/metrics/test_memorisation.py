"""Copying is seen, drawing anew is not taken for it, and the interval covers."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from ado_tasks.errors import StatisticsError
from ado_tasks.metrics.memorisation import memorisation
from ado_tasks.metrics.neighbours import nearest


def images(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=(n, 3, 3, 1)).astype(np.float32)


def test_figure_is_the_ratio_of_medians() -> None:
    rng = np.random.default_rng(0)
    generated, held_out, train = rng.normal(size=(30, 4)), rng.normal(size=(20, 4)), rng.normal(size=(50, 4))
    found = memorisation(generated, held_out, train, rng=np.random.default_rng(1))
    truth = np.median(cdist(generated, train).min(axis=1)) / np.median(cdist(held_out, train).min(axis=1))
    assert found.value == pytest.approx(truth)
    assert found.low < found.value < found.high
    assert found == memorisation(generated, held_out, train, rng=np.random.default_rng(1))


def test_copies_are_seen_and_fresh_samples_pass() -> None:
    rng = np.random.default_rng(2)
    train, held_out = images(rng, 1000), images(rng, 400)
    fresh = memorisation(images(rng, 2000), held_out, train, rng=rng)
    copied = memorisation(train[:400] + 0.01 * images(rng, 400), held_out, train, rng=rng)
    exact = memorisation(train[:400], held_out, train, rng=rng)
    assert fresh.no_copying
    assert fresh.value == pytest.approx(1, abs=0.06)
    assert not copied.no_copying
    assert copied.high < 0.1
    assert (exact.value, exact.low, exact.high, exact.close) == (0.0, 0.0, 0.0, 1.0)


def test_copying_now_and_then_shows_in_the_close_share() -> None:
    rng = np.random.default_rng(3)
    train, held_out = images(rng, 1000), images(rng, 400)
    mixed = np.concatenate([train[:100] + 0.01 * images(rng, 100), images(rng, 900)])
    assert memorisation(mixed, held_out, train, rng=rng).close > 0.1
    assert memorisation(mixed[100:], held_out, train, rng=rng).close < 0.06


def test_interval_covers_one_for_a_perfect_model() -> None:
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(100):
        train = rng.normal(size=(200, 3))
        found = memorisation(rng.normal(size=(300, 3)), rng.normal(size=(150, 3)), train, rng=rng, draws=200)
        covered += found.low <= 1 <= found.high
    assert covered >= 88  # 95 expected; fewer than 88 in 1 of 300 runs


def test_held_out_images_of_one_group_are_resampled_together() -> None:
    """20 groups whose members lie equally far from the training set: the interval is that of 20, not of 400."""
    rng = np.random.default_rng(7)
    train, groups = rng.normal(size=(300, 3)), np.repeat(np.arange(20), 20)
    held_out = rng.normal(size=(20, 3))[groups] * 2 + 0.01 * rng.normal(size=(400, 3))
    generated = rng.normal(size=(400, 3)) * 2

    def width(given: np.ndarray | None) -> float:
        found = memorisation(generated, held_out, train, rng=np.random.default_rng(8), groups=given, draws=300)
        return found.high - found.low

    assert width(groups) > 2 * width(None)
    assert width(np.arange(400)) == width(None)


def test_nearest_is_exact_for_copies_far_from_the_origin() -> None:
    x = 1e4 + np.random.default_rng(5).normal(size=(20, 6))
    np.testing.assert_array_equal(nearest(x, x), 0.0)


def test_bad_input_is_named() -> None:
    rng = np.random.default_rng(6)
    train = rng.normal(size=(50, 4))
    with pytest.raises(StatisticsError, match="held_out: half"):
        memorisation(train, train[:10], train, rng=rng)
    with pytest.raises(StatisticsError, match="same number of features"):
        memorisation(train[:, :3], train, train, rng=rng)
    with pytest.raises(StatisticsError, match="generated: 200 of 200"):
        memorisation(train * np.nan, train, train, rng=rng)
