"""The roofline picture of a machine (Williams, Waterman & Patterson 2009): probes below what its roofs allow."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ado_tasks.hardware.capability import Capability
from ado_tasks.pictures import plain_axes, save_figure

MARKERS = {"matmul": "s", "convolution": "o", "attention": "^"}
COLOURS = {"float32": "tab:blue", "float16": "tab:orange", "bfloat16": "tab:green"}


def save_roofline(path: Path, machine: Capability) -> None:
    """Write it as PNG: operations a second over operations a byte, both logarithmic."""
    figure = Figure(figsize=(7.4, 4.2))
    axes = plain_axes(figure)
    probes = [probe for probe in machine.probes if probe.gflops > 0 and probe.gb_s > 0]
    intensities = [probe.gflops / probe.gb_s for probe in probes] or [1.0, 1000.0]
    x = np.geomspace(0.1, 2 * max(intensities), 200)
    for precision, colour in COLOURS.items():
        peak = machine.peak_gflops.get(precision, 0.0)
        if peak <= 0:
            continue
        roof = np.minimum(peak, machine.bandwidth_gb_s * x)
        axes.plot(x, roof, color=colour, linewidth=1.2, label=f"roof, {precision}")
        for kind, marker in MARKERS.items():
            own = [probe for probe in probes if (probe.kind, probe.precision) == (kind, precision)]
            points = [(probe.gflops / probe.gb_s, probe.gflops) for probe in own]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=5, label=f"{kind}, {precision}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte of inputs and outputs")
    axes.set_ylabel("GFLOP/s")
    said = "published figures" if machine.predicted else "measured"
    axes.set_title(f"{machine.chip} ({machine.device}), {machine.bandwidth_gb_s:.0f} GB/s, {said}", fontsize=9)
    if probes:
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(path, figure)
