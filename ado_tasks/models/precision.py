"""A network's pass in half precision, forward and backward, with what a half cannot hold kept in float32.

Micikevicius et al. 2018, "Mixed Precision Training": weights, the optimiser's state and the loss stay float32; a pass
takes the weights rounded to a half, and their gradients come back in float32. Within the pass the sinusoids of the
timestep (bfloat16 turns 999 into 1000), the statistics of norms and the softmax are float32 too: `embeddings.py`,
`ops.py`.

Float16 ends at 6e-8: gradients of a mean over a batch of images would vanish. They are multiplied by LOSS_SCALE where
they enter the network, and divided by it where they leave, in float32; what overflows makes the loss diverge, by name.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ado_tasks.backend import mlx_utils, mx
from ado_tasks.hardware.capability import Precision

Tree = Any  # nested dicts and lists of arrays
Apply = Callable[..., mx.array]

TYPES: dict[Precision, mx.Dtype] = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
LOSS_SCALE = 1024.0  # within the 8 to 32K that Micikevicius et al. used, section 3.2; a gradient clipped to 1 has room
TIME = "time_proj"  # the layer whose weights, where it has any, are frequencies or a table of steps


def lowered(parameters: Tree, precision: Precision) -> Tree:
    """Float32 weights as a pass in `precision` takes them; "float32" gives the tree itself.

    Weights of norms and of what reads the timestep stay float32. The gradient of each weight is float32.
    """
    if precision == "float32":
        return parameters
    kind, entering = TYPES[precision], _times(1 / _scale(precision))

    def lower(path: str, weight: mx.array) -> mx.array:
        weight = entering(weight)
        return weight if stays_float32(path) else weight.astype(kind)

    return mlx_utils.tree_map_with_path(lower, parameters)


def stays_float32(path: str) -> bool:
    """Whether the weight of this name is of a norm, or of the layer that reads the timestep."""
    *_, layer, _ = ["", *path.split(".")]
    return "norm" in layer or TIME in path.split(".")


def in_precision(network: Apply, precision: Precision) -> Apply:
    """A network that was given lowered weights as a function (z, t, ...) to float32, gradients scaled inside of it."""
    if _scale(precision) == 1:
        return network
    entering, leaving = _times(1 / _scale(precision)), _times(_scale(precision))
    return lambda z, *rest, **named: leaving(network(entering(z), *rest, **named))


def _scale(precision: Precision) -> float:
    return LOSS_SCALE if precision == "float16" else 1.0


@lru_cache(maxsize=8)
def _times(factor: float) -> Callable[[mx.array], mx.array]:
    """The identity, whose gradient is multiplied by `factor`."""
    if factor == 1:
        return lambda x: x

    @mx.custom_function
    def same(x: mx.array) -> mx.array:
        return x

    @same.vjp
    def same_vjp(primal, cotangent, output):
        return cotangent * factor

    return same  # pyright: ignore[reportReturnType]
