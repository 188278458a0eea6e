"""Evaluations a class: equal to brute force, never worse than one number for all, and what samples need."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ado_tasks.errors import ConfigError
from ado_tasks.optimise.step_policy import (
    best_policy,
    class_complexity,
    class_errors,
    fixed_policy,
    steps_needed,
)


def brute_force(errors, nfe, counts, budget) -> float:
    """Least mean error over all assignments within the budget."""
    best = np.inf
    for options in product(range(len(nfe)), repeat=len(counts)):
        cost = sum(n * nfe[j] for n, j in zip(counts, options, strict=True))
        if cost <= budget * sum(counts) * (1 + 1e-12):
            total = sum(n * errors[c][j] for c, (n, j) in enumerate(zip(counts, options, strict=True)))
            best = min(best, total / sum(counts))
    return best


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_the_policy_is_what_brute_force_finds(seed, classes, options, falling):
    rng = np.random.default_rng(seed)
    errors, nfe = rng.uniform(0, 1, (classes, options)), rng.integers(1, 12, options)
    if falling:  # as errors usually do, and not convex
        nfe, errors = np.sort(nfe), np.sort(errors, axis=1)[:, ::-1]
    counts = rng.integers(1, 9, classes)
    budget = float(rng.uniform(nfe.min(), nfe.max() + 1))
    policy = best_policy(errors, nfe, counts, budget)
    assert policy.mean_error == pytest.approx(brute_force(errors, nfe, counts, budget), rel=1e-12, abs=1e-15)
    assert policy.mean_nfe <= budget * (1 + 1e-12)
    share = counts / counts.sum()
    assert policy.mean_nfe == pytest.approx(share @ policy.nfe)
    assert policy.mean_error == pytest.approx(share @ errors[np.arange(classes), policy.options])


def test_a_greedy_choice_would_lose_here():
    # Errors that are not convex: the best gain for one evaluation is not part of the best spending of four.
    errors, nfe = np.array([[10.0, 9.0, 0.0], [10.0, 6.0, 5.9]]), np.array([1, 2, 4])
    policy = best_policy(errors, nfe, np.array([1, 1]), 2.5)
    assert policy.options.tolist() == [2, 0] and policy.mean_nfe == 2.5


@given(st.integers(0, 10**6))
def test_a_policy_is_never_worse_than_one_number_for_all(seed):
    rng = np.random.default_rng(seed)
    errors, counts = np.sort(rng.uniform(0, 1, (10, 5)), axis=1)[:, ::-1], rng.integers(20, 60, 10)
    nfe = np.array([2, 4, 5, 6, 8])
    for budget in (4, 5, 6):
        best, fixed = (make(errors, nfe, counts, budget) for make in (best_policy, fixed_policy))
        assert best.mean_error <= fixed.mean_error + 1e-12
        assert len(set(fixed.nfe.tolist())) == 1 and fixed.mean_nfe <= budget


def test_classes_that_are_alike_get_what_is_alike():
    errors = np.tile([0.9, 0.5, 0.2], (3, 1))
    assert best_policy(errors, [2, 4, 8], [5, 5, 5], 4).nfe.tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("errors", "nfe", "counts", "budget", "named"),
    [
        ([[0.1, 0.2]], [2, 4], [3], 1.5, "budget"), ([[0.1, 0.2]], [2, 4, 5], [3], 4, "shapes"),
        ([[0.1, np.nan]], [2, 4], [3], 4, "finite"), ([[0.1, 0.2]], [0, 4], [3], 4, "nfe"),
        ([[0.1, 0.2]], [2, 4.5], [3], 4, "nfe"), ([[0.1, 0.2]], [2, 4], [0], 4, "counts"),
        ([[0.1, 0.2]] * 2, [2, 4], [10**8, 10**8 + 1], 4, "too many"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_from_is_named(errors, nfe, counts, budget, named):
    with pytest.raises(ConfigError, match=named):
        best_policy(errors, nfe, counts, budget)


def test_steps_needed_follow_a_power_law_exactly():
    nfe, scale = np.array([2, 4, 8, 16]), np.array([0.3, 1.0, 2.5])
    errors = scale[:, None] / nfe[None, :] ** 2.0
    np.testing.assert_allclose(steps_needed(errors, nfe, 0.05), np.sqrt(scale / 0.05))


def test_steps_needed_are_censored_at_both_ends():
    errors = np.array([[0.01, 0.005, 0.001], [1.0, 0.9, 0.8], [1.0, 0.05, 0.2], [1.0, 1.0, 0.05]])
    found = steps_needed(errors, [2, 4, 8], 0.05)
    np.testing.assert_allclose(found, [2, 8, 4, 8])


def test_classes_are_averaged_apart():
    index = pd.DataFrame({"label": [0, 1, 1, 2], "complexity": [0.1, 0.2, 0.4, 0.5]})
    np.testing.assert_allclose(class_complexity(index, 3), [0.1, 0.3, 0.5])
    with pytest.raises(ConfigError, match="class 3"):
        class_complexity(index, 4)
    errors = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    np.testing.assert_allclose(class_errors(errors, [1, 0, 1], 2), [[3, 4], [3, 4]])
    with pytest.raises(ConfigError, match="class 2"):
        class_errors(errors, [1, 0, 1], 3)
