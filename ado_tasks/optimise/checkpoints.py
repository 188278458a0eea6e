"""Checkpoints: the state of an interrupted run, found again by a key of everything that decides the result.

A checkpoint is one safetensors file under `scratch/<key>/`, written atomically. A damaged one is skipped for the one
before it; deleting any of them costs time and never changes the result.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ado_tasks import storage
from ado_tasks.backend import mx, numeric_fingerprint
from ado_tasks.closure import code_hash
from ado_tasks.errors import ArtifactError

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
        storage.save_arrays(self._path(step), state)
        for old in self._steps()[:-KEEP]:
            self._path(old).unlink(missing_ok=True)

    def latest(self) -> tuple[int, dict[str, mx.array]] | None:
        """The newest readable state and its step, or None."""
        for step in reversed(self._steps()):
            try:
                return step, storage.load_arrays(self._path(step))
            except ArtifactError:
                continue
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
        return sorted(int(path.stem.removeprefix("step-")) for path in self.folder.glob("step-*.safetensors"))
