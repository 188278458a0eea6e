"""How much memory training and sampling need at their peak, counted from a network's layers.

    training = bytes of the optimiser's vectors + f · (what the gradient keeps) + the largest passing array
    sampling = parameters + g · (what one pass makes)

The vectors are parameters, Adam's two moments, the average, the gradient, and the new ones beside the old while a step
is taken. f and g stand for what the count cannot know: MLX hands out operations ahead of those that run, and holds what
they will write to; both are fitted to measurements (`bench/memory_model.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ado_tasks.fit.work import Op
from ado_tasks.hardware.capability import Device, Precision
from ado_tasks.models.attention_choice import Form
from ado_tasks.models.chunked_attention import KEYS, QUERIES

FLOAT32 = 4
STEADY = 4  # vectors of parameters that live between steps: parameters, first and second moment, average
ACTIVE = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of an activation
BLOCK_ARRAYS = 8  # arrays of a block's size that attention in blocks has at once


@dataclass(frozen=True)
class Slack:
    """Factors on what is counted; measured on the CPU (2026-11-26), for accelerators taken over and not verified."""

    kept: float  # f
    made: float  # g
    step_vectors: float  # vectors of parameters at the peak of a step, those that live between steps included


SLACK: dict[Device, Slack] = {
    "cpu": Slack(kept=1.3, made=0.75, step_vectors=8.0),
    "metal": Slack(kept=1.3, made=0.75, step_vectors=8.0),
    "cuda": Slack(kept=1.3, made=0.75, step_vectors=8.0),
}


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
    slack, size = SLACK[plan.device], ACTIVE[plan.precision]
    parameters = FLOAT32 * sum(op.weights for op in work)
    kept, passing = activations(work, plan.attention_training, plan.checkpointing)
    made, _ = activations(work, plan.attention_sampling, checkpointing=False)
    copies = parameters / 2 if plan.precision != "float32" else 0.0  # of the parameters, in half precision
    training = slack.step_vectors * parameters + copies + size * (slack.kept * kept + passing)
    return Needed(training, parameters + copies + size * slack.made * made)


def activations(work: Sequence[Op], form: Form | None, checkpointing: bool) -> tuple[float, float]:
    """Elements kept for the gradient, and the most that any layer needs beside them."""
    kept, block, largest_block, passing = 0.0, 0.0, 0.0, 0.0
    for op in work:
        own, beside = _of_layer(op, form)
        passing = max(passing, beside)
        block += own
        if checkpointing and op.leaving:
            largest_block, block = max(largest_block, block), 0.0
            kept += op.leaving
        elif not checkpointing:
            kept, block = kept + own, 0.0
    return kept + block + largest_block, passing


def _of_layer(op: Op, form: Form | None) -> tuple[float, float]:
    """Elements kept and passing, attention's scores left out where its form never holds them all."""
    if not op.scores or form == "whole":
        return op.kept, op.passing
    images_and_heads = op.scores / op.positions**2
    block = BLOCK_ARRAYS * images_and_heads * min(QUERIES, op.positions) * min(KEYS, op.positions)
    return op.kept - op.scores, block if form == "chunked" else 0.0
