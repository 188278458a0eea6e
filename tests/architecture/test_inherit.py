"""What a candidate inherits: the identity at full width, the same function where what is dropped did nothing."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ado_tasks import rng
from ado_tasks.architecture import axes
from ado_tasks.architecture.importance import Importance, measure_importance
from ado_tasks.architecture.inherit import _rescaled_queries, _sliced, inherit, most_important
from ado_tasks.architecture.space import Space, SpaceConfig, check_inheritance
from ado_tasks.backend import mlx_utils, mx
from ado_tasks.errors import ConfigError
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.weights import flat_parameters

NETWORKS: dict[str, dict[str, Any]] = {
    "digits": {"block_out_channels": (8, 16), "down_block_types": ("DownBlock2D",) * 2,
               "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1, "attention_head_dim": 4},
    "attention": {"block_out_channels": (8, 16, 16), "down_block_types": ("DownBlock2D", *["AttnDownBlock2D"] * 2),
                  "up_block_types": (*["AttnUpBlock2D"] * 2, "UpBlock2D"), "layers_per_block": 2,
                  "attention_head_dim": 4, "resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet"},
    "one_head": {"block_out_channels": (8,), "down_block_types": ("AttnDownBlock2D",),
                 "up_block_types": ("AttnUpBlock2D",), "layers_per_block": 3, "attention_head_dim": None},
}  # fmt: skip


def network(name: str, **changes: Any) -> UNet2DConfig:
    shared: dict[str, Any] = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "norm_num_groups": 4,
                              "num_class_embeds": 3, "time_embedding_dim": 16}  # fmt: skip
    return UNet2DConfig(**{**shared, **NETWORKS[name], **changes})


def drawn(config: UNet2DConfig, name: str = "weights") -> UNet2D:
    """A network with weights of which none is 0 or 1: norms and biases too."""
    unet = UNet2D(config)
    initialise(unet, rng.key(0, "inherit", name))
    weights = {
        key: value + 0.1 * mx.random.normal(value.shape, key=rng.key(1, "inherit", name, key))
        for key, value in flat_parameters(unet).items()
    }
    unet.update(mlx_utils.tree_unflatten(list(weights.items())))
    return unet


def outputs(unet: UNet2D) -> np.ndarray:
    x = mx.random.normal((3, 8, 8, 1), key=rng.key(0, "inherit", "x"))
    return np.array(unet(x, mx.array([3.0, 400.0, 960.0]), mx.array([0, 1, 2])))


def batch(step: int) -> dict[str, mx.array]:
    shape = (2, 8, 8, 1)
    return {name: mx.random.normal(shape, key=rng.key(step, "inherit", name)) for name in ("x", "y")}


def importance_of(unet: UNet2D, batches: int = 2) -> Importance:
    def loss(parameters: Any, each: Any) -> mx.array:
        unet.update(parameters)
        return mx.mean((unet(each["x"], mx.array([3.0, 960.0]), mx.array([0, 1])) - each["y"]) ** 2)

    return measure_importance(unet, loss, map(batch, range(batches)))


def changed(unet: UNet2D, changes: dict[str, mx.array]) -> UNet2D:
    copy = UNet2D(unet.config)
    copy.update(mlx_utils.tree_unflatten(list({**flat_parameters(unet), **changes}.items())))
    return copy


@pytest.mark.parametrize("name", NETWORKS)
def test_the_table_counts_every_axis(name: str) -> None:
    """Every weight is in it, and each axis that is labelled has as many indices as the label counts."""
    unet = UNet2D(network(name))
    rows, weights = axes.table(unet.config), flat_parameters(unet)
    assert set(rows.axes) == set(weights)
    for key, (first, last) in rows.axes.items():
        for axis, length in ((first, weights[key].shape[0]), (last, weights[key].shape[-1])):
            assert not axis or sum(rows.sizes[part.stream] * part.unit for part in axis) == length, key


@pytest.mark.parametrize("name", NETWORKS)
def test_the_full_width_is_the_identity(name: str) -> None:
    teacher = drawn(network(name))
    before = {key: np.array(value).tobytes() for key, value in flat_parameters(teacher).items()}
    got = inherit(teacher, teacher.config, importance_of(teacher))
    assert {key: np.array(value).tobytes() for key, value in flat_parameters(got.unet).items()} == before
    assert got.dropped == ()


def widened(small: UNet2D) -> UNet2D:
    """Twice the channels and the same function: each channel has a double beside it which nothing reads.

    A double is in its channel's group of every norm, and so leaves means and variances as they are, in
    concatenations too. All that reads the doubles is zero; all that makes them is as for what they double.
    """
    wide = replace(
        small.config, block_out_channels=tuple(2 * width for width in small.config.block_out_channels),
        time_embedding_dim=small.config.embedding_width,
    )  # fmt: skip
    rows = axes.table(small.config)
    weights = {}
    for key, value in flat_parameters(small).items():
        first, last = rows.axes[key]
        array = np.array(value)
        if first:
            array = doubled(array, first, 0)
        if last:
            array = doubled_off(array, last)
        if key == "time_embedding.linear_1.weight":  # twice as many frequencies: every second is one of the old
            array = np.array(flat_parameters(drawn(wide, "time"))[key])
        weights[key] = mx.array(array)
    made = UNet2D(wide)
    made.update(mlx_utils.tree_unflatten(list(weights.items())))
    return made


def doubled(array: np.ndarray, axis: axes.Axis, along: int) -> np.ndarray:
    units = [part.unit for part in axis]
    assert len(set(units)) == 1
    shape = array.shape
    pieces = array.reshape(*shape[:along], -1, units[0], *shape[along + 1 :])
    return np.repeat(pieces, 2, axis=along).reshape(*shape[:along], -1, *shape[along + 1 :])


def doubled_off(array: np.ndarray, axis: axes.Axis) -> np.ndarray:
    moved = np.moveaxis(array, -1, 0)
    twice = doubled(moved, axis, 0)
    unit = axis[0].unit
    pieces = twice.reshape(-1, 2, unit, *moved.shape[1:]).copy()
    pieces[:, 1] = 0
    return np.moveaxis(pieces.reshape(twice.shape), 0, -1)


@pytest.mark.parametrize("name", ["digits", "attention"])
def test_what_nothing_reads_is_dropped_and_the_function_stays(name: str) -> None:
    """Widths halved: importance finds the channels and heads that nothing reads, in every skip and concatenation."""
    small = network(name, block_out_channels=tuple(width // 2 for width in NETWORKS[name]["block_out_channels"]),
                    attention_head_dim=2)  # fmt: skip
    teacher = widened(drawn(small))
    shuffled = _shuffled(teacher)
    got = inherit(shuffled, replace(shuffled.config, block_out_channels=small.block_out_channels),
                  importance_of(shuffled))  # fmt: skip
    # The time embedding's own frequencies are fewer and are fitted; here it is the rest that is compared.
    teacher_time = np.array(shuffled.time_embedding(shuffled.time_proj(mx.array([3.0, 400.0, 960.0]))))
    got.unet._embedding = _fixed(teacher_time, got.unet)  # type: ignore[method-assign]
    assert np.abs(outputs(got.unet) - outputs(shuffled)).max() <= 1e-6
    assert np.abs(outputs(shuffled)).max() > 0.1


def _fixed(time: np.ndarray, unet: UNet2D) -> Any:
    return lambda timestep, labels: mx.array(time) + unet.class_embedding(labels)


def _shuffled(unet: UNet2D) -> UNet2D:
    """The same function with a double and its channel swapped at random: no position tells which is read."""
    rows = axes.table(unet.config)
    kept = {}
    for stream, size in rows.sizes.items():
        order = np.arange(size).reshape(-1, 2)
        swap = rng.generator(0, "inherit", "swap", _tie(stream, unet.config)).random(len(order)) < 0.5
        kept[stream] = np.where(swap[:, None], order[:, ::-1], order).reshape(-1)
    weights = {key: _sliced(value, rows.axes[key], kept, rows.sizes) for key, value in flat_parameters(unet).items()}
    made = UNet2D(unet.config)
    made.update(mlx_utils.tree_unflatten(list(weights.items())))
    assert np.abs(outputs(made) - outputs(unet)).max() <= 1e-6
    return made


def _tie(stream: str, config: UNet2DConfig) -> str:
    widths = config.block_out_channels
    level = int(stream.rpartition(".")[2]) if stream.startswith("down.") else 0
    while level and widths[level] == widths[level - 1]:
        level -= 1
    return f"down.{level}" if stream.startswith("down.") else stream


def test_blocks_that_do_nothing_are_dropped_and_the_function_stays() -> None:
    """Of three layers the one on each way that passes on what it gets is found and left out; attention goes along."""
    teacher = drawn(network("one_head"))
    zero = {key: mx.zeros(value.shape) for key, value in flat_parameters(teacher).items()
            if key.startswith(("down_blocks.0.resnets.1.conv2", "down_blocks.0.attentions.1.to_out",
                               "up_blocks.0.resnets.2.conv2", "up_blocks.0.attentions.2.to_out",
                               "up_blocks.0.resnets.2.conv_shortcut"))}  # fmt: skip
    key = "up_blocks.0.resnets.2.conv_shortcut.weight"
    zero[key] = mx.array(np.eye(8, 16, dtype=np.float32)[:, None, None, :])
    idle = changed(teacher, zero)
    got = inherit(idle, replace(idle.config, layers_per_block=2), importance_of(idle))
    assert got.dropped == ("down_blocks.0.attentions.1", "down_blocks.0.resnets.1",
                           "up_blocks.0.attentions.2", "up_blocks.0.resnets.2")  # fmt: skip
    assert np.abs(outputs(got.unet) - outputs(idle)).max() <= 1e-6
    assert np.abs(outputs(idle) - outputs(teacher)).max() > 0.1


@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        ({"mid_block_type": None},
         ("mid_block.resnets.0.conv2", "mid_block.resnets.1.conv2", "mid_block.attentions.0.to_out")),
        ({"add_attention": False}, ("mid_block.attentions.0.to_out",)),
        ({"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
          "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")},
         ("down_blocks.2.attentions.0.to_out", "down_blocks.2.attentions.1.to_out", "up_blocks.0.attentions.0.to_out",
          "up_blocks.0.attentions.1.to_out", "up_blocks.0.attentions.2.to_out")),
    ],
)  # fmt: skip
def test_parts_that_do_nothing_go_and_the_function_stays(changes: dict[str, Any], idle: tuple[str, ...]) -> None:
    teacher = drawn(network("attention"))
    without = changed(
        teacher,
        {key: mx.zeros(value.shape) for key, value in flat_parameters(teacher).items() if key.startswith(idle)},
    )
    got = inherit(without, replace(teacher.config, **changes), importance_of(without))
    assert np.abs(outputs(got.unet) - outputs(without)).max() <= 1e-6
    assert np.abs(outputs(without) - outputs(teacher)).max() > 0.01


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        ({"downsample_type": "conv"}, ("down_blocks.1.downsamplers.0.conv2",)),
        ({"upsample_type": "conv"}, ("up_blocks.0.upsamplers.0.conv2", "up_blocks.1.upsamplers.0.conv2")),
        ({"downsample_type": "conv", "upsample_type": "conv"},
         ("down_blocks.1.downsamplers.0.conv2", "up_blocks.0.upsamplers.0.conv2", "up_blocks.1.upsamplers.0.conv2")),
        ({"down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),  # without attention: conv
          "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")},
         ("down_blocks.1.downsamplers.0.conv2", "up_blocks.1.upsamplers.0.conv2", "down_blocks.1.attentions.0.to_out",
          "down_blocks.1.attentions.1.to_out", "up_blocks.1.attentions.0.to_out", "up_blocks.1.attentions.1.to_out",
          "up_blocks.1.attentions.2.to_out")),
    ],
)  # fmt: skip
def test_a_residual_block_that_resamples_and_does_nothing_else_becomes_a_convolution(
    changes: dict[str, Any], idle: tuple[str, ...], padding: Any
) -> None:
    teacher = drawn(network("attention", upsample_type="resnet", downsample_padding=padding))
    without = changed(
        teacher,
        {key: mx.zeros(value.shape) for key, value in flat_parameters(teacher).items() if key.startswith(idle)},
    )
    got = inherit(without, replace(teacher.config, **changes), importance_of(without))
    assert set(name.removesuffix(".conv2").removesuffix(".to_out") for name in idle) == set(got.dropped)
    assert np.abs(outputs(got.unet) - outputs(without)).max() <= 1e-5
    assert np.abs(outputs(without) - outputs(teacher)).max() > 0.01


def test_the_width_of_one_head_is_made_up_for() -> None:
    """One head as wide as the level: with a double that nothing reads, half of it gives the same attention."""
    big, small = network("one_head", block_out_channels=(16,)), network("one_head")
    weights = {"mid_block.attentions.0.to_q.weight": mx.ones((8, 8))}
    got = _rescaled_queries(big, small, weights)["mid_block.attentions.0.to_q.weight"]
    assert np.allclose(np.array(got), math.sqrt(8 / 16))


def test_a_narrower_level_between_equal_ones_gets_a_projection_that_passes_on() -> None:
    teacher = drawn(network("attention"))
    got = inherit(teacher, replace(teacher.config, block_out_channels=(8, 16, 8)), importance_of(teacher))
    matrix = np.array(got.unet.down_blocks[2].resnets[0].conv_shortcut.weight)[:, 0, 0, :]
    assert matrix.shape == (8, 16) and (matrix.sum(axis=1) == 1).all()
    assert (got.kept["down.1"] == np.arange(16)).all()
    assert (matrix.argmax(axis=1) == got.kept["down.2"]).all()
    assert np.isfinite(outputs(got.unet)).all()


def test_the_most_important_of_each_group_stay() -> None:
    scores = np.array([1.0, 3.0, 2.0, 0.0, 9.0, 9.0, 9.0, 8.0])
    assert most_important(scores, 4, 2).tolist() == [1, 2, 4, 5]
    assert most_important(scores, 4, 1).tolist() == [4, 5, 6, 7]
    assert most_important(scores, 8, 2).tolist() == list(range(8))


def test_importance_is_the_change_of_the_loss_to_first_order() -> None:
    """A gate of 1 − δ on all that reads a channel changes the loss by −δ times the root of its importance."""
    teacher = drawn(network("digits"))
    rows, weights = axes.table(teacher.config), flat_parameters(teacher)
    found, delta, channel, stream = importance_of(teacher, batches=1), 1e-2, 3, "down.0"

    def loss_with(gate: float) -> float:
        changes = {}
        for key, (_, last) in rows.axes.items():
            start = 0
            factor = np.ones(weights[key].shape[-1], np.float32)
            for part in last:
                if part.stream == stream:
                    factor[start + channel] = gate
                start += rows.sizes[part.stream] * part.unit
            if last:
                changes[key] = weights[key] * mx.array(factor)
        unet, each = changed(teacher, changes), batch(0)
        out = unet(each["x"], mx.array([3.0, 960.0]), mx.array([0, 1]))
        return float(mx.mean((out - each["y"]) ** 2).item())

    slope = (loss_with(1 + delta) - loss_with(1 - delta)) / (2 * delta)
    assert slope**2 == pytest.approx(found.streams[stream][channel], rel=2e-2)


def test_what_cannot_inherit_is_refused() -> None:
    teacher = drawn(network("digits"))
    found = importance_of(teacher)
    for changes, message in (
        ({"block_out_channels": (8, 32)}, "block_out_channels: .*allowed: up to the teacher's"),
        ({"layers_per_block": 2}, "layers_per_block: 2; allowed: up to the teacher's 1"),
        ({"block_out_channels": (8, 8)}, "levels 0 and 1 are equally wide"),
        ({"attention_head_dim": 2}, "attention_head_dim: 2; allowed: a multiple of the teacher's 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            inherit(teacher, replace(teacher.config, **changes), found)
    attends = network("attention")  # resnet on the way down, convolutions on the way up
    check_inheritance(attends, replace(attends, downsample_type="conv"))
    with pytest.raises(ConfigError, match=r"\('resnet', 'resnet'\); allowed: conv, or the teacher's"):
        check_inheritance(attends, replace(attends, upsample_type="resnet"))
    with pytest.raises(ConfigError, match="where no level that resamples attends"):
        check_inheritance(teacher.config, replace(teacher.config, downsample_type="resnet"))


def test_the_kind_of_resampling_is_a_choice_that_keeps_each_network_once() -> None:
    teacher = network("attention", upsample_type="resnet")
    space = Space.around(teacher, SpaceConfig(resampling=("resnet", "conv"), attention=((1, 2), ())))
    found = [space.candidate(point) for point in space.points()]
    said = [(each.downsample_type, each.upsample_type, "AttnDownBlock2D" in each.down_block_types) for each in found]
    assert said == [("resnet", "resnet", True), ("conv", "conv", True), ("resnet", "resnet", False)]
    assert "resampling" not in Space.around(teacher, SpaceConfig()).dimensions
