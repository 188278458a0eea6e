"""Checkpoints that survive their machine: what a stage keeps under its scratch folder, mirrored to the store.

A stage writes each checkpoint once, under a temporary name, and renames it (see `optimise.checkpoints`). So every file
with a final name is complete and never changes, and two runs of one stage write the same bytes under the same name:
an attempt that outlived its worker can mirror beside its successor and do no harm.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ado_tasks.errors import AdoError, ArtifactError
from ado_tasks.stores import Store

SCRATCH = Path(".ado/scratch")  # where stages keep checkpoints, from the project's folder
_LOOK_EVERY_S = 5.0
_SHARE = 0.1  # of the time may go into uploads: large checkpoints on a slow line are mirrored less often

log = logging.getLogger(__name__)


@dataclass
class CheckpointMirror:
    """The files under `folder`, and their copies in the store under `prefix`."""

    store: Store
    prefix: str  # "checkpoints/<key of what decides the stage's result>"
    folder: Path
    _ours: set[str] = field(default_factory=set)  # copied up or down by this attempt, so this attempt may delete them

    def restore(self) -> int:
        """Bring what an earlier attempt left; returns how many files. What is being deleted meanwhile is left out."""
        for key in self.store.list(self.prefix + "/"):
            name = key.removeprefix(self.prefix + "/")
            try:
                self.store.download_file(key, self.folder / name)
            except ArtifactError:
                continue
            self._ours.add(name)
        return len(self._ours)

    def save(self) -> None:
        """Copy new files up, oldest first, then delete the copies of those that the stage has dropped."""
        present = self._complete()
        for name, path in present.items():
            if name in self._ours:
                continue
            try:
                self.store.upload_file(f"{self.prefix}/{name}", path)
            except (ArtifactError, FileNotFoundError):
                continue  # the stage dropped it just now
            self._ours.add(name)
        for name in self._ours - present.keys():
            self.store.delete(f"{self.prefix}/{name}")
            self._ours.discard(name)

    def clear(self) -> None:
        """The stage ended well: nothing of it is needed any more."""
        for key in self.store.list(self.prefix + "/"):
            self.store.delete(key)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Mirror while the block runs and once more at its end, however it ends. A dead store is logged, not raised."""
        stop = threading.Event()
        thread = threading.Thread(target=self._watch, args=(stop,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self._try_save()

    def _watch(self, stop: threading.Event) -> None:
        pause_s = _LOOK_EVERY_S
        while not stop.wait(pause_s):
            began_s = time.monotonic()
            self._try_save()
            pause_s = max(_LOOK_EVERY_S, (time.monotonic() - began_s) * (1 / _SHARE - 1))

    def _try_save(self) -> None:
        try:
            self.save()
        except AdoError as problem:
            log.warning("checkpoints are not mirrored for now: %s", problem)

    def _complete(self) -> dict[str, Path]:
        """Files with a final name, oldest first. (A folder may vanish while it is walked.)"""
        found: list[tuple[float, str, Path]] = []
        for path in self.folder.rglob("*") if self.folder.is_dir() else []:
            try:
                if not path.name.startswith(".") and path.is_file():
                    found.append((path.stat().st_mtime, path.relative_to(self.folder).as_posix(), path))
            except FileNotFoundError:
                continue
        return {name: path for _, name, path in sorted(found)}
