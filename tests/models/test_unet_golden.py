"""Our U-Net against stored answers of `diffusers.UNet2DModel`: parity is checked where PyTorch is not installed."""

import json
from pathlib import Path

import numpy as np
import pytest
from unet_cases import CASES, is_close, summary
from unet_run import run

STORED = np.load(Path(__file__).parents[1] / "golden" / "unet.npz")


@pytest.mark.parametrize("name", CASES)
def test_same_output_and_gradients_as_stored(name):
    output, by_input, gradients = run(CASES[name])
    assert STORED[f"{name}/output"].std() > 0.05
    np.testing.assert_allclose(output, STORED[f"{name}/output"], rtol=0, atol=1e-4)
    assert not is_close({"x": by_input}, {"x": STORED[f"{name}/by_input"]}, 1e-3)

    expected_names = json.loads(str(STORED[f"{name}/weights"]))
    used = {n: g for n, g in gradients.items() if n in expected_names}
    names, figures = summary(used)
    assert names == expected_names
    expected = STORED[f"{name}/by_weight"]
    # Both figures of a weight are off by at most the length of the difference (times that of the direction).
    length = np.maximum(expected[:, 0], 1e-3 * expected[:, 0].max())
    sizes = np.array([used[n].size for n in names])
    assert (np.abs(figures[:, 0] - expected[:, 0]) <= 1e-3 * length).all()
    assert (np.abs(figures[:, 1] - expected[:, 1]) <= 1e-3 * length * np.sqrt(sizes)).all()


def test_every_case_is_stored():
    assert {key.split("/")[0] for key in STORED.files} == {*CASES, "versions"}
