"""Costs in network evaluations: what a record says is what went through the network, counted on the way."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ado_tasks.backend import mx
from ado_tasks.distill import distill
from ado_tasks.errors import ArtifactError
from ado_tasks.models.unet import UNet2D
from ado_tasks.optimise.consistency import ConsistencyConfig
from ado_tasks.optimise.cost import (
    NOTHING,
    Passes,
    distillation_passes,
    family_passes,
    progressive_passes,
    training_passes,
)
from ado_tasks.optimise.distill_config import DistillConfig
from ado_tasks.optimise.matching import MatchingConfig
from ado_tasks.prepare import PrepareConfig, prepare
from ado_tasks.report import Recorder
from ado_tasks.storage import read_json
from ado_tasks.train import TrainConfig, train

MODEL = {
    "block_out_channels": [4], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1, "norm_num_groups": 2, "add_attention": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cost")
    prepare(PrepareConfig(name="digits", source="digits"), out=folder / "data", seed=0)
    return folder


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Images by "forward" and "backward", and "taught": of those forward, in losses that a gradient is taken of."""
    seen = {"forward": 0, "backward": 0, "taught": 0}
    inside: list[int] = []
    apply, value_and_grad = UNet2D.__call__, mx.value_and_grad

    def applied(self: UNet2D, z: mx.array, *rest: Any, **options: Any) -> mx.array:
        seen["forward"] += z.shape[0]
        seen["taught"] += z.shape[0] if inside else 0
        return apply(self, z, *rest, **options)

    def watched(loss: Any) -> Any:
        gradient = value_and_grad(loss)

        def call(weights: Any, batch: Any) -> Any:
            seen["backward"] += next(array.shape[0] for array in batch.values() if array.ndim)
            inside.append(1)
            try:
                return gradient(weights, batch)
            finally:
                inside.pop()

        return call

    monkeypatch.setattr(UNet2D, "__call__", applied)
    monkeypatch.setattr(mx, "value_and_grad", watched)
    mx.disable_compile()  # compiled functions would be seen at their first call only
    try:
        yield seen
    finally:
        mx.enable_compile()


def history(folder: Path) -> dict[str, Any]:
    return read_json(folder / "ado.json")


@pytest.fixture(scope="module")
def teacher(place: Path) -> Path:
    config = TrainConfig(model=MODEL, steps=3, batch_size=8, warmup_steps=1)
    train(config, dataset=place / "data", out=place / "teacher", scratch=place / "scratch", seed=0)
    return place / "teacher"


def test_training(place: Path, counted: dict[str, int]) -> None:
    config = TrainConfig(model=MODEL, steps=5, batch_size=12, warmup_steps=1)
    train(config, dataset=place / "data", out=place / "other", scratch=place / "scratch", seed=0)
    found = training_passes(history(place / "other"))
    assert found == Passes(counted["taught"], counted["backward"]) == Passes(60, 60)
    assert found is not None
    assert found.evaluations == 3 * 5 * 12
    assert distillation_passes(history(place / "other")) is None


@pytest.mark.parametrize("taught_by", ["previous", "first"])
@pytest.mark.parametrize("regression", [0.05, 0.0])
def test_progressive_distillation_with_matching(
    place: Path, teacher: Path, counted: dict[str, int], regression: float, taught_by: Any
) -> None:
    config = DistillConfig(
        teacher_steps=12, student_steps=(4, 2, 1), stage_steps=(3, 2, 1), batch_size=6, taught_by=taught_by,
        matching=MatchingConfig(steps=(2, 0, 3), batch_size=5, regression=regression),
    )  # fmt: skip
    report = Recorder()
    distill(
        config, teacher=teacher, dataset=place / "data", out=place / taught_by, scratch=place / "scratch", seed=0,
        report=report,
    )  # fmt: skip
    records = [history(place / taught_by / str(steps)) for steps in config.student_steps]
    found = family_passes(records)
    assert found is not None
    assert found == Passes(counted["forward"], counted["backward"])
    assert [value for name, value, _ in report.metrics if name == "evaluations"] == [found.evaluations]
    spent = [passes.evaluations for passes in map(distillation_passes, records) if passes]
    assert spent == sorted(spent)
    assert spent[-1] == found.evaluations  # a student's share ends with its own stage
    assert training_passes(records[0]) == training_passes(history(teacher))


@pytest.mark.parametrize("hold_on_to", ["teacher", "walks"])
def test_walks_are_counted_once_and_no_stage_asks_a_teacher_again(
    place: Path, teacher: Path, counted: dict[str, int], hold_on_to: Any
) -> None:
    config = DistillConfig(
        walks=600, teacher_steps=10, student_steps=(4, 2, 1), stage_steps=(3, 2, 1), batch_size=6,
        matching=MatchingConfig(steps=(2, 0, 3), batch_size=5, hold_on_to=hold_on_to),
    )  # fmt: skip
    out = place / f"walks, {hold_on_to}"
    distill(config, teacher=teacher, dataset=place / "data", out=out, scratch=place / "scratch", seed=0)
    found = distillation_passes(history(out / "1"))
    assert found == Passes(counted["forward"], counted["backward"])
    matched = 2 * 5 * (4 + 4 + 4) + 3 * 5 * (1 + 4 + 4)
    held = 2 * 5 * 2 + 3 * 5 * 2 if hold_on_to == "teacher" else 0  # 10 steps for 4, and 2 for 1
    assert found is not None and found.evaluations == 600 * 10 + 6 * 6 * 3 + matched + held


def test_further_walks_are_counted_for_the_students_that_learn_from_them(
    place: Path, teacher: Path, counted: dict[str, int]
) -> None:
    config = DistillConfig(
        walks=20, further_walks=600, teacher_steps=10, student_steps=(4, 2, 1), stage_steps=1, batch_size=6,
        optimiser="muon",
    )  # fmt: skip
    out = place / "further walks"
    distill(config, teacher=teacher, dataset=place / "data", out=out, scratch=place / "scratch", seed=0)
    spent = {steps: distillation_passes(history(out / str(steps))) for steps in (4, 2, 1)}
    assert spent[1] == Passes(counted["forward"], counted["backward"])
    assert [each.evaluations for each in spent.values() if each] == [
        20 * 10 + 6 * 3, 20 * 10 + 600 * 4 + 2 * 6 * 3, 20 * 10 + 600 * 4 + 3 * 6 * 3
    ]  # fmt: skip


def test_walks_cost_what_the_teacher_is_asked(place: Path, teacher: Path, counted: dict[str, int]) -> None:
    config = DistillConfig(
        walks=600, walk_evaluations=4, teacher_steps=10, student_steps=(4,), stage_steps=2, batch_size=6
    )
    out = place / "asked"
    distill(config, teacher=teacher, dataset=place / "data", out=out, scratch=place / "scratch", seed=0)
    found = distillation_passes(history(out / "4"))
    assert found == Passes(counted["forward"], counted["backward"])
    assert found is not None and found.evaluations == 600 * 4 + 2 * 6 * 3


def test_consistency_tuning_and_the_search_for_its_points(place: Path, teacher: Path, counted: dict[str, int]) -> None:
    config = ConsistencyConfig(
        steps=4, batch_size=7, warmup_steps=1, student_steps=(3, 1), search_samples=50, search_levels=4
    )
    distill(config, teacher=teacher, dataset=place / "data", out=place / "tuned", scratch=place / "scratch", seed=0)
    records = [history(place / "tuned" / str(steps)) for steps in config.student_steps]
    assert family_passes(records) == Passes(counted["forward"], counted["backward"])
    assert distillation_passes(records[1]) == Passes(2 * 28, 28)  # one step needs no points
    further = {"history": [*records[1]["history"], records[1]["history"][-1]]}  # tuned again from there
    assert distillation_passes(further) == Passes(4 * 28, 2 * 28)


def test_the_demos_default_by_hand() -> None:
    config = {
        "teacher_steps": 32, "student_steps": [8, 4], "stage_steps": [800, 500], "batch_size": 32, "matching": None,
    }  # fmt: skip
    assert progressive_passes(config, 8).evaluations == 800 * 32 * (4 + 3)
    assert progressive_passes(config, 4).evaluations == 800 * 32 * (4 + 3) + 500 * 32 * (2 + 3)
    assert NOTHING.evaluations == 0


def test_an_adversarial_term_goes_through_half_of_the_critic_three_times_more() -> None:
    config = {
        "teacher_steps": 4, "student_steps": [2, 1], "stage_steps": [1, 1], "batch_size": 2,
        "matching": {"steps": [0, 5], "batch_size": 8, "regression": 0.05},
    }  # fmt: skip
    plain = progressive_passes(config, 1).evaluations
    for weight in (0.1, [0.0, 0.1]):
        matching = {**config["matching"], "adversarial": {"weight": weight}}
        more = progressive_passes({**config, "matching": matching}, 1).evaluations - plain
        assert more == 5 * 8 * (2 + 1 + 2) / 2
    done = {"task": "distill", "method": "progressive, matching, adversarial", "steps": 1, "config": config}
    found = distillation_passes({"history": [done]})
    assert found is not None and found.evaluations == plain


def test_folding_guidance_asks_the_teacher_twice() -> None:
    done = {"task": "distill", "method": "guided", "weight": 2.0, "config": {"steps": 10, "batch_size": 4}}
    assert distillation_passes({"history": [done]}) == Passes(3 * 40, 40)


def test_what_is_not_known_is_said_to_be_unknown() -> None:
    assert training_passes({}) is None
    assert distillation_passes({"history": [{"task": "distill", "method": "something new"}]}) is None
    assert family_passes([{}, {"history": []}]) is None


@pytest.mark.parametrize("history", [7, [3], [{"task": "train"}], [{"task": "train", "config": {"steps": 1}}]])
def test_a_history_that_no_task_wrote_is_named(history: Any) -> None:
    with pytest.raises(ArtifactError, match=r"ado\.json: what was done by 'train'"):
        training_passes({"history": history})
