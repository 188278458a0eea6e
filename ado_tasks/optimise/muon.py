"""Muon: momentum made orthogonal, for the matrices inside a network.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", https://kellerjordan.github.io/posts/muon.

Adam scales each number of a step by itself. Muon takes a weight as the matrix it is, a convolution's as outputs ×
(height · width · inputs), and gives all singular values of the step about the same size: directions that the gradient
seldom shows are learned as fast as those it shows always. It costs 15 products of matrices a weight, whatever the batch
is, and needs one vector of state where Adam needs two (`steps.py` keeps both for all: a checkpoint then has one form).

What comes in and what goes out is left to Adam (first and last convolution, embeddings), as are biases and norms. One
learning rate serves both, since a step is scaled to the root mean square that Adam's have (Liu et al. 2025,
arXiv:2502.16982, §2.2).
"""

import math

from ado_tasks.backend import mx

MOMENTUM = 0.95
ITERATION = (3.4445, -4.7750, 2.0315)  # a, b, c of X := aX + (bA + cA²)X with A = XXᵀ: steepest at 0
ITERATIONS = 5  # singular values above 0.002 of the norm then lie between about 0.7 and 1.2
ADAMS = 0.2  # root mean square of a step of Adam at learning rate 1 (Liu et al. 2025)
TINY = 1e-7  # against 0/0 where nothing has a gradient
OUTER = ("conv_in", "conv_out", "time_embedding", "class_embedding")  # first names of what is left to Adam


def matrix_of(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(rows, columns) of a parameter that is a matrix inside the network: Muon's. () for all others: Adam's."""
    if len(shape) < 2 or name.partition(".")[0] in OUTER:
        return ()
    rows, *others = shape
    return rows, math.prod(others)


def momentum_and_step(momenta: mx.array, gradients: mx.array) -> tuple[mx.array, mx.array]:
    """The next momenta of matrices (n, rows, columns), and the steps they take at learning rate 1 (to be subtracted).

    M := μM + (1 − μ)G; O = orthogonal(μM + (1 − μ)G), Nesterov's look ahead; a step is 0.2 √max(rows, columns) · O.
    """
    moved = MOMENTUM * momenta + (1 - MOMENTUM) * gradients
    ahead = MOMENTUM * moved + (1 - MOMENTUM) * gradients
    return moved, ADAMS * math.sqrt(max(ahead.shape[1:])) * orthogonal(ahead)


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
