"""The task `prepare`: its contract, its purity, and that bad input leaves nothing behind."""

import errno
import hashlib
import json
import os
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ado_tasks.backend import mx
from ado_tasks.config import parse
from ado_tasks.datasets import shards
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.errors import ConfigError, DataError, StorageError
from ado_tasks.prepare import PrepareConfig, prepare
from ado_tasks.report import Recorder

SHAPES = PrepareConfig(source="shapes", count=180, height=8, width=8, train=0.5, selection=0.25, report=0.25)


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def global_state() -> tuple:
    legacy = np.random.get_state()  # noqa: NPY002
    return (
        repr(legacy),
        random.getstate(),
        [np.array(part).tolist() for part in mx.random.state],
        dict(os.environ),
        Path.cwd(),
        np.geterr(),
    )


@pytest.fixture
def images(tmp_path) -> Path:
    """Twelve images in two classes, enough for three parts."""
    rng = np.random.default_rng(0)
    for number in range(12):
        path = tmp_path / "in" / ("cat" if number % 2 else "dog") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(path)
    return tmp_path / "in"


FOLDER = PrepareConfig(name="mine", source="folder", train=0.5, selection=0.25, report=0.25)


def test_digits_are_those_of_scikit_learn_in_three_stratified_parts(tmp_path):
    from sklearn.datasets import load_digits

    result = prepare(PrepareConfig(), out=tmp_path / "digits", seed=0)
    assert result.splits == {"train": 999, "selection": 399, "report": 399, "unused": 0}
    opened = open_dataset(tmp_path / "digits", verify=True)
    assert (opened.shape, opened.num_classes, opened.classes) == ((8, 8, 1), 10, tuple("0123456789"))
    bunch = load_digits()
    stored = opened.shards.gather(np.arange(1797))[..., 0]
    np.testing.assert_array_equal(np.rint(stored * (16 / 255)), bunch.images)
    assert (stored.min(), stored.max()) == (0, 255)
    np.testing.assert_array_equal(opened.index["label"], bunch.target)
    for name, size in (("train", 999), ("selection", 399), ("report", 399)):
        share = np.bincount(opened.split(name).labels) / size
        np.testing.assert_allclose(share, np.bincount(bunch.target) / 1797, atol=2 / size)


def test_the_manifest_says_what_the_folder_holds(tmp_path):
    prepare(SHAPES, out=tmp_path / "s", seed=4)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    index = pd.read_parquet(tmp_path / "s" / "index.parquet")
    assert list(index.columns) == [
        "label", "split", "complexity", "group", "shape", "colour", "size", "cx", "cy", "turn"
    ]  # fmt: skip
    assert manifest["shape"] == [8, 8, 3]
    assert manifest["count"] == len(index) == 180
    assert manifest["splits"] == {"train": 90, "selection": 45, "report": 45, "unused": 0}
    assert manifest["source"]["kind"] == "shapes"
    assert manifest["source"]["seed"] == 4
    assert manifest["licence"].startswith("CC0")
    assert "Sobel" in manifest["complexity"]["measure"]
    assert manifest["complexity"]["mean"] == pytest.approx(index["complexity"].mean(), rel=1e-6)
    assert index["complexity"].between(0, 1).all()
    sums = tree(tmp_path / "s")
    assert {entry["file"]: entry["sha256"] for entry in manifest["shards"]} == {
        name: sum_ for name, sum_ in sums.items() if name.startswith("shard")
    }
    assert manifest["index"]["sha256"] == sums["index.parquet"]
    assert set(sums) == {"manifest.json", "index.parquet", "shard-00000.npy"}


@pytest.mark.parametrize("config", [SHAPES, PrepareConfig()])
def test_twice_gives_the_same_bytes_and_nothing_global_moves(tmp_path, config):
    before = global_state()
    first = prepare(config, out=tmp_path / "a", seed=7)
    assert global_state() == before
    again = prepare(config, out=tmp_path / "elsewhere" / "b", seed=7)
    assert first == again
    assert tree(tmp_path / "a") == tree(tmp_path / "elsewhere" / "b")
    other = prepare(config, out=tmp_path / "c", seed=8)
    assert other.manifest_sha256 != first.manifest_sha256


def test_only_out_is_written_and_a_former_dataset_is_replaced_whole(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.npy").write_bytes(b"x")
    prepare(SHAPES, out=tmp_path / "out", seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "stale.npy" not in tree(tmp_path / "out")


def test_progress_and_metrics_are_reported(tmp_path):
    recorder = Recorder()
    prepare(SHAPES, out=tmp_path / "out", seed=0, report=recorder)
    assert recorder.steps[-1][:2] == (180, 180)
    assert {name: value for name, value, _ in recorder.metrics}["images_train"] == 90


def test_a_folder_of_images_end_to_end(tmp_path, images):
    result = prepare(FOLDER, out=tmp_path / "out", seed=0, source_path=images)
    assert result.shape == (8, 8, 3)
    opened = open_dataset(tmp_path / "out", verify=True)
    assert opened.classes == ("cat", "dog")
    for row, name in enumerate(opened.index["file"]):
        expected = np.asarray(Image.open(images / name))
        np.testing.assert_array_equal(opened.shards.gather(np.array([row]))[0], expected)
        assert opened.classes[opened.index["label"][row]] == name.split("/")[0]


def test_near_duplicates_stay_in_one_part(tmp_path):
    rng = np.random.default_rng(0)
    originals = rng.integers(0, 250, (100, 8, 8)).astype(np.uint8)
    copies = originals + rng.integers(0, 5, originals.shape).astype(np.uint8)  # RMS 2.4 of 255: under 0.02
    np.savez(tmp_path / "x.npz", images=np.concatenate([originals, copies, originals[:20]]))
    config = PrepareConfig(source="npz", labelled=False, train=0.5, selection=0.25, report=0.25)
    prepare(config, out=tmp_path / "out", seed=0, source_path=tmp_path / "x.npz")
    opened = open_dataset(tmp_path / "out")
    parts = opened.index["split"].to_numpy()
    assert (parts[:100] == parts[100:200]).all()
    assert (parts[:20] == parts[200:]).all()
    assert opened.manifest["near_duplicates"] == {"rms": 0.02, "groups": 100, "images": 220}
    assert opened.manifest["splits"]["train"] == 110


def test_without_labels_there_are_no_classes(tmp_path):
    config = PrepareConfig(labelled=False)
    prepare(config, out=tmp_path / "out", seed=0)
    part = open_dataset(tmp_path / "out").split("train")
    assert part.num_classes == 0
    assert (part.labels == -1).all()


# --- what is refused leaves nothing behind ---


def refused(error: type[Exception], match: str, config: PrepareConfig, tmp_path: Path, source: Path | None) -> None:
    """The error is raised, no `out` and no temporary sibling appears, and the source is as it was."""
    before = tree(source) if source is not None and source.is_dir() else {}
    out = tmp_path / "data" / "out"
    out.parent.mkdir()
    with pytest.raises(error, match=match):
        prepare(config, out=out, seed=0, source_path=source)
    assert list(out.parent.iterdir()) == []
    if source is not None and source.is_dir():
        assert tree(source) == before


def test_one_bad_file_among_good_ones(tmp_path, images):
    data = (images / "cat" / "05.png").read_bytes()
    (images / "cat" / "05.png").write_bytes(data[: len(data) // 2])
    refused(DataError, r"cat/05\.png: damaged", FOLDER, tmp_path, images)


def test_a_text_file_among_images(tmp_path, images):
    (images / "cat" / "notes.txt").write_text("hello")
    refused(DataError, r"cat/notes\.txt: not a PNG or JPEG", FOLDER, tmp_path, images)


def test_an_empty_class(tmp_path, images):
    (images / "owl").mkdir()
    refused(DataError, r"owl: the class folder is empty", FOLDER, tmp_path, images)


def test_an_empty_folder(tmp_path):
    (tmp_path / "in").mkdir()
    refused(DataError, r"in: the folder is empty", FOLDER, tmp_path, tmp_path / "in")


def test_a_pickled_npz(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    config = PrepareConfig(source="npz")
    refused(DataError, r"x\.npz: images holds pickled objects", config, tmp_path, tmp_path / "x.npz")


def test_a_file_that_ends_early_after_some_shards_were_written(tmp_path, monkeypatch):
    from ado_tasks.datasets import packed

    monkeypatch.setattr(packed, "_CHUNK_BYTES", 64 * 10)
    monkeypatch.setattr(shards.ShardWriter.__init__, "__defaults__", (64 * 10,))
    raw = bytes([0, 0, 8, 3]) + np.array([100, 8, 8], ">u4").tobytes() + bytes(range(64)) * 90
    (tmp_path / "x").write_bytes(raw)
    config = PrepareConfig(source="idx", labelled=False)
    refused(DataError, "x: truncated: 100 images announced, it ends within image 90", config, tmp_path, tmp_path / "x")


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_full_disk_at_any_moment(tmp_path, monkeypatch, call):
    """The first, second or third file that is written finds the disk full: shard, index and manifest."""
    import builtins
    import io

    left = [call]

    class Full(io.FileIO):
        def write(self, data):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
            return super().write(data)

    def full_path_open(self, mode="r", *args, **kwargs):
        if "w" not in mode:
            return builtins.open(self, mode, *args, **kwargs)
        raw = io.BufferedWriter(Full(str(self), "w"), buffer_size=1 << 30)  # one write a file, when it is closed
        return raw if "b" in mode else io.TextIOWrapper(raw)

    def full_parquet(self, path, **options):
        with full_path_open(path, "wb") as file:
            file.write(b"x")

    monkeypatch.setattr(Path, "open", full_path_open)
    monkeypatch.setattr(pd.DataFrame, "to_parquet", full_parquet)
    refused(StorageError, "the disk is full", SHAPES, tmp_path, None)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file"):
        prepare(SHAPES, out=tmp_path / "file" / "out", seed=0)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (PrepareConfig(source="shapes", count=30, height=8, width=8, train=25, selection=4, report=4), "fewer images"),
        (PrepareConfig(source="shapes", count=40, height=8, width=8), "no image of class '.*' in the .* part"),
        (PrepareConfig(source="shapes", count=180, height=64, width=64, max_gigabytes=1e-3), r"prepare\.max_gigabytes"),
        (PrepareConfig(source="shapes", count=4000, height=8, width=8, near_duplicate_rms=0.3), "near_duplicate_rms"),
    ],
)
def test_too_little_or_too_much(tmp_path, config, match):
    refused(DataError, match, config, tmp_path, None)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (
            {"source": "digits", "height": 8},
            r"prepare\.height: the source 'digits' has no such key; .*: shapes, patches, folder",
        ),
        ({"source": "shapes", "count": 9, "height": 8, "width": 8, "resize": "crop"}, r"prepare\.resize: .*: folder"),
        ({"source": "shapes", "count": 90}, r"needs prepare\.count, prepare\.height and prepare\.width"),
        ({"source": "folder"}, "give --source-path"),
        ({"train": 0.9, "selection": 0.2, "report": 0.2}, r"prepare\.train.*add up to 1\.3"),
    ],
)
def test_keys_that_do_not_go_together(tmp_path, values, match):
    refused(ConfigError, match, PrepareConfig(**values), tmp_path, None)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"sauce": "digits"}, r"prepare\.sauce: unknown key; allowed here: name, source"),
        ({"source": "imagenet"}, r"prepare\.source: 'imagenet' is not allowed: .*'digits'"),
        ({"height": 2}, r"prepare\.height: 2 is not allowed"),
        ({"height": "8"}, r"prepare\.height: '8' is not allowed"),
        ({"train": 0}, r"prepare\.train: 0 is not allowed"),
        ({"alpha_over": 256}, r"prepare\.alpha_over: 256 is not allowed"),
        ({"name": "../digits"}, r"prepare\.name: '\.\./digits' is not allowed"),
    ],
)
def test_values_out_of_range_are_named(values, match):
    with pytest.raises(ConfigError, match=match):
        parse(PrepareConfig, values, "prepare")


@pytest.mark.parametrize("keys", [{"height": 8}, {"resize": "crop"}])
def test_incomplete_sizes(tmp_path, images, keys):
    config = PrepareConfig(source="folder", **keys)
    refused(ConfigError, r"prepare\.height and prepare\.width", config, tmp_path, images)


def test_a_path_for_a_source_that_reads_none(tmp_path, images):
    refused(ConfigError, "reads no path", SHAPES, tmp_path, images)


@pytest.mark.parametrize("out", ["in", ".", "in/cat/out"])
def test_a_dataset_that_would_replace_its_own_source(tmp_path, images, out):
    before = tree(images)
    with pytest.raises(ConfigError, match="may not lie within its source"):
        prepare(FOLDER, out=tmp_path / out, seed=0, source_path=images)
    assert tree(images) == before


def test_a_source_that_is_a_link_to_itself(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    refused(DataError, "loop: (a link that leads back to itself|not a folder)", FOLDER, tmp_path, tmp_path / "loop")


def test_images_that_are_too_small(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((30, 3, 9), np.uint8))
    config = PrepareConfig(source="npz", labelled=False)
    refused(DataError, r"x\.npz: images of 3x9 pixels; at least 4", config, tmp_path, tmp_path / "x.npz")


def test_the_command_ends_with_the_code_of_the_error_and_names_the_file(tmp_path, images, monkeypatch, capsys):
    from ado_tasks.__main__ import main

    (images / "cat" / "05.png").write_text("not an image")
    (tmp_path / "params.yaml").write_text(
        "seed: 0\nprepare: {source: folder, train: 0.5, selection: 0.25, report: 0.25}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADO_SYNC", "manual")
    status = main(["prepare", "--source-path", str(images), "--out", "out"])
    assert status == DataError.exit_code == 3
    assert "cat/05.png: not a PNG or JPEG" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_many_shards_are_split_and_read_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.ShardWriter.__init__, "__defaults__", (192 * 50,))
    many = prepare(SHAPES, out=tmp_path / "many", seed=0)
    monkeypatch.undo()
    one = prepare(SHAPES, out=tmp_path / "one", seed=0)
    a, b = open_dataset(tmp_path / "many"), open_dataset(tmp_path / "one")
    assert len(a.manifest["shards"]) == 4
    assert many.splits == one.splits
    np.testing.assert_array_equal(np.asarray(a.split("report").images), np.asarray(b.split("report").images))
