"""How much of a training step is ours: its time in the training loop against the time MLX needs to evaluate it.

Two figures of the same COUNT steps, the same compiled functions and the same batch:

    loop        wall time of COUNT calls of TrainStep, one running while the next is prepared, as `optimise/loop.py`
                makes them, a batch's noise and times drawn anew for each; waited for at the end
    evaluation  all COUNT steps first built as one lazy graph, then one `mx.eval`: MLX's own scheduling, launching and
                kernels, and nothing of ours between two steps

Overhead is 1 - evaluation/loop. What is said beside it: `build`, the host's time to build a lazy step (our Python and
the calls of compiled functions), and `call`, from calling a step on an idle device to its return, launching included.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.optimise.batches import times_of_step
from ado_tasks.optimise.steps import TrainStep
from ado_tasks.parallel import Batch

COUNT, ROUNDS = 10, 5


def overhead(step: TrainStep, batch: Batch, learning_rate: float) -> dict[str, Any]:
    """Milliseconds a step of each, by round, and the share of the loop's that is not MLX's evaluation."""
    batch_of = drawn_anew(batch)
    found: dict[str, list[float]] = {"loop": [], "evaluation": [], "build": [], "call": []}
    _loop(step, batch_of, learning_rate)
    for number in range(ROUNDS):
        # In turn, and in the other order every second round: what drifts meets both.
        parts = [lambda: {"loop": _loop(step, batch_of, learning_rate)}, lambda: _lazy(step, batch, learning_rate)]
        for part in parts[:: 1 if number % 2 == 0 else -1]:
            for name, seconds in part().items():
                found[name].append(1e3 * seconds / COUNT)
        found["call"].append(1e3 * _call(step, batch_of, learning_rate))
    shares = [1 - own / whole for own, whole in zip(found["evaluation"], found["loop"], strict=True)]
    return {
        "steps": COUNT, **{f"{name}_ms": values for name, values in found.items()}, "overhead": shares,
        "overhead_median": statistics.median(shares),
    }  # fmt: skip


def drawn_anew(batch: Batch) -> Callable[[int], Batch]:
    """What a training loop makes for each step beside its images: noise and times (train.py)."""
    shape = batch["noise"].shape

    def of_step(index: int) -> Batch:
        times = times_of_step(shape[0], rng.generator(0, "time", index)).astype(np.float32)
        noise = mx.random.normal(shape, key=rng.key(0, "noise", index))
        return {**batch, "noise": noise, "t": mx.array(999 * times)}

    return of_step


def _loop(step: TrainStep, batch_of: Callable[[int], Batch], learning_rate: float) -> float:
    began = time.perf_counter()
    loss = mx.array(0.0)
    for index in range(COUNT):
        loss = step(batch_of(index), learning_rate)
    mx.eval(loss, step.parameters())
    mx.synchronize()
    return time.perf_counter() - began


def _lazy(step: TrainStep, batch: Batch, learning_rate: float) -> dict[str, float]:
    began = time.perf_counter()
    losses = [step.lazily(batch, learning_rate) for _ in range(COUNT)]
    built = time.perf_counter()
    mx.eval(losses, step.parameters())
    mx.synchronize()
    return {"build": built - began, "evaluation": time.perf_counter() - built}


def _call(step: TrainStep, batch_of: Callable[[int], Batch], learning_rate: float) -> float:
    mx.synchronize()
    began = time.perf_counter()
    loss = step(batch_of(0), learning_rate)
    took = time.perf_counter() - began
    mx.eval(loss, step.parameters())
    return took
