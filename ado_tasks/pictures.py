"""Pictures: grids of images, and curves. The same figures give the same bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from ado_tasks.storage import atomic_file

DOTS_PER_INCH = 110
GAP = 2  # pixels between the images of a grid
_WITHOUT_VERSION = {"Software": None}  # matplotlib writes its version into a PNG; equal pictures should be equal files


def to_uint8(images: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Images in [-1, 1] as 0..255, rounded; what lies outside is clipped (for looking at, never for measuring)."""
    return np.clip(np.round((images + 1.0) * 127.5), 0, 255).astype(np.uint8)


def save_grid(
    path: Path, rows: Mapping[str, npt.NDArray[np.float32]], pixels: int = 40, label_width: int = 132
) -> None:
    """Write labelled rows of images, (n, H, W, C) in [-1, 1] with C 1 or 3, each image `pixels` wide, no smoothing."""
    count = max(len(images) for images in rows.values())
    height = max(round(pixels * images.shape[1] / images.shape[2]) for images in rows.values())
    canvas = Image.new("RGB", (label_width + count * (pixels + GAP), len(rows) * (height + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (label, images) in enumerate(rows.items()):
        top = row * (height + GAP)
        draw.text((6, top + height // 2 - 6), label, fill="black")
        for column, image in enumerate(to_uint8(images)):
            tile = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
            tile = tile.resize((pixels, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (label_width + column * (pixels + GAP), top))
    with atomic_file(path) as partial:
        canvas.save(partial)


def save_figure(path: Path, figure: Figure) -> None:
    """Write a matplotlib figure (made without pyplot: no global state) as PNG."""
    figure.set_layout_engine("tight")
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=DOTS_PER_INCH, metadata=_WITHOUT_VERSION)


def plain_axes(figure: Figure, position: tuple[int, int, int] = (1, 1, 1)) -> Axes:
    """Axes without the box, with a faint grid."""
    axes = figure.add_subplot(*position)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    return axes


def save_curves(
    path: Path, curves: Mapping[str, Sequence[tuple[int, float]]], y_label: str, *, log: bool = True
) -> None:
    """Write curves of (step, value) in one picture; one of a single point is a dot."""
    figure = Figure(figsize=(6.4, 3.6))
    axes = plain_axes(figure)
    for name, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.4, marker="o" if len(points) == 1 else None)
    axes.set_xlabel("training step")
    axes.set_ylabel(y_label)
    if log:
        axes.set_yscale("log")
    axes.legend(frameon=False)
    save_figure(path, figure)
