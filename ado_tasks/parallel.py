"""Parts of a batch computed at the same time on a CPU, each on an MLX stream of its own.

MLX's CPU backend runs one stream on one thread and BLAS is held to one thread (see backend.py), so two streams keep two cores
busy. The number of parts comes from a config, never from the machine: the sums are then taken in the same order everywhere,
and the bytes of a result do not depend on how many cores there were. A GPU fills itself: there the batch stays whole.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ado_tasks.backend import mlx_utils, mx, on_cpu

Tree = Any  # nested dicts and lists of arrays
Batch = Mapping[str, mx.array]
Loss = Callable[[Tree, Batch], mx.array]  # (parameters, batch) to the mean over the batch

_made = threading.local()  # a stream belongs to the thread that made it


def _streams(count: int) -> Sequence[mx.Stream]:
    """The first `count` CPU streams of this thread, made once."""
    made: list[mx.Stream] = _made.__dict__.setdefault("streams", [])
    while len(made) < count:
        made.append(mx.new_stream(mx.cpu))
    return made[:count]


def _bounds(size: int, shards: int) -> list[int]:
    """Where `size` rows are cut into `shards` parts that differ by at most one row; empty parts are left out."""
    shards = max(1, min(shards, size))
    return [size * part // shards for part in range(shards + 1)]


def _batch_size(arrays: Sequence[mx.array]) -> int:
    sizes = {array.shape[0] for array in arrays if array.ndim}
    if len(sizes) != 1:
        raise ValueError(f"the arrays of a batch must be equally long, got lengths {sorted(sizes)}")
    return sizes.pop()


def _part(array: mx.array, start: int, stop: int) -> mx.array:
    return array[start:stop] if array.ndim else array


def sharded_value_and_grad(loss: Loss, shards: int) -> Callable[[Tree, Batch], tuple[mx.array, Tree]]:
    """`mx.value_and_grad(loss)`, its batch cut into `shards` parts along the first axis. Use it inside `mx.compile`.

    Equal to the whole batch's up to rounding where the loss is a mean over the batch: L = Σ_s (n_s/n) L_s. Each part runs
    forward and backward on its own stream; the sum is taken in the order of the parts.

    Args:
        loss: (parameters, batch) to a scalar, the mean over the batch.
        shards: how many parts; a batch with fewer rows has fewer. On a GPU the batch stays whole.

    Raises:
        ValueError: the arrays of a batch differ in length. Scalars are given to every part.
    """
    value_and_grad = mx.value_and_grad(loss)

    def whole(parameters: Tree, batch: Batch) -> tuple[mx.array, Tree]:
        size = _batch_size(list(batch.values()))
        bounds = _bounds(size, shards if on_cpu() else 1)
        if len(bounds) == 2:
            return value_and_grad(parameters, batch)
        parts = []
        for stream, start, stop in zip(_streams(len(bounds) - 1), bounds, bounds[1:], strict=False):
            with mx.stream(stream):
                value, gradient = value_and_grad(parameters, {k: _part(v, start, stop) for k, v in batch.items()})
                share = (stop - start) / size
                parts.append((value * share, mlx_utils.tree_map(lambda g, share=share: g * share, gradient)))
        value, gradient = parts[0]
        for more, other in parts[1:]:
            value, gradient = value + more, mlx_utils.tree_map(lambda a, b: a + b, gradient, other)
        return value, gradient

    return whole


def sharded_apply(function: Callable[..., mx.array], shards: int) -> Callable[..., mx.array]:
    """A compiled `function` of arrays whose first axis is the batch, cut into `shards` parts; the results are joined.

    What the function holds on to (weights) is taken as it is at the first call with each shape. On a GPU the batch stays whole.
    """

    def whole(*arrays: mx.array) -> mx.array:
        bounds = _bounds(_batch_size(arrays), shards if on_cpu() else 1)
        if len(bounds) == 2:
            return function(*arrays)
        parts = []
        for stream, start, stop in zip(_streams(len(bounds) - 1), bounds, bounds[1:], strict=False):
            with mx.stream(stream):
                parts.append(function(*(_part(array, start, stop) for array in arrays)))
        return mx.concatenate(parts)

    return mx.compile(whole)
