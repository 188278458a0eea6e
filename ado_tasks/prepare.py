"""Task `prepare`: images from a source become a dataset folder with three disjoint parts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from ado_tasks.config import as_plain, config
from ado_tasks.datasets import complexity, duplicates, shards, shapes, source, splits
from ado_tasks.errors import ConfigError, DataError
from ado_tasks.report import SILENT, Reporter
from ado_tasks.storage import atomic_folder, sha256_file, write_json

Side = Annotated[int, Field(ge=4, le=4096)]  # pixels


@config
class PrepareConfig:
    """Where the images come from and how they are parted."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")] = "digits"  # of the dataset
    source: Literal["digits", "shapes"] = "digits"  # where images come from
    count: Annotated[int, Field(ge=18)] | None = None  # shapes: images to draw
    height: Side | None = None  # shapes: pixels
    width: Side | None = None  # shapes: pixels
    train: Annotated[float, Field(gt=0)] = 0.556  # part that models see: a fraction, or a number of images
    selection: Annotated[float, Field(gt=0)] = 0.222  # part that choices are made on: likewise
    report: Annotated[float, Field(gt=0)] = 0.222  # part that figures are reported on: likewise
    near_duplicate_rms: Annotated[float, Field(ge=0, le=0.5)] = 0.02  # RMS pixel distance, of the full range, under which
    # two images stay in one part; 0.02 is 5 grey levels of 255, what recompressing or rescanning changes


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
    """Read, check, measure and split the images of a source, and write them as a dataset folder (see datasets/shards.py).

    Args:
        config: see PrepareConfig.
        out: the dataset folder; it appears whole or not at all.
        seed: of the shapes that are drawn and of the split.
        report: where progress goes.
        source_path: the file or folder of a source that reads one.

    Raises:
        ConfigError: a key is missing for this source, or does not belong to it.
        DataError: an image cannot be used, or there are too few. Names the file.
        StorageError: the disk is full, or the place cannot be written.
    """
    images = _open_source(config, source_path, seed)
    sizes = splits.part_sizes((config.train, config.selection, config.report), images.count)
    with atomic_folder(out) as folder:
        writer = shards.ShardWriter(folder, images.shape)
        measured = _write_images(images, writer, report)
        stored = shards.Shards(folder, writer.entries, images.shape)
        groups = duplicates.duplicate_groups(
            measured["thumbs"], measured["hashes"], stored.gather, config.near_duplicate_rms
        )
        labels = np.full(images.count, -1) if images.labels is None else images.labels
        parts = splits.assign(labels, groups, sizes, seed)
        _check_classes(parts, labels, images.classes)
        index = _index(images, labels, parts, measured["complexity"], groups)
        index.to_parquet(folder / shards.INDEX, index=False)
        manifest = _manifest(config, images, index, writer.entries, sha256_file(folder / shards.INDEX), seed)
        write_json(folder / shards.MANIFEST, manifest)
        identity = sha256_file(folder / shards.MANIFEST)
    for name, number in manifest["splits"].items():
        report.metric(f"images_{name}", number)
    report.metric("complexity_mean", manifest["complexity"]["mean"])
    return PrepareResult(images.count, images.shape, manifest["splits"], identity)


def _open_source(config: PrepareConfig, source_path: Path | None, seed: int) -> source.Source:
    if config.source == "digits":
        return source.digits()
    if config.count is None or config.height is None or config.width is None:
        raise ConfigError("prepare.source shapes needs prepare.count, prepare.height and prepare.width")
    return shapes.shapes(config.count, config.height, config.width, seed)


def _write_images(images: source.Source, writer: shards.ShardWriter, report: Reporter) -> dict[str, Any]:
    """Stream the images into shards, and measure each on the way."""
    scores, thumbs, hashes = [], [], []
    done = 0
    for chunk in images.chunks():
        writer.add(chunk)
        scores.append(complexity.complexity(chunk))
        thumbs.append(duplicates.thumbnails(chunk))
        hashes += duplicates.digests(chunk)
        done += len(chunk)
        report.progress(done, images.count)
    writer.flush()
    return {"complexity": np.concatenate(scores), "thumbs": np.concatenate(thumbs), "hashes": hashes}


def _check_classes(parts: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    for part in splits.PARTS:
        found = np.bincount(labels[parts == part], minlength=len(classes)) if classes else []
        missing = [name for name, number in zip(classes, found, strict=True) if number == 0]
        if missing:
            raise DataError(f"no image of class {missing[0]!r} in the {part} part: the class has too few images")


def _index(
    images: source.Source, labels: np.ndarray, parts: np.ndarray, scores: np.ndarray, groups: np.ndarray
) -> pd.DataFrame:
    columns = {"label": labels.astype(np.int64), "split": parts, "complexity": scores, "group": groups}
    return pd.DataFrame({**columns, **images.columns})


def _manifest(
    config: PrepareConfig,
    images: source.Source,
    index: pd.DataFrame,
    entries: list[dict[str, Any]],
    index_sha256: str,
    seed: int,
) -> dict[str, Any]:
    group_sizes = index["group"].value_counts()
    return {
        "format": shards.FORMAT,
        "name": config.name,
        "source": {"kind": config.source, "description": images.description, "config": as_plain(config), "seed": seed},
        "licence": images.licence,
        "count": images.count,
        "shape": list(images.shape),
        "layout": "uint8 NHWC",
        "classes": list(images.classes),
        "splits": {part: int((index["split"] == part).sum()) for part in (*splits.PARTS, splits.UNUSED)},
        "complexity": {"measure": complexity.MEASURE, "mean": float(index["complexity"].mean())},
        "near_duplicates": {
            "rms": config.near_duplicate_rms,
            "groups": int((group_sizes > 1).sum()),
            "images": int(group_sizes[group_sizes > 1].sum()),
        },
        "index": {"file": shards.INDEX, "sha256": index_sha256},
        "shards": entries,
    }
