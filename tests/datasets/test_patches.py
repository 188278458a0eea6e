"""Patches of two photographs: no pixel in two parts, by coordinates; sizes; pixels as in the files; by the seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import maximum_filter

from ado_tasks.config import parse
from ado_tasks.datasets import patches
from ado_tasks.datasets.patches import PHOTOGRAPHS, SIZE, Cut, Places, block_corners, places
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.datasets.splits import PARTS
from ado_tasks.errors import ConfigError, DataError
from ado_tasks.prepare import PrepareConfig, prepare

SHARES = (0.556, 0.222, 0.222)
COARSE = {"source": "patches", "height": 16, "width": 24, "block": 48, "guard": 8, "stride": 8, "flips": True}


def painted(cut: Cut, where: Places) -> np.ndarray:
    """bool (part, photograph, height, width): which pixels the patches of each part show."""
    seen = np.zeros((len(PARTS), len(PHOTOGRAPHS), *SIZE), bool)
    for number, part in enumerate(PARTS):
        for row in np.flatnonzero(where.part == part):
            top, left = where.top[row], where.left[row]
            seen[number, where.photograph[row], top : top + cut.height, left : left + cut.width] = True
    return seen


def grown(seen: np.ndarray, by: int) -> np.ndarray:
    """Pixels at most `by` rows and columns from a seen one."""
    side = 2 * by + 1
    return maximum_filter(seen, size=(1, side, side), mode="constant")


@settings(max_examples=12)
@given(
    st.integers(16, 40), st.integers(16, 40), st.integers(40, 90), st.integers(0, 20), st.integers(5, 13),
    st.booleans(), st.integers(0, 9),
)  # fmt: skip
def test_no_pixel_is_in_two_parts_and_the_guard_lies_between(height, width, block, guard, stride, flips, seed):
    cut = Cut(height, width, block, guard, stride, flips)
    seen = painted(cut, places(cut, SHARES, seed))
    assert seen.any(axis=(1, 2, 3)).all()
    for one in range(3):
        for other in range(3):
            if one != other:
                assert not (grown(seen[one], guard) & seen[other]).any()


def test_sizes_of_the_preset():
    where = places(Cut(flips=True), SHARES, seed=0)
    assert len(block_corners(Cut())) == 108  # 6 x 9 of 64 pixels, 8 apart, in each of two photographs
    assert {part: int((where.part == part).sum()) for part in PARTS} == {
        "train": 60 * 121 * 2, "selection": 24 * 121, "report": 24 * 121
    }  # fmt: skip
    for part, blocks in zip(PARTS, (60, 24, 24), strict=True):
        mine = where.part == part
        assert len(np.unique(where.block[mine])) == blocks
        shares = np.bincount(where.photograph[mine]) / mine.sum()
        np.testing.assert_allclose(shares, 0.5, atol=1 / blocks)  # of each photograph alike
    assert not where.mirrored[where.part != "train"].any()
    assert where.mirrored[where.part == "train"].mean() == 0.5


def test_patches_are_the_pixels_of_the_files(tmp_path):
    from sklearn.datasets import load_sample_image

    prepare(parse(PrepareConfig, COARSE, "prepare"), out=tmp_path / "p", seed=0)
    data = open_dataset(tmp_path / "p", verify=True)
    assert (data.shape, data.num_classes) == ((16, 24, 3), 0)
    assert data.manifest["blocks"]["groups"] == data.index["block"].nunique()
    assert "near_duplicates" not in data.manifest
    photographs = {name: load_sample_image(f"{name}.jpg") for name in PHOTOGRAPHS}
    stored = data.shards.gather(np.arange(len(data)))
    assert data.index["mirrored"].to_numpy().any()
    names = ["photograph", "top", "left", "mirrored"]
    for row, (name, top, left, mirrored) in enumerate(data.index[names].itertuples(index=False)):
        expected = photographs[name][top : top + 16, left : left + 24]
        np.testing.assert_array_equal(stored[row], expected[:, ::-1] if mirrored else expected)


def test_groups_are_blocks_named_by_their_first_row(tmp_path):
    prepare(parse(PrepareConfig, COARSE, "prepare"), out=tmp_path / "p", seed=0)
    index = open_dataset(tmp_path / "p").index
    block, group, part = (index[name].to_numpy() for name in ("block", "group", "split"))
    for one in np.unique(block):
        rows = np.flatnonzero(block == one)
        assert set(group[rows]) == {rows[0]}
        assert len(set(part[rows])) == 1


def test_twice_gives_the_same_bytes_and_the_seed_decides(tmp_path):
    config = parse(PrepareConfig, COARSE, "prepare")
    first, again, other = (
        prepare(config, out=tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again
    assert first.manifest_sha256 != other.manifest_sha256
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ({"height": 80}, ConfigError, r"prepare\.block: 64 is not allowed: from a patch's longer side, 80"),
        ({"train": 60, "selection": 24, "report": 24}, ConfigError, r"parts blocks, so three fractions under 1"),
        ({"train": 0.9, "selection": 0.2, "report": 0.2}, ConfigError, r"add up to 1\.3"),
        ({"block": 200, "height": 64, "width": 64}, DataError, r"lower prepare\.block or prepare\.guard"),
        ({"count": 9}, ConfigError, r"prepare\.count: the source 'patches' has no such key"),
    ],
)
def test_what_cannot_be_cut_is_named(tmp_path, values, error, match):
    with pytest.raises(error, match=match):
        prepare(parse(PrepareConfig, {"source": "patches", **values}, "prepare"), out=tmp_path / "p", seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("values", [{"stride": 0}, {"guard": -1}, {"block": 500}, {"flips": 1}])
def test_values_out_of_range_are_named(values):
    with pytest.raises(ConfigError, match=rf"prepare\.{next(iter(values))}: .* is not allowed"):
        parse(PrepareConfig, {"source": "patches", **values}, "prepare")


def test_photographs_that_are_not_there(monkeypatch):
    monkeypatch.setattr(patches, "PHOTOGRAPHS", ("china", "nowhere"))
    with pytest.raises(DataError, match=r"nowhere\.jpg: scikit-learn's photograph is not there"):
        patches.patches(Cut(), SHARES, seed=0)


def test_keys_of_other_sources_stay_out_of_a_manifest(tmp_path):
    prepare(PrepareConfig(), out=tmp_path / "digits", seed=0)
    said = open_dataset(tmp_path / "digits").manifest["source"]["config"]
    assert not {"block", "guard", "stride", "flips"} & set(said)
