"""What the tests of operations share: arrays to try them on, and how two forms are compared."""

from collections.abc import Callable, Sequence

import numpy as np

from ado_tasks import rng
from ado_tasks.backend import mx

Function = Callable[..., mx.array]


def draw(*shape: int, name: str = "x", scale: float = 1.0, offset: float = 0.0) -> mx.array:
    return mx.random.normal(shape, key=rng.key(0, "ops", name, *shape)) * scale + offset


def relative(found: mx.array, wanted: mx.array | np.ndarray) -> float:
    wanted = np.asarray(wanted, dtype=np.float64)
    return float(np.abs(np.asarray(found, dtype=np.float64) - wanted).max() / np.abs(wanted).max())


def gradients(function: Function, arguments: Sequence[mx.array]) -> list[mx.array]:
    """Of Σ r · function with a fixed random r, for each argument."""
    weights = draw(*function(*arguments).shape, name="cotangent")
    places = list(range(len(arguments)))
    found = mx.grad(lambda *a: mx.sum(weights * function(*a)), argnums=places)(*arguments)
    return list(found) if isinstance(found, tuple | list) else [found]


def agree(fast: Function, plain: Function, arguments: Sequence[mx.array], tolerance: float = 3e-6) -> None:
    """Value and every gradient, plain and inside `mx.compile`."""
    wanted, wanted_gradients = plain(*arguments), gradients(plain, arguments)
    for how in (lambda f: f, mx.compile):
        assert relative(how(fast)(*arguments), wanted) < tolerance
        found = how(lambda *a: gradients(fast, a))(*arguments)
        for place, (one, other) in enumerate(zip(found, wanted_gradients, strict=True)):
            assert one.shape == arguments[place].shape
            assert relative(one, other) < tolerance, f"gradient {place}"
