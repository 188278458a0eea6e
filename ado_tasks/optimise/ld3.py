"""LD3: where a frozen model's sampler should step, and which times its network should be told, by gradient descent.

Tong et al. 2024, "Learning to Discretize Denoising Diffusion ODEs". Knots are cumulative sums of softmax(ξ), so that no
step can leave the order or the ends of [0, 1]; the network of step i is told another time than the step begins at
(their *decoupled* times):

    t_0 > t_1 > … > t_n = 0,    t_i = 1 − Σ_{k ≤ i} softmax(ξ)_k,    t_i^c = t_i + δ_i (t_i − t_{i+1}),    |δ_i| ≤ ½.

What is minimised is the distance between what the solver reaches and the fine solution from the same noise, the mean
over a batch of the root mean square over pixels: an unsquared norm, so that the few noises that end in another image do
not lead. It takes the place of the paper's soft teacher, which lets each noise move a little instead.

The gradient goes through every evaluation of the network. The solvers themselves are not differentiated: each of one
evaluation a step is linear in the noise and the estimates, so it *is* a table (`solver_table`), made by running the
solver on unit vectors in float64. The table's derivative by ξ is taken there too, where central differences cost
nothing; as σ → 0 float32 derivatives would be lost.

A network's dependence on time has ripples a few timesteps long (its sinusoidal embedding), so that the exact derivative
by a told time says little about the next hundredth: on a digits teacher, 5 steps of iPNDM, it was 0.4 to 4 times what a
difference over ±0.03 gave. Each sample of a batch is therefore told times shifted at random within `RIPPLE`, on average
the gradient of a smoothed loss.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.diffusion.denoiser import Denoiser
from ado_tasks.diffusion.schedules import NoiseSchedule
from ado_tasks.diffusion.solvers import SOLVERS
from ado_tasks.errors import ConfigError, DivergenceError
from ado_tasks.optimise.cost import GRADIENT
from ado_tasks.parallel import Batch, Parts

Floats = npt.NDArray[np.float64]
DenoiserOf = Callable[[mx.array | None], Denoiser]  # labels to the model with these labels bound, not compiled

WIDEST_SHIFT = 0.5  # of the gap to the next knot (the authors' `win_rate`)
RIPPLE = 0.01  # of t: ten training timesteps, one and a half waves of the embedding's fastest sine
DIFFERENCE = 1e-4  # of ξ, in float64
ADAM = (0.9, 0.95)  # decay of the two moments; the second short, as runs are
ADAM_EPSILON = 1e-8
SMALLEST_GAP = 1e-3  # of t: one training timestep of a thousand
FIRST_GAP = 0.02  # of t, before the first knot where that is free; from 0 a logarithm could not start
TINY = 1e-12  # of a squared distance: under a square root a derivative would be infinite at 0


@dataclass(frozen=True)
class Discretisation:
    """Where a solver steps, and the times that its network is told."""

    times: Floats  # (n + 1,), falling, to 0
    told: Floats | None = None  # (n,); None: the solver's own, times[:-1]


@dataclass(frozen=True)
class Examples:
    """Noise (B, …), labels (B,) or None, and the fine solution (B, …)."""

    noise: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32] | None
    fine: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Settings:
    """How a schedule is learned."""

    steps: int = 100  # of Adam
    batch: int = 16  # samples a step
    rate: float = 0.05  # first learning rate of ξ and δ; falls to 0 as half a cosine
    validate_every: int = 10  # steps
    free_start: bool = True  # may the first step begin at t < 1, taking the noise as it is?
    decoupled: bool = True  # may told times differ from the steps'?
    shards: int = 2  # parts of a batch computed at the same time on a CPU


@dataclass(frozen=True)
class Learned:
    """What was kept: the nearest of those validated."""

    found: Discretisation
    distance: float  # validation
    evaluations: int  # of the network, images: training (backward counted as two forwards), without validation


def solver_table(solver: str, times: Floats, schedule: NoiseSchedule) -> Floats:
    """Coefficients S of a solver of one evaluation a step: z_i = S[i, 0] z_0 + Σ_k S[i, k + 1] x̂_k, float64.

    (n + 1, n + 1), times (n + 1,). Row n is the sample.

    Raises:
        ConfigError: the solver takes more than one evaluation a step, or draws noise.
    """
    if SOLVERS[solver].evaluations_a_step != 1 or SOLVERS[solver].stochastic:
        raise ConfigError(f"solver: {solver!r} is not allowed: one evaluation a step and no noise of its own")
    count = len(times)
    with mx.stream(mx.cpu):  # float64 is not on GPUs
        units = mx.split(mx.eye(count, dtype=mx.float64), count)
        estimates = iter(units[1:])
        _, states = SOLVERS[solver].sample(lambda z, t: next(estimates), units[0], times, schedule, trajectory=True)
        return np.concatenate([np.array(state) for state in states])


def unrolled(denoise: Denoiser, noise: mx.array, table: mx.array, told: mx.array) -> mx.array:
    """The sample that a solver's table reaches from noise (B, …) with the network told `told`, (n, B)."""
    estimates: list[mx.array] = []
    for row, t in enumerate(told):
        state = sum((table[row, k + 1] * x for k, x in enumerate(estimates)), start=table[row, 0] * noise)
        estimates.append(denoise(state, t))
    return sum((table[-1, k + 1] * x for k, x in enumerate(estimates)), start=table[-1, 0] * noise)


def mean_distance(found: mx.array, fine: mx.array) -> mx.array:
    """Mean over the batch of the root mean square over pixels."""
    squared = mx.mean(mx.square(found - fine).reshape(found.shape[0], -1), axis=1)
    return mx.mean(mx.sqrt(squared + TINY))


class Gradient:
    """Loss of a batch and its gradient by a table and by told times; compiled, once for each number of steps."""

    def __init__(self, denoiser_of: DenoiserOf, shards: int) -> None:
        """`denoiser_of`: the model; what it holds on to is taken as it is at the first call with each shape."""

        def loss(shared: dict[str, mx.array], batch: Batch) -> mx.array:
            table, told = shared["table"], shared["told"]
            times = mx.clip(told[:, None] + batch["shift"].T, batch["least"], 1.0)
            sample = unrolled(denoiser_of(batch.get("labels")), batch["noise"], table, times)
            return mean_distance(sample, batch["fine"])

        self._parts = Parts(mx.value_and_grad(loss), shards)

    def __call__(self, table: Floats, told: Floats, batch: Batch) -> tuple[float, Floats, Floats]:
        """(loss, by table (n + 1, n + 1), by told times (n,))."""
        shared = {"table": mx.array(table.astype(np.float32)), "told": mx.array(told.astype(np.float32))}
        found = self._parts(shared, batch)
        mx.eval([result for _, result in found])
        loss, by_table, by_told = 0.0, np.zeros_like(table), np.zeros_like(told)
        for share, (value, by) in found:
            loss += share * float(value)
            by_table += share * np.array(by["table"], np.float64)
            by_told += share * np.array(by["told"], np.float64)
        return loss, by_table, by_told


class Family:
    """Discretisations by their unknowns: ξ, the logarithms of gaps, then δ where times are decoupled."""

    def __init__(self, start: Floats, least: float, *, free_start: bool, decoupled: bool) -> None:
        """Around `start`, times (n + 1,); no network is told less than `least`."""
        whole = np.append(1.0, start) if free_start else np.asarray(start, np.float64)
        gaps = np.maximum(-np.diff(whole), SMALLEST_GAP)
        if free_start:
            gaps[0] = max(gaps[0], min(FIRST_GAP, gaps[1] / 2))
        self.gaps, self.steps = len(gaps), len(start) - 1
        self.start = np.append(np.log(gaps), np.zeros(self.steps if decoupled else 0))
        self._least, self._free_start = least, free_start

    def times(self, xi: Floats) -> Floats:
        """(n + 1,) of ξ."""
        shares = np.exp(xi - xi.max())
        whole = np.append(1 - np.append(0, np.cumsum(shares / shares.sum())[:-1]), 0.0)
        return whole[1:] if self._free_start else whole

    def told(self, unknowns: Floats, times: Floats) -> Floats:
        """(n,) of δ, within what networks are trained at."""
        shift = np.clip(unknowns[self.gaps :], -WIDEST_SHIFT, WIDEST_SHIFT)
        return np.clip(times[:-1] - np.diff(times) * (shift if len(shift) else 0.0), self._least, 1.0)

    def __call__(self, unknowns: Floats) -> Discretisation:
        """The discretisation at some unknowns."""
        times = self.times(unknowns[: self.gaps])
        return Discretisation(times, self.told(unknowns, times) if len(unknowns) > self.gaps else None)

    def chain(
        self, unknowns: Floats, solver: str, schedule: NoiseSchedule, by_table: Floats, by_told: Floats
    ) -> Floats:
        """The gradient by the unknowns: central differences of the table and of the told times, in float64."""

        def inner(at: Floats) -> float:
            times = self.times(at[: self.gaps])
            table = solver_table(solver, times, schedule)
            return float((table * by_table).sum() + self.told(at, times) @ by_told)

        steps = DIFFERENCE * np.eye(len(unknowns))
        return np.array([inner(unknowns + step) - inner(unknowns - step) for step in steps]) / (2 * DIFFERENCE)


def learn(
    gradient: Gradient, solver: str, schedule: NoiseSchedule, examples: Examples, start: Floats,
    validate: Callable[[Discretisation], float], settings: Settings, seed: int,
) -> Learned:  # fmt: skip
    """Descend from `start`, times (n + 1,), with Adam (Kingma & Ba 2015); keep the nearest on other noise.

    `validate` says how far a discretisation ends from the fine solution on noise that is not in `examples`. The start
    is validated too: what is kept is never farther.

    Raises:
        ConfigError: the solver cannot be learned for (see `solver_table`).
        DivergenceError: the loss is not finite.
    """
    family = Family(start, schedule.t_min, free_start=settings.free_start, decoupled=settings.decoupled)
    unknowns = family.start
    kept = Discretisation(np.asarray(start, np.float64))
    least = validate(kept)
    first = second = np.zeros_like(unknowns)
    for step in range(settings.steps):
        times = family.times(unknowns[: family.gaps])
        batch = _batch(examples, settings.batch, family.steps, schedule.t_min, seed, step)
        value, *by = gradient(solver_table(solver, times, schedule), family.told(unknowns, times), batch)
        if not np.isfinite(value):
            raise DivergenceError(f"ld3: the loss of {solver} at {family.steps} evaluations is {value} at step {step}")
        slope = family.chain(unknowns, solver, schedule, *by)
        first = ADAM[0] * first + (1 - ADAM[0]) * slope
        second = ADAM[1] * second + (1 - ADAM[1]) * slope**2
        mean, square = first / (1 - ADAM[0] ** (step + 1)), second / (1 - ADAM[1] ** (step + 1))
        rate = settings.rate * 0.5 * (1 + np.cos(np.pi * step / settings.steps))
        unknowns = unknowns - rate * mean / (np.sqrt(square) + ADAM_EPSILON)
        unknowns[family.gaps :] = np.clip(unknowns[family.gaps :], -WIDEST_SHIFT, WIDEST_SHIFT)
        if (step + 1) % settings.validate_every == 0 or step + 1 == settings.steps:
            candidate = family(unknowns)
            distance = validate(candidate)
            if distance < least:
                kept, least = candidate, distance
    made = settings.steps * min(settings.batch, len(examples.noise)) * family.steps * GRADIENT
    return Learned(kept, least, made)


def _batch(examples: Examples, size: int, steps: int, least: float, seed: int, step: int) -> dict[str, mx.array]:
    """Rows in a new order each time all were used, and a shift of the told times for each sample and evaluation."""
    count = len(examples.noise)
    size = min(size, count)
    per_round = count // size
    order = rng.generator(seed, "ld3", "order", step // per_round).permutation(count)
    rows = order[(step % per_round) * size :][:size]
    shift = rng.generator(seed, "ld3", "shift", step).uniform(-RIPPLE, RIPPLE, (size, steps)).astype(np.float32)
    batch = {
        "noise": mx.array(examples.noise[rows]), "fine": mx.array(examples.fine[rows]),
        "shift": mx.array(shift), "least": mx.array(least),
    }  # fmt: skip
    return batch if examples.labels is None else batch | {"labels": mx.array(examples.labels[rows])}
