"""One optimiser step, compiled: gradient over parallel parts of the batch, global clip, Adam, averaged weights.

The whole state is one flat dictionary of arrays that goes in and comes out, so that a checkpoint is exactly that dictionary and
a resumed run goes on with the same bytes. Everything that changes between steps is an array: a Python number would be compiled in.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ado_tasks.backend import mlx_utils, mx
from ado_tasks.errors import ArtifactError
from ado_tasks.parallel import Batch, Loss, Parts, Tree

State = dict[str, mx.array]

BETAS = (0.9, 0.999)  # Kingma & Ba 2015, algorithm 1
EPSILON = 1e-8  # the same; outside the square root, as in PyTorch
CLIP_EPSILON = 1e-6  # against 0/0, as torch.nn.utils.clip_grad_norm_


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
            ema_decay: of the averaged weights, approached as `averaging_decay` says; None keeps no average.
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
        self._done = 0
        value_and_grad = mx.value_and_grad(loss)

        def gradient(vector: mx.array, batch: Batch) -> tuple[mx.array, mx.array]:
            value, tree = value_and_grad(self._layout.unflatten(vector), batch)
            return value, self._layout.flatten(tree)

        self._gradients = Parts(gradient, shards)
        self._update = mx.compile(self._updated)
        self._running: mx.array | None = None

    def __call__(self, batch: Batch, learning_rate: float) -> mx.array:
        """Take one step. One may be running while the next is prepared, never more: each holds its memory."""
        shares, parts = zip(*self._gradients(self.state["parameters"], batch), strict=True)
        rates = mx.array(step_rates(self._done, learning_rate, self._ema_decay), dtype=mx.float32)
        self.state, loss = self._update(self.state, list(parts), mx.array(shares), rates)
        self._done += 1
        if self._running is not None:
            mx.eval(self._running)
        mx.async_eval(self.state, loss)
        self._running = loss
        return loss

    def _updated(
        self, state: State, parts: list[tuple[mx.array, mx.array]], shares: mx.array, rates: mx.array
    ) -> tuple[State, mx.array]:
        """The sum over the parts, in their order, L = Σ (n_s/n) L_s and so its gradient; then one step of Adam."""
        loss = sum((shares[i] * value for i, (value, _) in enumerate(parts)), mx.array(0.0))
        gradient = sum((shares[i] * vector for i, (_, vector) in enumerate(parts)), mx.array(0.0))
        return adam(state, gradient, mx.sqrt(gradient @ gradient), rates, self._clip), loss

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
        self._done = int(self.state["step"].item())


def averaging_decay(done: int, decay: float) -> float:
    """The average follows quickly at first: min(decay, (1 + n)/(10 + n)) after n steps, as Diffusers' EMAModel has it."""
    return min(decay, (1 + done) / (10 + done))


def step_rates(done: int, learning_rate: float, ema_decay: float | None) -> list[float]:
    """What changes from step to step, worked out in float64: α/(1-β₁ᵗ), 1/(1-β₂ᵗ), 1 - decay; t = done + 1."""
    first, second = (1 - beta ** (done + 1) for beta in BETAS)
    return [learning_rate / first, 1 / second, 0.0 if ema_decay is None else 1 - averaging_decay(done, ema_decay)]


def adam(state: State, gradient: mx.array, norm: mx.array, rates: mx.array, clip: float) -> State:
    """One step of Adam on a gradient clipped to the norm `clip`, and of the average where one is kept.

    g := g min(1, clip/‖g‖) (Pascanu et al. 2013); m = β₁m + (1-β₁)g; v = β₂v + (1-β₂)g²;
    θ -= α/(1-β₁ᵗ) m / (√(v/(1-β₂ᵗ)) + ε) (Kingma & Ba 2015, algorithm 1); average += (1 - decay)(θ - average).
    A NaN in the gradient makes the norm, and so every parameter, NaN.
    """
    gradient = gradient * mx.minimum(clip / (norm + CLIP_EPSILON), 1.0)
    first = BETAS[0] * state["adam.first"] + (1 - BETAS[0]) * gradient
    second = BETAS[1] * state["adam.second"] + (1 - BETAS[1]) * (gradient * gradient)
    parameters = state["parameters"] - rates[0] * first / (mx.sqrt(second * rates[1]) + EPSILON)
    new = {"step": state["step"] + 1, "parameters": parameters, "adam.first": first, "adam.second": second}
    if "average" in state:
        new["average"] = state["average"] + rates[2] * (parameters - state["average"])
    return new
