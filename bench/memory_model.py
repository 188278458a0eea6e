"""Predicted against measured peak memory of training and sampling: MLX's own count, several networks and batches.

    python bench/memory_model.py             # 6 networks, two batches each, about a minute
    python bench/memory_model.py --count 4   # fewer

Prints measured over predicted for each. Fails where a measured peak exceeds the predicted one by more than a third, or
the median error exceeds 20 %. The networks are not those that the model's numbers were
read off.
"""

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.fit.calibration import drawn_configs
from ado_tasks.fit.memory import FLOAT32, Plan, activations, needed
from ado_tasks.fit.probes import device_kind
from ado_tasks.fit.work import parameters, unet_work
from ado_tasks.hardware.fingerprint import this_machine
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.optimise.steps import TrainStep

MIB = 2**20
EXCESS, MEDIAN = 4 / 3, 0.2


def peak_of(action: Callable[[], object]) -> int:
    """Bytes at the peak of a second run, all that is alive included."""
    action()
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    action()
    return mx.get_peak_memory()


def measured(config: UNet2DConfig, batch: int, side: int, shards: int) -> tuple[float, float]:
    """Peak bytes of a training step and of a pass."""
    unet = UNet2D(config)
    initialise(unet, rng.key(0, "memory"))
    x = mx.random.normal((batch, side, side, 3), key=rng.key(0, "memory", "x"))
    t = mx.full((batch,), 500.0)
    mx.eval(unet.parameters(), x, t)
    run = mx.compile(unet)
    sampling = peak_of(lambda: mx.eval(run(x, t)))
    start = unet.parameters()

    def loss(weights: Any, part: Any) -> mx.array:
        unet.update(weights)
        return mx.mean((unet(part["x"], part["t"]) - part["x"]) ** 2)

    step = TrainStep(loss, start, clip=1.0, ema_decay=0.99, shards=shards)
    unet.update(step.parameters())
    del start
    training = peak_of(lambda: mx.eval(step({"x": x, "t": t}, 1e-3), step.parameters()))
    return training, sampling


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=6, help="networks")
    parser.add_argument("--skip", type=int, default=7, help="networks of the same draw that are left out before them")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench/reports/memory_model.json"), help="JSON report")
    arguments = parser.parse_args()
    device = device_kind()
    plan = Plan(device, "float32", "whole", "whole", checkpointing=False, shards=arguments.shards)
    rows: list[dict[str, float]] = []
    for config in drawn_configs(0, "memory", arguments.skip + arguments.count, arguments.side)[arguments.skip :]:
        for batch in arguments.batches:
            gc.collect()
            mx.clear_cache()
            training, sampling = measured(config, batch, arguments.side, arguments.shards)
            work = unet_work(config, batch)
            predicted = needed(work, plan)
            kept, passing = activations(work, "whole", checkpointing=False, cpu=device == "cpu")
            rows.append({
                "batch": batch, "parameters_mib": FLOAT32 * parameters(work) / MIB, "kept_mib": FLOAT32 * kept / MIB,
                "passing_mib": FLOAT32 * passing / MIB, "training_mib": training / MIB, "sampling_mib": sampling / MIB,
                "training_ratio": training / predicted.training, "sampling_ratio": sampling / predicted.sampling,
            })  # fmt: skip
            print({name: round(value, 2) for name, value in rows[-1].items()}, flush=True)
    ratios = {name: np.array([row[f"{name}_ratio"] for row in rows]) for name in ("training", "sampling")}
    errors = {
        name: {"median": float(np.median(abs(1 / each - 1))), "least": float(each.min()), "most": float(each.max())}
        for name, each in ratios.items()
    }
    print("measured over predicted:", json.dumps(errors))
    report = {"hardware": this_machine().as_plain(), "rows": rows, "errors": errors}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if any(each["most"] > EXCESS or each["median"] > MEDIAN for each in errors.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
