"""IDX and npz: what is read equals what was written; what is damaged, pickled or out of range is named."""

import gzip
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ado_tasks.datasets import packed
from ado_tasks.datasets.packed import Packing, idx, npz
from ado_tasks.errors import DataError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (30, 6, 5)).astype(np.uint8)
LABELS = np.arange(30, dtype=np.uint8) % 4


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def read(source) -> np.ndarray:
    return np.concatenate(list(source.chunks()))


@pytest.fixture
def mnist(tmp_path) -> Path:
    """A folder like MNIST's: two pairs of files, one of them gzipped."""
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(IMAGES[:10]))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS[:10]))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(IMAGES[10:])))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(LABELS[10:])))
    return tmp_path


def test_idx_folder(mnist):
    source = idx(mnist, Packing())
    np.testing.assert_array_equal(read(source), IMAGES[..., None])
    assert source.labels is not None
    np.testing.assert_array_equal(source.labels, LABELS)
    assert source.classes == ("0", "1", "2", "3")
    assert source.columns["file"].tolist() == ["t10k-images-idx3-ubyte"] * 10 + ["train-images-idx3-ubyte.gz"] * 20


def test_idx_file_alone_and_with_colours(tmp_path):
    rgb = RNG.integers(0, 256, (7, 4, 6, 3)).astype(np.uint8)
    (tmp_path / "x").write_bytes(idx_bytes(rgb))
    np.testing.assert_array_equal(read(idx(tmp_path / "x", Packing(labelled=False))), rgb)
    with pytest.raises(DataError, match=r"x: no labels.*prepare\.labelled: false"):
        idx(tmp_path / "x", Packing())


def test_idx_is_streamed_in_chunks(mnist, monkeypatch):
    monkeypatch.setattr(packed, "_CHUNK_BYTES", 7 * 30)
    chunks = list(idx(mnist, Packing()).chunks())
    assert [len(chunk) for chunk in chunks] == [7, 3, 7, 7, 6]
    np.testing.assert_array_equal(np.concatenate(chunks), IMAGES[..., None])


@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte", "train-images-idx3-ubyte.gz"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: b"\0\0\x0d" + raw[3:], "magic number 00000d03"),  # floats
        (lambda raw: b"\x89PNG" + raw[4:], "magic number 89504e47"),
        (lambda raw: raw[:3], "magic number"),
        (lambda raw: raw[:9], "truncated within its header"),
        (lambda raw: raw[:-1], r"truncated: (10|20) images announced, it ends within image (9|19)"),
        (lambda raw: raw + b"\0", "longer than the (10|20) images"),
        (lambda raw: raw[:4] + b"\xff\xff\xff\xff" + raw[8:], "max_gigabytes"),  # 4 billion images announced
    ],
)
def test_idx_damaged_images(mnist, name, change, says):
    path = mnist / name
    zipped = name.endswith(".gz")
    raw = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
    path.write_bytes(gzip.compress(change(raw)) if zipped else change(raw))
    with pytest.raises(DataError, match=says) as caught:
        read(idx(mnist, Packing()))
    assert name in str(caught.value) or str(mnist) in str(caught.value)


def test_idx_truncated_gzip(mnist):
    path = mnist / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: (damaged|truncated)"):
        read(idx(mnist, Packing()))
    path.write_bytes(path.read_bytes()[:40] + b"\xff" * 40)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: damaged"):
        read(idx(mnist, Packing()))


def test_idx_labels_that_do_not_fit(mnist):
    labels = mnist / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(LABELS[:9]))
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte: dimensions \(9,\); 10 labels expected"):
        idx(mnist, Packing())
    labels.write_bytes(idx_bytes(LABELS[:10])[:-1])
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte: truncated"):
        idx(mnist, Packing())
    labels.unlink()
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte: no labels"):
        idx(mnist, Packing())
    assert idx(mnist, Packing(labelled=False)).labels is None


def test_idx_label_out_of_range(mnist):
    with pytest.raises(DataError, match="label 3 of image 3 is out of range; allowed: 0 to 2"):
        idx(mnist, Packing(num_classes=3))
    assert len(idx(mnist, Packing(num_classes=7)).classes) == 7


def test_idx_files_of_different_sizes_links_and_strangers(mnist, tmp_path_factory):
    stranger = mnist / "notes.txt"
    stranger.write_text("hello")
    with pytest.raises(DataError, match=r"notes\.txt: magic number"):
        idx(mnist, Packing())
    stranger.unlink()
    (mnist / "z-images-idx3-ubyte").write_bytes(idx_bytes(IMAGES[:, :, :4]))
    (mnist / "z-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS))
    with pytest.raises(DataError, match=r"different shapes: \(6, 4, 1\), \(6, 5, 1\)"):
        idx(mnist, Packing())
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "images"
    elsewhere.write_bytes(idx_bytes(IMAGES))
    (mnist / "z-images-idx3-ubyte").unlink()
    (mnist / "z-images-idx3-ubyte").symlink_to(elsewhere)
    with pytest.raises(DataError, match="z-images-idx3-ubyte: a link that leads out of"):
        idx(mnist, Packing())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("images", [IMAGES, IMAGES[..., None], np.repeat(IMAGES[..., None], 3, axis=-1)])
def test_npz(tmp_path, save, images):
    save(tmp_path / "x.npz", images=images, labels=LABELS.astype(np.int32))
    source = npz(tmp_path / "x.npz", Packing())
    np.testing.assert_array_equal(read(source), images.reshape(source.count, *source.shape))
    assert source.labels is not None
    np.testing.assert_array_equal(source.labels, LABELS)


def test_npz_is_streamed_in_chunks(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", images=IMAGES)
    monkeypatch.setattr(packed, "_CHUNK_BYTES", 8 * 30)
    chunks = list(npz(tmp_path / "x.npz", Packing(labelled=False)).chunks())
    assert [len(chunk) for chunk in chunks] == [8, 8, 8, 6]


class Evil:
    """Leaves a trace where it is unpickled."""

    def __reduce__(self):
        return (Path("/tmp/ado-unpickled").touch, ())


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"images": np.array([Evil()], dtype=object)}, "images holds pickled objects; nothing is ever unpickled"),
        ({"images": IMAGES, "labels": np.array([Evil()] * 30, dtype=object)}, "labels holds pickled objects"),
        ({"images": IMAGES / 255, "labels": LABELS}, r"images are float64 \(30, 6, 5\); allowed: uint8"),
        ({"images": IMAGES[0], "labels": LABELS}, r"images are uint8 \(6, 5\)"),
        ({"images": IMAGES[..., None].repeat(2, -1), "labels": LABELS}, r"images of shape \(6, 5, 2\)"),
        ({"images": np.asfortranarray(IMAGES), "labels": LABELS}, "images is in Fortran order"),
        ({"pictures": IMAGES}, "no array named 'images'; there: pictures.npy"),
        ({"images": IMAGES}, r"no labels.*prepare\.labelled: false"),
        ({"images": IMAGES, "labels": LABELS[:29]}, r"labels are uint8 \(29,\); 30 whole numbers expected"),
        ({"images": IMAGES, "labels": LABELS / 1.0}, r"labels are float64 \(30,\)"),
        ({"images": IMAGES, "labels": LABELS.astype(int) - 1}, "label -1 of image 0 is out of range; allowed: 0 to 29"),
        ({"images": IMAGES, "labels": np.full(30, 2**40)}, "label 1099511627776 of image 0 is out of range"),
        ({"images": IMAGES, "labels": np.full(30, 2**64 - 1, np.uint64)}, "label 18446744073709551615 is out of range"),
    ],
)
def test_npz_refused(tmp_path, arrays, says):
    np.savez(tmp_path / "x.npz", allow_pickle=True, **arrays)
    with pytest.raises(DataError, match=rf"x\.npz: {says}"):
        read(npz(tmp_path / "x.npz", Packing()))
    assert not Path("/tmp/ado-unpickled").exists()


def test_npz_damaged(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=IMAGES, labels=LABELS)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"x\.npz: damaged \(BadZipFile"):
        npz(path, Packing())
    changed = bytearray(whole)
    changed[300] ^= 0xFF  # within the deflated images
    path.write_bytes(changed)
    with pytest.raises(DataError, match=r"x\.npz: damaged"):
        read(npz(path, Packing()))
    path.write_bytes(np.array([Evil()], dtype=object).dumps())
    with pytest.raises(DataError, match=r"x\.npz: damaged \(BadZipFile"):
        npz(path, Packing())
    with pytest.raises(DataError, match="not a file"):
        npz(tmp_path, Packing())


def test_npz_whose_header_lies(tmp_path):
    """A header may announce less (trailing bytes) or more than the member holds: both are refused unread."""
    np.save(tmp_path / "images.npy", IMAGES)
    raw = (tmp_path / "images.npy").read_bytes()
    for claimed in (b"(20, 6, 5)", b"(31, 6, 5)"):
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            archive.writestr("images.npy", raw.replace(b"(30, 6, 5)", claimed))
        with pytest.raises(DataError, match=r"x\.npz: images has \d+ bytes, its header announces \d+"):
            npz(tmp_path / "x.npz", Packing(labelled=False))


@pytest.mark.parametrize("header", [b"{'shape': " + b"(" * 200, b"{'shape': " + b"[" * 60_000 + b"\n", b"\0"])
def test_npz_whose_header_is_no_header(tmp_path, header):
    """NumPy evaluates a header as a Python literal, and its parser has errors of its own."""
    raw = b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", raw)
    with pytest.raises(DataError, match=r"x\.npz: images is not a NumPy array"):
        npz(tmp_path / "x.npz", Packing(labelled=False))


def test_npz_packed_by_lzma_and_damaged(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.write(tmp_path / "images.npy", "images.npy")
    damaged = bytearray((tmp_path / "x.npz").read_bytes())
    damaged[300:400] = bytes(0xFF ^ byte for byte in damaged[300:400])
    (tmp_path / "x.npz").write_bytes(damaged)
    with pytest.raises(DataError, match=r"x\.npz: damaged"):
        read(npz(tmp_path / "x.npz", Packing(labelled=False)))


def test_zip_bomb(tmp_path):
    """100 MB of zeros in 100 kB: refused by its announced size, before anything is unpacked."""
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        np.save(tmp_path / "images.npy", np.zeros((0, 100, 100), np.uint8))
        header = (tmp_path / "images.npy").read_bytes().replace(b"(0, 100, 100), }    ", b"(10000, 100, 100), }")
        with archive.open("images.npy", "w") as member:
            member.write(header)
            for _ in range(100):
                member.write(bytes(1_000_000))
    assert (tmp_path / "x.npz").stat().st_size < 130_000
    with pytest.raises(DataError, match=r"unpacks to 0\.1 GB; allowed are 0\.05 GB \(prepare\.max_gigabytes\)"):
        npz(tmp_path / "x.npz", Packing(labelled=False, max_gigabytes=0.05))
