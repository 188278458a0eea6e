"""One optimiser step, compiled: gradient over parallel parts of the batch, global clip, Adam or Muon, averaged weights.

The state is a flat dictionary of arrays, so that a checkpoint is exactly that dictionary and a resumed run goes on with
the same bytes. Everything that changes between steps is an array: a Python number would be compiled in.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Literal

import numpy as np

from ado_tasks.backend import mlx_utils, mx
from ado_tasks.errors import ArtifactError
from ado_tasks.optimise.muon import matrix_of, momentum_and_step
from ado_tasks.parallel import Batch, Loss, Parts, SideBySide, Tree

Vectors = dict[str, mx.array]  # by kind: "parameters", "adam.first", "adam.second" and, where one is kept, "average"
Arrays = dict[str, mx.array]  # parameters by name
Optimiser = Literal["adam", "muon"]

BETAS = (0.9, 0.999)  # Kingma & Ba 2015, algorithm 1
EPSILON = 1e-8  # the same; outside the square root, as in PyTorch
ALIGNMENT = 64  # numbers: 256 bytes in float32, what CUDA's allocations have
CLIP_EPSILON = 1e-6  # against 0/0, as torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies in one vector of all of them: the optimiser is then a handful of operations."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(parameters: Tree, optimiser: Optimiser = "adam") -> "Layout":
        """The layout of a tree of arrays: by the alignment that their sizes allow, then by name.

        A parameter of a multiple of 2ᵏ numbers then begins at such a multiple, up to ALIGNMENT, with nothing between
        parameters: matrix products on CUDA refuse what is not aligned. For Muon its matrices of one size lie together.
        """

        def place(item: tuple[str, mx.array]) -> tuple[Any, ...]:
            name, array = item
            matrix = matrix_of(name, tuple(array.shape)) if optimiser == "muon" else ()
            return -math.gcd(array.size, ALIGNMENT), matrix, name

        flat = sorted(dict(mlx_utils.tree_flatten(parameters)).items(), key=place)
        return Layout(tuple(name for name, _ in flat), tuple(tuple(array.shape) for _, array in flat))

    @property
    def size(self) -> int:
        """Length of the vector."""
        return sum(map(math.prod, self.shapes))

    def runs(self) -> list[tuple[slice, tuple[int, ...]]]:
        """Stretches of the vector: of matrices of one size that are Muon's, with (rows, columns), or of all else."""
        runs, start = [], 0
        for matrix, group in groupby(zip(self.names, self.shapes, strict=True), lambda item: matrix_of(*item)):
            stop = start + sum(math.prod(shape) for _, shape in group)
            runs.append((slice(start, stop), matrix))
            start = stop
        return runs

    def groups(self, count: int) -> list["Layout"]:
        """Cut into `count` layouts of about the same size, in order; none is empty if there are enough parameters."""
        groups, start, done, total = [], 0, 0, self.size
        for number in range(count):
            stop, goal = start, total * (number + 1) / count
            while stop < len(self.names) and (stop == start or done + math.prod(self.shapes[stop]) / 2 <= goal):
                done += math.prod(self.shapes[stop])
                stop += 1
            groups.append(Layout(self.names[start:stop], self.shapes[start:stop]))
            start = stop
        return groups

    def flatten(self, arrays: Mapping[str, mx.array]) -> mx.array:
        """Named arrays as one vector."""
        return mx.concatenate([mx.zeros(0), *(arrays[name].reshape(-1) for name in self.names)])

    def unflatten(self, vector: mx.array) -> dict[str, mx.array]:
        """The vector as named arrays; each is a view of it."""
        arrays, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            arrays[name] = vector[start : start + math.prod(shape)].reshape(shape)
            start += math.prod(shape)
        return arrays


class TrainStep:
    """Adam with bias correction (Kingma & Ba 2015, algorithm 1), a clipped global gradient norm, and averaged weights.

    With "muon" the matrices inside the network take Muon's step in the place of Adam's (see `optimise/muon.py`).

    `step(batch, learning_rate)` returns the loss before the step. `state` is what a checkpoint keeps.
    """

    def __init__(
        self, loss: Loss, parameters: Tree, *, clip: float, ema_decay: float | None, shards: int = 1,
        accumulate: int = 1, optimiser: Optimiser = "adam",
    ):  # fmt: skip
        """Start from `parameters`.

        Args:
        loss: (parameters, batch) to a scalar, the mean over the batch.
        parameters: where to start: a tree of float32 arrays.
        clip: the gradient is scaled down to this global norm where it is longer.
        ema_decay: of the averaged weights, approached as `averaging_decay` says; None keeps no average.
        shards: parts of a batch computed at the same time on a CPU (see parallel.py). Decides the last bits.
        accumulate: pieces of a batch computed one after another, for less memory. Decides the last bits too.
        optimiser: of the matrices inside the network; all else is Adam's.
        """
        self._layout = Layout.of(parameters, optimiser)
        self._clip, self._ema_decay, self._optimiser, self._done = clip, ema_decay, optimiser, 0
        self._accumulate = accumulate
        self._value_and_grad = mx.value_and_grad(loss)
        self._gradient = Parts(self._gradient_of, shards)
        # The optimiser's step is taken in as many groups of parameters, side by side as the parts of the batch are.
        self._groups = self._layout.groups(self._gradient.count)
        self._update = SideBySide([self._updater(number) for number in range(len(self._groups))])
        start = self._layout.flatten(dict(mlx_utils.tree_flatten(parameters)))
        kinds = {"parameters": start, "adam.first": mx.zeros_like(start), "adam.second": mx.zeros_like(start)}
        self._put(kinds if ema_decay is None else {**kinds, "average": start})
        self._running: mx.array | None = None

    def __call__(self, batch: Batch, learning_rate: float) -> mx.array:
        """Take one step. One may be running while the next is prepared, never more: each holds its memory."""
        loss = self.lazily(batch, learning_rate)
        if self._running is not None:
            mx.eval(self._running)
        mx.async_eval(self._vectors, self._arrays, loss)
        self._running = loss
        return loss

    def lazily(self, batch: Batch, learning_rate: float) -> mx.array:
        """Build a step and leave it to MLX to take it, with the loss or the state. For measurements."""
        rates = mx.array(step_rates(self._done, learning_rate, self._ema_decay), dtype=mx.float32)
        shares, parts = self._parts(batch)
        gradients = [gradient for _, gradient in parts]
        updated = self._update([(vectors, gradients, mx.array(shares), rates) for vectors in self._vectors])
        loss = weighted_sum(mx.array(shares), [value for value, _ in parts])
        self._vectors = [vectors for vectors, _ in updated]
        self._arrays = {name: array for _, arrays in updated for name, array in arrays.items()}
        self._done += 1
        return loss

    def _parts(self, batch: Batch) -> tuple[tuple[float, ...], tuple[tuple[mx.array, list[mx.array]], ...]]:
        """Shares of the batch and, for each, its loss and gradients; or the sum over pieces that went one by one."""
        pieces = pieces_of(batch, self._accumulate)
        if len(pieces) == 1:
            shares, parts = zip(*self._gradient(self._arrays, batch), strict=True)
            return shares, parts
        value, sums = mx.array(0.0), [mx.array(0.0)] * len(self._groups)
        for size, piece in pieces:
            for share, (own, gradients) in self._gradient(self._arrays, piece):
                value = value + size * share * own
                sums = [total + size * share * gradient for total, gradient in zip(sums, gradients, strict=True)]
            mx.eval(value, sums)  # else MLX would hold all pieces at once
        return (1.0,), ((value, sums),)

    def _gradient_of(self, arrays: Arrays, batch: Batch) -> tuple[mx.array, list[mx.array]]:
        """The loss of a part, and its gradient as one vector for each group of parameters."""
        value, tree = self._value_and_grad(mlx_utils.tree_unflatten(list(arrays.items())), batch)
        named = dict(mlx_utils.tree_flatten(tree))
        return value, [group.flatten(named) for group in self._groups]

    def _updater(self, number: int) -> Callable[..., tuple[Vectors, Arrays]]:
        """The optimiser's step of one group: from what the parts of the batch say about every group."""

        def update(
            vectors: Vectors, parts: list[list[mx.array]], shares: mx.array, rates: mx.array
        ) -> tuple[Vectors, Arrays]:
            # Each group works out the whole norm for itself: cheaper than to wait for another stream.
            gradients = [weighted_sum(shares, [part[group] for part in parts]) for group in range(len(self._groups))]
            norm = mx.sqrt(sum((mx.sum(gradient * gradient) for gradient in gradients), mx.array(0.0)))
            clipped = gradients[number] * mx.minimum(self._clip / (norm + CLIP_EPSILON), 1.0)
            new = adam(vectors, clipped, rates)
            if self._optimiser == "muon":
                new = muon(self._groups[number], vectors, new, clipped, rates[3])
            return average(vectors, new, rates[2]), self._groups[number].unflatten(new["parameters"])

        return update

    @property
    def state(self) -> dict[str, mx.array]:
        """All that a later run needs to go on: the count of steps, and a vector of each kind."""
        joined = {kind: mx.concatenate([vectors[kind] for vectors in self._vectors]) for kind in self._vectors[0]}
        return {"step": mx.array(self._done, dtype=mx.int32), **joined}

    def load(self, state: Mapping[str, mx.array]) -> None:
        """Go on from a checkpoint's state. Raises ArtifactError where it does not fit this network."""
        expected = {name: (array.shape, array.dtype) for name, array in self.state.items()}
        found = {name: (array.shape, array.dtype) for name, array in state.items()}
        if expected != found:
            raise ArtifactError(f"a checkpoint does not fit: it holds {found}, expected {expected}")
        self._put({kind: array for kind, array in state.items() if kind != "step"})
        self._done, self._running = int(np.array(state["step"])), None

    def _put(self, kinds: Mapping[str, mx.array]) -> None:
        """Take whole vectors as the state: a copy of each, cut into the groups."""
        ends = [0]
        for group in self._groups:
            ends.append(ends[-1] + group.size)
        self._vectors: list[Vectors] = [
            {kind: vector[start:stop] * 1 for kind, vector in kinds.items()} for start, stop in pairwise(ends)
        ]
        pairs = zip(self._groups, self._vectors, strict=True)
        self._arrays = {k: v for group, vectors in pairs for k, v in group.unflatten(vectors["parameters"]).items()}
        mx.eval(self._vectors, self._arrays)

    def parameters(self) -> Tree:
        """The weights as they are now."""
        return mlx_utils.tree_unflatten(list(self._arrays.items()))

    def averaged_parameters(self) -> Tree:
        """The averaged weights. Raises ValueError where none are kept."""
        if "average" not in self._vectors[0]:
            raise ValueError("no averaged weights are kept: ema_decay is None")
        return mlx_utils.tree_unflatten(list(self._layout.unflatten(self.state["average"]).items()))


def pieces_of(batch: Batch, count: int) -> list[tuple[float, Batch]]:
    """Cut along the first axis into at most `count` pieces that differ by at most a row, with their shares of rows."""
    rows = next(array.shape[0] for array in batch.values() if array.ndim)
    if count == 1 or rows == 1:
        return [(1.0, batch)]
    ends = [rows * piece // min(count, rows) for piece in range(min(count, rows) + 1)]
    return [
        ((stop - start) / rows, {name: array[start:stop] if array.ndim else array for name, array in batch.items()})
        for start, stop in pairwise(ends)
    ]


def weighted_sum(shares: mx.array, terms: list[mx.array]) -> mx.array:
    """Σ_s (n_s/n) x_s in the order of the parts: the mean over a batch, from the means over its parts."""
    if len(terms) == 1:
        return terms[0]
    return sum((shares[place] * term for place, term in enumerate(terms[1:], 1)), shares[0] * terms[0])


def averaging_decay(done: int, decay: float) -> float:
    """The average follows quickly at first: min(decay, (1 + n)/(10 + n)) after n steps, as Diffusers' EMAModel."""
    return min(decay, (1 + done) / (10 + done))


def step_rates(done: int, learning_rate: float, ema_decay: float | None) -> list[float]:
    """What changes from step to step, in float64: α/(1-β₁ᵗ), 1/(1-β₂ᵗ), 1 - decay, and α itself; t = done + 1."""
    first, second = (1 - beta ** (done + 1) for beta in BETAS)
    decay = 1.0 if ema_decay is None else averaging_decay(done, ema_decay)
    return [learning_rate / first, 1 / second, 1 - decay, learning_rate]


def adam(state: Vectors, gradient: mx.array, rates: mx.array) -> Vectors:
    """One step of Adam on a gradient that is clipped: parameters and both moments.

    Before it g := g min(1, clip/‖g‖) (Pascanu et al. 2013), of the whole gradient: a NaN in it makes every parameter
    NaN. m = β₁m + (1-β₁)g; v = β₂v + (1-β₂)g²; θ -= α/(1-β₁ᵗ) m / (√(v/(1-β₂ᵗ)) + ε) (Kingma & Ba 2015, algorithm 1).
    """
    first = BETAS[0] * state["adam.first"] + (1 - BETAS[0]) * gradient
    second = BETAS[1] * state["adam.second"] + (1 - BETAS[1]) * (gradient * gradient)
    parameters = state["parameters"] - rates[0] * first / (mx.sqrt(second * rates[1]) + EPSILON)
    return {"parameters": parameters, "adam.first": first, "adam.second": second}


def muon(layout: Layout, state: Vectors, new: Vectors, gradient: mx.array, learning_rate: mx.array) -> Vectors:
    """What Adam made of the state, with Muon's step where a parameter is a matrix inside the network.

    Its momentum lies where Adam's first moment does; the second one of these parameters is not looked at.
    """
    found: dict[str, list[mx.array]] = {"parameters": [], "adam.first": []}
    for run, matrix in layout.runs():
        parameters, first = new["parameters"][run], new["adam.first"][run]
        if matrix:
            momenta, slopes = (each[run].reshape(-1, *matrix) for each in (state["adam.first"], gradient))
            moved, steps = momentum_and_step(momenta, slopes)
            parameters, first = state["parameters"][run] - learning_rate * steps.reshape(-1), moved.reshape(-1)
        found["parameters"].append(parameters)
        found["adam.first"].append(first)
    return {**new, **{kind: mx.concatenate(pieces) for kind, pieces in found.items()}}


def average(state: Vectors, new: Vectors, rate: mx.array) -> Vectors:
    """The new state with the average of the parameters, where one is kept: average += (1 - decay)(θ - average)."""
    if "average" not in state:
        return new
    return {**new, "average": state["average"] + rate * (new["parameters"] - state["average"])}
