"""Passes in halves against float32: outputs, gradients, and what stays float32 whatever the precision."""

from typing import Any

import numpy as np
import pytest
from ops_checks import draw

from ado_tasks import rng
from ado_tasks.backend import mlx_utils, mx
from ado_tasks.hardware.capability import Precision
from ado_tasks.models import half_ops, ops, precision
from ado_tasks.models.initialise import initialise
from ado_tasks.models.precision import in_precision, lowered, stays_float32
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.optimise.steps import TrainStep

CONFIG = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": [16, 32], "layers_per_block": 1,
    "norm_num_groups": 8, "attention_head_dim": 8, "num_class_embeds": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
TOLERANCE = {"bfloat16": 0.03, "float16": 0.005}  # root mean square, relative: some ten roundings of 2^-9 and of 2^-12
HALVES: list[Precision] = ["bfloat16", "float16"]


def network(**changes: Any) -> UNet2D:
    unet = UNet2D(UNet2DConfig.from_dict({**CONFIG, **changes}))
    initialise(unet, rng.key(0, "precision"))
    return unet


def batch() -> dict[str, mx.array]:
    shape = (4, 8, 8, 3)
    return {
        "images": draw(*shape), "noise": draw(*shape, name="noise"), "t": mx.array([1.0, 300.0, 997.0, 999.0]),
        "labels": mx.array([0, 1, 2, 3]),
    }  # fmt: skip


def loss_of(unet: UNet2D, kind: Precision) -> Any:
    apply = in_precision(unet, kind)

    def loss(parameters: Any, batch: Any) -> mx.array:
        unet.update(lowered(parameters, kind))
        return mx.mean((apply(batch["images"], batch["t"], batch["labels"]) - batch["noise"]) ** 2)

    return loss


def gradient(unet: UNet2D, kind: Precision) -> dict[str, np.ndarray]:
    start = unet.parameters()
    _, tree = mx.value_and_grad(loss_of(unet, kind))(start, batch())
    unet.update(start)
    found = dict(mlx_utils.tree_flatten(tree))
    assert {value.dtype for value in found.values()} == {mx.float32}
    return {name: np.array(value) for name, value in found.items()}


def rms(found: mx.array, wanted: mx.array) -> float:
    return float(mx.sqrt(mx.mean((found - wanted) ** 2) / mx.mean(wanted**2)))


def joined(gradients: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([each.ravel().astype(np.float64) for each in gradients.values()])


@pytest.mark.parametrize("kind", HALVES)
def test_a_pass_is_that_of_float32_up_to_rounding(kind: Precision) -> None:
    unet = network()
    arguments = (batch()["images"], batch()["t"], batch()["labels"])
    wanted = unet(*arguments)
    unet.update(lowered(unet.parameters(), kind))
    found = unet(*arguments)
    assert found.dtype == mx.float32
    assert 0 < rms(found, wanted) < TOLERANCE[kind]


@pytest.mark.parametrize("kind", HALVES)
def test_gradients_are_float32_and_point_the_same_way(kind: Precision) -> None:
    unet = network()
    wanted, found = joined(gradient(unet, "float32")), joined(gradient(unet, kind))
    assert found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted) > 0.999
    assert np.linalg.norm(found) / np.linalg.norm(wanted) == pytest.approx(1, abs=0.01)


def test_float32_is_what_it_was_to_the_byte() -> None:
    unet = network()
    parameters = unet.parameters()
    assert lowered(parameters, "float32") is parameters and in_precision(unet, "float32") is unet


def test_a_float16_gradient_that_would_vanish_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a loss as of a mean over a thousand times as many images."""

    def found() -> float:
        unet = network()
        loss = loss_of(unet, "float16")
        tree = mx.grad(lambda parameters: loss(parameters, batch()) / 4096)(unet.parameters())
        small, whole = (
            joined({k: np.array(v) for k, v in mlx_utils.tree_flatten(tree)}),
            joined(gradient(network(), "float32")),
        )
        return float(small @ whole / np.linalg.norm(small) / np.linalg.norm(whole))

    assert found() > 0.999
    monkeypatch.setattr(precision, "LOSS_SCALE", 2.0)
    assert found() < 0.999


def test_weights_of_norms_and_frequencies_stay_float32_and_all_others_do_not() -> None:
    unet = network(time_embedding_type="fourier")
    kept = {k for k, v in mlx_utils.tree_flatten(lowered(unet.parameters(), "bfloat16")) if v.dtype == mx.float32}
    assert kept == {name for name, _ in mlx_utils.tree_flatten(unet.parameters()) if stays_float32(name)}
    assert {"time_proj.weight", "conv_norm_out.bias", "mid_block.attentions.0.group_norm.weight"} <= kept
    assert all("norm" in name or "time_proj" in name for name in kept)
    assert not stays_float32("down_blocks.0.resnets.0.norm1.linear.weight")


@pytest.mark.parametrize("kind", HALVES)
def test_the_timestep_is_not_rounded(kind: Precision) -> None:
    """Bfloat16 has 996 and 1000 next to 999's neighbours: what the network is told must differ between 998 and 999."""
    unet = network()
    unet.update(lowered(unet.parameters(), kind))
    embedded = unet.time_proj(mx.array([998.0, 999.0]))
    assert embedded.dtype == mx.float32
    exact = np.sin(np.array([998.0, 999.0])[:, None] * np.array(unet.time_proj._frequencies, np.float64))
    assert (
        np.abs(np.array(embedded)[:, :8] - exact).max() < 1e-4 or np.abs(np.array(embedded)[:, 8:] - exact).max() < 1e-4
    )


@pytest.mark.parametrize("kind", [mx.bfloat16, mx.float16], ids=HALVES)
def test_statistics_of_a_norm_are_float32(kind: mx.Dtype) -> None:
    """16,384 numbers around 8: their sum of squares is no half, their mean to three digits hardly a bfloat16."""
    x = draw(1, 64, 64, 8, offset=8.0).astype(kind)
    one, zero = mx.ones(8), mx.zeros(8)
    found = ops.group_norm(x, 2, one, zero, 1e-5)
    assert found.dtype == kind
    wanted = ops.group_norm(x.astype(mx.float32), 2, one, zero, 1e-5)
    assert rms(found.astype(mx.float32), wanted) < (3e-3 if kind == mx.bfloat16 else 4e-4)


@pytest.mark.parametrize("kind", [mx.bfloat16, mx.float16], ids=HALVES)
def test_the_gradient_of_a_bias_is_a_float32_sum(kind: mx.Dtype) -> None:
    """Of 65,536 ones: float16 ends at 65,504, and a sum of bfloat16 stops growing at 256."""
    x, weight, bias = mx.ones((1, 256, 256, 2)), mx.ones((2, 1, 1, 2)), mx.zeros((2,))
    x, weight, bias = (each.astype(kind) for each in (x, weight, bias))
    scaled = mx.array(0.5, dtype=kind)
    by_conv = mx.grad(lambda b: mx.sum((ops.conv2d(x, weight, b) * scaled).astype(mx.float32)))(bias)
    by_linear = mx.grad(lambda b: mx.sum((ops.linear(x, weight[:, 0, 0], b) * scaled).astype(mx.float32)))(bias)
    # On a CPU MLX adds halves up in float32 by itself; on CUDA it does not: what is asked for is looked at too.
    assert half_ops.column_sums(x).dtype == mx.float32
    for found in (by_conv, by_linear):
        assert np.array(found.astype(mx.float32)).tolist() == [2**15] * 2


@pytest.mark.parametrize("kind", [mx.bfloat16, mx.float16], ids=HALVES)
def test_a_softmax_over_many_keys_is_float32(kind: mx.Dtype) -> None:
    """A thousand equal weights add up to 1: a sum of bfloat16 would stop growing at a quarter of them."""
    q, k, v = (draw(1, 2, 1024, 16, name=name, scale=scale) for name, scale in (("q", 0.1), ("k", 0.1), ("v", 1.0)))
    v = v + 1
    wanted = ops.attention(q, k, v, 0.25)
    found = ops.attention(*(each.astype(kind) for each in (q, k, v)), 0.25)
    assert found.dtype == kind
    assert rms(found.astype(mx.float32), wanted) < 5e-3


@pytest.mark.parametrize("kind", HALVES)
def test_the_optimiser_s_state_stays_float32_and_a_step_learns(kind: Precision) -> None:
    unet = network()
    step = TrainStep(loss_of(unet, kind), unet.parameters(), clip=1.0, ema_decay=0.9)
    losses = [float(step(batch(), 1e-3)) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert {k: v.dtype for k, v in step.state.items() if k != "step"} == dict.fromkeys(
        ("parameters", "adam.first", "adam.second", "average"), mx.float32
    )
