"""How much a teacher's loss leans on each channel, head and block: what a smaller network keeps.

A gate on a channel that multiplies all that reads it has the gradient Σ g·w over the weights that read it. To first
order its removal changes the loss by that sum; squared and averaged over batches it is the importance (Molchanov et al.
2019, arXiv:1906.10771, eq. 8, with the gate after the norm, which the channel's readers share). Where all that reads a
channel is zero, its importance is exactly 0.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ado_tasks.architecture.axes import Axis, Table, table
from ado_tasks.backend import mlx_utils, mx
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.weights import flat_parameters

Floats = npt.NDArray[np.float64]
Loss = Callable[[Any, Mapping[str, mx.array]], mx.array]  # (parameters, batch) to the mean over the batch


@dataclass(frozen=True)
class Importance:
    """Squared first-order changes of the loss, averaged over batches."""

    streams: dict[str, Floats]  # by stream (see axes.py): one figure a channel, or a head
    blocks: dict[str, float]  # by residual or attention block: were it to pass on what it is given


def measure_importance(unet: UNet2D, loss: Loss, batches: Iterable[Mapping[str, mx.array]]) -> Importance:
    """The importance of everything in a network, from the gradients of a loss.

    Args:
        unet: the network. Its weights are as they were, afterwards.
        loss: such as that which the teacher was trained with: at a distance to the teacher itself every gradient is 0.
        batches: as many as the average is to be taken over. Small ones tell more: gradients of large ones cancel.
    """
    weights = flat_parameters(unet)
    rows, gradient = table(unet.config), mx.grad(loss)
    streams = {name: np.zeros(size) for name, size in rows.sizes.items()}
    blocks: dict[str, float] = dict.fromkeys(sorted(_blocks_of(weights)), 0.0)
    count = 0
    for batch in batches:
        tree = gradient(mlx_utils.tree_unflatten(list(weights.items())), batch)
        gradients = {name: _float64(value) for name, value in dict(mlx_utils.tree_flatten(tree)).items()}
        for name, change in _channel_changes(weights, gradients, rows).items():
            streams[name] += change**2
        for name in blocks:
            blocks[name] += _block_change(name, weights, gradients) ** 2
        count += 1
    unet.update(mlx_utils.tree_unflatten(list(weights.items())))
    return Importance(
        {name: total / count for name, total in streams.items()},
        {name: total / count for name, total in blocks.items()},
    )


def _channel_changes(
    weights: Mapping[str, mx.array], gradients: Mapping[str, Floats], rows: Table
) -> dict[str, Floats]:
    """Σ g·w over all that reads each member of each stream."""
    changes = {name: np.zeros(size) for name, size in rows.sizes.items()}
    for name, (_, arriving) in rows.axes.items():
        if not arriving:
            continue
        product = gradients[name] * _float64(weights[name])
        along = product.reshape(-1, product.shape[-1]).sum(axis=0)
        for stream, members in split(along, arriving, rows.sizes):
            changes[stream] += members
    return changes


def split(values: Floats, axis: Axis, sizes: Mapping[str, int]) -> Iterable[tuple[str, Floats]]:
    """Figures along an axis (n,) as sums for each member of each stream on it, in order."""
    start = 0
    for part in axis:
        stop = start + sizes[part.stream] * part.unit
        yield part.stream, values[start:stop].reshape(-1, part.unit).sum(axis=1)
        start = stop


def _blocks_of(weights: Mapping[str, mx.array]) -> set[str]:
    ends = (".conv2.weight", ".to_out.0.weight")
    return {name.removesuffix(end) for name in weights for end in ends if name.endswith(end)}


def _block_change(name: str, weights: Mapping[str, mx.array], gradients: Mapping[str, Floats]) -> float:
    """First-order change of the loss were the block left out: its branch at 0, its projection an identity on x."""
    change = 0.0
    for layer in ("conv2", "to_out.0", "conv_shortcut"):
        for kind in ("weight", "bias"):
            full = f"{name}.{layer}.{kind}"
            if full not in weights:
                continue
            value = _float64(weights[full])
            if layer == "conv_shortcut" and kind == "weight":
                value = value - np.eye(value.shape[0], value.shape[-1])[:, None, None, :]
            change += float((gradients[full] * value).sum())
    return change


def _float64(array: mx.array) -> Floats:
    return np.array(array, dtype=np.float64)
