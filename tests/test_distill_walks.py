"""The task `distill` where students learn from walks that the teacher walked once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ado_tasks.config import parse
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.diffusion.grids import uniform_time
from ado_tasks.distill import distill
from ado_tasks.distillation import progressive
from ado_tasks.errors import ConfigError
from ado_tasks.interop.diffusers_folder import read_model
from ado_tasks.optimise.cost import distillation_passes
from ado_tasks.optimise.distill_config import DistillConfig
from ado_tasks.optimise.matching import MatchingConfig
from ado_tasks.optimise.walks import Walks, walked
from ado_tasks.prepare import PrepareConfig, prepare
from ado_tasks.report import StopWhen
from ado_tasks.sampling import Draw, Sampler, draw
from ado_tasks.storage import load_arrays, read_json
from ado_tasks.train import TrainConfig, train
from ado_tasks.variants import student_variants

MODEL = {
    "block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1, "norm_num_groups": 4, "add_attention": False,
}  # fmt: skip
KNOTS = (1.0, 0.9, 0.8, 0.5, 0.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill-walks")
    prepare(PrepareConfig(name="digits", source="digits"), out=folder / "data", seed=0)
    config = TrainConfig(model=MODEL, steps=150, batch_size=32, warmup_steps=10)
    train(config, dataset=folder / "data", out=folder / "teacher", scratch=folder / "scratch", seed=0)
    return folder


def taught(place: Path, out: str, config: DistillConfig, **options: Any) -> Path:
    distill(
        config, teacher=place / "teacher", dataset=place / "data", out=place / out, scratch=place / "scratch", seed=0,
        **options,
    )  # fmt: skip
    return place / out


def weights(folder: Path, steps: int) -> dict[str, np.ndarray]:
    arrays = load_arrays(folder / str(steps) / "unet" / "diffusion_pytorch_model.safetensors")
    return {name: np.array(array) for name, array in arrays.items()}


def stop_at(report: int) -> StopWhen:
    """Stops the run at its n-th report of progress."""
    seen = iter(range(1, report + 1))
    return StopWhen(lambda: next(seen, report) >= report)


def test_students_come_near_the_end_of_the_teachers_walk_on_noise_that_nobody_walked_from(place: Path) -> None:
    """Nearer than the teacher's own DDIM in as many steps comes to it; the teacher's steps need not be a multiple."""
    config = DistillConfig(
        teacher_steps=10, student_steps=(4, 2, 1), stage_steps=150, batch_size=32, learning_rate=5e-3, walks=600
    )
    folder = taught(place, "near", config)
    sampler = Sampler(read_model(place / "teacher"))
    start = draw(5, "test", 100, open_dataset(place / "data").split("selection"))
    end = sampler(start, "ddim", uniform_time(10))
    for variant in student_variants(folder):
        own = Sampler(variant.model)(start, "ddim", variant.times)
        plain = sampler(start, "ddim", uniform_time(variant.nfe))
        assert np.mean((own - end) ** 2) < 0.5 * np.mean((plain - end) ** 2), variant.nfe


def test_it_is_the_teacher_that_walks_by_its_solver_and_past_the_students_times(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the network that the first student begins as."""
    found: list[Walks] = []

    def watched(*given: Any) -> Walks:
        found.append(walked(*given))
        return found[-1]

    monkeypatch.setattr(progressive, "walked", watched)
    config = TrainConfig(model=MODEL, steps=5, batch_size=8, warmup_steps=1)
    train(config, dataset=place / "data", out=place / "other", scratch=place / "scratch", seed=1)
    config = DistillConfig(
        teacher_steps=10, teacher_solver="dpmpp_2m", student_steps=(4, 2), stage_steps=1, batch_size=4, walks=20,
        times=KNOTS,
    )  # fmt: skip
    taught(place, "by the teacher", config, start=place / "other")
    [walks] = found
    assert walks.times == KNOTS
    sampler = Sampler(read_model(place / "teacher"))
    start = Draw(walks.states[:, 0], walks.labels)
    np.testing.assert_allclose(walks.states[:, 4], sampler(start, "dpmpp_2m", uniform_time(10)), atol=1e-3)
    np.testing.assert_allclose(walks.states[:, 2], sampler(start, "dpmpp_2m", uniform_time(10)[:3]), atol=1e-3)


def test_the_first_student_walks_on_for_the_next_from_other_noises_and_in_its_own_steps(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is after its matching."""
    given: list[Any] = []
    found: list[Walks] = []

    def watched(*arguments: Any) -> Walks:
        given.append(arguments)
        found.append(walked(*arguments))
        return found[-1]

    seen: list[int] = []
    shared: list[Any] = []
    legs = Walks.legs

    def counted(self: Walks, *given: Any) -> Any:
        seen.append(len(self.states))
        shared.append((self.teachers, self.share))
        return legs(self, *given)

    monkeypatch.setattr(progressive, "walked", watched)
    monkeypatch.setattr(Walks, "legs", counted)
    config = DistillConfig(
        teacher_steps=10, student_steps=(4, 2, 1), stage_steps=2, batch_size=4, walks=20, further_walks=20,
        teacher_solver="dpmpp_2m", times=KNOTS, learning_rate=1e-2, teachers_share=0.25,
        matching=MatchingConfig(steps=(2, 0, 0), batch_size=4, learning_rate=1e-2),
    )  # fmt: skip
    folder = taught(place, "further", config)
    teachers, own = found
    assert (len(teachers.states), len(own.states)) == (20, 20)
    assert seen == [20, 20, 40, 40, 40, 40]
    first, second = given
    assert first[8] != second[8]  # the folders of what is kept
    assert not np.isin(own.states[:, 0, 0, 0, 0], teachers.states[:, 0, 0, 0, 0]).any()
    student = student_variants(folder)[0]
    assert student.nfe == 4
    end = Sampler(student.model)(Draw(own.states[:, 0], own.labels), "ddim", student.times)
    np.testing.assert_allclose(own.states[:, -1], end, atol=1e-3)
    assert own.times == KNOTS[::2]
    middle = Sampler(student.model)(Draw(own.states[:, 0], own.labels), "ddim", student.times[:3])
    np.testing.assert_allclose(own.states[:, 1], middle, atol=1e-3)
    assert shared[2] == shared[5] == (20, 0.25)  # the teacher's share of what later students see
    both = teachers.past_times_of(2).and_those_of(own)
    np.testing.assert_array_equal(both.states[:20], teachers.states[:, ::2])
    np.testing.assert_array_equal(both.states[20:], own.states)
    np.testing.assert_array_equal(np.array(both.labels)[:20], teachers.labels)
    np.testing.assert_array_equal(np.array(both.labels)[20:], own.labels)


def test_stages_are_taught_by_the_optimiser_that_is_asked_for(place: Path) -> None:
    """After one step what is Adam's in both is the same, and what is inside the network is not."""
    config = DistillConfig(teacher_steps=6, student_steps=(2,), stage_steps=1, batch_size=8, walks=10)
    adam, muon = (
        weights(taught(place, name, replace(config, optimiser=name)), 2) for name in ("adam", "muon")
    )  # fmt: skip
    inside = "mid_block.resnets.0.conv1.weight"
    assert np.abs(muon[inside] - adam[inside]).max() > 1e-5
    np.testing.assert_allclose(muon["conv_in.weight"], adam["conv_in.weight"], atol=1e-6)


def test_where_the_chain_ends_at_the_first_student_it_walks_for_nobody(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ends:
        def goes_on(self, *_: object) -> bool:
            return False

        def index(self, steps: tuple[int, ...]) -> dict[str, Any]:
            return {"students": [2], "steps": None, "failed": 2, "reason": "inferior", "margin": 0.0}

    found: list[Walks] = []

    def watched(*arguments: Any) -> Walks:
        found.append(walked(*arguments))
        return found[-1]

    monkeypatch.setattr(progressive, "_stopping", lambda *_: Ends())
    monkeypatch.setattr(progressive, "walked", watched)
    config = DistillConfig(teacher_steps=6, student_steps=(2, 1), stage_steps=1, batch_size=4, walks=5, further_walks=7)
    folder = taught(place, "ends", config)
    assert [variant.nfe for variant in student_variants(folder)] == [2]
    assert [len(walks.states) for walks in found] == [5]


@pytest.mark.parametrize("at", [2, 5, 7, 10, 13])
def test_a_run_that_was_stopped_ends_in_the_same_bytes(place: Path, at: int) -> None:
    """Among the walks (two files), in a stage, in matching, among the student's walks, in the next stage."""
    config = DistillConfig(
        teacher_steps=6, student_steps=(2, 1), stage_steps=12, batch_size=8, checkpoint_every=3, walks=600,
        times=(1, 0.8, 0), matching=MatchingConfig(steps=(5, 5), batch_size=4, hold_on_to="walks"),
        further_walks=1100, optimiser="muon",
    )  # fmt: skip
    if not (place / "whole").exists():
        taught(place, "whole", config)
    with pytest.raises(KeyboardInterrupt):
        taught(place, f"stopped-{at}", config, report=stop_at(at))
    folder = taught(place, f"stopped-{at}", config)
    for steps in (2, 1):
        one, other = weights(place / "whole", steps), weights(folder, steps)
        for name, array in one.items():
            np.testing.assert_array_equal(other[name], array, err_msg=name)
    assert list((place / "scratch").rglob("*.safetensors")) == []


def test_what_is_kept_of_walks_is_for_the_same_evaluations_only(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped among its walks and goes on is as one at once; with another number it begins anew."""
    found: list[Walks] = []

    def watched(*arguments: Any) -> Walks:
        found.append(walked(*arguments))
        return found[-1]

    monkeypatch.setattr(progressive, "walked", watched)
    config = DistillConfig(
        teacher_steps=6, student_steps=(2,), stage_steps=1, batch_size=4, walks=600, walk_evaluations=3
    )
    others = [replace(config, walk_evaluations=evaluations) for evaluations in (4, 6, None)]
    taught(place, "asked-at-once", config)
    for name, each in enumerate([*others, config]):
        with pytest.raises(KeyboardInterrupt):
            taught(place, f"asked-{name}", config, report=stop_at(1))  # one of two files is kept
        taught(place, f"asked-{name}", each)
    at_once, four, six, whole, resumed = (walks.states for walks in found)
    np.testing.assert_array_equal(resumed, at_once)
    np.testing.assert_array_equal(six, whole)
    np.testing.assert_array_equal(at_once[:, 0], whole[:, 0])
    for one, other in ((at_once, four), (at_once, whole), (four, whole)):
        ends = np.abs(one[:, -1] - other[:, -1]).max(axis=(1, 2, 3))
        assert (ends > 1e-4).all()


def test_matching_samples_from_the_walks_noise_and_holds_on_to_their_ends(place: Path) -> None:
    """With regression alone to speak of, more of it brings students nearer to the walks' ends."""
    common: dict[str, Any] = {
        "teacher_steps": 6,
        "student_steps": (1,),
        "stage_steps": 1,
        "batch_size": 32,
        "walks": 64,
    }
    matching = MatchingConfig(steps=(120,), batch_size=32, regression=1e3, learning_rate=5e-3, hold_on_to="walks")
    folder = taught(place, "pulled", DistillConfig(**common, matching=matching))
    left = taught(place, "left", DistillConfig(**common))
    start = draw(5, "test", 100, open_dataset(place / "data").split("selection"))
    end = Sampler(read_model(place / "teacher"))(start, "ddim", uniform_time(6))
    pulled, other = (
        np.mean((Sampler(read_model(each / "1"))(start, "ddim", uniform_time(1)) - end) ** 2) for each in (folder, left)
    )
    assert pulled < 0.6 * other


def test_the_record_says_so_and_a_record_without_walks_is_as_before(place: Path) -> None:
    matching = MatchingConfig(steps=(0,))
    common: dict[str, Any] = {
        "teacher_steps": 8, "student_steps": (4,), "stage_steps": 2, "batch_size": 8, "matching": matching
    }  # fmt: skip
    held = DistillConfig(**{**common, "matching": replace(matching, hold_on_to="walks")}, walks=20, times=KNOTS)
    said = [
        read_json(taught(place, name, config) / "4" / "ado.json")["history"][-1]
        for name, config in (
            ("walks", held), ("no walks", DistillConfig(**common))
        )
    ]  # fmt: skip
    assert [done["config"].get("walks") for done in said] == [20, None]
    assert not {"walks", "further_walks", "optimiser", "teachers_share", "walk_evaluations"} & set(said[1]["config"])
    assert [done["config"]["matching"].get("hold_on_to") for done in said] == ["walks", None]
    found = distillation_passes({"history": said[:1]})
    assert found is not None and found.evaluations == 20 * 8 + 2 * 8 * 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"taught_by": "first"}, "walks: they are all that is taught by"),
        ({"targets_together": 2}, "walks: they are all that is taught by"),
        ({"matching": {"steps": [0, 1], "adversarial": {"weight": 0.1}, "hold_on_to": "walks"}}, "is not supported"),
        (
            {"matching": {"steps": [0, 1], "hold_on_to": "walks"}, "walks": None, "teacher_steps": 8},
            "walks, and there are none",
        ),
        ({"matching": {"steps": [0, 1], "regression": 0, "hold_on_to": "walks"}}, "holds on to nothing"),
        ({"walks": 0}, r"walks"),
        ({"further_walks": 5, "student_steps": [4]}, "with walks and two student_steps or more"),
        ({"further_walks": 5, "walks": None, "teacher_steps": 8}, "with walks and two student_steps or more"),
        ({"teachers_share": 0.5}, "teachers_share: all walks are the teacher's; allowed: with further_walks"),
        ({"teachers_share": 1, "further_walks": 5}, "teachers_share"),
        ({"teachers_share": 0.1, "further_walks": 5, "batch_size": 4}, "0.1 of a batch of 4 leaves one kind"),
        ({"teachers_share": 0.9, "further_walks": 5, "batch_size": 4}, "0.9 of a batch of 4 leaves one kind"),
        (
            {
                "teachers_share": 0.1,
                "further_walks": 5,
                "matching": {"steps": [0, 1], "hold_on_to": "walks", "batch_size": 3},
            },
            "0.1 of a batch of 3 leaves one kind",
        ),
        ({"walk_evaluations": 5, "teacher_solver": "dpmpp_2m"}, "walk_evaluations: of the teacher's walks, DDIM's"),
        ({"walk_evaluations": 5, "walks": None, "teacher_steps": 8}, "allowed: with walks and teacher_solver: ddim"),
        ({"walk_evaluations": 11}, "walk_evaluations: 11; allowed: at most teacher_steps, 10"),
        ({"walk_evaluations": 1}, "walk_evaluations"),
        ({"optimiser": "sgd"}, r"optimiser: .*adam.*muon"),
        ({"student_steps": [5, 2]}, "a student of 2 steps cannot replace 5"),
        ({"teacher_steps": 4}, "a student of 4 steps cannot replace 4 steps; allowed: a smaller number"),
    ],
)
def test_what_does_not_go_with_walks_is_refused(values: dict[str, Any], message: str) -> None:
    given = {"walks": 10, "teacher_steps": 10, "student_steps": [4, 2]}
    parse(DistillConfig, given, "distill.progressive")
    with pytest.raises(ConfigError, match=message):
        parse(DistillConfig, {**given, **values}, "distill.progressive")
