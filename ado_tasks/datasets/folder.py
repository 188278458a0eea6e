"""A folder of PNG and JPEG images, one sub-folder a class, as a source.

What is accepted: 8-bit grey, RGB and palette images, told by their content, never by their suffix. An EXIF orientation
is applied and everything else that a file carries besides pixels is dropped. What is refused, by name: anything that is
not a PNG or JPEG, truncated files, animations, 16 bits a channel, CMYK, transparency (unless `alpha_over` says what
lies behind), more than `MAX_PIXELS`, links out of the folder, folders inside classes, empty classes. Hidden files are
skipped.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from ado_tasks.datasets.limits import check_inside, check_total, refuse
from ado_tasks.datasets.source import Source
from ado_tasks.errors import DataError

MAX_PIXELS = 1 << 26  # 67 megapixels: more than cameras make, and 200 MB as RGB
_FORMATS = ("PNG", "JPEG")
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}  # Pillow's names; the others have no one meaning in 8 bits
_ORIENTATION = 0x0112  # EXIF tag (Exif 2.3, section 4.6.4): where the first row and column are when shown upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPING = {5, 6, 7, 8}  # height becomes width
_CHUNK_BYTES = 1 << 24  # decoded at a time
_PNG_SIGNATURE, _PNG_DEPTH_AT = b"\x89PNG\r\n\x1a\n", 24  # bit depth is byte 24 (PNG specification, IHDR)


@dataclass(frozen=True)
class Decoding:
    """How a file becomes an array of one shape."""

    channels: Literal[1, 3] = 3  # colours become grey by ITU-R 601 where 1 is asked for
    size: tuple[int, int] | None = None  # height, width; None: that of the images, which must agree
    resize: Literal["none", "crop", "stretch"] = (
        "none"  # crop: cover the size, cut the middle; stretch: drop the aspect
    )
    alpha_over: int | None = None  # grey level behind transparent pixels; None: transparency is refused
    max_gigabytes: float = 64.0  # of all images, decoded


def folder(root: Path, decoding: Decoding, *, labelled: bool) -> Source:
    """Images in class sub-folders (`labelled`), or all images anywhere under `root` without classes.

    Raises:
        DataError: names the files that cannot be used, up to ten of them.
    """
    if not root.is_dir():
        raise DataError(f"{root}: not a folder")
    classes, files, labels = _by_class(root) if labelled else _anywhere(root)
    size = _scan(files, decoding)
    shape = (*size, decoding.channels)
    check_total(root, len(files), shape, decoding.max_gigabytes)
    return Source(
        count=len(files),
        shape=shape,
        chunks=lambda: _decoded(files, size, decoding),
        description=f"{len(files)} images of the folder {root.name}",
        licence="unknown (a folder of the user's own)",
        labels=np.array(labels, np.int64) if labelled else None,
        classes=classes,
        columns={"file": np.array([path.relative_to(root).as_posix() for path in files])},
    )


def _by_class(root: Path) -> tuple[tuple[str, ...], list[Path], list[int]]:
    entries = _visible(root)
    folders = [entry for entry in entries if entry.is_dir()]
    if not entries:
        raise DataError(f"{root}: the folder is empty")
    if not folders:
        raise DataError(f"{root}: no labels: there are no class sub-folders; prepare.labelled: false does without")
    refuse([f"{entry}: lies beside the class folders" for entry in entries if not entry.is_dir()], "misplaced files")
    files: list[Path] = []
    labels: list[int] = []
    for label, one in enumerate(folders):
        members = _visible(one)
        refuse([f"{member}: a folder inside a class" for member in members if member.is_dir()], "misplaced folders")
        if not members:
            raise DataError(f"{one}: the class folder is empty")
        for member in members:
            check_inside(member, root)
        files += members
        labels += [label] * len(members)
    return tuple(one.name for one in folders), files, labels


def _anywhere(root: Path) -> tuple[tuple[str, ...], list[Path], list[int]]:
    files: list[Path] = []
    waiting = [root]
    while waiting:
        for entry in _visible(waiting.pop(0)):
            check_inside(entry, root)
            (waiting if entry.is_dir() else files).append(entry)
    if not files:
        raise DataError(f"{root}: no image in the folder")
    return (), sorted(files), []


def _visible(folder_: Path) -> list[Path]:
    """Sorted entries, without hidden ones; links to folders are refused here, before they could be walked into."""
    try:
        entries = sorted(entry for entry in folder_.iterdir() if not entry.name.startswith("."))
    except OSError as problem:
        raise DataError(f"{folder_}: cannot be read ({problem.strerror})") from None
    for entry in entries:
        if entry.is_symlink() and entry.is_dir():
            raise DataError(f"{entry}: a link to a folder; links to folders are not followed")
        # Opening a pipe would wait for ever. A dangling link is told later, as one.
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            raise DataError(f"{entry}: neither a file nor a folder")
    return entries


def _scan(files: list[Path], decoding: Decoding) -> tuple[int, int]:
    """Look at every header, decode nothing; the size that all images will have."""
    problems: list[str] = []
    sizes: list[tuple[Path, tuple[int, int]]] = []
    for path in files:
        try:
            with _opened(path) as image:
                sizes.append((path, _upright_size(image)))
        except DataError as problem:
            problems.append(str(problem))
    refuse(problems, "files cannot be used as images")
    if decoding.resize != "none" and decoding.size is not None:
        return decoding.size
    expected = decoding.size or sizes[0][1]
    refuse(
        [
            f"{path}: {height}x{width} pixels, expected {expected[0]}x{expected[1]}"
            for path, (height, width) in sizes
            if (height, width) != expected
        ],
        "images have another size (height x width); prepare.resize: crop or stretch makes them equal",
    )
    return expected


def _decoded(files: list[Path], size: tuple[int, int], decoding: Decoding) -> Iterator[np.ndarray]:
    """uint8 chunks in file order. A bad file does not stop the reading: all are named, at the end."""
    per_chunk = max(1, _CHUNK_BYTES // (size[0] * size[1] * decoding.channels))
    problems: list[str] = []
    for start in range(0, len(files), per_chunk):
        images = []
        for path in files[start : start + per_chunk]:
            try:
                images.append(decode(path, size, decoding))
            except DataError as problem:
                problems.append(str(problem))
        if not problems:
            yield np.stack(images)
    refuse(problems, "files cannot be decoded")


def decode(path: Path, size: tuple[int, int], decoding: Decoding) -> np.ndarray:
    """One file as uint8 (height, width, channels). Raises DataError."""
    with _opened(path) as image:
        try:
            with _quiet_pillow():
                image.load()
                turn = _TURNS.get(_orientation(image))
                upright = image if turn is None else image.transpose(turn)
        except Exception as problem:
            raise DataError(f"{path}: damaged ({problem})") from None
    flat = _without_alpha(path, upright, decoding.alpha_over)
    grey_or_rgb = flat.convert("L" if decoding.channels == 1 else "RGB")
    target = (size[1], size[0])  # Pillow counts width first
    if grey_or_rgb.size != target:
        if decoding.resize == "none":
            raise DataError(f"{path}: {upright.height}x{upright.width} pixels, expected {size[0]}x{size[1]}")
        # Pillow's bicubic widens its kernel when it shrinks, so it does not alias (Parmar et al. 2022, section 3).
        filter_ = Image.Resampling.BICUBIC
        if decoding.resize == "crop":
            grey_or_rgb = ImageOps.fit(grey_or_rgb, target, method=filter_)
        else:
            grey_or_rgb = grey_or_rgb.resize(target, filter_)
    return np.asarray(grey_or_rgb, np.uint8).reshape(*size, decoding.channels)


def _opened(path: Path) -> Image.Image:
    """A file whose header has been read and found acceptable; its pixels have not been touched."""
    try:
        with path.open("rb") as file:
            head = file.read(_PNG_DEPTH_AT + 1)
        with _quiet_pillow():
            image = Image.open(path, formats=_FORMATS)
    except Image.UnidentifiedImageError:
        raise DataError(f"{path}: not a PNG or JPEG image") from None
    except Exception as problem:  # Pillow's readers raise nearly anything on damaged headers
        raise DataError(f"{path}: cannot be opened as an image ({problem})") from None
    reason = _unacceptable(image, head)
    if reason:
        image.close()
        raise DataError(f"{path}: {reason}")
    return image


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings: of many pixels (our own limit follows, its global is not ours) and of damaged EXIF."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _unacceptable(image: Image.Image, head: bytes) -> str | None:
    if image.width * image.height > MAX_PIXELS:
        return f"{image.width}x{image.height} pixels; at most {MAX_PIXELS} are allowed (decompression bomb?)"
    # Pillow would silently drop the lower byte of 16-bit RGB.
    if head.startswith(_PNG_SIGNATURE) and head[_PNG_DEPTH_AT] > 8:
        return f"{head[_PNG_DEPTH_AT]} bits a channel; 8 are allowed"
    if image.mode not in _MODES:
        return f"mode {image.mode}; allowed are {', '.join(sorted(_MODES))}"
    if image.format == "PNG" and getattr(image, "n_frames", 1) > 1:
        return f"an animation of {getattr(image, 'n_frames', 1)} frames; single pictures are allowed"
    return None


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (pixels as they are stored) where there is none or none that can be read."""
    try:
        # The base class's reader: that of PNG decodes the pixels to find EXIF behind them. `decode` has done so.
        with _quiet_pillow():
            return Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF raises whatever its bytes lead to
        return 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width as shown."""
    turned = _orientation(image) in _SWAPPING
    return (image.width, image.height) if turned else (image.height, image.width)


def _without_alpha(path: Path, image: Image.Image, alpha_over: int | None) -> Image.Image:
    """Drop an opaque alpha channel; blend a transparent one over a grey level, or refuse it."""
    if not image.has_transparency_data:
        return image
    blended = image.convert("RGBA")
    if blended.getchannel("A").getextrema()[0] == 255:
        return blended.convert("RGB")
    if alpha_over is None:
        raise DataError(f"{path}: has transparent pixels; prepare.alpha_over says what lies behind them")
    behind = Image.new("RGBA", blended.size, (alpha_over, alpha_over, alpha_over, 255))
    return Image.alpha_composite(behind, blended).convert("RGB")
