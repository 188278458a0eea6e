"""Pictures: what they are to show can be seen in them."""

from pathlib import Path

import numpy as np
from PIL import Image

from ado_tasks.evaluation.pictures import COLOURS, colours_of
from ado_tasks.pictures import save_curves


def test_families_of_any_name_have_colours_that_tell_them_apart() -> None:
    families = ["teacher", "calibrated", "mine", "progressive", "yours"]
    found = colours_of(families)
    assert list(found) == families and len(set(found.values())) == len(families)
    assert found["progressive"] == COLOURS["progressive"]
    apart = {name: [int(colour[at : at + 2], 16) for at in (1, 3, 5)] for name, colour in found.items()}
    for name in ("mine", "yours"):
        for other in set(families) - {name}:
            assert np.abs(np.subtract(apart[name], apart[other])).max() >= 40, (name, other)  # of 255, in one channel


def test_a_curve_of_one_point_is_seen(tmp_path: Path) -> None:
    save_curves(tmp_path / "curves.png", {"short": [(5, 1.5)], "long": [(1, 1.0), (9, 2.0)]}, "loss")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
    blue = np.abs(pixels - (31, 119, 180)).sum(-1) < 30  # matplotlib's first colour
    assert blue[:, blue.shape[1] // 4 :].any()  # not only in the legend, which stands at the left
