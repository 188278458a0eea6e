"""bench/quality.py: verdicts, the sanity row, what is kept, and the two sides against each other on a tiny model."""

import sys
from pathlib import Path

import numpy as np
import pytest

from ado_tasks.backend import mx
from ado_tasks.diffusion import grids
from ado_tasks.diffusion.schedules import Cosine
from ado_tasks.interop.diffusers_folder import write_model
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.sampling import Draw

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import diffusers_schedulers as theirs
import quality
import quality_report

UNET = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1, "norm_num_groups": 4, "num_class_embeds": 10,
}  # fmt: skip


def row(name, side, nfe, features, validated=None):
    return {
        "name": name, "side": side, "family": name.partition("@")[0], "nfe": nfe, "paired_features": features,
        "validated": validated,
    }  # fmt: skip


def test_ours_is_chosen_in_validation_and_theirs_is_the_best_at_no_more_evaluations():
    rows = [
        row("calibrated ipndm@5", "ours", 5, 1.0, validated=0.3),  # the nearest here, yet not the one validated
        row("calibrated dpmpp_2m@5", "ours", 5, 1.5, validated=0.2),
        row("calibrated dpmpp_2m@4", "ours", 4, 0.1, validated=0.1),
        row("teacher ddim@5", "ours", 5, 0.2),
        row("DDIM@5", "diffusers", 5, 4.0),
        row("Heun@3", "diffusers", 3, 2.0),
        row("UniPC@6", "diffusers", 6, 0.5),
        row("DPM++ 2M@5", "diffusers", 5, None),  # not finite
        row("LCM, consistency@5", "diffusers", 5, 0.1),  # of another model
    ]
    [found] = quality.verdicts(rows, {5: 0.7})
    assert (found["ours"], found["best"]) == ("calibrated dpmpp_2m@5", "Heun@3")
    assert found["ratio"] == 0.75
    assert found["met"] is False
    assert "MISSED" in quality_report.verdict_line(found)
    [found] = quality.verdicts(rows, {5: 0.75})
    assert found["met"] is True
    [found] = quality.verdicts(rows, {10: 0.9})
    assert found["met"] is None
    assert "no verdict" in quality_report.verdict_line(found)


def test_pictures_are_compared_clipped_and_only_where_the_grids_are_one():
    ours = np.zeros((2, 2, 2, 1))
    images = {"teacher ddim@4": ours + 1.5, "DDIM@4": ours + 1.2, "teacher ddim@6": ours, "DDIM@6": ours + 0.5}
    images |= {"teacher ddim@5": ours, "DDIM@5": ours + 0.002}
    found = quality.same_pictures(images, [4, 5, 6, 8], 1000)
    assert [(one["nfe"], one["same"]) for one in found] == [(4, True), (5, False)]
    assert found[1]["difference"] == pytest.approx(0.002)


def test_samples_are_made_once_for_what_they_depend_on(tmp_path):
    made = []

    def make():
        made.append(1)
        return np.full((2, 1), len(made), np.float32)

    first = quality.kept(tmp_path, ["a", 1], make)
    assert quality.kept(tmp_path, ["a", 1], make).tolist() == first.tolist()
    assert quality.kept(tmp_path, ["a", 2], make).tolist() != first.tolist()
    assert len(made) == 2


def test_the_picture_has_a_row_without_figures_left_out(tmp_path):
    rows = [row("DDIM@4", "diffusers", 4, 0.1) | {"ms": 1.0}, row("DDIM@5", "diffusers", 5, None) | {"ms": 2.0}]
    quality_report.save_picture(tmp_path / "picture.png", rows)
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_quick_is_small_and_help_says_what_is_measured(capsys):
    assert quality.parse_arguments(["--quick"]).n == 256
    with pytest.raises(SystemExit):
        quality.parse_arguments(["--help"])
    assert "--fine-steps" in capsys.readouterr().out


def test_a_workspace_without_models_is_named(tmp_path, capsys):
    pytest.importorskip("diffusers")
    (tmp_path / "params.yaml").write_text("dataset: digits\n")
    assert quality.main(["--workspace", str(tmp_path), "--out", str(tmp_path / "out.json")]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("root") / "models" / "teacher"
    unet = UNet2D(UNet2DConfig.from_dict(UNET))
    initialise(unet, mx.random.key(3))
    write_model(out, unet, Cosine().to_diffusers("v_prediction"), {"history": []})
    return out


def test_few_images_are_not_padded_to_a_large_batch(folder):
    samplers = quality.Samplers(batch=256, shards=1)
    assert samplers.ours(folder, 64).batch_size == 64
    assert samplers.ours(folder, 1000).batch_size == 256
    assert samplers.ours(folder, 64) is samplers.ours(folder, 64)


@pytest.fixture
def start():
    noise = np.random.default_rng(0).standard_normal((5, 8, 8, 1)).astype(np.float32)
    return Draw(noise, np.arange(5, dtype=np.int32))


@pytest.mark.filterwarnings("ignore")
def test_ddim_makes_the_same_picture_on_both_sides(folder, start):
    pytest.importorskip("diffusers")
    samplers = quality.Samplers(batch=4, shards=1)
    images, evaluations = samplers.theirs(folder).sample(theirs.SCHEDULERS["DDIM"], 4, start)
    assert evaluations == 4
    ours = samplers.ours(folder, 5)(start, "ddim", grids.uniform_time(4))
    np.testing.assert_allclose(images, ours, atol=quality.SAME_PICTURE)
    other = Draw(start.noise, start.labels[::-1].copy())
    assert np.abs(samplers.theirs(folder).sample(theirs.SCHEDULERS["DDIM"], 4, other)[0] - ours).max() > 0.01


@pytest.mark.filterwarnings("ignore")
def test_every_scheduler_keeps_within_its_evaluations_and_what_fails_is_told(folder, start):
    pytest.importorskip("diffusers")
    rows, failed = quality.their_rows(folder.parents[1], [5, 6], quality.Samplers(4, 1), start.first(1))
    assert {row.family for row in rows} >= {"DDIM", "DPM++ 2M", "UniPC", "Heun"}
    assert {(row.family, row.nfe) for row in rows if row.family in {"DDIM", "Heun"}} == {
        ("DDIM", 5), ("DDIM", 6), ("Heun", 5),
    }  # fmt: skip
    assert len({row.name for row in rows}) == len(rows)
    assert all(row.nfe <= 6 for row in rows)
    assert all(one["why"] for one in failed)


@pytest.mark.filterwarnings("ignore")
def test_lcm_runs_with_noise_of_its_own_that_is_the_same_each_time(folder, start):
    pytest.importorskip("diffusers")
    model = quality.Samplers(4, 1).theirs(folder)
    (one, evaluations), (again, _) = (model.sample(theirs.LCM, 2, start) for _ in range(2))
    assert evaluations == 2
    assert one.tobytes() == again.tobytes()
