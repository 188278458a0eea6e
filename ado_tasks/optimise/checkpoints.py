"""Checkpoints: the state of an interrupted run, found again by a key of everything that decides the result.

A checkpoint is one safetensors file under `scratch/<key>/`, written atomically, with a sum of its arrays in its header.
A damaged one is skipped for the one before it; deleting any of them costs time and never changes the result.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ado_tasks import storage
from ado_tasks.backend import mx, numeric_fingerprint
from ado_tasks.closure import code_hash
from ado_tasks.errors import ArtifactError

SUM = "sha256"  # key of `sum_of` in the header's metadata
_NAME = re.compile(r"step-(\d{8,})\.safetensors", re.ASCII)
KEEP = 2  # the newest, and one more in case the newest is damaged


def run_key(task: str, settings: Mapping[str, Any], inputs: Mapping[str, str], seed: int) -> str:
    """A key that two runs share only if they would compute the same bytes.

    Args:
        task: its module, as "ado_tasks.train"; the code in its import closure is part of the key.
        settings: the config as plain values.
        inputs: hashes of what it reads.
        seed: of the run.
    """
    parts = [task, settings, inputs, seed, code_hash(task), numeric_fingerprint()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run."""

    folder: Path

    @staticmethod
    def under(scratch: Path, key: str) -> "Checkpoints":
        """The checkpoints with this key, the whole of it; those of other keys are another run's and are left alone."""
        return Checkpoints(scratch / key)

    def save(self, step: int, state: Mapping[str, mx.array]) -> None:
        """Keep the state after `step` steps, and the one before it."""
        storage.save_arrays(self._path(step), state, {SUM: sum_of(state)})
        for old in self._steps()[:-KEEP]:
            self._path(old).unlink(missing_ok=True)

    def latest(self) -> tuple[int, dict[str, mx.array]] | None:
        """The newest readable state and its step, or None."""
        for step in reversed(self._steps()):
            try:
                state, metadata = storage.load_arrays_and_metadata(self._path(step))
            except ArtifactError:
                continue
            if metadata.get(SUM) == sum_of(state):
                return step, state
        return None

    def last_step(self) -> int | None:
        """The step of the newest checkpoint, for messages."""
        steps = self._steps()
        return steps[-1] if steps else None

    def clear(self) -> None:
        """The run has ended well: its checkpoints are of no more use."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

    def _steps(self) -> list[int]:
        names = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*.safetensors"))
        return sorted(int(name[1]) for name in names if name)


def sum_of(state: Mapping[str, mx.array]) -> str:
    """The SHA-256 of names, types, shapes and bytes: a bit that flipped on a disk must not end in a model."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = mx.array(state[name])
        digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        digest.update(np.array(array.reshape(-1).view(mx.uint8)).tobytes())
    return digest.hexdigest()
