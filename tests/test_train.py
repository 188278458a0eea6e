"""The task `train`: what dropout touches and what it leaves alone, and that a network's keys are checked by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ado_tasks.config import parse
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.errors import ConfigError
from ado_tasks.prepare import PrepareConfig, prepare
from ado_tasks.train import TrainConfig, TrainResult, _training_batch, train

TINY = {
    "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare(PrepareConfig(train=200, selection=100, report=100), out=out, seed=0)
    return out


def trained(digits: Path, out: Path, model: dict[str, Any], **keys: Any) -> tuple[TrainResult, dict[str, Any]]:
    """A few steps: the result, and the last point of each curve."""
    values = {"steps": 3, "batch_size": 8, "warmup_steps": 0, "ema_decay": 0.0, **keys, "model": {**TINY, **model}}
    result = train(parse(TrainConfig, values, "train"), dataset=digits, out=out, scratch=out.parent / "scratch", seed=1)
    curves = json.loads((out / "curves.json").read_text())
    return result, {name: points[-1][1] for name, points in curves.items()}


def test_dropout_changes_what_is_learned_and_repeats_itself(digits: Path, tmp_path: Path) -> None:
    sums = [
        trained(digits, tmp_path / f"{number}", {"dropout": dropout})[0].weights_sha256
        for number, dropout in enumerate((0.0, 0.5, 0.5))
    ]
    assert sums[0] != sums[1] == sums[2]


def test_nothing_is_dropped_in_validation(digits: Path, tmp_path: Path) -> None:
    """At a rate that is 0 in float32 the weights stay: all that dropout can change is how a loss is taken."""
    plain, dropped = (
        trained(digits, tmp_path / f"{dropout}", {"dropout": dropout}, learning_rate=1e-46) for dropout in (0.0, 0.9)
    )
    assert plain[0].weights_sha256 == dropped[0].weights_sha256
    assert plain[1]["validation"] == dropped[1]["validation"]
    assert abs(dropped[1]["training"] / plain[1]["training"] - 1) > 1e-3


def test_each_image_of_each_step_has_a_key_of_its_own(digits: Path) -> None:
    """Parts of a batch are computed apart, each with the key of its first image: no two may drop the same."""
    part = open_dataset(digits).split("train")
    keys = [np.array(_training_batch(part, 8, seed, step, 0.5)["dropout"]) for seed, step in ((0, 3), (0, 4), (1, 3))]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 24
    np.testing.assert_array_equal(keys[0], _training_batch(part, 8, 0, 3, 0.5)["dropout"])
    assert "dropout" not in _training_batch(part, 8, 0, 3, 0.0)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"droput": 0.1}, r"^params\.yaml train\.model\.droput: unknown key; allowed here: .*dropout"),
        ({"dropout": 1.5}, r"^params\.yaml train\.model\.dropout: 1\.5 is not allowed: .*less than or equal to 1"),
        ({"norm_num_groups": 3}, r"^params\.yaml train\.model\.norm_num_groups: 3; allowed: a divisor"),
        # The dataset decides these. Fewer classes than it has would be looked up, and written, outside of their table.
        ({"num_class_embeds": 5}, r"train\.model\.num_class_embeds: 5 does not fit the dataset; allowed: 10 or more"),
        ({"num_class_embeds": None}, r"train\.model\.num_class_embeds: None does not fit the dataset"),
        ({"sample_size": 16}, r"train\.model\.sample_size: 16 does not fit the dataset; allowed: \(8, 8\)"),
        ({"in_channels": 3}, r"train\.model\.in_channels: 3 does not fit the dataset; allowed: 1"),
        ({"out_channels": 2}, r"train\.model\.out_channels: 2 does not fit the dataset; allowed: 1"),
    ],
)
def test_a_networks_keys_are_those_of_params(digits: Path, tmp_path: Path, model: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        trained(digits, tmp_path / "out", model)
    assert list(tmp_path.iterdir()) == []


class StopAt:
    """A reporter that stops a run at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def progress(self, done: int, total: int, **figures: float) -> None:
        if done == self.step:
            raise KeyboardInterrupt

    def metric(self, name: str, value: float, step: int | None = None) -> None: ...

    def picture(self, name: str, path: Path) -> None: ...


OBEYED = {"precision": "bfloat16", "checkpointing": True, "accumulate": 3}


def test_a_stopped_run_in_a_half_ends_with_the_bytes_of_an_unbroken_one(digits: Path, tmp_path: Path) -> None:
    values = {"steps": 4, "batch_size": 8, "checkpoint_every": 2, **OBEYED, "model": {**TINY, "dropout": 0.2}}
    config = parse(TrainConfig, values, "train")
    with pytest.raises(KeyboardInterrupt):
        train(config, dataset=digits, out=tmp_path / "a", scratch=tmp_path / "s", seed=1, report=StopAt(2))  # pyright: ignore
    assert list((tmp_path / "s").rglob("*")) and not (tmp_path / "a").exists()
    stopped = train(config, dataset=digits, out=tmp_path / "a", scratch=tmp_path / "s", seed=1)
    unbroken = train(config, dataset=digits, out=tmp_path / "b", scratch=tmp_path / "t", seed=1)
    assert stopped.weights_sha256 == unbroken.weights_sha256


@pytest.mark.parametrize("key", OBEYED)
def test_a_key_is_obeyed_recorded_and_changes_little(key: str, digits: Path, tmp_path: Path) -> None:
    plain = trained(digits, tmp_path / "plain", {}, ema_decay=0.0)
    obeying = trained(digits, tmp_path / key, {}, **{key: OBEYED[key]})
    assert abs(obeying[1]["validation"] / plain[1]["validation"] - 1) < 0.02
    if key != "checkpointing":  # whose gradients are the same to rounding, and may be to the bit
        assert obeying[0].weights_sha256 != plain[0].weights_sha256
    recorded = [
        json.loads((tmp_path / name / "ado.json").read_text())["history"][0]["config"] for name in ("plain", key)
    ]
    assert not set(OBEYED) & set(recorded[0])
    assert {name: value for name, value in recorded[1].items() if name in OBEYED} == {key: OBEYED[key]}
