"""What one optimiser step sees: drawn from (seed, step) alone, so that a resumed run sees the same."""

from typing import TYPE_CHECKING

import numpy as np

from ado_tasks import rng
from ado_tasks.backend import mx

if TYPE_CHECKING:  # the reader of tables, which who only trains on arrays need not have
    from ado_tasks.datasets.shards import Split


def images_of_step(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Rows of the images of one step: every image once an epoch, each epoch in an order of its own."""
    first = step * batch_size
    positions = np.arange(first, first + batch_size)
    epochs = np.unique(positions // count)
    orders = {epoch: rng.generator(seed, "order", int(epoch)).permutation(count) for epoch in epochs}
    return np.array([orders[position // count][position % count] for position in positions])


def times_of_step(batch_size: int, generator: np.random.Generator) -> np.ndarray:
    """Times in (0, 1], one in each of `batch_size` equal strata with a common offset (Kingma et al. 2021, §I.1)."""
    return 1.0 - (generator.random() + np.arange(batch_size)) / batch_size % 1.0


def labels_of(part: "Split", rows: np.ndarray) -> dict[str, mx.array]:
    """The labels of these rows as a batch entry, or nothing where the dataset has no classes."""
    return {"labels": mx.array(part.labels[rows].astype(np.int32))} if part.num_classes else {}
