"""A guess at the quality loss of networks that were not tuned, from those that were: linear in logarithms of size.

Bayesian linear regression (Bishop 2006, eqs. 3.50–3.59) of log loss on the logarithms of channels and layers and on
counts of attention: few numbers, so that a handful of networks tell something. What is cheapest is known beforehand;
the expected gain of a network is what it would save, times the probability that it is good enough.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from ado_tasks.architecture.space import Point, Space

Floats = npt.NDArray[np.float64]
NOISE = 0.25  # standard deviation of log loss about the line
SLOPE = 2.0  # prior standard deviation of a weight: halving a width may cost up to e^(2 × 2 ln 2) or so
OFFSET = 10.0  # of the constant: next to no prior
MIDDLE = {"none": 0.0, "plain": 0.5, "attention": 1.0}


def features(space: Space, points: Sequence[Point]) -> Floats:
    """(points, 1 + dimensions): 1, then one number for each dimension."""
    return np.array([[1.0, *(_size(name, each) for name, each in space.values(point).items())] for point in points])


def expected_gain(
    space: Space, points: Sequence[Point], cost: Mapping[Point, float], tried: Sequence[tuple[Point, float]],
    limit: float,
) -> Floats:  # fmt: skip
    """For each point, P(loss ≤ limit) × log of the cost of the best that is known over its own; (points,).

    Args:
        space: of all points.
        points: to judge.
        cost: of every point.
        tried: points with their quality losses.
        limit: on the quality loss. Where nothing tried is within it, the dearest point stands for the best.
    """
    design = features(space, [point for point, _ in tried])
    losses = np.log(np.maximum([loss for _, loss in tried], 1e-30))
    prior = np.diag([OFFSET**-2.0, *[SLOPE**-2.0] * (design.shape[1] - 1)])
    covariance = np.linalg.inv(prior + design.T @ design / NOISE**2)
    mean = covariance @ design.T @ losses / NOISE**2
    asked = features(space, points)
    deviation = np.sqrt(NOISE**2 + np.einsum("nd,de,ne->n", asked, covariance, asked))
    good = special.ndtr((math.log(limit) - asked @ mean) / deviation)
    best = min((cost[point] for point, loss in tried if loss <= limit), default=max(cost.values()) * math.e)
    return good * np.maximum(math.log(best) - np.log([cost[point] for point in points]), 0.0)


def _size(name: str, value: Any) -> float:
    if name == "middle":
        return MIDDLE[value]
    if name == "attention":
        return float(len(value))
    return math.log(value) if value else 0.0
