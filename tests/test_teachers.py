"""What may teach: a student of few steps is right at the noise levels of these only."""

from pathlib import Path
from typing import Any

import pytest

from ado_tasks import rng
from ado_tasks.anchor import AnchorConfig, anchor
from ado_tasks.config import as_plain, parse
from ado_tasks.diffusion.schedules import Cosine
from ado_tasks.distill import distill
from ado_tasks.errors import ConfigError
from ado_tasks.interop.diffusers_folder import read_model, write_model
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.optimise.consistency import ConsistencyConfig
from ado_tasks.optimise.distill_config import DistillConfig
from ado_tasks.optimise.guided import GuidedConfig
from ado_tasks.prepare import PrepareConfig, prepare
from ado_tasks.probe import ProbeConfig, probe

GUIDED = {"task": "distill", "method": "guided", "weight": 2.0, "config": as_plain(GuidedConfig())}
SEARCHED = [{"task": "probe", "lane": 1}, {"task": "search", "chosen": "1"}]
TUNED = {
    "steps": 2, "batch_size": 4, "warmup_steps": 1, "student_steps": [1], "search_samples": 50,
    "search_levels": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose guidance is folded in and that was searched for, and its students of 4 and 2 steps."""
    folder = tmp_path_factory.mktemp("teachers")
    prepare(
        PrepareConfig(name="digits", source="digits", train=200, selection=100, report=100),
        out=folder / "data", seed=0,
    )  # fmt: skip
    config = UNet2DConfig(
        sample_size=8, in_channels=1, out_channels=1, num_class_embeds=10, block_out_channels=(8,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1, norm_num_groups=4,
        add_attention=False,
    )  # fmt: skip
    unet = UNet2D(config)
    initialise(unet, rng.key(0, "teachers"))
    history = [{"task": "train"}, GUIDED, *SEARCHED]
    write_model(folder / "teacher", unet, Cosine().to_diffusers("v_prediction"), {"history": history})
    chain(folder, folder / "teacher", "students", teacher_steps=8, student_steps=[4, 2])
    return folder


def chain(place: Path, teacher: Path, out: str, **settings: Any) -> None:
    config = parse(DistillConfig, {"stage_steps": 2, "batch_size": 8, **settings}, "distill")
    given(place, config, teacher, out)


def given(place: Path, config: Any, teacher: Path, out: str, **options: Any) -> None:
    paths = {"dataset": place / "data", "out": place / out, "scratch": place / "scratch"}
    distill(config, teacher=teacher, **paths, seed=0, **options)


def test_students_do_not_teach(place: Path) -> None:
    student, nothing = place / "students/4", place / "nothing"
    common: dict[str, Any] = {"teacher": student, "dataset": place / "data", "out": nothing / "0", "seed": 0}
    said = r"students/4: a student of 4 steps, .*; allowed: a model that was not distilled to few steps"
    with pytest.raises(ConfigError, match=said):
        anchor(AnchorConfig(), features=place / "features", **common)
    with pytest.raises(ConfigError, match=said):
        probe(ProbeConfig(), scratch=place / "scratch", **common)
    for config in (GuidedConfig(), parse(ConsistencyConfig, TUNED, "distill"), DistillConfig()):
        with pytest.raises(ConfigError, match=said):
            distill(config, scratch=place / "scratch", **common)
    assert not nothing.exists()


def test_a_student_goes_on_from_its_own_steps_only(place: Path) -> None:
    """As within a chain: by DDIM, on its own grid; matching would ask it at noise levels that it was never taught."""
    student = place / "students/4"
    chain(place, student, "further", teacher_steps=4, student_steps=[2, 1])
    steps = [done.get("steps") for done in read_model(place / "further/1").record["history"]]
    assert steps == [None, None, None, None, 4, 1]
    for other in (
        {"teacher_steps": 8}, {"teacher_steps": 2, "student_steps": [1]},
        {"teacher_steps": 4, "teacher_solver": "dpmpp_2m"}, {"teacher_steps": 4, "matching": {"steps": [2, 2]}},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="a student of 4 steps"):
            chain(place, student, "other", **{"student_steps": [2, 1], **other})


def test_consistency_begins_with_a_student_but_is_not_taught_by_it(place: Path) -> None:
    """And its own students are no teachers, whatever their number of steps."""
    tuned = parse(ConsistencyConfig, TUNED, "distill")
    given(place, tuned, place / "teacher", "consistency", start=place / "students/2")
    with pytest.raises(ConfigError, match="consistency/1: a student of 1 step,"):
        chain(place, place / "consistency/1", "other", teacher_steps=2, student_steps=[1])
