"""Parts are disjoint, of the sizes asked for, stratified, and keep groups whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ado_tasks.datasets.splits import PARTS, UNUSED, assign, part_sizes
from ado_tasks.errors import ConfigError, DataError


def test_fractions_that_add_up_to_one_use_every_image():
    assert part_sizes((0.556, 0.222, 0.222), 1797) == (999, 399, 399)
    for count in range(30, 400):
        assert sum(part_sizes((0.5, 0.3, 0.2), count)) == count


def test_counts_are_taken_as_they_are():
    assert part_sizes((1000, 390, 390), 1797) == (1000, 390, 390)


@pytest.mark.parametrize("asked", [(0.5, 400, 400), (1000.5, 400, 390), (0.6, 0.3, 0.2), (1, 0.2, 0.2)])
def test_what_is_neither_is_refused_by_key(asked):
    with pytest.raises(ConfigError, match=r"prepare\.train"):
        part_sizes(asked, 1797)


@pytest.mark.parametrize(("asked", "count"), [((1000, 400, 400), 1797), ((0.8, 0.1, 0.1), 3)])
def test_fewer_images_than_parts_need(asked, count):
    with pytest.raises(DataError, match=f"fewer images than the parts need: {count} images"):
        part_sizes(asked, count)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(100, 600), st.integers(1, 8), st.floats(0, 0.3))
def test_sizes_groups_and_strata(seed, count, classes, grouped):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    groups = np.arange(count)
    for row in np.flatnonzero(rng.random(count) < grouped):
        groups[row] = groups[rng.integers(0, row + 1)]
    sizes = part_sizes((0.5, 0.25, 0.2), count)
    parts = assign(labels, groups, sizes, seed)
    assert [int((parts == name).sum()) for name in PARTS] == list(sizes)
    assert (parts == UNUSED).sum() == count - sum(sizes)
    for group in np.unique(groups):
        assert len(set(parts[groups == group])) == 1


def test_each_class_has_its_share_of_each_part():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [600, 300, 100])[rng.permutation(1000)]
    parts = assign(labels, np.arange(1000), (500, 300, 200), seed=1)
    for name, size in zip(PARTS, (500, 300, 200), strict=True):
        share = np.bincount(labels[parts == name], minlength=3)
        np.testing.assert_allclose(share, np.array([0.6, 0.3, 0.1]) * size, atol=2)


def test_the_seed_decides_and_position_does_not():
    labels = np.repeat(np.arange(10), 50)
    first, again, other = (assign(labels, np.arange(500), (250, 125, 125), seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert 0.4 < (first != other).mean() < 0.8  # two independent splits disagree in 1 - (1/4 + 1/16 + 1/16) of images
    position = np.arange(500)[first == "train"] % 50
    assert 20 < position.mean() < 29  # not the first of each class


def test_a_group_that_fits_nowhere():
    with pytest.raises(DataError, match="60 near-duplicates of image 7 "):
        groups = np.arange(100)
        groups[np.arange(7, 67)] = 7
        assign(np.zeros(100, int), groups, (50, 25, 25), seed=0)
