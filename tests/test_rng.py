"""Draws depend on names, never on order, and touch no global generator."""

import numpy as np

from ado_tasks import rng
from ado_tasks.backend import mx


def test_equal_names_give_equal_draws_in_any_order() -> None:
    first = [rng.generator(1, "a", 2).random(), rng.generator(1, "b").random()]
    second = [rng.generator(1, "b").random(), rng.generator(1, "a", 2).random()][::-1]
    assert first == second


def test_each_part_of_a_name_counts() -> None:
    seeds = [
        rng.derive(s, *n)
        for s, n in [(0, ("a",)), (1, ("a",)), (0, ("b",)), (0, ("a", 1)), (0, ("a", "1")), (0, ('a", "1',))]
    ]
    assert len(set(seeds)) == len(seeds)


def test_global_generators_stay_where_they_were() -> None:
    before_np, before_mx = np.random.get_state()[1].copy(), np.array(mx.random.state[0])  # noqa: NPY002
    mx.eval(mx.random.normal((3,), key=rng.key(0, "x")))
    rng.generator(0, "x").random()
    assert (np.random.get_state()[1] == before_np).all()  # noqa: NPY002
    assert (np.array(mx.random.state[0]) == before_mx).all()
