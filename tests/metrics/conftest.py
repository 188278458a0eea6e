"""What several tests of metrics draw from."""

from collections.abc import Callable

import numpy as np
import pytest

from ado_tasks.metrics.simulation import Mixture


@pytest.fixture(scope="session")
def random_mixture() -> Callable[[np.random.Generator, int, int], Mixture]:
    """A mixture of so many overlapping components in so many dimensions."""

    def make(rng: np.random.Generator, components: int, d: int) -> Mixture:
        roots = rng.normal(size=(components, d, d)) / np.sqrt(d)
        return Mixture(rng.dirichlet(np.full(components, 5.0)), 0.5 * rng.normal(size=(components, d)), roots)

    return make
