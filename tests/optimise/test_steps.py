"""The optimiser's step: against float64 NumPy, whole against in parts, stopped and resumed against unbroken."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.errors import ArtifactError
from ado_tasks.optimise.steps import Layout, TrainStep, averaging_decay, step_rates

RATES = [1e-2, 2e-2, 3e-2, 2e-2, 1e-2, 0.0]


def draw(*shape: int, name: str) -> mx.array:
    return mx.random.normal(shape, key=rng.key(0, "steps", name))


def parameters() -> dict[str, Any]:
    return {
        "layers": [{"weight": draw(5, 3, name="w0"), "bias": draw(5, name="b0")}, {"weight": draw(2, 5, name="w1")}],
        "scale": draw(2, name="s"),
    }


def batch(step: int, rows: int = 6) -> dict[str, mx.array]:
    return {"x": draw(rows, 3, name=f"x{step}"), "y": draw(rows, 2, name=f"y{step}")}


def loss(tree: Any, batch: Any) -> mx.array:
    hidden = mx.tanh(batch["x"] @ tree["layers"][0]["weight"].T + tree["layers"][0]["bias"])
    return mx.mean((hidden @ tree["layers"][1]["weight"].T * tree["scale"] - batch["y"]) ** 2)


def run(step: TrainStep, first: int = 0, last: int = len(RATES)) -> list[float]:
    return [step(batch(index), RATES[index]).item() for index in range(first, last)]


def bytes_of(step: TrainStep) -> dict[str, bytes]:
    return {name: np.array(array).tobytes() for name, array in step.state.items()}


def reference(clip: float, decay: float) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Adam, clipping and the average in float64, the gradient by hand: parameters, average, losses."""
    tree = parameters()
    w0, b0 = (np.array(tree["layers"][0][k], dtype=np.float64) for k in ("weight", "bias"))
    w1, s = np.array(tree["layers"][1]["weight"], dtype=np.float64), np.array(tree["scale"], dtype=np.float64)
    theta = [b0, w0, w1, s]  # in the order of their names
    average, m, v = [p.copy() for p in theta], [0 * p for p in theta], [0 * p for p in theta]
    losses = []
    for index, rate in enumerate(RATES):
        b0, w0, w1, s = theta
        x, y = (np.array(batch(index)[k], dtype=np.float64) for k in "xy")
        hidden = np.tanh(x @ w0.T + b0)
        out = hidden @ w1.T
        residual = out * s - y
        losses.append((residual**2).mean())
        d = 2 * residual / residual.size
        inner = (d * s) @ w1 * (1 - hidden**2)
        gradient = [inner.sum(0), inner.T @ x, (d * s).T @ hidden, (d * out).sum(0)]
        norm = np.sqrt(sum((g**2).sum() for g in gradient))
        gradient = [g * min(1.0, clip / norm) for g in gradient]
        t = index + 1
        m = [0.9 * a + 0.1 * g for a, g in zip(m, gradient, strict=True)]
        v = [0.999 * a + 0.001 * g * g for a, g in zip(v, gradient, strict=True)]
        change = [(a / (1 - 0.9**t)) / (np.sqrt(b / (1 - 0.999**t)) + 1e-8) for a, b in zip(m, v, strict=True)]
        theta = [p - rate * c for p, c in zip(theta, change, strict=True)]
        keep = min(decay, (1 + index) / (10 + index))
        average = [keep * a + (1 - keep) * p for a, p in zip(average, theta, strict=True)]
    # In a vector of all, what has an even size comes first (see Layout.of).
    flat = [np.concatenate([group[place].ravel() for place in (2, 3, 0, 1)]) for group in (theta, average)]
    return flat[0], flat[1], losses


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("clip", [0.05, 1e6], ids=["clipped", "unclipped"])
def test_it_is_adam_with_clipping_and_an_average(clip: float, shards: int) -> None:
    step = TrainStep(loss, parameters(), clip=clip, ema_decay=0.3, shards=shards)
    losses = run(step)
    wanted, average, wanted_losses = reference(clip, 0.3)
    assert np.allclose(losses, wanted_losses, rtol=1e-5)
    assert np.allclose(np.array(step.state["parameters"]), wanted, atol=2e-6)
    assert np.allclose(np.array(step.state["average"]), average, atol=2e-6)
    assert int(step.state["step"].item()) == len(RATES)


def test_every_parameter_begins_where_its_size_is_aligned() -> None:
    sizes = {"a": 3, "b": 64, "c": 24, "d": 640, "e": 1, "f": 16}
    layout = Layout.of({name: mx.zeros(size) for name, size in sizes.items()})
    start = 0
    for name in layout.names:
        assert start % math.gcd(sizes[name], 64) == 0
        start += sizes[name]
    assert start == layout.size == sum(sizes.values())


def test_uneven_parts_weigh_by_their_rows() -> None:
    whole, parts = (TrainStep(loss, parameters(), clip=1.0, ema_decay=None, shards=shards) for shards in (1, 3))
    for step in (whole, parts):
        step(batch(0, rows=7), 1e-2)
    assert np.allclose(np.array(whole.state["adam.first"]), np.array(parts.state["adam.first"]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_ends_with_the_same_bytes(stop: int) -> None:
    def fresh() -> TrainStep:
        return TrainStep(loss, parameters(), clip=0.5, ema_decay=0.9, shards=2)

    unbroken, first = fresh(), fresh()
    losses = run(unbroken)
    early = run(first, 0, stop)
    saved = {name: np.array(array) for name, array in first.state.items()}
    resumed = fresh()
    run(resumed, 0, 2)  # whatever it did before
    resumed.load({name: mx.array(array) for name, array in saved.items()})
    assert early + run(resumed, stop) == losses
    assert bytes_of(resumed) == bytes_of(unbroken)


def test_trees_come_back_as_they_were() -> None:
    step = TrainStep(loss, parameters(), clip=1.0, ema_decay=0.5, shards=2)
    for tree in (step.parameters(), step.averaged_parameters()):
        assert np.array_equal(np.array(tree["layers"][0]["weight"]), np.array(parameters()["layers"][0]["weight"]))
        assert np.array_equal(np.array(tree["layers"][1]["weight"]), np.array(parameters()["layers"][1]["weight"]))
        assert np.array_equal(np.array(tree["scale"]), np.array(parameters()["scale"]))
    step(batch(0), 0.1)
    value = float(loss(step.parameters(), batch(1)).item())
    assert value == pytest.approx(step(batch(1), 0.0).item(), rel=1e-6)


def test_a_rate_of_zero_moves_nothing_but_the_moments() -> None:
    step = TrainStep(loss, parameters(), clip=1.0, ema_decay=None)
    before = bytes_of(step)
    step(batch(0), 0.0)
    after = bytes_of(step)
    assert after["parameters"] == before["parameters"]
    assert after["adam.first"] != before["adam.first"]


def test_a_nan_is_seen_in_the_loss_and_spreads() -> None:
    step = TrainStep(loss, parameters(), clip=1.0, ema_decay=0.9, shards=2)
    bad = batch(0)
    bad["x"][5, 0] = np.nan
    assert np.isnan(step(bad, 1e-2).item())
    assert np.isnan(np.array(step.state["parameters"])).all()


def test_no_average_is_kept_unless_asked_for() -> None:
    step = TrainStep(loss, parameters(), clip=1.0, ema_decay=None)
    assert sorted(step.state) == ["adam.first", "adam.second", "parameters", "step"]
    with pytest.raises(ValueError, match="ema_decay"):
        step.averaged_parameters()


def test_a_checkpoint_of_another_network_is_refused() -> None:
    step = TrainStep(loss, parameters(), clip=1.0, ema_decay=None)
    with pytest.raises(ArtifactError, match="does not fit"):
        step.load({**step.state, "parameters": mx.zeros(3)})
    with pytest.raises(ArtifactError, match="does not fit"):
        step.load({name: array for name, array in step.state.items() if name != "adam.first"})


def test_rates_in_float64() -> None:
    rate, second, average, _ = step_rates(0, 1e-3, 0.999)
    assert (rate, second, average) == pytest.approx((1e-2, 1000.0, 0.9))
    rate, second, average, _ = step_rates(999_999, 1e-3, 0.999)
    assert (rate, second, average) == pytest.approx((1e-3, 1.0, 1e-3), rel=1e-9)
    assert [averaging_decay(n, 0.5) for n in (0, 8, 100)] == [0.1, 0.5, 0.5]


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=30), st.integers(1, 6))
def test_groups_cover_everything_once_and_evenly(sizes: list[int], count: int) -> None:
    layout = Layout(tuple(f"p{i:02d}" for i in range(len(sizes))), tuple((size,) for size in sizes))
    groups = layout.groups(count)
    assert len(groups) == count
    assert sum((group.names for group in groups), ()) == layout.names
    assert sum((group.shapes for group in groups), ()) == layout.shapes
    assert max(group.size for group in groups) <= layout.size / count + 2 * max(sizes)


@pytest.mark.parametrize("pieces", [2, 4, 9])
def test_pieces_one_after_another_are_the_whole_batch(pieces: int) -> None:
    whole, cut = (TrainStep(loss, parameters(), clip=0.5, ema_decay=0.9, accumulate=n) for n in (1, pieces))
    np.testing.assert_allclose(run(whole), run(cut), rtol=1e-5)
    for name, array in whole.state.items():
        np.testing.assert_allclose(np.array(array), np.array(cut.state[name]), rtol=1e-4, atol=1e-6)


def test_pieces_need_less_memory() -> None:
    """Only because each is evaluated before the next begins: lazily MLX would hold all of them."""

    def peak(accumulate: int) -> int:
        tree = {"w": draw(64, 64, name="wide")}

        def wide(tree: Any, batch: Any) -> mx.array:
            hidden = batch["x"]
            for _ in range(6):
                hidden = mx.tanh(hidden @ tree["w"])
            return mx.mean(hidden**2)

        step = TrainStep(wide, tree, clip=1.0, ema_decay=None, accumulate=accumulate)
        rows = {"x": draw(8192, 64, name="rows")}
        mx.eval(rows)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(step(rows, 1e-3), step.parameters())
        return mx.get_peak_memory() - before

    assert peak(8) < 0.5 * peak(1)


def test_pieces_resume_to_the_bit() -> None:
    unbroken, stopped, resumed = (
        TrainStep(loss, parameters(), clip=0.5, ema_decay=0.9, shards=2, accumulate=3) for _ in range(3)
    )
    run(unbroken)
    run(stopped, 0, 3)
    resumed.load(stopped.state)
    run(resumed, 3)
    assert bytes_of(unbroken) == bytes_of(resumed)
