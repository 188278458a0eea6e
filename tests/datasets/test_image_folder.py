"""Folders of images: what is read is right, what is refused is named, Pillow's globals stay as they were."""

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ado_tasks.datasets.folder import MAX_PIXELS, Decoding, folder
from ado_tasks.errors import DataError

RNG = np.random.default_rng(0)


def pixels(height=8, width=10, channels=3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels)).astype(np.uint8)


def save(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.squeeze()).save(path, **options)


def read(root: Path, *, labelled: bool = True, **decoding) -> np.ndarray:
    source = folder(root, Decoding(**decoding), labelled=labelled)
    images = np.concatenate(list(source.chunks()))
    assert images.shape == (source.count, *source.shape)
    return images


def png(width: int, height: int, depth: int, colour: int, data: bytes) -> bytes:
    """A PNG written by hand, for headers that Pillow will not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.fixture
def root(tmp_path) -> Path:
    """Two classes, three good images."""
    save(tmp_path / "in" / "b" / "one.png", pixels())
    save(tmp_path / "in" / "a" / "two.png", pixels())
    save(tmp_path / "in" / "a" / "one.png", pixels())
    return tmp_path / "in"


def test_order_labels_names_and_pixels(root):
    source = folder(root, Decoding(), labelled=True)
    assert source.classes == ("a", "b")
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 1]
    assert source.columns["file"].tolist() == ["a/one.png", "a/two.png", "b/one.png"]
    for image, name in zip(read(root), source.columns["file"], strict=True):
        np.testing.assert_array_equal(image, np.asarray(Image.open(root / name)))


def test_content_decides_not_the_suffix_and_hidden_files_are_skipped(root):
    (root / "a" / "one.png").rename(root / "a" / "one.txt")
    (root / ".DS_Store").write_bytes(b"x")
    (root / "a" / ".thumbs").write_text("x")
    assert len(read(root)) == 3


def test_without_labels_images_lie_anywhere(root):
    save(root / "c" / "d" / "deep.png", pixels())
    save(root / "top.png", pixels())
    source = folder(root, Decoding(), labelled=False)
    assert source.labels is None
    assert source.classes == ()
    assert sorted(source.columns["file"]) == ["a/one.png", "a/two.png", "b/one.png", "c/d/deep.png", "top.png"]


def test_grey_of_colours_and_colours_of_grey(root):
    rgb = np.asarray(Image.open(root / "a" / "one.png")).astype(float)
    grey = rgb @ [0.299, 0.587, 0.114]  # ITU-R BT.601
    assert np.abs(read(root, channels=1)[0, ..., 0] - grey).max() <= 1
    save(root / "a" / "one.png", pixels(channels=1))
    back = read(root)[0]
    assert (back == back[..., :1]).all()


def test_palette_and_black_and_white(root):
    Image.fromarray(pixels()).convert("P").save(root / "a" / "one.png")
    Image.fromarray(pixels(channels=1).squeeze() > 128).save(root / "a" / "two.png")
    images = read(root)
    assert set(np.unique(images[1])) == {0, 255}
    np.testing.assert_array_equal(images[0], np.asarray(Image.open(root / "a" / "one.png").convert("RGB")))


def test_exif_orientation_is_applied_and_counts_for_the_size(root):
    lying = np.zeros((10, 8, 3), np.uint8)  # stored on its side: 10 x 8, shown as 8 x 10
    lying[:5] = 255  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: what is up goes right
    save(root / "a" / "one.png", lying, exif=exif)
    shown = read(root)[0]
    assert shown.shape == (8, 10, 3)
    assert shown[:, 5:].min() == 255
    assert shown[:, :5].max() == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pillows_own_transpose(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "in" / "a" / "x.png"
    save(path, pixels(), exif=exif)
    np.testing.assert_array_equal(read(tmp_path / "in")[0], np.asarray(ImageOps.exif_transpose(Image.open(path))))


def test_exif_that_cannot_be_read_counts_as_none(root):
    image = pixels()
    for exif in (b"Exif\0\0MM\0\x2a\xff\xff\xff\xff", b"Exif\0\0nonsense", b"\0" * 40):
        save(root / "a" / "one.png", image, exif=exif)
        np.testing.assert_array_equal(read(root)[0], image)


def test_crop_cuts_the_middle_and_stretch_keeps_all(root):
    striped = np.zeros((20, 40, 3), np.uint8)
    striped[:, :8] = 255  # the left fifth: cut away by a crop to a square, which keeps columns 10 to 30
    for name in ("a/one.png", "a/two.png", "b/one.png"):
        save(root / name, striped)
    crop = read(root, size=(10, 10), resize="crop")
    stretch = read(root, size=(10, 10), resize="stretch")
    assert crop.max() < 30
    assert stretch[:, :, 0].min() > 225
    assert stretch[:, :, 5:].max() < 30


def test_shrinking_does_not_alias(root):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)  # one-pixel chess board: grey from afar
    for name in ("a/one.png", "a/two.png", "b/one.png"):
        save(root / name, board)
    small = read(root, size=(8, 8), resize="stretch", channels=1)
    assert np.abs(small.astype(int) - 127).max() <= 6


def test_jpeg(root):
    smooth = np.broadcast_to(np.linspace(0, 255, 10)[None, :, None], (8, 10, 3)).astype(np.uint8)
    (root / "a" / "one.png").unlink()
    save(root / "a" / "one.jpg", smooth, quality=95)
    assert np.abs(read(root)[0].astype(int) - smooth).max() < 12


def test_opaque_alpha_is_dropped_and_transparency_is_blended_or_refused(root):
    rgba = pixels(channels=4)
    rgba[..., 3] = 255
    save(root / "a" / "one.png", rgba)
    np.testing.assert_array_equal(read(root)[0], rgba[..., :3])
    rgba[0, 0, 3] = 0
    save(root / "a" / "one.png", rgba)
    with pytest.raises(DataError, match=r"a/one\.png: has transparent pixels; prepare\.alpha_over"):
        read(root)
    blended = read(root, alpha_over=200)[0]
    assert blended[0, 0].tolist() == [200, 200, 200]
    np.testing.assert_array_equal(blended[1:], rgba[1:, :, :3])


def truncated_png(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def text_file(path: Path) -> None:
    path.write_text("label,image\n")


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def gif(path: Path) -> None:
    Image.fromarray(pixels()).save(path, format="GIF")


def animated_png(path: Path) -> None:
    frames = [Image.fromarray(pixels()) for _ in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def grey_of_16_bits(path: Path) -> None:
    Image.fromarray(np.full((8, 10), 40_000, np.uint16)).save(path)


def rgb_of_16_bits(path: Path) -> None:
    path.write_bytes(png(10, 8, 16, 2, zlib.compress(b"".join(b"\0" + b"\x80\x01" * 30 for _ in range(8)))))


def cmyk_jpeg(path: Path) -> None:
    Image.fromarray(pixels()).convert("CMYK").save(path, format="JPEG")


def bomb(path: Path) -> None:
    path.write_bytes(png(60_000, 60_000, 8, 0, zlib.compress(b"\0" * 1000)))


def moderate_bomb(path: Path) -> None:
    """More than ours, less than Pillow's own limits, which would let it pass."""
    side = int(MAX_PIXELS**0.5) + 1
    path.write_bytes(png(side, side, 8, 0, zlib.compress(b"\0" * 1000)))


def broken_checksum(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 20] ^= 0xFF
    path.write_bytes(bytes(data))


def text_chunk_bomb(path: Path) -> None:
    body = b"key\0\0" + zlib.compress(b"\0" * 100_000_000)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    data = path.read_bytes()
    path.write_bytes(data[:33] + chunk + data[33:])


def pickled(path: Path) -> None:
    np.array([{"a": 1}], dtype=object).dump(path)


def exif_behind_the_pixels(path: Path) -> None:
    """An orientation that only decoding finds: the file is 8 x 10 by its header and 10 x 8 when shown."""
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    data = path.read_bytes()
    path.write_bytes(data[:-12] + chunk + data[-12:])  # before IEND


def another_size(path: Path) -> None:
    save(path, pixels(8, 11))


def link_out(path: Path) -> None:
    outside = path.parents[2] / "outside.png"
    save(outside, pixels())
    path.unlink()
    path.symlink_to(outside)


def dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nothing.png"))


def folder_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/", target_is_directory=True)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncated_png, "damaged|cannot be opened"),
        (text_file, "not a PNG or JPEG"),
        (empty_file, "not a PNG or JPEG"),
        (gif, "not a PNG or JPEG"),
        (animated_png, "animation of 3 frames"),
        (grey_of_16_bits, "16 bits a channel"),
        (rgb_of_16_bits, "16 bits a channel"),
        (cmyk_jpeg, "mode CMYK"),
        (bomb, "pixels|exceeds limit"),
        (moderate_bomb, f"at most {MAX_PIXELS} are allowed"),
        (broken_checksum, "damaged|cannot be opened"),
        (text_chunk_bomb, "too large|damaged|cannot be opened"),
        (pickled, "not a PNG or JPEG"),
        (another_size, "8x11 pixels, expected 8x10"),
        (exif_behind_the_pixels, "10x8 pixels, expected 8x10"),
        (link_out, "leads out of"),
        (dangling_link, "leads nowhere"),
        (folder_link, "link to a folder"),
        (pipe, "neither a file nor a folder"),
    ],
)
def test_what_cannot_be_used_is_named(root, damage, says):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        damage(root / "a" / "two.png")
    with pytest.raises(DataError, match=rf"a/two\.png: [\s\S]*({says})"):
        read(root)


def test_a_truncated_file_of_the_right_size_is_named_when_decoded(root):
    for name in ("a/one.png", "a/two.png", "b/one.png"):
        save(root / name, pixels(64, 64))
    data = (root / "a" / "two.png").read_bytes()
    (root / "a" / "two.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"a/two\.png: damaged \(.*truncated"):
        read(root)


def test_up_to_ten_bad_files_are_listed(root):
    for number in range(14):
        (root / "a" / f"x{number:02d}.png").write_text("not an image")
    with pytest.raises(DataError) as caught:
        read(root)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("14 files")
    assert sum("x" in line.rsplit("/", 1)[-1] for line in lines[1:]) == 10
    assert lines[-1].strip() == "and 4 more"


def test_files_that_only_fail_when_decoded_are_listed_together(root):
    for number in range(12):
        save(root / "a" / f"y{number:02d}.png", pixels(64, 64))
        data = (root / "a" / f"y{number:02d}.png").read_bytes()
        (root / "a" / f"y{number:02d}.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"12 files cannot be decoded[\s\S]*y00\.png[\s\S]*y09\.png[\s\S]*and 2 more"):
        read(root, size=(8, 8), resize="stretch")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda root: (root / "c").mkdir(), r"in/c: the class folder is empty"),
        (lambda root: (root / "a" / "deep").mkdir(), r"a/deep: a folder inside a class"),
        (lambda root: (root / "README.md").write_text("x"), r"README\.md: lies beside the class folders"),
    ],
)
def test_folders_that_are_not_classes_of_images(root, change, says):
    change(root)
    with pytest.raises(DataError, match=says):
        read(root)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_link_to_itself(root, labelled):
    (root / "a" / "loop.png").symlink_to("loop.png")
    with pytest.raises(DataError, match=r"a/loop\.png: a link that leads"):
        read(root, labelled=labelled)


def test_an_empty_folder_a_flat_one_and_none(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: the folder is empty"):
        read(tmp_path / "empty")
    with pytest.raises(DataError, match="empty: no image"):
        read(tmp_path / "empty", labelled=False)
    save(tmp_path / "flat" / "one.png", pixels())
    with pytest.raises(DataError, match=r"no labels.*prepare\.labelled: false"):
        read(tmp_path / "flat")
    with pytest.raises(DataError, match="not a folder"):
        read(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_read(root, monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(DataError, match=r"in: cannot be read \(Permission denied\)"):
        read(root)


def test_more_than_was_agreed(root):
    with pytest.raises(DataError, match=r"prepare\.max_gigabytes"):
        read(root, max_gigabytes=1e-9)


def test_pillows_globals_stay_as_they_were(root):
    from PIL import ImageFile

    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    read(root)
    bomb(root / "a" / "two.png")
    with pytest.raises(DataError):
        read(root)
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before
