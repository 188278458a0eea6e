"""Parts of a batch: the same numbers as the whole, the same bytes each time, and really side by side."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ado_tasks import rng
from ado_tasks.backend import mx, on_cpu
from ado_tasks.parallel import Parts, SideBySide, sharded_apply

pytestmark = pytest.mark.skipif(not on_cpu(), reason="a GPU takes the batch whole")


def draw(*shape: int, name: str = "x") -> mx.array:
    return mx.random.normal(shape, key=rng.key(0, "parallel", name, *shape))


def per_row(z: mx.array, t: mx.array, *labels: mx.array) -> mx.array:
    y = mx.tanh(z) * t[:, None]
    return y if not labels else y + labels[0][:, None]


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("shards", [1, 2, 3, 5])
def test_applied_in_parts_is_applied_to_the_whole(rows: int, shards: int) -> None:
    z, t, labels = draw(rows, 4), draw(rows, name="t"), mx.arange(rows)
    apply = sharded_apply(per_row, shards)
    assert np.array_equal(np.array(apply(z, t)), np.array(mx.compile(per_row)(z, t)))
    assert np.array_equal(np.array(apply(z, t, labels)), np.array(mx.compile(per_row)(z, t, labels)))


def test_results_can_be_fed_back_without_waiting() -> None:
    apply = sharded_apply(lambda z: mx.sin(z) * 1.5, 2)
    z = wanted = draw(8, 3)
    for _ in range(20):
        z, wanted = apply(z), mx.sin(wanted) * 1.5
    assert np.allclose(np.array(z), np.array(wanted), rtol=1e-5, atol=1e-6)


def test_scalars_go_to_every_part() -> None:
    apply = sharded_apply(lambda z, factor: z * factor, 3)
    assert np.array_equal(np.array(apply(mx.arange(7), mx.array(3))), np.arange(7) * 3)


def test_parts_differ_by_a_row_at_most_and_say_their_share() -> None:
    parts = Parts(lambda shared, batch: batch["x"].sum() * shared, 3)(mx.array(2.0), {"x": mx.ones(7)})
    assert [round(share * 7) for share, _ in parts] == [2, 2, 3]
    assert [result.item() for _, result in parts] == [4.0, 4.0, 6.0]


@pytest.mark.parametrize(
    "batch", [{"x": mx.ones(4), "y": mx.ones(3)}, {"x": mx.array(1.0)}, {}], ids=["unequal", "scalar", "empty"]
)
def test_a_batch_without_one_length_is_refused(batch: dict[str, mx.array]) -> None:
    with pytest.raises(ValueError, match="equally long"):
        Parts(lambda _, part: part, 2)([], batch)


def test_each_function_has_a_stream_of_its_own() -> None:
    streams = SideBySide([lambda x: x + 1, lambda x: x + 2])
    used: list[str] = []
    both = SideBySide([lambda x: used.append(str(mx.default_stream(mx.cpu))) or x + 1] * 2)
    mx.eval(both([(mx.ones(3),), (mx.ones(3),)]), streams([(mx.ones(3),), (mx.ones(3),)]))
    assert len(set(used)) == 2
    assert str(mx.default_stream(mx.cpu)) not in used


def test_mlx_takes_turns_between_the_parts() -> None:
    """Without breadth-first order the second part starts when the first has ended, and nothing else would tell."""
    assert int(os.environ["MLX_BFS_MAX_WIDTH"]) >= 10_000


def test_the_process_ends_well_after_use() -> None:
    program = (
        "from ado_tasks.backend import mx\n"
        "from ado_tasks.parallel import sharded_apply\n"
        "print(sharded_apply(lambda x: mx.exp(x), 2)(mx.zeros((8, 4))).sum().item())\n"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.strip()) == (0, "32.0"), done.stderr


def test_another_thread_has_streams_of_its_own() -> None:
    """As a server has, which loads a model in a thread while the main thread computed before it."""
    double = sharded_apply(lambda x: x * 2, 2)
    x = mx.arange(4.0)
    mx.eval(x)
    with ThreadPoolExecutor(1) as pool:
        here, there = double(x), pool.submit(lambda: np.array(sharded_apply(lambda x: x * 2, 2)(x))).result()
    np.testing.assert_array_equal(here, there)
