"""The task `measure`: what it times, and what one step costs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ado_tasks import measure as module
from ado_tasks import rng
from ado_tasks.config import parse
from ado_tasks.diffusion.schedules import Cosine
from ado_tasks.errors import ConfigError
from ado_tasks.hardware.latency import interleaved
from ado_tasks.hardware.steps import FEW, MANY
from ado_tasks.interop.diffusers_folder import write_model
from ado_tasks.measure import MeasureConfig, measure
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.profile import ProfileConfig, profile
from ado_tasks.sampling import Sampler
from ado_tasks.storage import read_json, write_json

TINY = {
    "sample_size": 4, "in_channels": 1, "out_channels": 1, "block_out_channels": [4],
    "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "layers_per_block": 1,
    "norm_num_groups": 2, "add_attention": False,
}  # fmt: skip


def network(folder: Path, **fields: Any) -> None:
    unet = UNet2D(UNet2DConfig.from_dict({**TINY, **fields}))
    initialise(unet, rng.key(0, str(folder.name)))
    write_model(folder, unet, Cosine().to_diffusers("v_prediction"), {"history": []})


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A teacher, a family of its size, one that is wider, learned schedules of three solvers."""
    network(tmp_path / "teacher")
    network(tmp_path / "progressive/2")
    network(tmp_path / "searched/1", block_out_channels=[6])
    network(tmp_path / "architecture", block_out_channels=[6])
    entry = {"solver": "ipndm", "nfe": 2, "times": [1.0, 0.5, 0.0], "distance": 0.1}
    write_json(tmp_path / "its_schedules/ipndm-2.json", entry)
    for solver in ("ddim", "ipndm", "angle_ab2"):
        entry = {"solver": solver, "nfe": 2, "times": [1.0, 0.4, 0.0], "distance": 0.1}
        write_json(tmp_path / f"schedules/{solver}-2.json", entry)
    profile(ProfileConfig(), out=tmp_path / "profile.json")
    return tmp_path


def run(place: Path, given: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    measure(
        MeasureConfig(batch_size=2, rounds=3, **settings), teacher=place / "teacher",
        students=(place / "progressive", place / "searched"), schedules=place / "schedules",
        profile=place / "profile.json", out=place / "measure.json", seed=0, **(given or {}),
    )  # fmt: skip
    return read_json(place / "measure.json")


def test_a_step_is_timed_for_each_network_solver_and_batch(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[tuple[int, int, str, int]] = []
    sample = Sampler.__call__

    def watched(self: Sampler, start: Any, solver: str, times: np.ndarray, **options: Any) -> Any:
        sampled.append((self.batch_size, len(start), solver, len(times) - 1))
        return sample(self, start, solver, times, **options)

    monkeypatch.setattr(Sampler, "__call__", watched)
    # A machine on which a batch takes 5 ms and each evaluation 2 more, whatever it is.
    monkeypatch.setattr(
        module, "interleaved",
        lambda actions, rounds, _, **_options: {
            name: [action() is None or 5e-3 + 2e-3 * sampled[-1][3]] * rounds for name, action in actions.items()
        },
    )  # fmt: skip
    found = run(place, step_batches=(3, 1))["steps"]
    keys = [(tuple(row["families"]), row["solver"], row["batch"]) for row in found]
    same = ("calibrated", "progressive", "teacher")
    assert keys == [
        *((same, solver, batch) for batch in (1, 3) for solver in ("angle_ab2", "ddim", "ipndm")),
        *((("searched",), "ddim", batch) for batch in (1, 3)),
    ]
    for row in found:
        assert row["fixed_ms"]["median"] == pytest.approx(5.0)
        assert row["step_ms"]["median"] == pytest.approx(2.0)
    for row in found:
        for steps in (FEW, MANY):
            assert (row["batch"], row["batch"], row["solver"], steps) in sampled


@pytest.mark.parametrize("warm", [False, True])
def test_what_has_run_before_needs_no_unmeasured_round(warm: bool) -> None:
    ran: list[str] = []
    actions = {name: (lambda name=name: ran.append(name)) for name in "ab"}
    seconds = interleaved(actions, 3, warm=warm)
    assert ran == ([] if warm else ["a", "b"]) + ["a", "b", "b", "a", "a", "b"]
    assert [len(taken) for taken in seconds.values()] == [3, 3]


def test_nothing_is_timed_by_the_step_unless_asked(place: Path) -> None:
    found = run(place)
    assert "steps" not in found
    assert [row["name"] for row in found["variants"][-3:]] == ["progressive-2", "searched-1", "calibrated-2"]
    with pytest.raises(ConfigError, match=r"measure\.step_batches"):
        parse(MeasureConfig, {"step_batches": [0]}, "measure")


def test_what_was_searched_for_is_timed_where_it_is_given(place: Path) -> None:
    """As its students are, whose network is the same; and not where it is the teacher."""
    before = [row["name"] for row in run(place)["variants"]]
    given = {"architecture": place / "architecture", "architecture_schedules": place / "its_schedules"}
    found = run(place, given, step_batches=(1,))
    added = ["architecture-50", "architecture_calibrated-2"]
    assert [row["name"] for row in found["variants"]] == [*before, *added]
    steps = {(tuple(row["families"]), row["solver"]) for row in found["steps"]}
    narrow = ("architecture", "architecture_calibrated", "searched")
    assert {solver for families, solver in steps if families == narrow} == {"ddim", "ipndm"}
    assert {families for families, _ in steps} == {narrow, ("calibrated", "progressive", "teacher")}
    same = run(place, {**given, "architecture": place / "teacher"})
    assert [row["name"] for row in same["variants"]] == before
