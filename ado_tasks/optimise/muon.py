"""Muon: momentum made orthogonal, for the matrices inside a network.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", https://kellerjordan.github.io/posts/muon.

Adam scales each number of a step by itself. Muon takes a weight as the matrix it is, a convolution's as outputs ×
(height · width · inputs), and gives all singular values of the step about the same size: directions that the gradient
seldom shows are learned as fast as those it shows always. It holds one vector of state where Adam holds two, and costs
15 products of matrices a weight, whatever the batch is.

What comes in and what goes out is left to Adam (first and last convolution, embeddings), as are biases and norms. One
learning rate serves both, since a step is scaled to the root mean square that Adam's have (Liu et al. 2025,
arXiv:2502.16982, §2.2).
"""

import math
from collections.abc import Iterable, Mapping
from itertools import groupby

from ado_tasks.backend import mx

MOMENTUM = 0.95
ITERATION = (3.4445, -4.7750, 2.0315)  # a, b, c of X := aX + (bA + cA²)X with A = XXᵀ: steepest at 0
ITERATIONS = 5  # singular values then lie between about 0.7 and 1.2
ADAMS = 0.2  # root mean square of a step of Adam at learning rate 1 (Liu et al. 2025)
TINY = 1e-7  # against 0/0 where nothing has a gradient
OUTER = ("conv_in", "conv_out", "time_embedding", "class_embedding")  # first names of what Adam is left


def hidden(names_and_shapes: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[str, ...]:
    """Which parameters are matrices inside the network: Muon's. All others are Adam's."""
    return tuple(name for name, shape in names_and_shapes if len(shape) > 1 and name.partition(".")[0] not in OUTER)


def momentum_and_step(
    momenta: Mapping[str, mx.array], gradients: Mapping[str, mx.array]
) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """The next momentum of each weight, and the step it takes at learning rate 1 (to be subtracted), by name.

    M := μM + (1 − μ)G; O = orthogonal(μM + (1 − μ)G), Nesterov's look ahead; a step is 0.2 √max(rows, columns) · O.
    Weights of one shape go through the iteration together.
    """
    moved = {name: MOMENTUM * momenta[name] + (1 - MOMENTUM) * gradient for name, gradient in gradients.items()}
    ahead = {name: MOMENTUM * moved[name] + (1 - MOMENTUM) * gradient for name, gradient in gradients.items()}
    steps = {}
    for shape, group in groupby(sorted(ahead, key=lambda name: ahead[name].shape), lambda name: ahead[name].shape):
        names = list(group)
        matrices = mx.stack([ahead[name].reshape(shape[0], -1) for name in names])
        taken = ADAMS * math.sqrt(max(matrices.shape[1:])) * orthogonal(matrices)
        steps |= {name: one.reshape(shape) for name, one in zip(names, taken, strict=True)}
    return moved, steps


def orthogonal(matrices: mx.array) -> mx.array:
    """About UVᵀ of each matrix USVᵀ of (n, rows, columns), by Newton and Schulz's iteration; of zeros, zeros."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.swapaxes(1, 2)).swapaxes(1, 2)
    a, b, c = ITERATION
    x = matrices / (mx.sqrt(mx.sum(matrices * matrices, axis=(1, 2), keepdims=True)) + TINY)
    for _ in range(ITERATIONS):
        square = x @ x.swapaxes(1, 2)
        x = a * x + (b * square + c * (square @ square)) @ x
    return x
