"""Predicted against measured latency of networks that the cost model has not seen.

    python bench/cost_model.py               # here, float32, 16 networks to fit on, 30 to predict: 3 minutes
    python bench/cost_model.py --side 32 --batch 64 --precision bfloat16    # for a GPU

Measures the machine, fits on networks drawn from the fields that a search varies (channels, layers, attention, heads,
middle, kind of resampling), predicts others, times them in turn, and prints Spearman's ρ with its interval. Fails below
0.9. The report keeps every network's configuration, its predicted and its measured milliseconds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ado_tasks.fit.calibration import drawn_configs, timed, works
from ado_tasks.fit.cost import fit_cost_model
from ado_tasks.fit.probes import TYPES, measure_capability
from ado_tasks.hardware.capability import read_capability
from ado_tasks.metrics.rank_correlation import rank_correlation
from ado_tasks.pictures import plain_axes, save_figure

BAR = 0.9


def median_ms(seconds: list[list[float]]) -> list[float]:
    return [1e3 * float(np.median(each)) for each in seconds]


def picture(path: Path, predicted: list[float], measured: list[float], title: str) -> None:
    figure = Figure(figsize=(4.8, 4.4))
    axes = plain_axes(figure)
    ends = [0.8 * min(*predicted, *measured), 1.25 * max(*predicted, *measured)]
    axes.plot(ends, ends, color="0.7", linewidth=1)
    axes.plot(measured, predicted, "o", markersize=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):  # plain numbers, few enough not to touch
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("measured, ms")
    axes.set_ylabel("predicted, ms")
    axes.set_title(title, fontsize=9)
    save_figure(path, figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=int, default=16, help="networks that the model is fitted on")
    parser.add_argument("--unseen", type=int, default=30, help="networks that it predicts")
    parser.add_argument("--side", type=int, default=16, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=4, help="images")
    parser.add_argument("--rounds", type=int, default=5, help="times each network is timed")
    parser.add_argument("--precision", choices=list(TYPES), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hardware", type=Path, default=None, help="hardware.json; measured where none is given")
    parser.add_argument("--out", type=Path, default=Path("bench/reports/cost_model.json"), help="JSON report")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/cost_model.png"), help="PNG")
    arguments = parser.parse_args()
    capability = read_capability(arguments.hardware) if arguments.hardware else measure_capability()
    print(f"{capability.chip}: {capability.peak_gflops} GFLOP/s, {capability.bandwidth_gb_s} GB/s", flush=True)
    known = drawn_configs(arguments.seed, "fit", arguments.fit, arguments.side)
    unseen = drawn_configs(arguments.seed, "unseen", arguments.unseen, arguments.side)
    unseen = [config for config in unseen if config not in known]
    # All in one run: a machine that slows down slows both sides.
    times = median_ms(timed([*known, *unseen], arguments.batch, arguments.rounds, arguments.precision))
    fitted_on = [1e-3 * each for each in times[: len(known)]]
    model = fit_cost_model(works(known, arguments.batch), fitted_on, capability, arguments.precision)
    predicted = [1e3 * model.seconds(work, capability) for work in works(unseen, arguments.batch)]
    measured = times[len(known) :]
    rho = rank_correlation(np.array(predicted), np.array(measured))
    errors = np.abs(np.array(predicted) / np.array(measured) - 1)
    entries: list[dict[str, Any]] = [
        {"config": config.to_dict(), "predicted_ms": round(p, 3), "measured_ms": round(m, 3)}
        for config, p, m in zip(unseen, predicted, measured, strict=True)
    ]
    report = {
        "hardware": {**capability.as_plain(), "probes": []}, "model": model.as_plain(),
        "settings": {n: value for n, value in vars(arguments).items() if n not in ("hardware", "out", "picture")},
        "spearman": {"value": rho.value, "ci": [rho.low, rho.high], "n": len(unseen)},
        "relative_error": {"median": float(np.median(errors)), "worst": float(errors.max())}, "unseen": entries,
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    said = f"ρ = {rho.value:.3f} [{rho.low:.3f}, {rho.high:.3f}], n = {len(unseen)}"
    picture(arguments.picture, predicted, measured, f"{capability.chip}, {arguments.precision}\n{said}")
    print(
        "factors:", {kind: round(value, 2) for kind, value in model.factors.items()}, f"{model.layer_us:.0f} µs a layer"
    )
    print(f"error: left out {model.median_error:.1%}, unseen {np.median(errors):.1%}, worst {errors.max():.1%}")
    print(f"measured {min(measured):.2f} to {max(measured):.2f} ms; Spearman {said}")
    return 0 if rho.value >= BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
