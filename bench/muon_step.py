"""What Muon's step costs beside Adam's on this machine: a stage's training step with each, in turn.

    python bench/muon_step.py params.shapes32.yaml --rounds 7 --out reports/bench-muon-step.json

The network is that of the params file, of drawn shapes, with random weights, and the batch is of noise: forward,
backward, clip and the optimiser's step, as `distill` takes them. Figures are medians and quartiles of times and of the
ratios within rounds, since the times of a shared machine mean little.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from ado_tasks import rng
from ado_tasks.backend import mx, numeric_fingerprint
from ado_tasks.config import read_params
from ado_tasks.errors import AdoError, ConfigError
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.optimise.steps import Optimiser, TrainStep
from ado_tasks.storage import write_json

CHANNELS, CLASSES = 3, 18  # of drawn shapes
OPTIMISERS: tuple[Optimiser, ...] = ("adam", "muon")
LEARNING_RATE, CLIP = 1e-4, 1.0


def network(params: Mapping[str, Any]) -> UNet2D:
    """The U-Net of a params file, with random weights. Raises ConfigError where it names none with its data's size."""
    try:
        prepare, model = params["prepare"], params["train"]["model"]
        sizes = {"sample_size": prepare["height"], "in_channels": CHANNELS, "out_channels": CHANNELS}
        unet = UNet2D(UNet2DConfig.from_dict({**sizes, "num_class_embeds": CLASSES, **model}))
    except (KeyError, TypeError, ValidationError) as problem:
        raise ConfigError(
            f"params: {problem}; allowed: a file with prepare.height and train.model, such as params.shapes32.yaml"
        ) from problem
    initialise(unet, rng.key(0, "muon_step"))
    return unet


def stage_step(unet: UNet2D, size: int, optimiser: Optimiser, shards: int) -> Callable[[], object]:
    """One optimiser step on a batch of noise, run to its end."""
    pixels, net = unet.config.sample_size, UNet2D(unet.config)
    assert isinstance(pixels, int)  # `network` sets one
    shape = (size, pixels, pixels, CHANNELS)
    batch = {name: mx.random.normal(shape, key=rng.key(0, "muon_step", name)) for name in ("z", "target")}
    batch |= {"t": mx.full((size,), 500.0), "labels": mx.arange(size) % CLASSES}

    def loss(parameters: Any, part: Mapping[str, mx.array]) -> mx.array:
        net.update(parameters)
        return mx.mean(mx.square(net(part["z"], part["t"], part["labels"]) - part["target"]))

    step = TrainStep(loss, unet.parameters(), clip=CLIP, ema_decay=None, shards=shards, optimiser=optimiser)
    return lambda: mx.eval(step(batch, LEARNING_RATE), step.parameters())


def seconds(run: Callable[[], object], steps: int) -> float:
    """Of one of so many steps."""
    began = time.perf_counter()
    for _ in range(steps):
        run()
    return (time.perf_counter() - began) / steps


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, middle, high = (float(value) for value in np.quantile(values, [0.25, 0.5, 0.75]))
    return {"median": middle, "quartiles": [low, high]}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure both in turn."""
    unet = network(read_params(options.params))
    runs = {name: stage_step(unet, options.batch, name, options.shards) for name in OPTIMISERS}
    for each in runs.values():
        seconds(each, 2)  # compiled, and tuned
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds):
        for name in OPTIMISERS if number % 2 else reversed(OPTIMISERS):
            found[name].append(seconds(runs[name], options.steps))
    ratios = [muon / adam for adam, muon in zip(found["adam"], found["muon"], strict=True)]
    return {
        "kind": "muon-step", "machine": numeric_fingerprint(), "params": options.params.name, "batch": options.batch,
        "rounds": options.rounds, "steps": options.steps,
        "ms": {name: spread([1e3 * value for value in values]) for name, values in found.items()},
        "muon_over_adam": spread(ratios),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 where it cannot run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("params", type=Path, help="a params file, such as params.shapes32.yaml")
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps a turn")
    parser.add_argument("--shards", type=int, default=1, help="parts of a batch at the same time, on a CPU")
    parser.add_argument("--out", type=Path, default=Path("reports/bench-muon-step.json"), help="report")
    options = parser.parse_args(arguments)
    try:
        if min(options.batch, options.rounds, options.steps, options.shards) < 1:
            raise ConfigError("--batch, --rounds, --steps, --shards: at least 1 are allowed")
        report = run(options)
    except AdoError as problem:
        print(f"muon-step: {problem}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, report)
    for name, ms in report["ms"].items():
        print(f"{name}: {ms['median']:.1f} ms a step [{ms['quartiles'][0]:.1f}, {ms['quartiles'][1]:.1f}]")
    ratio = report["muon_over_adam"]
    print(f"muon over adam: {ratio['median']:.2f} [{ratio['quartiles'][0]:.2f}, {ratio['quartiles'][1]:.2f}]")
    print(f"report: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
