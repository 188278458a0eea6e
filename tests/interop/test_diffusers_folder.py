"""Diffusers folders: what is written can be read, always in the same bytes; what is damaged is refused by name."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ado_tasks.backend import mx
from ado_tasks.errors import ArtifactError, ConfigError, StorageError
from ado_tasks.interop.diffusers_folder import extended, read_model, read_unet, write_model
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.weights import flat_parameters
from ado_tasks.storage import atomic_folder, load_arrays, save_arrays

CONFIG = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "num_class_embeds": 3,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "timestep_spacing": "trailing",
}
RECORD = {"history": [{"task": "train", "seed": 3}], "revision": "abc"}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FILES = ["ado.json", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS]


def _unet(**changes) -> UNet2D:
    unet = UNet2D(UNet2DConfig.from_dict({**CONFIG, **changes}))
    initialise(unet, mx.random.key(0))
    return unet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", _unet(), SCHEDULER, RECORD)
    return tmp_path / "model"


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_is_written_is_read(folder):
    assert sorted(_files(folder)) == sorted(FILES)
    stored = read_model(folder)
    assert stored.record == RECORD
    assert {key: stored.scheduler_config[key] for key in SCHEDULER} == SCHEDULER
    assert stored.unet.config == UNet2DConfig.from_dict(CONFIG)
    written = flat_parameters(_unet())
    for name, value in flat_parameters(stored.unet).items():
        np.testing.assert_array_equal(value, written[name])


def test_a_model_that_is_read_and_written_again_has_the_same_bytes(folder, tmp_path):
    stored = read_model(folder)
    write_model(tmp_path / "again", stored.unet, stored.scheduler_config, stored.record)
    assert _files(tmp_path / "again") == _files(folder)


def test_another_process_writes_the_same_bytes(folder, tmp_path):
    """Hash seeds, insertion orders and clocks differ between processes."""
    program = (
        "import sys; sys.path[:0] = ['tests/interop']\n"
        "from pathlib import Path\n"
        "from test_diffusers_folder import _unet, SCHEDULER, RECORD, write_model\n"
        f"write_model(Path({str(tmp_path / 'other')!r}), _unet(), SCHEDULER, RECORD)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONHASHSEED": "77"})
    assert _files(tmp_path / "other") == _files(folder)


def test_a_former_model_is_replaced_as_a_whole(folder):
    (folder / "unet" / "leftover.txt").write_text("old")
    write_model(folder, _unet(), SCHEDULER, {})
    assert sorted(_files(folder)) == sorted(FILES)
    assert read_model(folder).record == {}


def test_inside_an_atomic_folder_it_writes_in_place(tmp_path):
    """A second temporary folder beside the task's own would outlive a killed run: nobody would know its name."""
    with atomic_folder(tmp_path / "out") as partial:
        before = partial.stat().st_ino
        write_model(partial, _unet(), SCHEDULER, RECORD)
        assert partial.stat().st_ino == before
        (partial / "curves.json").write_text("{}")
    assert sorted(_files(tmp_path / "out")) == sorted([*FILES, "curves.json"])
    assert read_model(tmp_path / "out").record == RECORD  # files that others add are not the model's


def test_a_failed_write_leaves_the_former_model(folder, monkeypatch):
    before = _files(folder)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "no space", str(folder))

    monkeypatch.setattr("ado_tasks.interop.diffusers_folder.save_arrays", full)
    with pytest.raises(StorageError, match="the disk is full"):
        write_model(folder, _unet(), SCHEDULER, {})
    assert _files(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_scheduler_decides_the_pipeline(folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "DDIMPipeline"
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"] and index["unet"] == ["diffusers", "UNet2DModel"]
    write_model(tmp_path / "edm", _unet(), {"_class_name": "EDMEulerScheduler"}, {})
    index = json.loads((tmp_path / "edm" / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"  # DDIMPipeline would put a DDIMScheduler in its place
    assert index["scheduler"] == ["diffusers", "EDMEulerScheduler"]


def test_events_are_appended_and_the_record_is_left_alone():
    record = extended(RECORD, {"task": "distill", "steps": 4})
    assert record["history"] == [{"task": "train", "seed": 3}, {"task": "distill", "steps": 4}]
    assert record["revision"] == "abc" and len(RECORD["history"]) == 1
    assert extended({}, {"task": "train"}) == {"history": [{"task": "train"}]}


def test_a_scheduler_without_a_class_and_a_taken_key_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"scheduler_config\._class_name: None; allowed: a scheduler such as"):
        write_model(tmp_path / "m", _unet(), {}, {})
    with pytest.raises(ConfigError, match=r"record\.sha256: the key is taken"):
        write_model(tmp_path / "m", _unet(), SCHEDULER, {"sha256": {}})
    assert not (tmp_path / "m").exists()


class TestDamage:
    @pytest.mark.parametrize("name", FILES[1:])
    def test_one_changed_byte_is_refused_with_both_sums(self, folder, name):
        content = bytearray((folder / name).read_bytes())
        content[-2] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(ArtifactError, match=rf"{name}: SHA-256 [0-9a-f]{{64}}, expected [0-9a-f]{{64}}"):
            read_model(folder)

    @pytest.mark.parametrize("name", FILES[1:])
    def test_a_missing_file_is_named(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(ArtifactError, match=name):
            read_model(folder)

    @pytest.mark.parametrize("size", [0, 4, 1000, -1])
    def test_truncated_weights_are_refused_even_without_checksums(self, folder, size):
        (folder / "ado.json").unlink()
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[:size])
        with pytest.raises(ArtifactError, match=WEIGHTS):
            read_model(folder)

    def test_a_record_without_checksums_is_refused(self, folder):
        (folder / "ado.json").write_text("{}")
        with pytest.raises(ArtifactError, match=r"ado\.json: has no checksums"):
            read_model(folder)

    def test_a_record_that_is_not_json_is_refused(self, folder):
        (folder / "ado.json").write_text('{"sha256": {')
        with pytest.raises(ArtifactError, match=r"ado\.json: not valid JSON"):
            read_model(folder)

    def test_a_record_that_names_a_file_elsewhere_is_refused(self, folder):
        for name in ("../secret", "/etc/hostname"):
            (folder / "ado.json").write_text(json.dumps({"sha256": {name: "0"}}))
            with pytest.raises(ArtifactError, match="leads out of the folder"):
                read_model(folder)


class TestFoldersOfOthers:
    """Without ado.json there are no checksums: the parts are checked against one another."""

    @pytest.fixture
    def foreign(self, folder: Path) -> Path:
        (folder / "ado.json").unlink()
        return folder

    def test_no_record(self, foreign):
        assert read_model(foreign).record == {}

    def test_another_network(self, foreign):
        index = json.loads((foreign / "model_index.json").read_text())
        (foreign / "model_index.json").write_text(json.dumps({**index, "unet": ["diffusers", "UNet2DConditionModel"]}))
        with pytest.raises(ArtifactError, match=r"model_index\.json: the unet is .*UNet2DConditionModel.*UNet2DModel"):
            read_model(foreign)

    def test_a_configuration_that_is_not_possible(self, foreign):
        config = json.loads((foreign / "unet/config.json").read_text())
        (foreign / "unet/config.json").write_text(json.dumps({**config, "norm_num_groups": 3}))
        with pytest.raises(ConfigError, match=r"unet/config\.json\.norm_num_groups: 3"):
            read_model(foreign)

    def test_weights_of_another_configuration(self, foreign):
        config = json.loads((foreign / "unet/config.json").read_text())
        (foreign / "unet/config.json").write_text(json.dumps({**config, "num_class_embeds": 4}))
        with pytest.raises(ArtifactError, match=r"class_embedding\.weight: shape \(3, 32\), expected \(4, 32\)"):
            read_model(foreign)

    def test_a_scheduler_without_a_class(self, foreign):
        (foreign / "scheduler/scheduler_config.json").write_text("{}")
        with pytest.raises(ArtifactError, match=r"scheduler_config\.json: names no scheduler class"):
            read_model(foreign)

    def test_half_precision(self, foreign):
        exact = load_arrays(foreign / WEIGHTS)
        (foreign / WEIGHTS).unlink()
        halves = {name: value.astype(mx.float16) for name, value in exact.items()}
        save_arrays(foreign / "unet/diffusion_pytorch_model.fp16.safetensors", halves)
        weights = flat_parameters(read_model(foreign).unet)
        assert {value.dtype for value in weights.values()} == {mx.float32}
        np.testing.assert_array_equal(weights["conv_in.bias"], halves["conv_in.bias"])

    def _shard(self, foreign: Path) -> dict:
        tensors = load_arrays(foreign / WEIGHTS)
        (foreign / WEIGHTS).unlink()
        names = sorted(tensors)
        parts = {"one.safetensors": names[:40], "two.safetensors": names[40:]}
        for part, members in parts.items():
            save_arrays(foreign / "unet" / part, {name: tensors[name] for name in members})
        places = {name: part for part, members in parts.items() for name in members}
        self._index(foreign, places)
        return places

    def _index(self, foreign: Path, places: object) -> None:
        path = foreign / "unet" / "diffusion_pytorch_model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": places}))

    def test_weights_in_several_files(self, foreign):
        expected = flat_parameters(read_model(foreign).unet)
        self._shard(foreign)
        for name, value in flat_parameters(read_model(foreign).unet).items():
            np.testing.assert_array_equal(value, expected[name])

    def test_several_files_of_which_one_is_missing(self, foreign):
        self._shard(foreign)
        (foreign / "unet/two.safetensors").unlink()
        with pytest.raises(ArtifactError, match=r"unet/two\.safetensors"):
            read_model(foreign)

    def test_an_index_that_is_wrong_or_climbs(self, foreign):
        places = self._shard(foreign)
        self._index(foreign, {**places, "conv_in.weight": "two.safetensors", "ghost": "one.safetensors"})
        with pytest.raises(ArtifactError, match=r"ghost is not in one\.safetensors"):
            read_model(foreign)
        self._index(foreign, {**places, "conv_in.weight": "../../elsewhere.safetensors"})
        with pytest.raises(ArtifactError, match="leads out of the folder"):
            read_model(foreign)
        self._index(foreign, None)
        with pytest.raises(ArtifactError, match="has no weight_map"):
            read_model(foreign)

    def test_pickled_weights_are_never_opened(self, foreign):
        (foreign / WEIGHTS).unlink()
        with pytest.raises(ArtifactError, match="the folder has no weights"):
            read_model(foreign)
        (foreign / "unet/diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
        with pytest.raises(
            ArtifactError, match=r"model\.bin: pickled weights are never opened.*safe_serialization=True"
        ):
            read_model(foreign)

    def test_links_into_a_cache_are_followed(self, foreign, tmp_path):
        (tmp_path / "blob").write_bytes((foreign / WEIGHTS).read_bytes())
        (foreign / WEIGHTS).unlink()
        (foreign / WEIGHTS).symlink_to(tmp_path / "blob")
        assert flat_parameters(read_model(foreign).unet)

    def test_a_network_alone(self, foreign):
        assert read_unet(foreign / "unet").config == UNet2DConfig.from_dict(CONFIG)
        (foreign / "unet/config.json").write_text("[]")
        with pytest.raises(ArtifactError, match=r"config\.json: expected a mapping"):
            read_unet(foreign / "unet")
