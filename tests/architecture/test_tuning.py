"""What a candidate learns: nothing where it is its teacher, less distance where it is not, the same when resumed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ado_tasks import rng
from ado_tasks.architecture.importance import Importance, measure_importance
from ado_tasks.architecture.inherit import Inherited, inherit
from ado_tasks.architecture.tuning import (
    Lesson,
    TuneConfig,
    denoising_loss,
    feature_streams,
    gradient_batches,
    tune,
)
from ado_tasks.backend import mlx_utils, mx
from ado_tasks.diffusion.schedules import Cosine
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.weights import flat_parameters
from ado_tasks.optimise.checkpoints import Checkpoints
from ado_tasks.report import SILENT

CONFIG = TuneConfig(batch_size=8, learning_rate=5e-3, shards=1, checkpoint_every=4, validation_images=32)


class Images:
    """A part of a dataset: smooth patterns of two classes."""

    shape, num_classes = (4, 4, 1), 2
    labels = np.arange(64) % 2

    def __len__(self) -> int:
        return 64

    def batch(self, rows: Any) -> np.ndarray:
        wave = np.cos(np.arange(16).reshape(4, 4, 1) * (1 + self.labels[rows])[:, None, None, None])
        return wave.astype(np.float32)


PART: Any = Images()


def teacher() -> UNet2D:
    network = UNet2DConfig(
        sample_size=4, in_channels=1, out_channels=1, block_out_channels=(4, 8), num_class_embeds=2,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1, norm_num_groups=2, attention_head_dim=4, time_embedding_dim=8,
    )  # fmt: skip
    unet = UNet2D(network)
    initialise(unet, rng.key(0, "tuning"))
    return unet


def lesson(unet: UNet2D, kept: Any, config: TuneConfig = CONFIG) -> Lesson:
    return Lesson(config, unet, kept, Cosine(), "v_prediction", 0)


def importance(unet: UNet2D) -> Importance:
    about = lesson(unet, {})
    return measure_importance(unet, denoising_loss(about), gradient_batches(about, PART, 2, 4))


@pytest.fixture(scope="module")
def narrow() -> tuple[UNet2D, Inherited]:
    unet = teacher()
    return unet, inherit(unet, replace(unet.config, block_out_channels=(2, 4)), importance(unet))


def copy_of(unet: UNet2D) -> UNet2D:
    made = UNet2D(unet.config)
    made.update(mlx_utils.tree_unflatten(list(flat_parameters(unet).items())))
    return made


def test_the_teacher_has_nothing_to_learn_from_itself() -> None:
    unet = teacher()
    whole = inherit(unet, unet.config, importance(unet))
    about = lesson(unet, whole.kept)
    batch = about.batch(PART, about.targets(), 0)
    value, gradient = mx.value_and_grad(about.loss(whole.unet))(whole.unet.parameters(), batch)
    assert float(np.array(value)) < 1e-10
    assert max(float(np.abs(np.array(g)).max()) for _, g in mlx_utils.tree_flatten(gradient)) < 1e-5
    assert about.quality_loss(whole.unet, PART) == 0


def test_features_are_compared_at_the_channels_that_were_kept(narrow: tuple[UNet2D, Inherited]) -> None:
    unet, small = narrow
    about = lesson(unet, small.kept)
    batch = about.batch(PART, about.targets(), 3)
    leaving: list[mx.array] = []
    told = mx.array(Cosine().timestep(np.array(batch["t"])).astype(np.float32))
    unet(batch["z"], told, batch["labels"], leaving=leaving)
    assert feature_streams(unet) == ["down.0", "down.1", "up.1", "up.0"]
    for number, (stream, whole) in enumerate(zip(feature_streams(unet), leaving, strict=True)):
        wanted = np.array(whole)[..., small.kept[stream]]
        assert np.allclose(np.array(batch[f"features.{number}"]), wanted, atol=1e-4)
    mine = about.run(small.unet, batch["z"], batch["t"], batch["labels"])[1]
    assert [each.shape[-1] for each in mine] == [2, 4, 4, 2]


def test_the_loss_is_the_weighted_distance_by_hand(narrow: tuple[UNet2D, Inherited]) -> None:
    unet, small = narrow
    about = lesson(unet, small.kept)
    batch = about.batch(PART, about.targets(), 0)
    x_hat, features = about.run(small.unet, batch["z"], batch["t"], batch["labels"])
    apart = (np.array(x_hat) - np.array(batch["target"])) ** 2
    output = (np.array(batch["weight"]) * apart.reshape(len(apart), -1).mean(axis=1)).mean()
    of_blocks = []
    for number, each in enumerate(features):
        wanted = np.array(batch[f"features.{number}"])
        squares = [np.square(array).reshape(len(wanted), -1).sum(axis=1) for array in (np.array(each) - wanted, wanted)]
        of_blocks.append((squares[0] / squares[1]).mean())
    value = about.loss(small.unet)(small.unet.parameters(), batch)
    assert float(np.array(value)) == pytest.approx(output + CONFIG.feature_weight * np.mean(of_blocks), rel=1e-4)


def tuned(narrow: tuple[UNet2D, Inherited], folder: Path, steps: int, report: Any = SILENT) -> tuple[UNet2D, float]:
    unet, small = narrow
    about, candidate = lesson(unet, small.kept), copy_of(small.unet)
    tune(about, candidate, PART, 0, steps, Checkpoints(folder), report)
    return candidate, about.quality_loss(candidate, PART)


def test_tuning_brings_a_candidate_nearer(narrow: tuple[UNet2D, Inherited], tmp_path: Path) -> None:
    unet, small = narrow
    before = lesson(unet, small.kept).quality_loss(small.unet, PART)
    assert tuned(narrow, tmp_path, 60)[1] < 0.5 * before


class StopsAt:
    """Ends the work at the first report from this step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def progress(self, done: int, total: int, **figures: float) -> None:
        if done >= self.step:
            raise KeyboardInterrupt

    def metric(self, name: str, value: float, step: int | None = None) -> None: ...

    def picture(self, name: str, path: Path) -> None: ...


def test_a_resumed_tuning_ends_with_the_bytes_of_an_unbroken_one(
    narrow: tuple[UNet2D, Inherited], tmp_path: Path
) -> None:
    whole, _ = tuned(narrow, tmp_path / "whole", 12)
    with pytest.raises(KeyboardInterrupt):
        tuned(narrow, tmp_path / "broken", 12, StopsAt(5))
    assert list((tmp_path / "broken").iterdir())
    resumed, _ = tuned(narrow, tmp_path / "broken", 12)
    for name, array in flat_parameters(whole).items():
        assert np.array(array).tobytes() == np.array(flat_parameters(resumed)[name]).tobytes(), name
