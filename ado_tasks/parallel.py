"""Parts of a batch computed at the same time on a CPU, each in a thread of its own.

MLX's CPU backend runs a stream on one thread, and BLAS is held to one thread (see backend.py), so as many parts as cores keep the
cores busy. Two streams fed by one thread do not: MLX lets that thread run only ten operations ahead, all of them of the
first part. The number of parts comes from a config, never from the machine: sums are then taken in the same order everywhere,
and the bytes of a result do not depend on how many cores there were. A GPU fills itself: there the batch stays whole.
"""

import atexit
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import cache
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from ado_tasks.backend import mx, on_cpu

Tree = Any  # nested dicts and lists of arrays
Batch = Mapping[str, mx.array]
Loss = Callable[[Tree, Batch], mx.array]  # (parameters, batch) to the mean over the batch
R = TypeVar("R")

_building = threading.Lock()  # held while a graph is traced or copied: models are changed in place while they are traced


class _Worker:
    """A thread that computes one part after another, with a stream and compiled functions of its own."""

    def __init__(self, number: int) -> None:
        self._todo: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # A daemon: Python joins other threads before it calls what atexit holds, and this one would wait for ever.
        self._thread = threading.Thread(target=self._run, name=f"part-{number}", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    def submit(self, function: Callable[..., R], *arguments: Any) -> "Future[R]":
        """Compute function(*arguments) in the thread, on its stream."""
        future: Future[R] = Future()

        def work() -> None:
            try:
                future.set_result(function(*arguments))
            except BaseException as problem:  # noqa: BLE001  (raised again where the result is asked for)
                future.set_exception(problem)

        self._todo.put(work)
        return future

    def _run(self) -> None:
        with mx.stream(mx.new_stream(mx.cpu)):  # a stream belongs to the thread that made it
            while (work := self._todo.get()) is not None:
                work()
                del work  # or its arrays would live until the next one comes
        mx.clear_streams()  # MLX aborts the process at exit where a thread has left its streams behind

    def stop(self) -> None:
        """End the thread when it has done what it was given."""
        self._todo.put(None)
        self._thread.join()


@cache
def _worker(number: int) -> _Worker:
    """The thread that always computes part `number`."""
    return _Worker(number)


class Parts(Generic[R]):
    """A function of (shared, batch), compiled, computed for the parts of a batch at the same time.

    What the function holds on to is taken as it is at the first call with each shape.
    """

    def __init__(self, function: Callable[[Tree, Batch], R], shards: int) -> None:
        """`shards`: how many parts; a batch with fewer rows has fewer. On a GPU it is one."""
        self._shards = shards if on_cpu() else 1
        self._compiled = [mx.compile(function) for _ in range(self._shards)]
        self._seen: set[tuple[Any, ...]] = set()

    def __call__(self, shared: Tree, batch: Batch) -> list[tuple[float, R]]:
        """For each part, in order, its share of the batch and its result.

        Several parts come back evaluated, a single one lazy. Arrays are cut along the first axis, scalars go to each part.

        Raises:
            ValueError: the arrays of a batch differ in length.
        """
        size = _batch_size(batch.values())
        bounds = _bounds(size, self._shards)
        if len(bounds) == 2:
            return [(1.0, self._compiled[0](shared, dict(batch)))]
        parts = [{k: _rows(v, *ends) for k, v in batch.items()} for ends in zip(bounds, bounds[1:], strict=False)]
        mx.eval(shared, parts)  # what is not yet computed belongs to this thread's stream, which a worker cannot run
        signature = (size, *((name, array.shape, array.dtype) for name, array in batch.items()))
        running = []
        for number, part in enumerate(parts):
            running.append(_worker(number).submit(self._compute, number, shared, part))
            if signature not in self._seen:
                running[-1].result()  # the first time it is traced, and tracing is not for two threads at once
        self._seen.add(signature)
        results = [each.result() for each in running]
        shares = [(stop - start) / size for start, stop in zip(bounds, bounds[1:], strict=False)]
        return list(zip(shares, results, strict=True))

    def _compute(self, number: int, shared: Tree, part: Batch) -> R:
        with _building:
            result = self._compiled[number](shared, part)
        mx.eval(result)
        return result


def sharded_apply(function: Callable[..., mx.array], shards: int) -> Callable[..., mx.array]:
    """A compiled `function` of arrays whose first axis is the batch; its parts are computed at the same time and joined.

    For inference: it takes no part in an outer trace or gradient. Scalars are given to each part.
    """
    parts = Parts(lambda _, batch: function(*batch.values()), shards)

    def whole(*arrays: mx.array) -> mx.array:
        results = parts([], {str(place): array for place, array in enumerate(arrays)})
        return results[0][1] if len(results) == 1 else mx.concatenate([result for _, result in results])

    return whole


def _bounds(size: int, shards: int) -> list[int]:
    """Where `size` rows are cut into at most `shards` parts that differ by at most one row and are never empty."""
    shards = max(1, min(shards, size))
    return [size * part // shards for part in range(shards + 1)]


def _batch_size(arrays: Any) -> int:
    sizes = {array.shape[0] for array in arrays if array.ndim}
    if len(sizes) != 1:
        raise ValueError(f"the arrays of a batch must be equally long, got lengths {sorted(sizes)}")
    return sizes.pop()


def _rows(array: mx.array, start: int, stop: int) -> mx.array:
    return mx.contiguous(array[start:stop]) if array.ndim else array

