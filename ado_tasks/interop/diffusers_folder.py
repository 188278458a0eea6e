"""Models as Diffusers folders: what is written here loads there, what was saved there loads here.

- model_index.json: the pipeline and the classes of its parts
- unet/config.json: `UNet2DConfig`
- unet/diffusion_pytorch_model.safetensors: weights, by Diffusers' names
- unet/quantised.safetensors: where its linear layers have few bits, those; the weights above are then their values as
  floats, and Diffusers reads the folder as any other
- scheduler/scheduler_config.json: the noise schedule, in Diffusers' words
- ado.json: what was done to the model, and the SHA-256 of the files above
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ado_tasks.backend import mx
from ado_tasks.errors import ArtifactError, ConfigError
from ado_tasks.models.quantised import bits_of, floating, load_packed, packed
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import CLASS_NAME, UNet2DConfig
from ado_tasks.models.weights import flat_parameters, load_weights, to_diffusers
from ado_tasks.storage import (
    atomic_folder,
    load_arrays,
    load_arrays_and_metadata,
    read_json,
    save_arrays,
    sha256_file,
    write_json,
)  # fmt: skip

DIFFUSERS_VERSION = "0.37.1"  # whose UNet2DModel this is, and against which it is tested
INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER = "scheduler/scheduler_config.json"
RECORD = "ado.json"
QUANTISED, BITS = "quantised.safetensors", "bits"  # the file, and the key of its header
WEIGHTS = "diffusion_pytorch_model"  # Diffusers' WEIGHTS_NAME without its ending
SUMS = "sha256"  # key of ado.json; the rest of that file is the record
NULL_LABEL = "null_label"  # key of the record: the label that stands for no class, where some were dropped in training


@dataclass(frozen=True)
class StoredModel:
    """What a folder holds."""

    unet: UNet2D  # with its weights, in float32; linear layers of few bits where the folder has such
    scheduler_config: dict[str, Any]  # as in scheduler_config.json, `_class_name` included
    record: dict[str, Any]  # what was done to the model; empty for a folder that Diffusers wrote


def write_model(folder: Path, unet: UNet2D, scheduler_config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Write a model as a Diffusers folder, atomically. The same arguments give the same bytes.

    Args:
        folder: becomes the model's folder; a former one is replaced. One that stands empty is filled where it is:
            whoever made it, such as a task inside `atomic_folder`, makes it appear whole.
        unet: the network.
        scheduler_config: Diffusers' scheduler_config.json; `_class_name` names the scheduler's class.
        record: plain values: the ordered history of what was done, seeds, revision. Its key `sha256` is taken.

    Raises:
        ConfigError: the scheduler has no class name, or the record uses the taken key.
        StorageError: the folder cannot be written.
    """
    scheduler = scheduler_config.get("_class_name")
    if not isinstance(scheduler, str):
        raise ConfigError(f"scheduler_config._class_name: {scheduler!r}; allowed: a scheduler such as DDIMScheduler")
    if SUMS in record:
        raise ConfigError(f"record.{SUMS}: the key is taken by the checksums of the folder's files")
    with _place(folder) as partial:
        # DDIMPipeline turns whatever scheduler it is given into a DDIMScheduler; DDPMPipeline keeps it.
        pipeline = "DDIMPipeline" if scheduler == "DDIMScheduler" else "DDPMPipeline"
        index = {"scheduler": ["diffusers", scheduler], "unet": ["diffusers", CLASS_NAME]}
        write_json(partial / INDEX, {"_class_name": pipeline, "_diffusers_version": DIFFUSERS_VERSION, **index})
        config = {"_diffusers_version": DIFFUSERS_VERSION, **unet.config.to_dict()}
        write_json(partial / "unet" / CONFIG, config)
        weights = to_diffusers(flat_parameters(floating(unet)))
        save_arrays(partial / "unet" / f"{WEIGHTS}.safetensors", weights, {"format": "pt"})
        if bits := bits_of(unet):
            save_arrays(partial / "unet" / QUANTISED, packed(unet), {BITS: str(bits)})
        write_json(partial / SCHEDULER, {"_diffusers_version": DIFFUSERS_VERSION, **scheduler_config})
        write_json(partial / RECORD, {**record, SUMS: _sums(partial)})


def read_model(folder: Path) -> StoredModel:
    """Read a model from a Diffusers folder, written here or by Diffusers.

    Raises:
        ArtifactError: a file is missing, truncated, changed since it was written, or not of this kind: names it.
        ConfigError: the network's configuration is one that UNet2DModel cannot have.
    """
    record = _checked_record(folder)
    index = read_json(folder / INDEX)
    part = index.get("unet") if isinstance(index, dict) else None
    if not isinstance(part, list) or part[-1:] != [CLASS_NAME]:
        raise ArtifactError(f"{folder / INDEX}: the unet is {part}; allowed: ['diffusers', '{CLASS_NAME}']")
    scheduler_config = read_json(folder / SCHEDULER)
    if not isinstance(scheduler_config, dict) or "_class_name" not in scheduler_config:
        raise ArtifactError(f"{folder / SCHEDULER}: names no scheduler class (_class_name)")
    return StoredModel(read_unet(folder / "unet"), scheduler_config, record)


def read_unet(folder: Path) -> UNet2D:
    """Read a network from the folder that holds its config.json and its weights. Raises as `read_model`."""
    values = read_json(folder / CONFIG)
    if not isinstance(values, dict):
        raise ArtifactError(f"{folder / CONFIG}: expected a mapping of keys")
    unet = UNet2D(UNet2DConfig.from_dict(values, where=str(folder / CONFIG)))
    load_weights(unet, _read_tensors(folder), str(folder))
    return _with_few_bits(unet, folder / QUANTISED) if (folder / QUANTISED).exists() else unet


def _with_few_bits(unet: UNet2D, path: Path) -> UNet2D:
    tensors, header = load_arrays_and_metadata(path)
    bits = header.get(BITS, "")
    if not bits.isdecimal():
        raise ArtifactError(f"{path}: its header says {bits!r} {BITS}; allowed: a number")
    return load_packed(unet, tensors, int(bits), str(path))


def _place(folder: Path) -> AbstractContextManager[Path]:
    """Where to write: the folder itself where it stands empty, else a temporary one that will replace it."""
    empty = folder.is_dir() and not any(folder.iterdir())
    return nullcontext(folder) if empty else atomic_folder(folder)


def extended(record: Mapping[str, Any], event: Mapping[str, Any]) -> dict[str, Any]:
    """The record with one more event at the end of its history."""
    return {**record, "history": [*record.get("history", []), dict(event)]}


def steps_of_student(record: Mapping[str, Any]) -> int | None:
    """The steps that a model was distilled to; None where it answers at every noise level.

    One that has its guidance folded in (`guided`) was taught all of them, and has no such number.
    """
    distilled = [done for done in record.get("history", []) if done.get("task") == "distill" and "steps" in done]
    return distilled[-1]["steps"] if distilled else None


def check_teacher(stored: StoredModel, where: str) -> None:
    """Raises ConfigError: a student of few steps is right at the noise levels of these only, and no teacher of others.

    Args:
        stored: the model that is to be taught from, or held others against.
        where: its folder, for the message.
    """
    steps = steps_of_student(stored.record)
    if steps is not None:
        raise ConfigError(
            f"{where}: a student of {steps} step{'s' if steps > 1 else ''}, which knows no noise levels between them; "
            "allowed: a model that was not distilled to few steps, such as its teacher"
        )


def _sums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def _checked_record(folder: Path) -> dict[str, Any]:
    """The record, once every file it has a checksum of was compared with it."""
    if not (folder / RECORD).exists():
        return {}
    record = read_json(folder / RECORD)
    sums = record.pop(SUMS, None) if isinstance(record, dict) else None
    if not isinstance(sums, dict):
        raise ArtifactError(f"{folder / RECORD}: has no checksums ({SUMS})")
    for name, expected in sums.items():
        found = sha256_file(_inside(folder, name))
        if found != expected:
            raise ArtifactError(f"{folder / name}: SHA-256 {found}, expected {expected}: damaged or changed")
    return record


def _read_tensors(folder: Path) -> dict[str, mx.array]:
    """The weights of a folder: one file, one in half precision, or several with an index. Pickled ones are refused."""
    for name in (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.fp16.safetensors"):
        if (folder / name).exists():
            return load_arrays(folder / name)
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    if index.exists():
        return _read_shards(index)
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise ArtifactError(
            f"{folder / pickled[0]}: pickled weights are never opened, for they can run code; "
            "save the model again in Diffusers with safe_serialization=True"
        )
    raise ArtifactError(f"{folder / WEIGHTS}.safetensors: missing: the folder has no weights")


def _read_shards(index: Path) -> dict[str, mx.array]:
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict):
        raise ArtifactError(f"{index}: has no weight_map")
    tensors: dict[str, mx.array] = {}
    for name in sorted(set(places.values())):
        tensors.update(load_arrays(_inside(index.parent, name)))
    absent = sorted(places.keys() - tensors.keys())
    if absent:
        raise ArtifactError(f"{index}: {absent[0]} is not in {places[absent[0]]}, where the index says it is")
    return tensors


def _inside(folder: Path, name: Any) -> Path:
    """The path of a file that another file names, which may not climb out of `folder`.

    Links are followed: a snapshot in the Hugging Face cache is made of links to files elsewhere.
    """
    relative = PurePosixPath(str(name))
    if relative.is_absolute() or ".." in relative.parts:
        raise ArtifactError(f"{folder}: {name!r} leads out of the folder")
    return folder / relative
