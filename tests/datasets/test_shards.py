"""Reading a dataset back: the same pixels, mapped lazily, and nothing damaged or foreign accepted."""

import json
from pathlib import Path

import numpy as np
import pytest

from ado_tasks.datasets.shards import Shards, ShardWriter, open_dataset, to_float, to_uint8
from ado_tasks.errors import ArtifactError, ConfigError, StorageError
from ado_tasks.prepare import PrepareConfig, prepare
from ado_tasks.storage import atomic_folder


@pytest.fixture
def dataset(tmp_path) -> Path:
    config = PrepareConfig(source="shapes", count=180, height=8, width=12, train=0.5, selection=0.25, report=0.25)
    prepare(config, out=tmp_path / "data", seed=0)
    return tmp_path / "data"


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_images_cross_shard_borders(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (23, 5, 4, 3)).astype(np.uint8)
    writer = ShardWriter(tmp_path, (5, 4, 3), shard_bytes=5 * 60)
    for piece in np.split(images, [2, 3, 14]):  # smaller and larger than a shard
        writer.add(piece)
    writer.flush()
    assert [entry["count"] for entry in writer.entries] == [5, 5, 5, 5, 3]
    shards = Shards(tmp_path, writer.entries, (5, 4, 3))
    rows = np.array([22, 0, 4, 5, 5, 9, 10])
    np.testing.assert_array_equal(shards.gather(rows), images[rows])
    np.testing.assert_array_equal(np.load(tmp_path / "shard-00001.npy", allow_pickle=False), images[5:10])
    with pytest.raises(IndexError):
        shards.gather(np.array([23]))


def test_only_the_shards_that_are_touched_are_mapped_and_none_is_loaded(tmp_path):
    writer = ShardWriter(tmp_path, (4, 4, 1), shard_bytes=160)
    writer.add(np.zeros((30, 4, 4, 1), np.uint8))
    writer.flush()
    shards = Shards(tmp_path, writer.entries, (4, 4, 1))
    shards.gather(np.array([12, 15]))
    assert list(shards._mapped) == [1]
    assert isinstance(shards._mapped[1], np.memmap)


def test_a_split_gives_images_labels_and_floats(dataset):
    part = open_dataset(dataset).split("selection")
    assert part.images.shape == (45, 8, 12, 3)
    assert part.num_classes == 18
    assert len(part) == len(part.labels) == 45
    whole = np.asarray(part.images)
    np.testing.assert_array_equal(part.images[7], whole[7])
    np.testing.assert_array_equal(part.images[-1], whole[44])
    np.testing.assert_array_equal(part.images[3:6], whole[3:6])
    np.testing.assert_array_equal(part.images[[5, 1, 5]], whole[[5, 1, 5]])
    np.testing.assert_array_equal(np.stack(list(part.images)), whole)
    batch = part.batch(np.array([5, 1]))
    assert batch.dtype == np.float32
    np.testing.assert_allclose(batch, whole[[5, 1]] / 127.5 - 1, atol=1e-6)


def test_the_parts_hold_every_image_once_with_its_own_label(dataset):
    from ado_tasks.datasets.shapes import draw, sample_attributes

    known = sample_attributes(180, 8, 12, seed=0)
    drawn = {image.tobytes(): label for image, label in zip(draw(known, 8, 12), known.label, strict=True)}
    opened = open_dataset(dataset)
    seen = []
    for name in ("train", "selection", "report"):
        part = opened.split(name)
        for image, label in zip(part.images, part.labels, strict=True):
            assert drawn[image.tobytes()] == label
            seen.append(image.tobytes())
    assert sorted(seen) == sorted(drawn)


def test_float_and_back():
    levels = np.arange(256, dtype=np.uint8)
    assert to_float(levels).min() == -1
    assert to_float(levels).max() == 1
    np.testing.assert_array_equal(to_uint8(to_float(levels)), levels)
    np.testing.assert_array_equal(to_uint8(np.array([-7.0, 3.0])), [0, 255])


def test_unknown_part(dataset):
    with pytest.raises(ConfigError, match=r"'test'.*train, selection, report"):
        open_dataset(dataset).split("test")


@pytest.mark.parametrize("file", ["shard-00000.npy", "index.parquet"])
def test_one_changed_byte_is_refused_with_both_sums(dataset, file):
    expected = json.loads((dataset / "manifest.json").read_text())
    stored = expected["index"]["sha256"] if file == "index.parquet" else expected["shards"][0]["sha256"]
    data = bytearray((dataset / file).read_bytes())
    data[-1] ^= 1
    (dataset / file).write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{file}: checksum expected {stored}, found [0-9a-f]{{64}}"):
        np.asarray(open_dataset(dataset).split("train").images)
    with pytest.raises(ArtifactError, match=file):
        open_dataset(dataset, verify=True)


@pytest.mark.parametrize("file", ["shard-00000.npy", "index.parquet", "manifest.json"])
def test_missing_and_truncated_files_are_named(dataset, file):
    whole = (dataset / file).read_bytes()
    (dataset / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match=file):
        open_dataset(dataset, verify=True)
    (dataset / file).unlink()
    with pytest.raises(ArtifactError, match=file):
        open_dataset(dataset, verify=True)


@pytest.mark.parametrize(
    "name", ["../shard-00000.npy", "/etc/passwd", "x/shard-00000.npy", "shard-0.npy", "shard-00000.npy\n", 7]
)
def test_a_manifest_cannot_lead_out_of_its_folder(dataset, name):
    edit_manifest(dataset, shards=[{"file": name, "count": 180, "sha256": "0"}])
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        open_dataset(dataset)


def test_an_index_elsewhere_is_refused(dataset):
    edit_manifest(dataset, index={"file": "../index.parquet", "sha256": "0"})
    with pytest.raises(ArtifactError, match="index must be"):
        open_dataset(dataset)


@pytest.mark.parametrize(
    "changes", [{"format": 2}, {"count": 181}, {"shards": None}, {"shape": [8, 12]}, {"shards": [{"file": "x"}]}]
)
def test_a_manifest_that_is_not_one(dataset, changes):
    edit_manifest(dataset, **changes)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        open_dataset(dataset)


def test_a_shard_of_another_shape_is_refused_even_with_its_own_sum(dataset):
    from ado_tasks.storage import sha256_file

    np.save(dataset / "shard-00000.npy", np.zeros((180, 8, 11, 3), np.uint8))
    sum_ = sha256_file(dataset / "shard-00000.npy")
    edit_manifest(dataset, shards=[{"file": "shard-00000.npy", "count": 180, "sha256": sum_}])
    with pytest.raises(ArtifactError, match=r"expected uint8 \(180, 8, 12, 3\), found uint8 \(180, 8, 11, 3\)"):
        np.asarray(open_dataset(dataset).split("train").images)


def test_a_pickled_shard_is_not_loaded(dataset):
    from ado_tasks.storage import sha256_file

    np.save(dataset / "shard-00000.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    sum_ = sha256_file(dataset / "shard-00000.npy")
    edit_manifest(dataset, shards=[{"file": "shard-00000.npy", "count": 180, "sha256": sum_}])
    with pytest.raises(ArtifactError, match=r"shard-00000\.npy"):
        np.asarray(open_dataset(dataset).split("train").images)


def test_a_really_full_device_is_named(tmp_path):
    """/dev/full answers ENOSPC to every write: the errno must survive the way a shard is written."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(StorageError, match="the disk is full"), atomic_folder(tmp_path / "out") as folder:
        (folder / "shard-00000.npy").symlink_to("/dev/full")
        writer = ShardWriter(folder, (64, 64, 3))
        writer.add(np.zeros((50, 64, 64, 3), np.uint8))
        writer.flush()
    assert list(tmp_path.iterdir()) == []
