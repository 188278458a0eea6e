"""Muon's step: against the singular vectors it stands for, MLX's own Muon, and what is left to Adam."""

import math
from typing import Any

import mlx.optimizers as optim
import numpy as np
import pytest

from ado_tasks import rng
from ado_tasks.backend import mlx_utils, mx
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.weights import flat_parameters
from ado_tasks.optimise.muon import ADAMS, MOMENTUM, matrix_of, momentum_and_step, orthogonal
from ado_tasks.optimise.steps import Layout, TrainStep

UNET = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 8], "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4, "attention_head_dim": 8, "num_class_embeds": 3,
}  # fmt: skip
RATES = [1e-2, 2e-2, 1e-2, 0.0]


def draw(*shape: int, name: str) -> mx.array:
    return mx.random.normal(shape, key=rng.key(0, "muon", name))


@pytest.mark.parametrize("shape", [(3, 12, 12), (2, 8, 24), (2, 24, 8), (1, 1, 5)])
def test_of_a_matrix_usv_what_is_left_is_about_uv(shape: tuple[int, int, int]) -> None:
    """Singular vectors as they are and values near 1, of small ones too."""
    matrices = np.array(draw(*shape, name=str(shape)), np.float64)
    u, s, v = np.linalg.svd(matrices, full_matrices=False)
    s = np.maximum(s, 0.03 * np.linalg.norm(matrices, axis=(1, 2))[:, None])
    found = np.array(orthogonal(mx.array((u * s[:, None] @ v).astype(np.float32))), np.float64)
    turned = np.swapaxes(u, 1, 2) @ found @ np.swapaxes(v, 1, 2)
    values = np.diagonal(turned, axis1=1, axis2=2)
    assert values.min() > 0.6
    assert values.max() < 1.25
    np.testing.assert_allclose(turned * (1 - np.eye(turned.shape[1])), 0, atol=1e-4)


def test_nothing_of_nothing() -> None:
    assert not np.array(orthogonal(mx.zeros((2, 3, 4)))).any()


def test_steps_are_those_of_mlx_at_its_scale() -> None:
    """mlx.optimizers.Muon without decay, of matrices as broad as high; its step is 1 where ours is 0.2 √rows."""
    ours, momenta = draw(2, 9, 9, name="w"), mx.zeros((2, 9, 9))
    optimiser, theirs = optim.Muon(learning_rate=0.1, momentum=MOMENTUM, weight_decay=0.0), dict(enumerate(ours))
    for step in range(3):
        gradients = draw(2, 9, 9, name=f"g {step}")
        momenta, steps = momentum_and_step(momenta, gradients)
        ours = ours - 0.1 / (ADAMS * math.sqrt(9)) * steps
        theirs = optimiser.apply_gradients(dict(enumerate(gradients)), theirs)
    for number, matrix in theirs.items():
        np.testing.assert_allclose(np.array(ours[number]), np.array(matrix), atol=1e-5)


def test_a_step_is_about_as_long_as_adams() -> None:
    """A root mean square of 0.2 for a gradient of full rank, whatever the shape (Liu et al. 2025)."""
    for shape in ((1, 32, 32), (1, 16, 144), (1, 64, 16)):
        _, step = momentum_and_step(mx.zeros(shape), draw(*shape, name=str(shape)))
        assert 0.15 < float(mx.sqrt(mx.mean(step**2))) < 0.25


def test_in_a_unet_what_comes_in_and_goes_out_is_left_to_adam() -> None:
    net = UNet2D(UNet2DConfig.from_dict(UNET))
    shapes = {name: tuple(array.shape) for name, array in flat_parameters(net).items()}
    chosen = {name for name, shape in shapes.items() if matrix_of(name, shape)}
    assert {name.partition(".")[0] for name in chosen} == {"down_blocks", "mid_block", "up_blocks"}
    assert all(name.endswith("weight") for name in chosen)
    left = set(shapes) - chosen
    outer = ("conv_in", "conv_out", "time_embedding", "class_embedding")
    assert all(len(shapes[name]) == 1 or name.startswith(outer) for name in left)
    assert {"conv_in.weight", "conv_out.weight", "class_embedding.weight"} <= left
    assert matrix_of("mid_block.conv.weight", (8, 3, 3, 4)) == (8, 36)  # as it lies in memory: outputs first


def test_matrices_of_one_size_lie_together_and_every_parameter_where_it_is_looked_for() -> None:
    net = UNet2D(UNet2DConfig.from_dict(UNET))
    layout = Layout.of(net.parameters(), "muon")
    sizes = [matrix for _, matrix in layout.runs() if matrix]
    assert len(sizes) == len(set(sizes)) > 3
    arrays = flat_parameters(net)
    vector = layout.flatten(arrays)
    for run, matrix in layout.runs():
        inside = [n for n in layout.names if matrix and matrix_of(n, tuple(arrays[n].shape)) == matrix]
        for name, found in zip(inside, vector[run].reshape(-1, *(matrix or (1,))), strict=bool(matrix)):
            np.testing.assert_array_equal(np.array(found), np.array(arrays[name]).reshape(matrix))
    assert [run.start for run, _ in layout.runs()][1:] == [run.stop for run, _ in layout.runs()][:-1]
    assert layout.runs()[-1][0].stop == layout.size


def test_matrices_of_odd_sizes_come_after_those_that_are_to_lie_aligned() -> None:
    shapes = {"a": (5, 7), "b": (8, 8), "c": (6, 16), "d": (128,)}
    layout = Layout.of({name: mx.zeros(shape) for name, shape in shapes.items()}, "muon")
    assert layout.names == ("d", "b", "c", "a")


def parameters() -> dict[str, Any]:
    return {
        "conv_in": {"weight": draw(6, 3, name="in")},
        "mid": {"weight": draw(5, 6, name="w"), "bias": draw(5, name="b")},
    }


def loss(tree: Any, batch: Any) -> mx.array:
    hidden_units = mx.tanh(batch["x"] @ tree["conv_in"]["weight"].T)
    return mx.mean((hidden_units @ tree["mid"]["weight"].T + tree["mid"]["bias"] - batch["y"]) ** 2)


def batch(step: int) -> dict[str, mx.array]:
    return {"x": draw(8, 3, name=f"x{step}"), "y": draw(8, 5, name=f"y{step}")}


def run(optimiser: Any, shards: int = 1, stop: int | None = None) -> TrainStep:
    def new() -> TrainStep:
        return TrainStep(loss, parameters(), clip=0.05, ema_decay=0.9, shards=shards, optimiser=optimiser)

    step = new()
    for index, rate in enumerate(RATES):
        if index == stop:
            other = new()
            other.load({name: mx.array(np.array(array)) for name, array in step.state.items()})
            step = other
        step(batch(index), rate)
    return step


def test_the_matrix_inside_takes_muons_step_on_the_clipped_gradient_and_all_else_adams() -> None:
    muon, adam = TrainStep(loss, parameters(), clip=0.05, ema_decay=None, optimiser="muon"), TrainStep(
        loss, parameters(), clip=0.05, ema_decay=None
    )  # fmt: skip
    for each in (muon, adam):
        each(batch(0), 1e-2)
    before, found, plain = (
        dict(mlx_utils.tree_flatten(tree)) for tree in (parameters(), muon.parameters(), adam.parameters())
    )
    for name in ("conv_in.weight", "mid.bias"):
        np.testing.assert_array_equal(np.array(found[name]), np.array(plain[name]))
    gradients = dict(mlx_utils.tree_flatten(mx.grad(loss)(parameters(), batch(0))))
    norm = math.sqrt(sum(float(mx.sum(g * g)) for g in gradients.values()))
    assert norm > 0.05
    slope = gradients["mid.weight"] * 0.05 / norm
    moved, steps = momentum_and_step(mx.zeros((1, 5, 6)), slope[None])
    np.testing.assert_allclose(
        np.array(before["mid.weight"] - found["mid.weight"]), 1e-2 * np.array(steps[0]), atol=1e-6
    )
    state = muon.state["adam.first"]
    assert any(np.allclose(np.array(state[at : at + 30]), np.array(moved).ravel(), atol=1e-7)
               for at in range(len(state) - 29))  # fmt: skip


@pytest.mark.parametrize("stop", [None, 2])
def test_in_parts_or_resumed_it_is_the_same(stop: int | None) -> None:
    whole = run("muon")
    other = run("muon", shards=2, stop=stop) if stop is None else run("muon", stop=stop)
    for name, array in whole.state.items():
        if stop is None:
            np.testing.assert_allclose(np.array(other.state[name]), np.array(array), atol=1e-5)
        else:
            np.testing.assert_array_equal(np.array(other.state[name]), np.array(array))
    assert not np.allclose(np.array(whole.state["average"]), np.array(run("adam").state["average"]), atol=1e-4)


def test_the_average_is_of_what_muon_made() -> None:
    """After one step, at a decay of 0.1 (see `averaging_decay`)."""
    step = TrainStep(loss, parameters(), clip=1.0, ema_decay=0.9, optimiser="muon")
    start = np.array(step.state["parameters"])
    step(batch(0), 0.1)
    expected = 0.1 * start + 0.9 * np.array(step.state["parameters"])
    np.testing.assert_allclose(np.array(step.state["average"]), expected, atol=1e-6)


@pytest.mark.parametrize("place", ["mid", "conv_in"])
def test_a_gradient_that_is_not_a_number_makes_every_parameter_none(place: str) -> None:
    """Wherever it is: a loss is then not finite at the next step, which ends the run."""

    def broken(tree: Any, batch: Any) -> mx.array:
        return loss(tree, batch) + mx.sum(tree[place]["weight"][0, 0] * mx.nan)

    step = TrainStep(broken, parameters(), clip=1.0, ema_decay=None, optimiser="muon")
    step(batch(0), 0.1)
    assert np.isnan(np.array(step.state["parameters"])).all()
