"""The whole graph on images without classes that come in blocks: every task passes, and resampling is by block."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from ado_tasks.__main__ import main
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.errors import ConfigError
from ado_tasks.evaluation.quality import Reference, Yardstick, base_of, score
from ado_tasks.features import FeaturesConfig, features, load_features, rotate
from ado_tasks.metrics.kernel import kid
from ado_tasks.metrics.noninferiority import kid_difference
from ado_tasks.prepare import PrepareConfig, prepare
from ado_tasks.sampling import draw
from ado_tasks.storage import load_arrays

# 234 blocks of four patches. The teacher is just good enough that one step loses something: else there is no margin.
PARAMS = """\
seed: 3
prepare: {name: patches, source: patches, height: 8, width: 8, block: 40, stride: 32, train: 0.4, selection: 0.3,
          report: 0.3}
features: {dimensions: 8, filters: 4, steps: 20, batch: 16, unlabelled: rotation}
train:
  model: {block_out_channels: [8], down_block_types: [DownBlock2D], up_block_types: [UpBlock2D], layers_per_block: 1,
          norm_num_groups: 4}
  steps: 150
  batch_size: 32
  warmup_steps: 10
  learning_rate: 1.0e-2
  ema_decay: 0.95
anchor: {n_generated: 100, steps: 20, coarse_steps: 1, batch_size: 50}
distill:
  progressive: {teacher_steps: 2, student_steps: [1], stage_steps: 5, batch_size: 16}
calibrate:
  teacher: {nfe: [2], samples: 8, validation_samples: 8, points: 12, max_solves: 3}
evaluate: {n_generated: 150, n_paired: 30, draws: 50, batch_size: 50, shards: 1}
"""
STAGES = """\
prepare --out data
features --dataset data --out features
train --dataset data --out models/teacher
anchor --dataset data --features features --teacher models/teacher --out anchor
distill --section distill.progressive --teacher models/teacher --dataset data --out models/progressive
calibrate --section calibrate.teacher --model models/teacher --dataset data --out schedules/teacher
evaluate --dataset data --features features --anchor anchor --teacher models/teacher --students models/progressive
 --schedules schedules/teacher --out reports""".replace("\n ", " ")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blocks")
    (folder / "params.yaml").write_text(PARAMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in STAGES.splitlines():
            assert main(stage.split()) == 0, stage
    return folder


def test_every_task_passes_and_no_class_is_judged(place):
    assert yaml.safe_load((place / "features/config.json").read_text())["feature_net"]["task"] == "rotation"
    report = json.loads((place / "reports/evaluate.json").read_text())
    assert report["reference"]["judge_sha256"] is None
    assert {entry["class_accuracy"] for entry in report["variants"]} == {None}
    # 280 patches of 70 blocks: halves that share no block hold (280 - 3) // 2.
    assert (report["reference"]["n_real"], report["reference"]["floor_fd"]["n"]) == (280, 138)


def test_the_margin_is_of_pairs_of_different_blocks(place):
    frozen = json.loads((place / "anchor/anchor.json").read_text())
    part, extractor = open_dataset(place / "data").split("selection"), load_features(place / "features")
    real = extractor.whitened(extractor.features(part.batch(slice(None))))
    teacher = np.array(load_arrays(place / "anchor/teacher.safetensors")["features"])
    assert frozen["kid_teacher"] == pytest.approx(kid(teacher, real, groups=part.index["block"].to_numpy()), rel=1e-9)
    assert frozen["kid_teacher"] != pytest.approx(kid(teacher, real), rel=1e-3)


def test_the_choice_and_the_report_resample_blocks(place):
    data, extractor = open_dataset(place / "data"), load_features(place / "features")
    start = draw(3, "report", 200, data.split("report"))
    yardstick = Yardstick(Reference.of(data, extractor), extractor, None, 1.0, 50, 0)
    better, worse = (np.clip(start.noise / by, -1, 1).astype(np.float32) for by in (3, 1))
    found = score(yardstick, better, start, base_of(yardstick, worse, better[:30]))
    block = data.split("report").index["block"].to_numpy()
    near, far = (extractor.whitened(extractor.features(images)) for images in (better, worse))
    by_block = kid_difference(near, far, yardstick._white_report, groups=block)
    assert found.kid_minus_teacher["ci"] == pytest.approx([by_block.low, by_block.high], rel=1e-9)
    by_image = kid_difference(near, far, yardstick._white_report)
    assert found.kid_minus_teacher["ci"] != pytest.approx([by_image.low, by_image.high], rel=1e-3)
    assert found.kid == pytest.approx(kid(near, yardstick._white_report, groups=block), rel=1e-9)


def test_quarter_turns():
    images = np.arange(4 * 3 * 3).reshape(4, 3, 3, 1)
    turned = rotate(images, np.arange(4))
    np.testing.assert_array_equal(turned[0], images[0])
    np.testing.assert_array_equal(
        turned[1, :, :, 0], [[11, 14, 17], [10, 13, 16], [9, 12, 15]]
    )  # the right edge on top
    np.testing.assert_array_equal(turned[2], images[2, ::-1, ::-1])
    np.testing.assert_array_equal(rotate(turned, (4 - np.arange(4)) % 4), images)


def test_quarter_turns_are_learned_where_there_is_an_up(tmp_path):
    """Bright above dark: a network tells the turns of held-out images, mirrored copies or not."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(220, 30, 8)[:, None] + rng.normal(scale=20, size=(240, 8, 8))
    np.savez(tmp_path / "x.npz", images=np.clip(ramp, 0, 255).astype(np.uint8))
    config = PrepareConfig(source="npz", labelled=False)
    prepare(config, out=tmp_path / "d", seed=0, source_path=tmp_path / "x.npz")
    short = FeaturesConfig(dimensions=8, filters=4, steps=60, batch=16, learning_rate=1e-2, unlabelled="rotation")
    result = features(short, dataset=tmp_path / "d", out=tmp_path / "f", seed=0)
    assert (result.task, result.judge_accuracy) == ("rotation", None)
    assert result.feature_accuracy > 0.9


def test_images_that_are_not_square_are_not_rotated(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.random.default_rng(0).integers(0, 256, (40, 8, 9)).astype(np.uint8))
    prepare(PrepareConfig(source="npz", labelled=False), out=tmp_path / "d", seed=0, source_path=tmp_path / "x.npz")
    with pytest.raises(ConfigError, match=r"features\.unlabelled: 'rotation' is not allowed for images of 8x9"):
        features(FeaturesConfig(unlabelled="rotation"), dataset=tmp_path / "d", out=tmp_path / "f", seed=0)
    assert not (tmp_path / "f").exists()
