"""One training step in MLX against PyTorch on this machine: forward, backward, clip, Adam, averaged weights.

The same U-Net (`diffusers.UNet2DModel`), batch and arithmetic, in turn, so that whatever else the machine does meets
all alike; figures are medians of ratios, because the times of a shared machine mean little. Needs PyTorch and Diffusers
(`tests/install-parity.sh`). `python bench/train_step.py --out reports/bench-train-step.json`
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ado_tasks import rng
from ado_tasks.backend import mx, numeric_fingerprint
from ado_tasks.models import ops
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.optimise.steps import TrainStep

Step = Callable[[], object]

COMMON = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "attention_head_dim": 8}
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    # 1.18 M parameters, attention at every level: 64 tokens in heads of 8 channels
    "large": (
        128,
        {
            **COMMON,
            "block_out_channels": (32, 64, 64),
            "norm_num_groups": 32,
            "down_block_types": ("AttnDownBlock2D",) * 3,
            "up_block_types": ("AttnUpBlock2D",) * 3,
        },
    ),
}
LEARNING_RATE, CLIP, DECAY = 1e-4, 1.0, 0.999


def demo_model() -> tuple[int, dict[str, Any]]:
    """Batch and network of the demo, as params.yaml has them: 8×8 grey digits in ten classes."""
    import yaml

    train = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text(encoding="utf-8"))["train"]
    digits = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "num_class_embeds": 10}
    return train["batch_size"], {**digits, **train["model"]}


def mlx_step(config: dict[str, Any], batch_size: int, naive: bool) -> Step:
    """A training step in MLX. `naive`: MLX's own operations, the batch in one part."""
    unet = UNet2D(UNet2DConfig.from_dict(config))
    initialise(unet, rng.key(0, "bench"))
    shape = (batch_size, config["sample_size"], config["sample_size"], config["in_channels"])
    batch = {name: mx.random.normal(shape, key=rng.key(0, "bench", name)) for name in ("images", "noise")}
    batch["t"] = mx.random.uniform(0, 999, (batch_size,), key=rng.key(0, "bench", "t"))
    if config.get("num_class_embeds"):
        batch["labels"] = mx.arange(batch_size) % config["num_class_embeds"]

    def loss(parameters: Any, part: Any) -> mx.array:
        unet.update(parameters)
        return mx.mean((unet(part["images"], part["t"], part.get("labels")) - part["noise"]) ** 2)

    step = TrainStep(loss, unet.parameters(), clip=CLIP, ema_decay=DECAY, shards=1 if naive else 2)

    def run() -> object:
        return mx.eval(step(batch, LEARNING_RATE), step.parameters())

    form = ops.on_cpu
    ops.on_cpu = (lambda: False) if naive else form  # the form is chosen while the step is traced, in its first call
    try:
        run()
    finally:
        ops.on_cpu = form
    return run


def torch_step(config: dict[str, Any], batch_size: int) -> Step:
    """The same in eager PyTorch, on as many threads as there are cores."""
    import torch
    from diffusers.models.unets.unet_2d import UNet2DModel

    torch.set_num_threads(os.cpu_count() or 1)
    model = UNet2DModel(**config)
    average = [parameter.detach().clone() for parameter in model.parameters()]
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    shape = (batch_size, config["in_channels"], config["sample_size"], config["sample_size"])
    images, noise, t = torch.randn(shape), torch.randn(shape), torch.rand(batch_size) * 999
    classes = config.get("num_class_embeds")
    labels = {"class_labels": torch.arange(batch_size) % classes} if classes else {}

    def run() -> object:
        optimiser.zero_grad()
        loss = ((model(images, t, **labels).sample - noise) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        torch._foreach_lerp_(average, list(model.parameters()), 1 - DECAY)  # pyright: ignore[reportPrivateImportUsage]
        return loss.item()

    return run


def interleaved(steps: dict[str, Step], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each step, `repeats` at a time, in turn. The first of each turn is left out."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            for _ in range(repeats):
                start = time.perf_counter()
                step()
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def summary(times: dict[str, list[float]], repeats: int) -> dict[str, Any]:
    """Speed of each as a multiple of PyTorch's: the median over rounds of the ratio of medians, and its spread."""
    medians = {
        name: [statistics.median(each[k : k + repeats]) for k in range(0, len(each), repeats)]
        for name, each in times.items()
    }
    result: dict[str, Any] = {}
    for name, own in medians.items():
        ratios = sorted(theirs / mine for theirs, mine in zip(medians["pytorch"], own, strict=True))
        result[name] = {
            "speed_over_pytorch": round(statistics.median(ratios), 3),
            "quartiles": [round(value, 3) for value in statistics.quantiles(ratios, n=4)[::2]],
            "milliseconds": round(statistics.median(times[name]), 1),
        }
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps a turn")
    parser.add_argument("--models", nargs="*", default=["demo", "large"], choices=["demo", "large"])
    parser.add_argument(
        "--bar", type=float, default=0.9, help="exit with 1 where MLX is slower than this times PyTorch"
    )
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"machine": numeric_fingerprint(), "load_before": os.getloadavg(), "models": {}}
    for name in arguments.models:
        batch_size, config = demo_model() if name == "demo" else MODELS[name]
        steps = {
            "pytorch": torch_step(config, batch_size),
            "mlx": mlx_step(config, batch_size, naive=False),
            "mlx naive": mlx_step(config, batch_size, naive=True),
        }
        figures = summary(interleaved(steps, arguments.rounds, arguments.repeats), arguments.repeats)
        report["models"][name] = figures
        for form, values in figures.items():
            low, high = values["quartiles"]
            print(
                f"{name:6} {form:10} {values['speed_over_pytorch']:6.2f} × PyTorch  (quartiles {low:.2f} to {high:.2f})"
            )
    report["load_after"] = os.getloadavg()
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    slow = [name for name, each in report["models"].items() if each["mlx"]["speed_over_pytorch"] < arguments.bar]
    if slow:
        print(f"slower than {arguments.bar} × PyTorch: {', '.join(slow)}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    raise SystemExit(main())
