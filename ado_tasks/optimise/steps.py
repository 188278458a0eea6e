"""One optimiser step, compiled: gradient over parallel parts of the batch, global clip, Adam, averaged weights.

The whole state is one flat dictionary of arrays that goes in and comes out, so that a checkpoint is exactly that dictionary and
a resumed run goes on with the same bytes. Everything that changes between steps is an array: a Python number would be compiled in.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ado_tasks.backend import mlx_utils, mx
from ado_tasks.errors import ArtifactError
from ado_tasks.models.ema import warmed_decay
from ado_tasks.parallel import Batch, Loss, Tree, sharded_value_and_grad

State = dict[str, mx.array]

BETAS = (0.9, 0.999)  # Kingma & Ba 2015, algorithm 1
EPSILON = 1e-8  # the same; outside the square root, as in PyTorch


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies in one vector of all of them. One vector makes the optimiser a handful of operations."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(parameters: Tree) -> "Layout":
        """The layout of a tree of arrays, in the order of their names."""
        flat = sorted(mlx_utils.tree_flatten(parameters))
        return Layout(tuple(name for name, _ in flat), tuple(tuple(array.shape) for _, array in flat))

    def flatten(self, parameters: Tree) -> mx.array:
        """A tree of arrays as one vector."""
        arrays = dict(mlx_utils.tree_flatten(parameters))
        return mx.concatenate([arrays[name].reshape(-1) for name in self.names])

    def unflatten(self, vector: mx.array) -> Tree:
        """The vector as a tree; each array is a view of it."""
        arrays, start = [], 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            size = math.prod(shape)
            arrays.append((name, vector[start : start + size].reshape(shape)))
            start += size
        return mlx_utils.tree_unflatten(arrays)


class TrainStep:
    """Adam with bias correction (Kingma & Ba 2015, algorithm 1), a clipped global gradient norm, and averaged weights.

    `step(batch, learning_rate)` returns the loss before the step, not yet waited for. `state` is what a checkpoint keeps.
    """

    def __init__(self, loss: Loss, parameters: Tree, *, clip: float, ema_decay: float | None, shards: int = 1):
        """
        Args:
            loss: (parameters, batch) to a scalar, the mean over the batch.
            parameters: where to start: a tree of float32 arrays.
            clip: the gradient is scaled down to this global norm where it is longer.
            ema_decay: of the averaged weights, approached as `warmed_decay` says; None keeps no average.
            shards: parts of a batch computed at the same time on a CPU (see parallel.py). Decides the last bits of a result.
        """
        self._layout = Layout.of(parameters)
        self._clip, self._ema_decay = clip, ema_decay
        start = self._layout.flatten(parameters)
        self.state: State = {
            "step": mx.array(0, dtype=mx.int32),
            "parameters": start,
            "adam.first": mx.zeros_like(start),
            "adam.second": mx.zeros_like(start),
        }
        if ema_decay is not None:
            self.state["average"] = start * 1  # an array of its own: the step reuses the memory of what goes in
        mx.eval(self.state)
        self._gradient = sharded_value_and_grad(loss, shards)
        self._compiled = mx.compile(self._advance)
        self._running: mx.array | None = None

    def __call__(self, batch: Batch, learning_rate: float) -> mx.array:
        """Take one step. One step may be running while the next is prepared, never more: each holds its memory."""
        self.state, loss = self._compiled(self.state, dict(batch), mx.array(learning_rate, dtype=mx.float32))
        if self._running is not None:
            mx.eval(self._running)
        mx.async_eval(self.state, loss)
        self._running = loss
        return loss

    def _advance(self, state: State, batch: Batch, learning_rate: mx.array) -> tuple[State, mx.array]:
        loss, gradient = self._gradient(self._layout.unflatten(state["parameters"]), batch)
        new = adam(state, clipped(self._layout.flatten(gradient), self._clip), learning_rate)
        if self._ema_decay is not None:
            decay = warmed_decay(state["step"], self._ema_decay)
            new["average"] = state["average"] + (1 - decay) * (new["parameters"] - state["average"])
        return new, loss

    def parameters(self) -> Tree:
        """The weights as they are now."""
        return self._layout.unflatten(self.state["parameters"])

    def averaged_parameters(self) -> Tree:
        """The averaged weights. Raises ValueError where none are kept."""
        if "average" not in self.state:
            raise ValueError("no averaged weights are kept: ema_decay is None")
        return self._layout.unflatten(self.state["average"])

    def load(self, state: Mapping[str, mx.array]) -> None:
        """Go on from a checkpoint's state. Raises ArtifactError where it does not fit this network."""
        expected = {name: (array.shape, array.dtype) for name, array in self.state.items()}
        found = {name: (array.shape, array.dtype) for name, array in state.items()}
        if expected != found:
            raise ArtifactError(f"a checkpoint does not fit: it holds {found}, expected {expected}")
        self.state, self._running = dict(state), None


def clipped(gradient: mx.array, limit: float) -> mx.array:
    """The gradient (a vector), scaled to the norm `limit` where it is longer (Pascanu et al. 2013). NaN stays NaN."""
    norm = mx.sqrt(gradient @ gradient)
    return gradient * mx.minimum(limit / (norm + 1e-6), 1.0)  # 1e-6: against 0/0, as torch.nn.utils.clip_grad_norm_


def adam(state: State, gradient: mx.array, learning_rate: mx.array) -> State:
    """m = β₁m + (1-β₁)g, v = β₂v + (1-β₂)g², θ -= α m/(1-β₁ᵗ) / (√(v/(1-β₂ᵗ)) + ε): Kingma & Ba 2015, algorithm 1."""
    step = state["step"] + 1
    first = BETAS[0] * state["adam.first"] + (1 - BETAS[0]) * gradient
    second = BETAS[1] * state["adam.second"] + (1 - BETAS[1]) * (gradient * gradient)
    corrections = [1 - mx.exp(step.astype(mx.float32) * math.log(beta)) for beta in BETAS]
    change = learning_rate / corrections[0] * first / (mx.sqrt(second * (1 / corrections[1])) + EPSILON)
    return {"step": step, "parameters": state["parameters"] - change, "adam.first": first, "adam.second": second}
