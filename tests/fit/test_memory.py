"""The predicted peak of a training step and of a pass against MLX's own count."""

import gc
from collections.abc import Callable
from typing import Any

import pytest

from ado_tasks import rng
from ado_tasks.backend import mx, on_cpu
from ado_tasks.fit.calibration import drawn_configs
from ado_tasks.fit.memory import BLOCK_ARRAYS, Plan, activations, needed
from ado_tasks.fit.work import Op, unet_work
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.optimise.steps import TrainStep

pytestmark = pytest.mark.skipif(not on_cpu(), reason="the numbers were read off a CPU")
BATCH = 16


def peak_of(action: Callable[[], object]) -> int:
    action()
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    action()
    return mx.get_peak_memory()


def test_activations_by_hand() -> None:
    """Two blocks that keep 10 and 20 and hand on 3 and 4; the second has scores of 12, which only one form keeps."""
    work = [
        Op("norm", 0, 0, kept=10, passing=5), Op("pointwise", 0, 0, leaving=3),
        Op("attention", 0, 0, kept=20, passing=24, scores=12, positions=2, head_width=1),
        Op("pointwise", 0, 0, leaving=4),
    ]  # fmt: skip
    assert activations(work, "whole", checkpointing=False, cpu=True) == (30, 24)
    assert activations(work, "whole", checkpointing=True, cpu=True) == (3 + 4 + 20, 24)
    assert activations(work, "fused", checkpointing=True, cpu=True) == (3 + 4 + 10, 5)
    assert activations(work, "chunked", checkpointing=False, cpu=True) == (18, BLOCK_ARRAYS * 3 * 2 * 2)


def test_the_peak_is_as_predicted() -> None:
    """Of a network that the model was not read off. Both sides: a plan that is far too careful helps no one."""
    config = drawn_configs(0, "memory", 8, 16)[7]
    before = mx.get_active_memory()
    unet = UNet2D(config)
    initialise(unet, rng.key(0, "memory"))
    batch: dict[str, Any] = {"x": mx.random.normal((BATCH, 16, 16, 3), key=rng.key(0, "x")), "t": mx.zeros((BATCH,))}
    mx.eval(unet.parameters(), batch)
    predicted = needed(unet_work(config, BATCH), Plan("cpu", "float32", "whole", "whole", checkpointing=False))
    run = mx.compile(unet)
    sampling = peak_of(lambda: mx.eval(run(batch["x"], batch["t"]))) - before
    assert sampling == pytest.approx(predicted.sampling, rel=0.4)

    def loss(weights: Any, part: Any) -> mx.array:
        unet.update(weights)
        return mx.mean((unet(part["x"], part["t"]) - part["x"]) ** 2)

    step = TrainStep(loss, unet.parameters(), clip=1.0, ema_decay=0.99, shards=2)
    training = peak_of(lambda: mx.eval(step(batch, 1e-3), step.parameters())) - before
    assert training == pytest.approx(predicted.training, rel=0.2)
