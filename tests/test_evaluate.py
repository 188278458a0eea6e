"""Parts of `evaluate` by themselves: what is chosen on the selection part, and what everything cost."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ado_tasks.backend import mx
from ado_tasks.evaluate import EvaluateConfig, _choose, _compute
from ado_tasks.storage import save_arrays, write_json

GENERATOR = np.random.default_rng(0)
REAL, TEACHER = (GENERATOR.standard_normal((400, 4)).astype(np.float32) for _ in range(2))
FAR = {"progressive-1": 2.0, "progressive-2": 0.0, "calibrated-4": 0.0, "progressive-8": 1.0}


@dataclass
class Part:
    """The selection part, of images that are their own features."""

    shape: tuple[int, ...] = (4, 1, 1)
    num_classes: int = 0
    groups: np.ndarray = field(default_factory=lambda: np.arange(len(REAL)))  # each image by itself

    def __len__(self) -> int:
        return len(REAL)

    def batch(self, rows: np.ndarray) -> np.ndarray:
        return REAL[rows]


def variants() -> list[Any]:
    rows = [SimpleNamespace(name=name, family=name.partition("-")[0], nfe=int(name[-1]), parameters=9) for name in FAR]
    return [SimpleNamespace(name="teacher-50", family="teacher", nfe=50, parameters=9), *rows]


def chosen_of(tmp_path: Path, among: list[Any], far: dict[str, float], judge_all: bool = False) -> Any:
    """What is chosen and why, and which were looked at in which order."""
    save_arrays(tmp_path / "teacher.safetensors", {"features": mx.array(TEACHER)})
    seen = []

    def sampled(variant: Any, start: Any) -> np.ndarray:
        seen.append(variant.name)
        return TEACHER[: len(start)] + far[variant.name]

    features: Any = SimpleNamespace(features=lambda images: images, whitened=lambda found: found)
    data = SimpleNamespace(split=lambda name: {"selection": Part()}[name])  # no other part is asked for
    config, how = EvaluateConfig(judge_all=judge_all), (data, features, tmp_path, 0.05, 0)
    return *_choose(config, sampled, among, *how), seen  # pyright: ignore[reportArgumentType]


def test_of_equal_evaluations_the_smaller_network_is_chosen(tmp_path: Path) -> None:
    small = SimpleNamespace(name="searched-2", family="searched", nfe=2, parameters=4)
    chosen, _, seen = chosen_of(tmp_path, [*variants(), small], {**FAR, "searched-2": 0.0})
    assert chosen == "searched-2"
    assert seen == ["progressive-1", "searched-2"]


@pytest.mark.parametrize("judge_all", [False, True])
def test_the_cheapest_that_is_good_enough_is_chosen_whether_the_rest_is_judged_or_not(
    tmp_path: Path, judge_all: bool
) -> None:
    chosen, reasons, seen = chosen_of(tmp_path, variants(), FAR, judge_all)
    assert chosen == "progressive-2"
    judged = ["progressive-1", "progressive-2", "calibrated-4", "progressive-8"]
    assert seen == [row["name"] for row in reasons] == (judged if judge_all else judged[:2])
    assert [row["non_inferior"] for row in reasons] == [False, True, True, False][: len(reasons)]


def test_what_everything_cost_is_told_as_far_as_it_is_known(tmp_path: Path) -> None:
    trained = {"task": "train", "config": {"steps": 10, "batch_size": 5}}
    stages = {"teacher_steps": 8, "student_steps": [4, 2], "stage_steps": 3, "batch_size": 2}
    taught = [{"task": "distill", "method": "progressive", "steps": steps, "config": stages} for steps in (4, 2)]
    teacher: Any = SimpleNamespace(record={"history": [trained]})

    def variant(family: str, history: list[Any] | None) -> Any:
        model = teacher if history is None else SimpleNamespace(record={"history": history})
        return SimpleNamespace(family=family, model=model)

    everything = [
        variant("teacher", None), variant("calibrated", None), variant("new", [{"task": "distill", "method": "new"}]),
        *(variant("progressive", [trained, done]) for done in taught),
    ]  # fmt: skip
    write_json(tmp_path / "index.json", {"cost": {"reference": 7, "ddim-4": 9}})
    assert _compute(teacher, everything, tmp_path) == {
        "training": 150, "distillation": {"new": None, "progressive": 2 * 3 * 2 * (2 + 3)},
        "calibration": {"reference": 7, "ddim-4": 9},
    }  # fmt: skip
    searched = SimpleNamespace(record={"history": [trained, {"task": "search", "chosen": "6"}]})
    both: list[Any] = [
        SimpleNamespace(family=name, model=searched) for name in ("architecture", "architecture_calibrated")
    ]
    write_json(tmp_path / "its/index.json", {"cost": {"reference": 5, "ddim-4": 3}})
    assert _compute(teacher, [*everything, *both], tmp_path, tmp_path / "its") == {
        **_compute(teacher, everything, tmp_path), "architecture_calibration": {"reference": 5, "ddim-4": 3},
    }  # fmt: skip
    foreign: Any = SimpleNamespace(record={})
    assert _compute(foreign, [], tmp_path / "none") == {"training": None, "distillation": {}, "calibration": None}
