"""Stores what `diffusers.UNet2DModel` (PyTorch) answers to the cases of tests/models/unet_cases.py.

With it parity is checked where PyTorch is not installed. Run from the repository root with PyTorch and Diffusers:

    python tests/golden/make_unet_golden.py

Inputs and weights come from a formula and are not stored: per case the output and the input's gradient in full, and of
each weight's gradient its length and its product with a fixed direction.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import diffusers
import torch
from test_unet_parity import torch_run
from unet_cases import CASES, summary

GOLDEN = Path(__file__).with_name("unet.npz")


def main() -> None:
    """Write unet.npz."""
    stored = {"versions": np.array(json.dumps({"torch": torch.__version__, "diffusers": diffusers.__version__}))}
    for name, case in CASES.items():
        output, by_input, gradients = torch_run(case)
        stored[f"{name}/output"] = output.astype(np.float32)
        stored[f"{name}/by_input"] = by_input.astype(np.float32)
        names, figures = summary(gradients)
        stored[f"{name}/weights"] = np.array(json.dumps(names))
        stored[f"{name}/by_weight"] = figures
    np.savez_compressed(GOLDEN, **stored)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
