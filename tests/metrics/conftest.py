"""What several tests of metrics draw from."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from ado_tasks.metrics.simulation import Mixture


@pytest.fixture(scope="package", autouse=True)
def one_blas_thread() -> Iterator[None]:
    """Thousands of small products: on busy cores a second thread makes them 8 times slower."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="session")
def random_mixture() -> Callable[[np.random.Generator, int, int], Mixture]:
    """A mixture of so many overlapping components in so many dimensions."""

    def make(rng: np.random.Generator, components: int, d: int) -> Mixture:
        roots = rng.normal(size=(components, d, d)) / np.sqrt(d)
        return Mixture(rng.dirichlet(np.full(components, 5.0)), 0.5 * rng.normal(size=(components, d)), roots)

    return make
