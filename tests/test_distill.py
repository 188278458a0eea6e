"""The task `distill` as a whole: stages apart from each other, checkpoints without influence."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ado_tasks import rng
from ado_tasks.config import parse
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.diffusion.grids import uniform_time
from ado_tasks.diffusion.schedules import Cosine
from ado_tasks.distill import distill
from ado_tasks.errors import ConfigError
from ado_tasks.interop.diffusers_folder import read_model, write_model
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.optimise.adversarial import AdversarialConfig
from ado_tasks.optimise.distill_config import DistillConfig
from ado_tasks.optimise.matching import MatchingConfig
from ado_tasks.optimise.progressive import Interval, WalkSolver, distillation_target
from ado_tasks.optimise.students import Stage
from ado_tasks.prepare import PrepareConfig, prepare
from ado_tasks.sampling import Sampler, draw
from ado_tasks.storage import load_arrays, read_json, sha256_tree
from ado_tasks.train import TrainConfig, train
from ado_tasks.variants import student_variants

MODEL = {
    "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "add_attention": False,
}
STAGES = (4, 2, 1)
STEPS = 60


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    prepare(PrepareConfig(name="digits", source="digits"), out=folder / "data", seed=0)
    config = TrainConfig(model=MODEL, steps=150, batch_size=32, warmup_steps=10)
    train(config, dataset=folder / "data", out=folder / "teacher", scratch=folder / "scratch", seed=0)
    for name, every in (("often", 15), ("never", 1000)):
        config = DistillConfig(
            teacher_steps=8, student_steps=STAGES, stage_steps=STEPS, batch_size=32, checkpoint_every=every,
            matching=MatchingConfig(steps=(0, 20, 20), batch_size=16),
        )  # fmt: skip
        distill(
            config, teacher=folder / "teacher", dataset=folder / "data", out=folder / name,
            scratch=folder / "scratch", seed=0,
        )  # fmt: skip
    return folder


def weights(folder: Path, student: str, steps: int) -> dict[str, np.ndarray]:
    arrays = load_arrays(folder / student / str(steps) / "unet" / "diffusion_pytorch_model.safetensors")
    return {name: np.array(array) for name, array in arrays.items()}


@pytest.mark.parametrize("steps", STAGES)
def test_checkpoints_change_nothing(taught: Path, steps: int) -> None:
    often, never = weights(taught, "often", steps), weights(taught, "never", steps)
    for name, array in never.items():
        np.testing.assert_array_equal(often[name], array, err_msg=name)


def test_each_stage_starts_from_its_first_step_and_has_losses_of_its_own(taught: Path) -> None:
    curves = read_json(taught / "often" / "curves.json")
    assert list(curves) == ["4 steps", "2 steps", "2 steps, matching", "1 steps", "1 steps, matching"]
    starts = [tuple(curve[0]) for curve in curves.values()]
    assert {step for step, _ in starts} == {15}  # losses are noted at each checkpoint
    assert len({loss for _, loss in starts}) == len(curves)


def test_the_history_says_which_students_were_matched(taught: Path) -> None:
    said = {steps: read_json(taught / "often" / str(steps) / "ado.json")["history"][-1]["method"] for steps in STAGES}
    assert said == {4: "progressive", 2: "progressive, matching", 1: "progressive, matching"}


def test_a_record_without_the_adversarial_term_is_as_it_was_before_there_was_one(taught: Path) -> None:
    done = read_json(taught / "often" / "1" / "ado.json")["history"][-1]
    assert list(done["config"]["matching"]) == [
        "steps", "batch_size", "learning_rate", "critic_learning_rate", "regression", "lowest_time", "highest_time",
        "average",
    ]  # fmt: skip


def test_the_adversarial_term_is_resumed_recorded_and_of_the_students_that_have_a_weight(taught: Path) -> None:
    options = {"teacher": taught / "teacher", "dataset": taught / "data", "scratch": taught / "scratch", "seed": 0}
    for name, every in (("pulled", 3), ("pulled, whole", 1000)):
        config = DistillConfig(
            teacher_steps=4, student_steps=(2, 1), stage_steps=2, batch_size=16, checkpoint_every=every,
            matching=MatchingConfig(steps=(2, 8), batch_size=8, adversarial=AdversarialConfig(weight=(0.0, 0.1))),
        )  # fmt: skip
        if name == "pulled":
            with pytest.raises(KeyboardInterrupt):
                distill(config, **options, out=taught / name, report=Stop(2 + 2 + 2 + 6))
        distill(config, **options, out=taught / name)
    for steps in (2, 1):
        stopped, whole = weights(taught, "pulled", steps), weights(taught, "pulled, whole", steps)
        for name, array in whole.items():
            np.testing.assert_array_equal(stopped[name], array, err_msg=name)
    done = {steps: read_json(taught / "pulled" / str(steps) / "ado.json")["history"][-1] for steps in (2, 1)}
    assert done[2]["method"] == "progressive, matching"
    assert done[1]["method"] == "progressive, matching, adversarial"
    assert done[1]["config"]["matching"]["adversarial"] == {"weight": [0.0, 0.1], "critic_weight": 0.1}


def test_targets_of_several_steps_at_once_are_those_of_each_and_a_run_is_resumed_between(taught: Path) -> None:
    options = {"teacher": taught / "teacher", "dataset": taught / "data", "scratch": taught / "scratch", "seed": 0}
    common = {"teacher_steps": 8, "student_steps": (4,), "stage_steps": 17, "batch_size": 8}
    distill(DistillConfig(**common), **options, out=taught / "one")
    for name, every in (("together, stopped", 5), ("together", 1000)):
        config = DistillConfig(**common, targets_together=3, checkpoint_every=every)
        if every == 5:  # the fourth of five threes begins with step 9: step 10 is its second
            with pytest.raises(KeyboardInterrupt):
                distill(config, **options, out=taught / name, report=Stop(10))
        distill(config, **options, out=taught / name)
    one, whole, stopped = (weights(taught, name, 4) for name in ("one", "together", "together, stopped"))
    for name, array in whole.items():
        np.testing.assert_array_equal(stopped[name], array, err_msg=name)
        np.testing.assert_allclose(one[name], array, atol=1e-5, err_msg=name)
    said = [read_json(taught / name / "4" / "ado.json")["history"][-1]["config"] for name in ("one", "together")]
    assert [config.get("targets_together") for config in said] == [None, 3]


class Stop:
    """A reporter that stops the run where so many steps of all stages are done."""

    def __init__(self, at: int) -> None:
        self.at = at

    def progress(self, done: int, total: int, **_: float) -> None:
        if done >= self.at:
            raise KeyboardInterrupt

    def metric(self, *_: object) -> None: ...
    def picture(self, *_: object) -> None: ...


def test_matching_is_told_for_each_student() -> None:
    with pytest.raises(ConfigError, match=r"matching\.steps: 2 given for 4 stages"):
        parse(DistillConfig, {"matching": {"steps": [0, 5]}}, "distill.progressive")
    with pytest.raises(ConfigError, match=r"matching\.batch_size"):
        parse(DistillConfig, {"matching": {"steps": [0, 0, 0, 5], "batch_size": 1}}, "distill.progressive")


def test_each_student_is_another_network(taught: Path) -> None:
    first, *others = (weights(taught, "often", steps) for steps in STAGES)
    assert all(np.abs(first["conv_in.weight"] - other["conv_in.weight"]).max() > 0 for other in others)


def test_nothing_is_left_of_finished_runs(taught: Path) -> None:
    assert list((taught / "scratch").rglob("*.safetensors")) == []


def test_a_teacher_with_fewer_classes_than_the_data_is_refused(tmp_path: Path) -> None:
    prepare(PrepareConfig(name="digits", source="digits"), out=tmp_path / "data", seed=0)
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "num_class_embeds": 9}
    unet = UNet2D(UNet2DConfig.from_dict({**MODEL, **sizes}))
    write_model(tmp_path / "teacher", unet, Cosine().to_diffusers("v_prediction"), {"history": []})
    with pytest.raises(ConfigError, match=r"teacher/unet/config\.json\.num_class_embeds: 9 .*10 or more"):
        distill(
            DistillConfig(), teacher=tmp_path / "teacher", dataset=tmp_path / "data", out=tmp_path / "out",
            scratch=tmp_path / "scratch", seed=0,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_the_learning_rate_starts_anew_and_reaches_0_in_each_stage() -> None:
    values = {"student_steps": [4, 2, 1], "stage_steps": [10, 20, 1], "learning_rate": [1e-3, 2e-3, 3e-3]}
    config = parse(DistillConfig, values, "distill.progressive")
    rates = []
    for number, steps in enumerate(config.student_steps):
        stage = Stage(config, number, Interval(steps, 2), Cosine(), "v_prediction", 0)
        rates.append([stage.learning_rate_at(step) for step in range(config.steps_of(number))])
    assert [len(each) for each in rates] == [10, 20, 1]
    assert [each[0] for each in rates] == [1e-3, 2e-3, 3e-3]
    assert [each[-1] for each in rates[:2]] == [0, 0]
    assert all(np.all(np.diff(each) < 0) for each in rates)


@pytest.mark.parametrize("taught_by", ["previous", "first"])
def test_who_teaches_a_later_stage_and_in_how_many_steps(taught: Path, taught_by: Any) -> None:
    """Students that cannot learn (a rate of almost 0) keep the teacher's weights, so each target shows its walk."""
    config = DistillConfig(teacher_steps=12, teacher_solver="dpmpp_2m", student_steps=(4, 2, 1), taught_by=taught_by)
    assert [config.walk_of(number) for number in range(3)] == ([3, 6, 12] if taught_by == "first" else [3, 2, 2])
    solvers: list[WalkSolver] = [config.solver_of(number) for number in range(3)]
    assert solvers == ["dpmpp_2m", *(["dpmpp_2m" if taught_by == "first" else "ddim"] * 2)]
    part, net = open_dataset(taught / "data").split("train"), read_model(taught / "teacher").unet
    for number, steps in enumerate(config.student_steps):
        stage = Stage(config, number, Interval(steps, config.walk_of(number)), Cosine(), "v_prediction", 0)
        found = stage.batches(part, stage.targets(net))(0)
        drawn = stage.draw(part, 0)
        expected = distillation_target(
            stage.denoiser(net, [drawn["labels"]]), drawn["z"], drawn["times"], Cosine(), solvers[number]
        )
        assert drawn["times"].shape[1] == config.walk_of(number) + 1
        np.testing.assert_allclose(found["target"], expected, atol=1e-5)


def test_what_a_student_has_lost_is_not_handed_on_where_the_teacher_itself_teaches(taught: Path) -> None:
    """A first student spoilt by one huge step: the next one's target is the teacher's walk, or the spoilt one's."""
    options = {"teacher": taught / "teacher", "dataset": taught / "data", "scratch": taught / "scratch", "seed": 0}
    last = {}
    for taught_by in ("previous", "first"):
        config = DistillConfig(
            teacher_steps=8, student_steps=(4, 2), stage_steps=(1, 2), batch_size=32, learning_rate=(0.3, 1e-6),
            taught_by=taught_by, checkpoint_every=1,
        )  # fmt: skip
        last[taught_by] = distill(config, **options, out=taught / f"by {taught_by}").final_loss[2]
        said = read_json(taught / f"by {taught_by}" / "2" / "ado.json")["history"][-1]["config"]
        assert said.get("taught_by", "previous") == taught_by
    assert last["previous"] < 0.5 * last["first"]  # near to what taught it, as it begins as that


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_students_of_half_precision_are_near_those_of_whole_and_are_float32_on_disk(
    taught: Path, precision: Any
) -> None:
    options = {"teacher": taught / "teacher", "dataset": taught / "data", "scratch": taught / "scratch", "seed": 0}
    common = {
        "teacher_steps": 8, "student_steps": (2,), "stage_steps": 30, "batch_size": 32, "learning_rate": 2e-3,
        "matching": MatchingConfig(steps=(3,), batch_size=16),
    }  # fmt: skip
    distill(DistillConfig(**common), **options, out=taught / "float32")
    distill(DistillConfig(**common, precision=precision), **options, out=taught / precision)
    start = load_arrays(taught / "teacher" / "unet" / "diffusion_pytorch_model.safetensors")
    whole, half = weights(taught, "float32", 2), weights(taught, precision, 2)
    moved = apart = 0.0
    for name, array in whole.items():
        assert half[name].dtype == np.float32
        moved += float(np.square(array - np.array(start[name])).sum())
        apart += float(np.square(array - half[name]).sum())
    assert 0 < apart < 0.1 * moved
    said = [read_json(taught / name / "2" / "ado.json")["history"][-1]["config"] for name in ("float32", precision)]
    assert [config.get("precision") for config in said] == [None, precision]


def another(folder: Path, like: Path, **changes: Any) -> Path:
    """A network of other widths, with first weights of its own, that predicts what `like` does."""
    model = read_model(like)
    values = {**MODEL, "sample_size": 8, "in_channels": 1, "out_channels": 1, "num_class_embeds": 10}
    unet = UNet2D(UNet2DConfig.from_dict({**values, "block_out_channels": [4], "norm_num_groups": 2, **changes}))
    initialise(unet, rng.key(1, "another"))
    write_model(folder, unet, model.scheduler_config, {"history": model.record["history"]})
    return folder


def test_a_network_of_another_architecture_is_taught_by_the_teacher(taught: Path) -> None:
    """It is no student's copy: its pictures come nearer to the teacher's, and each stage keeps its architecture."""
    options = {"teacher": taught / "teacher", "dataset": taught / "data", "scratch": taught / "scratch", "seed": 0}
    start = another(taught / "another", taught / "teacher")
    config = DistillConfig(
        teacher_steps=8, student_steps=(2, 1), stage_steps=150, batch_size=32, learning_rate=2e-2,
        matching=MatchingConfig(steps=(0, 5), batch_size=16),
    )  # fmt: skip
    distill(config, **options, start=start, out=taught / "narrow")
    part = open_dataset(taught / "data").split("selection")
    noise = draw(3, "test", 100, part)

    def pictures(folder: Path, steps: int) -> np.ndarray:
        return Sampler(read_model(folder))(noise, "ddim", uniform_time(steps))

    fine = pictures(taught / "teacher", 16)
    for steps in (2, 1):
        model = read_model(taught / "narrow" / str(steps))
        assert list(model.unet.config.block_out_channels) == [4]
        done = model.record["history"][-1]
        assert done["start"] == sha256_tree(start)
        apart, before = (
            np.mean(np.square(pictures(each, steps) - fine)) for each in (taught / "narrow" / str(steps), start)
        )
        assert apart < 0.5 * before


def test_to_start_as_the_teacher_is_not_to_say_how_to_start(taught: Path) -> None:
    options = {"teacher": taught / "teacher", "dataset": taught / "data", "scratch": taught / "scratch", "seed": 0}
    config = DistillConfig(
        teacher_steps=8, student_steps=(4, 2), stage_steps=5, batch_size=8,
        matching=MatchingConfig(steps=(2, 2), batch_size=8),
    )  # fmt: skip
    distill(config, **options, out=taught / "unsaid")
    distill(config, **options, start=taught / "teacher", out=taught / "said")
    for steps in (4, 2):
        one, other = weights(taught, "unsaid", steps), weights(taught, "said", steps)
        for name, array in one.items():
            np.testing.assert_array_equal(other[name], array, err_msg=name)


def test_a_start_that_does_not_fit_its_teacher_is_refused(taught: Path, tmp_path: Path) -> None:
    options = {"teacher": taught / "teacher", "dataset": taught / "data", "scratch": tmp_path, "seed": 0}
    config = DistillConfig(teacher_steps=8, student_steps=(2,), stage_steps=2, batch_size=8)
    with pytest.raises(ConfigError, match=r"num_class_embeds is 11; allowed: .*10"):
        start = another(tmp_path / "classes", taught / "teacher", num_class_embeds=11)
        distill(config, **options, start=start, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="a student of 4 steps"):
        distill(config, **options, start=taught / "often" / "4", out=tmp_path / "out")
    model = read_model(taught / "teacher")
    changed = {**model.scheduler_config, "prediction_type": "sample"}
    write_model(tmp_path / "kind", model.unet, changed, model.record)
    with pytest.raises(ConfigError, match=r"its scheduler prediction_type is sample; allowed: .*v_prediction"):
        distill(config, **options, start=tmp_path / "kind", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_start_that_another_version_of_diffusers_wrote_fits_its_teacher(taught: Path, tmp_path: Path) -> None:
    options = {"teacher": taught / "teacher", "dataset": taught / "data", "scratch": tmp_path, "seed": 0}
    model = read_model(taught / "teacher")
    older = {**model.scheduler_config, "_diffusers_version": "0.30.0"}
    write_model(tmp_path / "older", model.unet, older, model.record)
    config = DistillConfig(teacher_steps=8, student_steps=(2,), stage_steps=2, batch_size=8)
    distill(config, **options, start=tmp_path / "older", out=tmp_path / "out")
    assert (tmp_path / "out" / "2").is_dir()


def test_students_step_where_they_were_taught_to(taught: Path, tmp_path: Path) -> None:
    knots = (1.0, 0.9, 0.8, 0.5, 0.0)
    config = DistillConfig(teacher_steps=8, student_steps=STAGES, stage_steps=2, batch_size=8, times=knots)
    distill(
        config, teacher=taught / "teacher", dataset=taught / "data", out=tmp_path / "knots", scratch=tmp_path, seed=0
    )  # fmt: skip
    found = {variant.nfe: variant for variant in student_variants(tmp_path / "knots")}
    assert {steps: found[steps].times.tolist() for steps in STAGES} == {4: list(knots), 2: [1, 0.8, 0], 1: [1, 0]}
    assert found[4].model.record["history"][-1]["config"]["times"] == list(knots)
    for student in student_variants(taught / "never"):
        assert student.model.record["sampler"] == {"solver": "ddim", "steps": student.nfe, "grid": "uniform_time"}
        assert "times" not in student.model.record["history"][-1]["config"]  # as before there was one


@pytest.mark.parametrize(
    "times", [
        (1, 0.5, 0), (1, 0.9, 0.9, 0.5, 0), (0.9, 0.8, 0.7, 0.6, 0), (1, 0.8, 0.7, 0.6, 0.1), (1, 2, 0.7, 0.6, 0),
        (1, 0.50000001, 0.5, 0.2, 0),
    ],
)  # fmt: skip
def test_times_that_are_no_steps_are_refused(times: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"distill\.progressive.*(5 falling numbers are required|less than or equal)"):
        parse(DistillConfig, {"student_steps": [4, 2, 1], "times": list(times)}, "distill.progressive")


def test_a_judge_in_float16_is_refused() -> None:
    values = {"precision": "float16", "matching": {"steps": [1, 1, 1, 1], "adversarial": {"weight": 0.1}}}
    with pytest.raises(ConfigError, match=r"float16 with matching\.adversarial"):
        parse(DistillConfig, values, "distill.progressive")


@pytest.mark.parametrize("key", ["stage_steps", "learning_rate"])
def test_as_many_values_as_stages_are_wanted(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: 2 given for 4 stages"):
        parse(DistillConfig, {key: [0.5, 0.5] if key == "learning_rate" else [5, 5]}, "distill.progressive")
