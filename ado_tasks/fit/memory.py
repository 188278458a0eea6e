"""How much memory training and sampling need at their peak, counted from a network's layers.

    training = max(5.5 · parameters + f · kept + 1.5 · passing, 13 · parameters)
    sampling = parameters + 3.5 · passing

At the end of the forward pass the optimiser's four vectors, the network's copy and a part of the gradient live beside
all that is kept for the gradient; at the end of a step the new vectors live beside the old. `passing` is the largest
array that only one layer needs (a matrix of patches, attention's scores): MLX hands out operations ahead of those that
run, so several live at once. The numbers were read off seven measurements (`bench/memory_model.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ado_tasks.fit.work import Op
from ado_tasks.hardware.capability import Device, Precision
from ado_tasks.models.attention_choice import Form, block_sizes

FLOAT32 = 4
ACTIVE = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of an activation
BLOCK_ARRAYS = 8  # arrays of a block's size that attention in blocks has at once


# Vectors of parameters that live beside what is kept, and at the end of a step.
BESIDE_KEPT, AFTER_STEP = 5.5, 13.0
PASSING_TRAINING, PASSING_SAMPLING = 1.5, 3.5  # arrays of the size of `passing` at once
# f. Forms of `cpu_ops` keep what is counted. MLX's own gradient of norm and SiLU keeps five arrays where those keep
# three; for accelerators this is counted, not measured.
KEPT: dict[Device, float] = {"cpu": 1.0, "metal": 5 / 3, "cuda": 5 / 3}


@dataclass(frozen=True)
class Plan:
    """How the network is to be run."""

    device: Device
    precision: Precision
    attention_training: Form | None
    attention_sampling: Form | None
    checkpointing: bool
    shards: int = 1


@dataclass(frozen=True)
class Needed:
    """Bytes at the peak."""

    training: float
    sampling: float


def needed(work: Sequence[Op], plan: Plan) -> Needed:
    """For the whole batch that `work` is of."""
    size = ACTIVE[plan.precision]
    parameters = FLOAT32 * sum(op.weights for op in work)
    cpu = plan.device == "cpu"
    kept, passing = activations(work, plan.attention_training, checkpointing=plan.checkpointing, cpu=cpu)
    _, at_once = activations(work, plan.attention_sampling, checkpointing=False, cpu=cpu)
    copies = parameters / 2 if plan.precision != "float32" else 0.0  # of the parameters, in half precision
    beside = BESIDE_KEPT * parameters + copies + size * (KEPT[plan.device] * kept + PASSING_TRAINING * passing)
    sampling = parameters + copies + size * PASSING_SAMPLING * at_once
    return Needed(max(beside, AFTER_STEP * parameters + copies), sampling)


def activations(work: Sequence[Op], form: Form | None, *, checkpointing: bool, cpu: bool) -> tuple[float, float]:
    """Elements kept for the gradient, and the most that any layer needs beside them."""
    kept, block, largest_block, passing = 0.0, 0.0, 0.0, 0.0
    for op in work:
        own, beside = _of_layer(op, form, cpu)
        passing = max(passing, beside)
        block += own
        if checkpointing and op.leaving:
            largest_block, block = max(largest_block, block), 0.0
            kept += op.leaving
        elif not checkpointing:
            kept, block = kept + own, 0.0
    return kept + block + largest_block, passing


def _of_layer(op: Op, form: Form | None, cpu: bool) -> tuple[float, float]:
    """Elements kept and passing, attention's scores left out where its form never holds them all."""
    if not op.scores or form == "whole":
        return op.kept, op.passing
    rows = round(op.scores / op.positions**2)  # images times heads
    queries, keys = block_sizes(rows, cpu=cpu)
    block = BLOCK_ARRAYS * rows * min(queries, op.positions) * min(keys, op.positions)
    return op.kept - op.scores, block if form == "chunked" else 0.0
