"""What is compared beside teacher and students: the network that a search chose, and it at its own learned knots."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ado_tasks import rng
from ado_tasks.diffusion.schedules import Cosine
from ado_tasks.errors import ArtifactError, ConfigError
from ado_tasks.interop.diffusers_folder import read_model, write_model
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.registry.workspace import Workspace
from ado_tasks.storage import write_json
from ado_tasks.variants import Variant, all_variants, read_architecture

TINY = {
    "sample_size": 4, "in_channels": 1, "out_channels": 1, "block_out_channels": [4],
    "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "layers_per_block": 1,
    "norm_num_groups": 2, "add_attention": False,
}  # fmt: skip
TEACHERS, ITS_OWN = [1.0, 0.4, 0.0], [1.0, 0.6, 0.0]  # knots


def network(folder: Path, seed: int = 0, **fields: Any) -> None:
    unet = UNet2D(UNet2DConfig.from_dict({**TINY, **fields}))
    initialise(unet, rng.key(seed, "network"))
    write_model(folder, unet, Cosine().to_diffusers("v_prediction"), {"history": []})


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A teacher, a student of it, a narrower network that was searched for, its student, schedules of both networks."""
    network(tmp_path / "models/teacher", block_out_channels=[6])
    network(tmp_path / "models/progressive/2", block_out_channels=[6])
    network(tmp_path / "models/architecture")
    network(tmp_path / "models/searched/2")
    for name, times in {"teacher": TEACHERS, "architecture": ITS_OWN}.items():
        for solver, distance in {"ddim": 0.1, "ipndm": 0.3, "angle_ab2": 0.2}.items():
            entry = {"solver": solver, "nfe": 2, "times": times, "distance": distance}
            write_json(tmp_path / f"schedules/{name}/{solver}-2.json", entry)
    return tmp_path


def compared(place: Path, architecture: str | None, schedules: str | None) -> list[Variant]:
    teacher = read_model(place / "models/teacher")
    students = (place / "models/progressive", place / "models/searched")
    return all_variants(
        teacher, students, place / "schedules/teacher",
        read_architecture(None if architecture is None else place / architecture, teacher),
        None if schedules is None else place / schedules,
    )  # fmt: skip


def names(variants: list[Variant]) -> list[str]:
    return [variant.name for variant in variants if variant.family != "teacher"]


def test_what_was_searched_for_is_compared_where_it_is_given(place: Path) -> None:
    before = ["progressive-2", "searched-2", "calibrated-2"]
    assert names(compared(place, None, None)) == before
    assert names(compared(place, "models/architecture", None)) == [*before, "architecture-50"]
    found = compared(place, "models/architecture", "schedules/architecture")
    assert names(found) == [*before, "architecture-50", "architecture_calibrated-2"]
    teacher, plain, learned = (variant for variant in found if variant.name in {
        "teacher-50", "architecture-50", "architecture_calibrated-2"})  # fmt: skip
    assert (plain.family, learned.family) == ("architecture", "architecture_calibrated")
    assert (plain.solver, plain.nfe, learned.solver, learned.nfe) == ("ddim", 50, "angle_ab2+gits", 2)
    assert np.array_equal(plain.times, teacher.times) and list(learned.times) == ITS_OWN
    assert plain.model is learned.model  # one sampler, one network
    assert plain.parameters == learned.parameters < teacher.parameters


def test_the_teacher_is_not_compared_under_a_second_name(place: Path) -> None:
    """Whatever folder it lies in; another network of the same configuration is another."""
    network(place / "models/same", block_out_channels=[6])
    network(place / "models/other", seed=1, block_out_channels=[6])
    teacher = read_model(place / "models/teacher")
    assert read_architecture(place / "models/same", teacher) is teacher
    assert read_architecture(place / "models/other", teacher) is not teacher
    assert names(compared(place, "models/same", "schedules/architecture")) == names(compared(place, None, None))
    assert "architecture_calibrated-2" in names(compared(place, "models/other", "schedules/architecture"))


def test_an_architecture_for_other_classes_or_images_is_refused(place: Path) -> None:
    teacher = read_model(place / "models/teacher")
    for fields, said in (({"num_class_embeds": 3}, "num_class_embeds: 3"), ({"in_channels": 3}, "in_channels: 3")):
        network(place / "models/odd", **fields)
        with pytest.raises(ConfigError, match=rf"odd/unet/config\.json\.{said} is not allowed; allowed: the teacher's"):
            read_architecture(place / "models/odd", teacher)


def test_schedules_of_no_network_are_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"architecture_schedules: .*of which network is not said"):
        compared(place, None, "schedules/architecture")


def test_a_workspace_packages_each_by_its_name(place: Path) -> None:
    workspace, compare = Workspace(place), compared(place, "models/architecture", "schedules/architecture")
    for variant in compare:
        package = workspace.package(variant.name)
        assert (package.name, package.method) == (variant.name, variant.method)
        assert list(package.times) == list(variant.times)
        assert package.model.unet.config == variant.model.unet.config
    with pytest.raises(ArtifactError, match="no such schedule; there: architecture_calibrated-2"):
        workspace.package("architecture_calibrated-3")
