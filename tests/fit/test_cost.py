"""The cost model: exact where times follow its formula, honest about its error where they don't."""

import numpy as np
import pytest

from ado_tasks import rng
from ado_tasks.errors import HardwareError
from ado_tasks.fit.calibration import drawn_configs, timed, works
from ado_tasks.fit.cost import CostModel, fit_cost_model, predict
from ado_tasks.fit.work import KINDS, Op
from ado_tasks.hardware.capability import Capability, apple_chip

HERE = Capability("test", "cpu", 16, True, {"float32": 80.0}, 10.0, id="a" * 16)
KNOWN = works(drawn_configs(0, "fit", 24, 16), 4)
UNSEEN = works(drawn_configs(0, "unseen", 20, 16), 4)
TRUTH = CostModel("float32", dict(zip(KINDS, (1.5, 3.0, 2.0, 6.0, 2.5, 4.0), strict=True)), 40.0, 0, 0, 0, HERE.id)


def seconds(work: list[list[Op]], noise: float) -> list[float]:
    draw = rng.generator(0, "cost", len(work))
    return [TRUTH.seconds(each, HERE) * float(np.exp(noise * draw.standard_normal())) for each in work]


def test_one_layer_by_hand() -> None:
    """8e9 operations at 80 GFLOP/s: 0.1 s; 4e9 bytes at 10 GB/s: 0.4 s, which is the roof; times 1.5, and 40 µs."""
    assert TRUTH.seconds([Op("convolution", 8e9, 1e9)], HERE) == pytest.approx(1.5 * 0.4 + 40e-6)
    assert TRUTH.seconds([Op("convolution", 8e10, 1e9)], HERE) == pytest.approx(1.5 * 1.0 + 40e-6)


def test_times_of_its_own_formula_are_found_again() -> None:
    model = fit_cost_model(KNOWN, seconds(KNOWN, 0.0), HERE)
    predicted = np.array([model.seconds(work, HERE) for work in UNSEEN])
    assert np.abs(predicted / np.array(seconds(UNSEEN, 0.0)) - 1).max() < 0.06  # the pull to a common factor
    assert model.median_error < 0.04


def test_its_error_is_that_of_networks_it_has_not_seen() -> None:
    """Noise of 10 % in the times: the error that it tells lies near it, and near that on others."""
    model = fit_cost_model(KNOWN, seconds(KNOWN, 0.1), HERE)
    truth = np.array(seconds(UNSEEN, 0.1))
    real = np.median(np.abs(np.array([model.seconds(work, HERE) for work in UNSEEN]) / truth - 1))
    assert 0.03 < model.median_error < 0.2 and 0.03 < real < 0.2
    assert model.worst_error > model.median_error
    few = fit_cost_model(KNOWN[:9], seconds(KNOWN[:9], 0.1), HERE)
    seen = [abs(few.seconds(w, HERE) / s - 1) for w, s in zip(KNOWN[:9], seconds(KNOWN[:9], 0.1), strict=True)]
    assert few.median_error > 1.5 * np.median(seen), "nine networks and seven numbers: what was fitted fits too well"


def test_another_chip_is_marked() -> None:
    model = fit_cost_model(KNOWN, seconds(KNOWN, 0.05), HERE)
    own, other = predict(model, UNSEEN[0], HERE), predict(model, UNSEEN[0], apple_chip("Apple M4"))
    assert own.predicted and other.predicted and other.milliseconds < own.milliseconds
    assert other.error.startswith("not measured on Apple M4; on machine aaaa") and "left out" in own.error


def test_networks_are_drawn_and_timed() -> None:
    """The same draw gives the same networks, another name others; each is timed once a round."""
    configs = drawn_configs(0, "fit", 2, 8)
    assert configs == drawn_configs(0, "fit", 3, 8)[:2] != drawn_configs(0, "unseen", 2, 8)
    times = timed(configs, batch=1, rounds=2)
    assert [len(each) for each in times] == [2, 2] and min(map(min, times)) > 0


def test_too_little_to_fit_on_is_refused() -> None:
    with pytest.raises(HardwareError, match="3 networks, 3 times; allowed: at least 8"):
        fit_cost_model(KNOWN[:3], [1.0] * 3, HERE)
    with pytest.raises(HardwareError, match="no float16 peak"):
        fit_cost_model(KNOWN, [1.0] * len(KNOWN), HERE, "float16")
