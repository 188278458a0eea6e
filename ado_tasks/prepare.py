"""Task `prepare`: images from a source become a dataset folder with three disjoint parts."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from ado_tasks.config import as_plain, config
from ado_tasks.datasets import complexity, duplicates, folder, limits, packed, patches, shapes, shards, splits
from ado_tasks.datasets.source import Source, digits
from ado_tasks.errors import ConfigError, DataError
from ado_tasks.report import SILENT, Reporter
from ado_tasks.storage import atomic_folder, sha256_file, write_json

Side = Annotated[int, Field(ge=4, le=4096)]  # pixels
MIN_SIDE = 4  # the networks halve an image at least once and look at 3x3 pixels

# Keys that only some sources know; each must be left out elsewhere.
_KEYS_OF = {
    "digits": set(),
    "shapes": {"count", "height", "width"},
    "patches": {"height", "width", "block", "guard", "stride", "flips"},
    "folder": {"height", "width", "channels", "resize", "alpha_over"},
    "idx": {"num_classes"},
    "npz": {"num_classes"},
}
_READS_A_PATH = {"folder", "idx", "npz"}


@config
class PrepareConfig:
    """Where the images come from and how they are parted."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")] = "digits"  # of the dataset
    source: Literal["digits", "shapes", "patches", "folder", "idx", "npz"] = "digits"  # where images come from
    labelled: bool = True  # false: classes are ignored, and need not be there
    count: Annotated[int, Field(ge=1)] | None = None  # shapes: images to draw
    height: Side | None = None  # shapes, patches: pixels; folder: what images are resized to, or must have already
    width: Side | None = None  # likewise
    block: Annotated[int, Field(ge=4, le=427)] | None = None  # patches: side of a block, pixels (default: 64)
    guard: Annotated[int, Field(ge=0, le=427)] | None = None  # patches: pixels between blocks (default: 8)
    stride: Annotated[int, Field(ge=1, le=427)] | None = None  # patches: pixels between those of a block (default: 3)
    flips: bool | None = None  # patches: those of train also mirrored left to right (default: false)
    channels: Literal[1, 3] | None = None  # folder: 1 makes grey of colours, 3 colours of grey (the default)
    resize: Literal["none", "crop", "stretch"] | None = None  # folder: how images get height and width (default: none)
    alpha_over: Annotated[int, Field(ge=0, le=255)] | None = None  # folder: grey behind transparency (default: refused)
    num_classes: Annotated[int, Field(ge=1)] | None = None  # idx, npz: labels lie under it (default: the largest found)
    max_gigabytes: Annotated[float, Field(gt=0)] = 64.0  # decoded pixels accepted; more is taken for a zip bomb
    # Of patches, fractions of blocks.
    train: Annotated[float, Field(gt=0)] = 0.556  # part that models see: a fraction, or a number of images
    selection: Annotated[float, Field(gt=0)] = 0.222  # part that choices are made on: likewise
    report: Annotated[float, Field(gt=0)] = 0.222  # part that figures are reported on: likewise
    # RMS pixel distance up to which two images stay in one part; 0.02 of the full range is 5 grey levels, about what
    # recompressing changes. The two nearest digits are 0.0415 apart. Not used for patches: their blocks stay together,
    # and two pieces of sky are near without being copies.
    near_duplicate_rms: Annotated[float, Field(ge=0, le=0.5)] = 0.02


@dataclass(frozen=True)
class PrepareResult:
    """What was made."""

    count: int  # images
    shape: tuple[int, int, int]  # height, width, channels
    splits: dict[str, int]  # images in each part
    manifest_sha256: str  # identifies the content


def prepare(
    config: PrepareConfig, *, out: Path, seed: int, report: Reporter = SILENT, source_path: Path | None = None
) -> PrepareResult:
    """Read, check, measure and split the images of a source, and write a dataset folder (see datasets/shards.py).

    Images that are the same, or nearly so, stay in one part; the parts hold the classes in proportion. The source
    `patches` parts whole blocks of its photographs instead (see datasets/patches.py).

    Args:
        config: see PrepareConfig.
        out: the dataset folder; it appears whole or not at all.
        seed: of the shapes that are drawn and of the split.
        report: where progress goes.
        source_path: the file or folder that the sources folder, idx and npz read.

    Raises:
        ConfigError: a key is missing for this source, or does not belong to it.
        DataError: an image cannot be used, or there are too few. Names the file.
        StorageError: the disk is full, or the place cannot be written.
    """
    _check_keys(config, source_path, out)
    images = _open_source(config, source_path, seed)
    limits.check_total(source_path or out, images.count, images.shape, config.max_gigabytes)
    if min(images.shape[:2]) < MIN_SIDE:
        height, width, _ = images.shape
        raise DataError(f"{source_path}: images of {height}x{width} pixels; at least {MIN_SIDE} a side are needed")
    sizes = (0, 0, 0) if images.parted else splits.part_sizes(_shares(config), images.count)  # before pixels are read
    with atomic_folder(out) as partial:
        writer = shards.ShardWriter(partial, images.shape)
        measured = _write_images(images, writer, report)
        labels = np.full(images.count, -1) if images.labels is None else images.labels
        if images.parted is not None:
            parts, groups = images.parted.parts, images.parted.groups
        else:
            stored = shards.Shards(partial, writer.entries, images.shape)
            groups = duplicates.duplicate_groups(
                measured["thumbs"], measured["hashes"], stored.gather, config.near_duplicate_rms
            )
            parts = splits.assign(labels, groups, sizes, seed)
        _check_classes(parts, labels, images.classes)
        columns = {"label": labels, "split": parts, "complexity": measured["complexity"], "group": groups}
        index = pd.DataFrame({**columns, **images.columns})
        index.to_parquet(partial / shards.INDEX, index=False)
        manifest = {
            **_described(config, images, seed),
            **_counted(config, index, sought=images.parted is None),
            "index": {"file": shards.INDEX, "sha256": sha256_file(partial / shards.INDEX)},
            "shards": writer.entries,
        }
        write_json(partial / shards.MANIFEST, manifest)
        identity = sha256_file(partial / shards.MANIFEST)
    for name, number in manifest["splits"].items():
        report.metric(f"images_{name}", number)
    report.metric("complexity_mean", manifest["complexity"]["mean"])
    return PrepareResult(images.count, images.shape, manifest["splits"], identity)


def _check_keys(config: PrepareConfig, source_path: Path | None, out: Path) -> None:
    for key in sorted(set().union(*_KEYS_OF.values()) - _KEYS_OF[config.source]):
        if getattr(config, key) is not None:
            owners = ", ".join(name for name, keys in _KEYS_OF.items() if key in keys)
            raise ConfigError(f"prepare.{key}: the source {config.source!r} has no such key; it belongs to: {owners}")
    if config.source in _READS_A_PATH:
        if source_path is None:
            raise ConfigError(f"prepare.source {config.source!r} reads a file or folder: give --source-path")
        # `out` is replaced as a whole: one that holds the source would take it along.
        source, place = limits.resolved(source_path), limits.resolved(out)
        if source.is_relative_to(place) or place.is_relative_to(source):
            raise ConfigError(f"{out}: the dataset may not lie within its source {source_path}, nor hold it")
    elif source_path is not None:
        raise ConfigError(f"prepare.source {config.source!r} reads no path, but source_path is {source_path}")


def _open_source(config: PrepareConfig, source_path: Path | None, seed: int) -> Source:
    path = source_path or Path()  # only those sources look at it for which _check_keys has demanded it
    packing = packed.Packing(config.labelled, config.num_classes, config.max_gigabytes)
    openers = {
        "digits": digits,
        "shapes": lambda: _open_shapes(config, seed),
        "folder": lambda: folder.folder(path, _decoding(config), labelled=config.labelled),
        "idx": lambda: packed.idx(path, packing),
        "npz": lambda: packed.npz(path, packing),
        "patches": lambda: patches.patches(_cut(config), _shares(config), seed),
    }
    opened = openers[config.source]()
    return opened if config.labelled else replace(opened, labels=None, classes=())


def _open_shapes(config: PrepareConfig, seed: int) -> Source:
    if config.count is None or config.height is None or config.width is None:
        raise ConfigError("prepare.source 'shapes' needs prepare.count, prepare.height and prepare.width")
    return shapes.shapes(config.count, config.height, config.width, seed)


def _cut(config: PrepareConfig) -> patches.Cut:
    given = {key: getattr(config, key) for key in sorted(_KEYS_OF["patches"])}
    return patches.Cut(**{key: value for key, value in given.items() if value is not None})


def _decoding(config: PrepareConfig) -> folder.Decoding:
    if (config.height is None) != (config.width is None):
        raise ConfigError("prepare.height and prepare.width: give both or neither")
    size = None if config.height is None or config.width is None else (config.height, config.width)
    resize = config.resize or "none"
    if resize != "none" and size is None:
        raise ConfigError(f"prepare.resize {resize!r} needs prepare.height and prepare.width")
    return folder.Decoding(config.channels or 3, size, resize, config.alpha_over, config.max_gigabytes)


def _write_images(images: Source, writer: shards.ShardWriter, report: Reporter) -> dict[str, Any]:
    """Stream the images into shards, and measure each on the way."""
    scores, thumbs, hashes = [], [], []
    for chunk in images.chunks():
        writer.add(chunk)
        scores.append(complexity.complexity(chunk))
        thumbs.append(duplicates.thumbnails(chunk))
        hashes += duplicates.digests(chunk)
        report.progress(len(hashes), images.count)
    writer.flush()
    return {"complexity": np.concatenate(scores), "thumbs": np.concatenate(thumbs), "hashes": hashes}


def _shares(config: PrepareConfig) -> tuple[float, float, float]:
    return config.train, config.selection, config.report


def _check_classes(parts: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    """Every class must be in every part: a figure by class would otherwise be missing where it is reported."""
    for part in splits.PARTS if classes else ():
        found = np.bincount(labels[parts == part], minlength=len(classes))
        if not found.all():
            label = int(found.argmin())
            raise DataError(
                f"no image of class {classes[label]!r} in the {part} part: the class has only "
                f"{int((labels == label).sum())} images, and every part needs some"
            )


def _described(config: PrepareConfig, images: Source, seed: int) -> dict[str, Any]:
    return {
        "format": shards.FORMAT,
        "name": config.name,
        "source": {"kind": config.source, "description": images.description, "config": _said(config), "seed": seed},
        "licence": images.licence,
        "count": images.count,
        "shape": list(images.shape),
        "layout": "uint8 NHWC",
        "classes": list(images.classes),
    }


def _said(config: PrepareConfig) -> dict[str, Any]:
    """The config without keys that only patches have, where they are not given: other manifests keep their bytes."""
    only_patches = _KEYS_OF["patches"] - {"height", "width"}
    return {key: value for key, value in as_plain(config).items() if value is not None or key not in only_patches}


def _counted(config: PrepareConfig, index: pd.DataFrame, *, sought: bool) -> dict[str, Any]:
    sizes = np.bincount(index["group"].to_numpy())
    parts = index["split"].to_numpy()
    several = {"groups": int((sizes > 1).sum()), "images": int(sizes[sizes > 1].sum())}
    return {
        "splits": {part: int((parts == part).sum()) for part in (*splits.PARTS, splits.UNUSED)},
        "complexity": {
            "measure": complexity.MEASURE,
            "mean": float(index["complexity"].to_numpy().mean(dtype=np.float64)),
        },
        **({"near_duplicates": {"rms": config.near_duplicate_rms, **several}} if sought else {"blocks": several}),
    }
