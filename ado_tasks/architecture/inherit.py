"""A smaller network with a teacher's weights: blocks left out, channels and heads sliced by importance.

Slicing to the full width is the identity, bit for bit. Where what is dropped did nothing (and the group norms see the
same means and variances without it) the function stays as it is.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ado_tasks.architecture import axes
from ado_tasks.architecture.axes import Axis, Table
from ado_tasks.architecture.importance import Floats, Importance
from ado_tasks.architecture.space import check_inheritance
from ado_tasks.backend import mlx_utils, mx
from ado_tasks.models.embeddings import Timesteps
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.weights import flat_parameters

Rows = npt.NDArray[np.intp]
FITTED_TIMESTEPS = 1000  # Ho et al. 2020, §4: timesteps 0 to 999, which the new embedding of time is fitted on


@dataclass(frozen=True)
class Inherited:
    """A candidate, and what was kept."""

    unet: UNet2D
    kept: dict[str, Rows]  # by stream of the teacher: members kept, in order
    dropped: tuple[str, ...]  # blocks of the teacher that were left out


def inherit(teacher: UNet2D, network: UNet2DConfig, importance: Importance) -> Inherited:
    """A network of another configuration with the weights of a teacher.

    Args:
        teacher: has the weights.
        network: of the candidate; the fields that `Space` can change differ.
        importance: of the teacher's channels, heads and blocks: the most important stay.

    Raises:
        ConfigError: the configuration cannot inherit from the teacher (see space.py).
    """
    check_inheritance(teacher.config, network)
    source = _blocks_kept(teacher.config, network, importance)
    of_teacher = axes.table(teacher.config)
    of_candidate = axes.table(network, teacher.config.attention_head_dim)
    kept = _members_kept(network, of_teacher, of_candidate, source, importance)
    theirs = flat_parameters(teacher)
    made = UNet2D(network)
    weights: dict[str, mx.array] = {}
    for name, empty in flat_parameters(made).items():
        origin = _origin(name, source)
        if origin in theirs:
            weights[name] = _sliced(theirs[origin], of_teacher.axes[origin], kept, of_teacher.sizes)
        elif _RESIZE.fullmatch(name):  # in the place of a residual block
            weights[name] = _resizing(name, empty, network.downsample_padding)
        else:  # a projection that the candidate alone has: x passes through it as it is
            weights[name] = _passing(name, empty, kept)
    weights |= _rescaled_queries(teacher.config, network, weights)
    if network.block_out_channels[0] != teacher.config.block_out_channels[0]:
        weights |= _time_embedding(teacher.config, network, theirs)
    made.update(mlx_utils.tree_unflatten(list(weights.items())))
    mx.eval(made.parameters())
    dropped = sorted(set(_blocks(theirs)) - {_origin(name, source) for name in _blocks(weights)})
    return Inherited(made, kept, tuple(dropped))


# ---- which blocks


def _blocks_kept(teacher: UNet2DConfig, network: UNet2DConfig, importance: Importance) -> dict[str, str]:
    """For the residual blocks of each level: the teacher's name by the candidate's, both without what follows."""
    source: dict[str, str] = {}
    levels = len(teacher.block_out_channels)
    for level in range(levels):
        way_down, way_up = f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}"
        down, up = list(range(teacher.layers_per_block)), list(range(teacher.layers_per_block + 1))
        while len(down) > network.layers_per_block:
            leaves_down, leaves_up = _least_pair(down, up, way_down, way_up, importance)
            down.remove(leaves_down)
            up.remove(leaves_up)
        source |= {f"{way_down}.{index}": f"{way_down}.{origin}" for index, origin in enumerate(down)}
        source |= {f"{way_up}.{index}": f"{way_up}.{origin}" for index, origin in enumerate(up)}
    return source


def _least_pair(down: list[int], up: list[int], way_down: str, way_up: str, importance: Importance) -> tuple[int, int]:
    """The block on the way down, and the one on the way up, that matter least together.

    Never the first of a level, which changes the width, nor the last on the way up, which takes the state from above.
    Of L blocks down, j may go with L−1−j or L−j on the way up: every state that stays then reaches the block which
    took it, or one equal to it where block j does nothing.
    """
    count = len(down)
    pairs = [(j, r) for j in range(1, count) for r in (count - 1 - j, count - j) if 1 <= r < count]

    def matters(pair: tuple[int, int]) -> float:
        return _block(importance, way_down, down[pair[0]]) + _block(importance, way_up, up[pair[1]])

    j, r = min(pairs, key=matters)
    return down[j], up[r]


def _block(importance: Importance, way: str, index: int) -> float:
    """Of a residual block and the attention behind it."""
    names = (f"{way}.resnets.{index}", f"{way}.attentions.{index}")
    return sum(importance.blocks.get(name, 0.0) for name in names)


_PLACE = re.compile(r"((?:down|up)_blocks\.\d+)\.(resnets|attentions)\.(\d+)(\..*)?")


def _origin(name: str, source: Mapping[str, str]) -> str:
    """The teacher's name of a candidate's weight or block."""
    found = _PLACE.fullmatch(name)
    if found is None:
        return name
    way, kind, index, rest = found.groups()
    return f"{way}.{kind}.{source[f'{way}.{index}'].rpartition('.')[2]}{rest or ''}"


def _blocks(weights: Mapping[str, mx.array]) -> set[str]:
    return {name.removesuffix(end) for end in (".conv2.weight", ".to_out.0.weight") for name in weights
            if name.endswith(end)}  # fmt: skip


# ---- which channels


def _members_kept(
    network: UNet2DConfig, of_teacher: Table, of_candidate: Table, source: Mapping[str, str], importance: Importance
) -> dict[str, Rows]:
    """The members of each of the teacher's streams that stay. Streams which the candidate lacks are not in it."""
    groups = network.norm_num_groups or 1
    scores = _tied(network, importance.streams)
    kept: dict[str, Rows] = {}
    for stream, size in of_candidate.sizes.items():
        name, _, kind = stream.rpartition(".")
        origin = f"{_origin(name, source)}.{kind}" if kind in {"inner", "heads"} else stream
        # Heads pass no norm; channels stay in the group of their norm, as many in each.
        kept[origin] = most_important(scores[origin], size, 1 if kind == "heads" else groups)
    return kept


def most_important(scores: Floats, count: int, groups: int) -> Rows:
    """Which `count` of the members stay, in order: the most important of each group, as many in each.

    Of equal ones the first stays. `groups` divides both.
    """
    grouped = scores.reshape(groups, -1)
    order = np.argsort(-grouped, axis=1, kind="stable")[:, : count // groups]
    return (np.sort(order, axis=1) + np.arange(groups)[:, None] * grouped.shape[1]).reshape(-1)


def _tied(network: UNet2DConfig, streams: Mapping[str, Floats]) -> dict[str, Floats]:
    """Levels of one width on the way down have no projection between them: they keep the same channels."""
    scores = dict(streams)
    runs: list[list[int]] = [[0]]
    for level, (before, after) in enumerate(pairwise(network.block_out_channels), start=1):
        if before == after:
            runs[-1].append(level)
        else:
            runs.append([level])
    for run in runs:
        total = sum((streams[axes.down(level)] for level in run), np.zeros(1))
        scores |= {axes.down(level): total for level in run}
    return scores


# ---- slices


def _sliced(weight: mx.array, of_weight: axes.Axes, kept: Mapping[str, Rows], sizes: Mapping[str, int]) -> mx.array:
    first, last = of_weight
    if first:
        weight = mx.take(weight, mx.array(_indices(first, kept, sizes)), axis=0)
    if last:
        weight = mx.take(weight, mx.array(_indices(last, kept, sizes)), axis=-1)
    return weight


def _indices(axis: Axis, kept: Mapping[str, Rows], sizes: Mapping[str, int]) -> Rows:
    indices, start = [], 0
    for part in axis:
        members = kept[part.stream][:, None] * part.unit + np.arange(part.unit)
        indices.append(start + members.reshape(-1))
        start += sizes[part.stream] * part.unit
    return np.concatenate(indices)


def _passing(name: str, empty: mx.array, kept: Mapping[str, Rows]) -> mx.array:
    """A projection that hands each kept channel on: from a level to a next one, which in the teacher is as wide."""
    if name.endswith(".bias"):
        return mx.zeros(empty.shape)
    level = int(name.split(".")[1])
    matrix = kept[axes.down(level)][:, None] == kept[axes.down(level - 1)][None, :]
    return mx.array(matrix.astype(np.float32)[:, None, None, :])


_RESIZE = re.compile(r"(down|up)_blocks\.\d+\.(down|up)samplers\.0\.conv\.(weight|bias)")


def _resizing(name: str, empty: mx.array, padding: int) -> mx.array:
    """A convolution that does what a residual block with nothing in its branch does: means of 2x2, or repetition.

    Going up the pixels are repeated before it. Going down the first of the four is in the middle of its 3x3 window, or
    without padding in the corner.
    """
    if name.endswith(".bias"):
        return mx.zeros(empty.shape)
    taps = np.zeros((3, 3), np.float32)
    if name.startswith("down"):
        taps[padding : padding + 2, padding : padding + 2] = 0.25
    else:
        taps[1, 1] = 1.0
    channels = np.eye(empty.shape[0], dtype=np.float32)
    return mx.array(channels[:, None, None, :] * taps[None, :, :, None])


def _rescaled_queries(
    teacher: UNet2DConfig, network: UNet2DConfig, weights: Mapping[str, mx.array]
) -> dict[str, mx.array]:
    """Logits are divided by √(width of a head): queries make up for one of another width."""
    changed = {}
    for name, weight in weights.items():
        if ".to_q." not in name:
            continue
        stream = _width_at(name, teacher), _width_at(name, network)
        before, after = teacher.attention_head_dim or stream[0], network.attention_head_dim or stream[1]
        if before != after:
            changed[name] = weight * math.sqrt(after / before)
    return changed


def _width_at(name: str, network: UNet2DConfig) -> int:
    """Channels of the level in which a weight lies."""
    widths, words = network.block_out_channels, name.split(".")
    if words[0] == "mid_block":
        return widths[-1]
    return widths[int(words[1])] if words[0] == "down_blocks" else widths[::-1][int(words[1])]


def _time_embedding(
    teacher: UNet2DConfig, network: UNet2DConfig, weights: Mapping[str, mx.array]
) -> dict[str, mx.array]:
    """The first layer of the time embedding, on other frequencies.

    As many frequencies as half of the first channels, spread over the same range: none of the new ones need be among
    the old. The least-squares fit over all timesteps, in float64, gives the nearest to what the old layer says.
    """
    timesteps = mx.arange(FITTED_TIMESTEPS).astype(mx.float32)
    before, after = (
        np.array(Timesteps(each.block_out_channels[0], each.flip_sin_to_cos, each.freq_shift)(timesteps), np.float64)
        for each in (teacher, network)
    )
    name = "time_embedding.linear_1"
    wanted = before @ np.array(weights[f"{name}.weight"], np.float64).T
    design = np.concatenate([after, np.ones((len(after), 1))], axis=1)
    solution = np.linalg.lstsq(design, wanted, rcond=None)[0]
    bias = np.array(weights[f"{name}.bias"], np.float64) + solution[-1]
    return {
        f"{name}.weight": mx.array(solution[:-1].T.astype(np.float32)),
        f"{name}.bias": mx.array(bias.astype(np.float32)),
    }
