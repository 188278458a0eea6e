"""Blocks whose inner arrays are computed anew in the gradient: only what goes in and what comes out is kept.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"; `mx.checkpoint`.
"""

from collections.abc import Callable, Sequence

from ado_tasks.backend import mx, nn

MaybeArrays = Sequence[mx.array | None]


def recomputed(block: nn.Module, call: Callable[..., MaybeArrays], arrays: MaybeArrays) -> list[mx.array | None]:
    """call(*arrays), with the same gradients in the arrays and in the block's weights; `call` runs the block twice.

    `call` must depend on its arrays and on the block's weights alone. None stands for an array that is not there.
    """
    given = [number for number, array in enumerate(arrays) if array is not None]
    places: list[int | None] = []  # of each result among the distinct ones

    def run(parameters: dict, present: list[mx.array]) -> list[mx.array]:
        block.update(parameters)
        whole: list[mx.array | None] = [None] * len(arrays)
        for number, array in zip(given, present, strict=True):
            whole[number] = array
        results = call(*whole)
        # An array that is there twice leaves once: of two gradients in the same output MLX would drop one.
        distinct = {id(result): result for result in results if result is not None}
        order = list(distinct)
        places[:] = [None if result is None else order.index(id(result)) for result in results]
        return list(distinct.values())

    results = mx.checkpoint(run)(block.parameters(), [array for array in arrays if array is not None])
    return [None if place is None else results[place] for place in places]
