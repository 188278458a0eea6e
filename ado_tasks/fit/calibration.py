"""Networks to fit a cost model on, and to test it: drawn from the fields that a search varies, timed in turn."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.fit.work import Op, unet_work
from ado_tasks.hardware.capability import Precision
from ado_tasks.hardware.latency import interleaved
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig

WIDTHS = (16, 24, 32, 48, 64)  # of the first level
GROWTH = ((1, 1), (1, 2), (2, 2), (1, 1, 2), (1, 2, 2), (1, 2, 3))  # of the levels, in first widths
HEAD_WIDTHS = (8, 16, 32)


def drawn_configs(seed: int, name: str, count: int, side: int) -> list[UNet2DConfig]:
    """Configurations that differ in all that a search varies; draws of different names share none but by chance."""
    draw = rng.generator(seed, "candidates", name)
    return [_drawn(draw, side) for _ in range(count)]


def _drawn(draw: np.random.Generator, side: int) -> UNet2DConfig:
    width, growth = int(draw.choice(WIDTHS)), GROWTH[int(draw.integers(len(GROWTH)))]
    attends = draw.random(len(growth)) < 0.4
    kinds = [_kind(draw, bool(attends[level])) for level in range(len(growth))]
    values: dict[str, Any] = {
        "sample_size": side, "in_channels": 3, "out_channels": 3, "norm_num_groups": 8,
        "block_out_channels": [width * times for times in growth],
        "down_block_types": [down for down, _ in kinds], "up_block_types": [up for _, up in reversed(kinds)],
        "layers_per_block": int(draw.integers(1, 4)), "attention_head_dim": int(draw.choice(HEAD_WIDTHS[:2])),
        "mid_block_type": "UNetMidBlock2D" if draw.random() < 0.7 else None, "add_attention": bool(draw.random() < 0.5),
    }  # fmt: skip
    return UNet2DConfig.from_dict(values)


def _kind(draw: np.random.Generator, attends: bool) -> tuple[str, str]:
    if attends:
        return "AttnDownBlock2D", "AttnUpBlock2D"
    return ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if draw.random() < 0.3 else ("DownBlock2D", "UpBlock2D")


def timed(
    configs: Sequence[UNet2DConfig],
    batch: int,
    rounds: int,
    precision: Precision = "float32",
    on_round: Callable[[int], None] = lambda _: None,
) -> list[list[float]]:
    """Seconds of a compiled forward pass of each, in each round, all in turn."""
    runs = {str(number): _forward(config, batch, precision) for number, config in enumerate(configs)}
    seconds = interleaved(runs, rounds, on_round)
    return [seconds[str(number)] for number in range(len(configs))]


def works(configs: Sequence[UNet2DConfig], batch: int) -> list[list[Op]]:
    """What each of them does."""
    return [unet_work(config, batch) for config in configs]


def _forward(config: UNet2DConfig, batch: int, precision: Precision) -> Callable[[], object]:
    unet = UNet2D(config)
    initialise(unet, rng.key(0, "calibration"))
    unet.set_dtype(getattr(mx, precision))
    assert isinstance(config.sample_size, int)  # as drawn
    shape = (batch, config.sample_size, config.sample_size, config.in_channels)
    x, t = mx.random.normal(shape, key=rng.key(0, "calibration", "x")), mx.full((batch,), 500.0)
    mx.eval(unet.parameters(), x, t)
    step = mx.compile(unet)
    return lambda: mx.eval(step(x, t))
