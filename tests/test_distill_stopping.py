"""A chain of students that ends itself: at the right one, with the right figures, and the same after every kill."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ado_tasks.anchor import AnchorConfig, anchor
from ado_tasks.config import parse
from ado_tasks.datasets.shards import Dataset, open_dataset
from ado_tasks.diffusion import grids
from ado_tasks.distill import distill
from ado_tasks.distillation.stopping import Stopping
from ado_tasks.errors import ArtifactError, ConfigError
from ado_tasks.features import FeaturesConfig, features
from ado_tasks.interop.diffusers_folder import read_model
from ado_tasks.metrics.noninferiority import kid_difference
from ado_tasks.models.classifier import load_features
from ado_tasks.optimise.distill_config import DistillConfig
from ado_tasks.prepare import PrepareConfig, prepare
from ado_tasks.sampling import Sampler, draw
from ado_tasks.storage import load_arrays, read_json, sha256_tree, write_json
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
CONFIG = DistillConfig(
    teacher_steps=8, student_steps=(4, 2, 1), stage_steps=24, batch_size=16, checkpoint_every=10, learning_rate=3e-3
)
SELF_ENDING = replace(CONFIG, stop="inferior")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, its features, a teacher, its anchor, and the whole chain of three students."""
    folder = tmp_path_factory.mktemp("stopping")
    prepare(PrepareConfig(source="digits"), out=folder / "data", seed=0)
    features(FeaturesConfig(steps=20), dataset=folder / "data", out=folder / "features", seed=0)
    config = TrainConfig(model=MODEL, steps=150, batch_size=32, learning_rate=5e-3, warmup_steps=10, ema_decay=0.99)
    train(config, dataset=folder / "data", out=folder / "teacher", scratch=folder / "scratch", seed=0)
    anchor(
        AnchorConfig(n_generated=200, steps=12, coarse_steps=1, batch_size=100), dataset=folder / "data",
        features=folder / "features", teacher=folder / "teacher", out=folder / "anchor", seed=0,
    )  # fmt: skip
    made(place=folder, out=folder / "whole", config=CONFIG)
    return folder


def made(place: Path, out: Path, config: DistillConfig, anchor: Path | None = None, seed: int = 0, **given: Any) -> Any:
    paths = {"features": place / "features", "anchor": anchor or place / "anchor"} if config.stop != "never" else {}
    return distill(
        config, teacher=place / "teacher", dataset=place / "data", out=out, scratch=out.parent / f"{out.name}.scratch",
        seed=seed, **{**paths, **given},
    )  # fmt: skip


def with_margin(place: Path, folder: Path, margin: float) -> Path:
    """The same anchor with another margin."""
    shutil.copytree(place / "anchor", folder)
    write_json(folder / "anchor.json", {**read_json(folder / "anchor.json"), "margin": margin})
    return folder


@pytest.fixture(scope="module")
def upper_ends(place: Path) -> list[float]:
    """Of each student of the whole chain, worked out from its folder alone."""
    data, extractor = open_dataset(place / "data"), load_features(place / "features")
    part = data.split("selection")
    start = draw(0, "selection", 200, part)
    real = extractor.whitened(extractor.features(part.batch(np.arange(len(part)))))
    teacher = np.array(load_arrays(place / "anchor" / "teacher.safetensors")["features"])
    ends = []
    for steps in CONFIG.student_steps:
        images = Sampler(read_model(place / "whole" / str(steps)), 100)(start, "ddim", grids.uniform_time(steps))
        ends.append(kid_difference(extractor.whitened(extractor.features(images)), teacher, real).high)
    return ends


@pytest.mark.parametrize("passing", [0, 2, 3])
def test_it_ends_with_the_first_student_that_is_not_as_good(
    place: Path, upper_ends: list[float], tmp_path: Path, passing: int
) -> None:
    # A margin under which exactly the first `passing` students stay (the ends of such short chains rise).
    assert 0 < upper_ends[0] < upper_ends[1] < upper_ends[2]
    bounds = [0.0, *upper_ends, 2 * upper_ends[-1]]
    margin = (bounds[passing] + bounds[passing + 1]) / 2
    out = tmp_path / "chain"
    result = made(place, out, SELF_ENDING, with_margin(place, tmp_path / "anchor", margin))
    there = CONFIG.student_steps[: passing + 1]
    assert [variant.nfe for variant in student_variants(out)] == list(there) == list(result.students)
    index = read_json(out / "index.json")
    assert index["students"] == list(there) and index["not_made"] == list(CONFIG.student_steps[passing + 1 :])
    assert index["steps"] == (CONFIG.student_steps[passing - 1] if passing else None)
    assert index["failed"] == (None if passing == 3 else there[-1])
    assert [found["non_inferior"] for found in index["kid_minus_teacher"]] == [True] * passing + [False] * (passing < 3)
    np.testing.assert_allclose(
        [found["ci"][1] for found in index["kid_minus_teacher"]], upper_ends[: passing + 1], rtol=1e-9
    )
    for steps in there:  # the very students of a chain that does not end itself
        assert sha256_tree(out / str(steps) / "unet") == sha256_tree(place / "whole" / str(steps) / "unet")
    assert not list((tmp_path / "chain.scratch").rglob("*.safetensors"))


def test_a_kill_between_stages_changes_nothing(
    place: Path, upper_ends: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    margin, config = with_margin(place, tmp_path / "anchor", upper_ends[2]), replace(SELF_ENDING, student_steps=(4, 2))
    made(place, tmp_path / "unbroken", config, margin)
    judged, whole = [], Stopping.goes_on

    def killed(self: Stopping, stored: Any, student: Any, times: np.ndarray, report: Any) -> bool:
        judged.append(len(times) - 1)
        if len(judged) in {1, 3}:  # before the first verdict, and in the next run before the second
            raise KeyboardInterrupt
        return whole(self, stored, student, times, report)

    with monkeypatch.context() as patch:
        patch.setattr(Stopping, "goes_on", killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                made(place, tmp_path / "broken", config, margin)
    assert judged == [4, 4, 2] and list((tmp_path / "broken.scratch").rglob("*.safetensors"))
    made(place, tmp_path / "broken", config, margin)
    assert sha256_tree(tmp_path / "broken") == sha256_tree(tmp_path / "unbroken")


def test_nothing_is_asked_of_the_report_part(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, split = set(), Dataset.split
    monkeypatch.setattr(Dataset, "split", lambda self, name: asked.add(name) or split(self, name))
    made(place, tmp_path / "chain", replace(SELF_ENDING, student_steps=(4,)))
    assert asked == {"train", "selection"}


def test_a_chain_that_does_not_end_itself_says_nothing_of_it(place: Path) -> None:
    assert not (place / "whole" / "index.json").exists()
    assert "stop" not in read_json(place / "whole" / "4" / "ado.json")["history"][-1]["config"]


def test_what_it_needs_is_named(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stop: inferior needs --features --anchor"):
        distill(
            SELF_ENDING, teacher=place / "teacher", dataset=place / "data", out=tmp_path / "out",
            scratch=tmp_path / "scratch", seed=0,
        )  # fmt: skip
    with pytest.raises(ArtifactError, match=r"seed 0, here 1.*run `anchor` again"):
        made(place, tmp_path / "out", SELF_ENDING, seed=1)
    with pytest.raises(ConfigError, match=r"distill\.progressive\.stop: 'always'"):
        parse(DistillConfig, {"stop": "always"}, "distill.progressive")


def test_a_folder_that_is_not_its_index_is_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "whole", tmp_path / "whole")
    said = {"students": [4, 2], "steps": 2, "failed": None, "reason": "", "margin": 0.1}
    (tmp_path / "whole" / "index.json").write_text(json.dumps(said))
    with pytest.raises(ArtifactError, match=r"students of \[4, 2, 1\] steps, its index.json says \[4, 2\]"):
        student_variants(tmp_path / "whole")
