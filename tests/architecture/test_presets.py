"""What presets with a search ask for, counted: sections parse, the race keeps its bar, networks are fast."""

from pathlib import Path
from typing import Any

import pytest

from ado_tasks.architecture.cost import multiply_adds, probe_multiply_adds
from ado_tasks.architecture.space import Space
from ado_tasks.calibrate import CalibrateConfig
from ado_tasks.config import as_plain, parse, read_params
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.optimise.cost import GRADIENT
from ado_tasks.optimise.distill_config import DistillConfig
from ado_tasks.probe import ProbeConfig
from ado_tasks.search import SearchConfig
from ado_tasks.sensitivity import SensitivityConfig
from ado_tasks.weigh import WeighConfig

ROOT = Path(__file__).resolve().parents[2]
BAR = 0.5  # of the teacher's training: what a race may take at most (docs/search.md)
FASTER = 1.7  # what is asked of the network that is chosen, beside its teacher
DATA = {"demo": {"sample_size": 8, "in_channels": 1, "out_channels": 1},
        "search": {"sample_size": 8, "in_channels": 1, "out_channels": 1},
        "search32": {"sample_size": 32, "in_channels": 3, "out_channels": 3}}  # fmt: skip


def preset(name: str) -> dict[str, Any]:
    return read_params(ROOT / ("params.yaml" if name == "demo" else f"params.{name}.yaml"))


def counted(name: str) -> tuple[dict[str, Any], ProbeConfig, int, list[int]]:
    """A preset, its `probe`, and multiply-adds of its teacher and of every network of its space, the most first."""
    params = preset(name)
    probe = parse(ProbeConfig, params["probe"], "probe")
    teacher = UNet2DConfig.from_dict({**params["train"]["model"], **DATA[name], "num_class_embeds": 10})
    space, size = Space.around(teacher, probe.space), DATA[name]["sample_size"]
    costs = sorted((multiply_adds(space.candidate(point), size, size) for point in space.points()), reverse=True)
    return params, probe, multiply_adds(teacher, size, size), costs


@pytest.mark.parametrize("name", DATA)
def test_sections_of_the_search_parse(name: str) -> None:
    params = preset(name)
    kinds = {"weigh": WeighConfig, "search": SearchConfig, "sensitivity": SensitivityConfig,
             "distill_searched": DistillConfig, "calibrate_searched": CalibrateConfig}  # fmt: skip
    assert name == "demo" or "sensitivity" in params
    for section in kinds.keys() & params.keys():
        parse(kinds[section], params[section], section)


def test_the_race_of_shapes_keeps_its_bar_whichever_networks_it_meets() -> None:
    """Each lane of a rung meets another network: of the largest of the space, or of the smallest."""
    params, probe, teacher, costs = counted("search32")
    training = GRADIENT * params["train"]["steps"] * params["train"]["batch_size"] * teacher

    def share(costs: list[int]) -> float:
        return sum(
            probe_multiply_adds(as_plain(probe), rung, cost, teacher) / training
            for rung, size in enumerate(probe.race.sizes)
            for cost in costs[:size]
        )

    most, least = share(costs), share(costs[::-1])
    assert most < BAR
    assert (most, least) == pytest.approx((0.38, 0.23), abs=0.005)  # as docs/search.md says


def test_the_demo_tries_every_network_that_is_smaller_than_its_teacher_and_keeps_the_bar() -> None:
    params, probe, teacher, costs = counted("demo")
    assert len(costs) == probe.race.sizes[0] == probe.race.unguided and teacher > costs[0]
    training = GRADIENT * params["train"]["steps"] * params["train"]["batch_size"] * teacher
    race = zip(probe.race.sizes, (costs, costs), strict=True)
    share = sum(
        probe_multiply_adds(as_plain(probe), rung, cost, teacher) / training
        for rung, (size, dearest) in enumerate(race)
        for cost in dearest[:size]
    )
    assert share < 0.1 < BAR
    assert probe.race.good_enough == params["search"]["policy"]["max_quality_loss"]


def test_every_network_for_shapes_is_fast_enough_by_count() -> None:
    """The policy knows no least speed-up, so the space has none below it. What counts is measured by `weigh`."""
    _, probe, teacher, costs = counted("search32")
    assert len(costs) == 54 >= probe.race.sizes[0]
    assert teacher / costs[0] > FASTER
