"""Parts of a batch computed at the same time on a CPU, each on an MLX stream of its own.

MLX's CPU backend runs a stream on one thread, and BLAS is held to one thread (see backend.py): as many parts as cores
keep the cores busy. The number of parts comes from a config, never from the machine: sums are then taken in the same
order everywhere, and the bytes of a result do not depend on how many cores there were. A GPU fills itself: there the
batch stays whole.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from threading import local
from typing import Any, Generic, TypeVar

from ado_tasks.backend import mx, on_cpu

Tree = Any  # nested dicts and lists of arrays
Batch = Mapping[str, mx.array]
Loss = Callable[[Tree, Batch], mx.array]  # (parameters, batch) to the mean over the batch
R = TypeVar("R")

if on_cpu():
    # MLX hands operations out from one thread that runs at most about a hundred ahead of what is done, in an order that
    # goes deep first where the graph is wider than this (20 by default): all of the first part, then all of the second,
    # and so nothing at the same time. Breadth first, the parts take turns. Read at MLX's first evaluation.
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "100000")


_streams = local()


def _stream(number: int) -> mx.Stream:
    """The stream of part `number` in this thread: MLX ties a stream to the thread that made it."""
    made: dict[int, mx.Stream] = _streams.__dict__.setdefault("made", {})
    if number not in made:
        made[number] = mx.new_stream(mx.cpu)
    return made[number]


class SideBySide(Generic[R]):
    """Functions, each compiled and with an MLX stream of its own: what they return runs at the same time.

    One compiled function of all of them would not do: MLX merges equal constants and operations across streams, and
    each part would wait for another's.
    """

    def __init__(self, functions: Sequence[Callable[..., R]]) -> None:
        """What a function holds on to (weights) is taken as it is at its first call with each shape."""
        self._compiled = [mx.compile(function) for function in functions]

    def __call__(self, arguments: Sequence[tuple[Any, ...]]) -> list[R]:
        """The results in order, lazy. With fewer arguments than functions, the last functions are left out."""
        if len(arguments) == 1:
            return [self._compiled[0](*arguments[0])]
        results = []
        for number, each in enumerate(arguments):
            with mx.stream(_stream(number)):
                results.append(self._compiled[number](*each))
        return results


class Parts(Generic[R]):
    """A function of (shared, batch) of each part of a batch, side by side. On a GPU the batch is one part."""

    def __init__(self, function: Callable[[Tree, Batch], R], shards: int) -> None:
        """`shards`: how many parts on a CPU; a batch with fewer rows has fewer."""
        self.count = shards if on_cpu() else 1
        self._functions = SideBySide([function] * self.count)

    def __call__(self, shared: Tree, batch: Batch) -> list[tuple[float, R]]:
        """For each part, in order, its share of the rows and its result, lazy.

        Arrays are cut along their first axis into parts that differ by at most a row; scalars go to each part.

        Raises:
            ValueError: the arrays of a batch differ in length, or it has none.
        """
        size = _length(batch.values())
        count = max(1, min(self.count, size))
        ends = [size * part // count for part in range(count + 1)]
        bounds = list(pairwise(ends))
        results = self._functions([(shared, _part(batch, start, stop)) for start, stop in bounds])
        return [((stop - start) / size, result) for (start, stop), result in zip(bounds, results, strict=True)]


def sharded_apply(function: Callable[..., mx.array], shards: int) -> Callable[..., mx.array]:
    """A compiled `function` of arrays whose first axis is the batch; its parts run side by side and are joined.

    Scalars are given to each part. What the function holds on to (weights) is taken as it is at the first call with
    each shape.
    """
    parts = Parts(lambda _, batch: function(*batch.values()), shards)

    def whole(*arrays: mx.array) -> mx.array:
        results = [result for _, result in parts([], {str(place): array for place, array in enumerate(arrays)})]
        return results[0] if len(results) == 1 else mx.concatenate(results)

    return whole


def _length(arrays: Iterable[mx.array]) -> int:
    lengths = {array.shape[0] for array in arrays if array.ndim}
    if len(lengths) != 1:
        raise ValueError(f"the arrays of a batch must be equally long, got lengths {sorted(lengths)}")
    return lengths.pop()


def _part(batch: Batch, start: int, stop: int) -> dict[str, mx.array]:
    return {name: array[start:stop] if array.ndim else array for name, array in batch.items()}
