"""One stage on any worker: a workspace, the entries of the stages above it, DVC, checkpoints, the record of the run."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ado_tasks.endpoints import Endpoints
from ado_tasks.errors import AdoError, ArtifactError
from ado_tasks.orchestration import records
from ado_tasks.orchestration.checkpoints import SCRATCH, CheckpointMirror
from ado_tasks.orchestration.driver import drive
from ado_tasks.orchestration.energy import Meter
from ado_tasks.orchestration.workspace import workspace
from ado_tasks.stores import Store, open_store

_INLINE_BYTES = 1500  # of a lock entry; a longer one goes to the store (an XCom value is kept under 4 kB)


@dataclass(frozen=True)
class StageResult:
    """What a stage's task hands on; as plain values it is smaller than 4 kB."""

    stage: str
    lock: dict[str, Any]  # its entry for dvc.lock, or {"store": key, "sha256": …} where that is long
    cached: bool  # its result was known: nothing ran
    seconds: float  # that its command took, here and now
    joules: float | None = None  # that this machine took meanwhile, where it tells
    metrics: dict[str, float] = field(default_factory=dict)  # figures of the run that made the result
    mlflow_run: str | None = None
    mlflow_url: str | None = None  # the page of that run
    pictures: list[str] = field(default_factory=list)  # addresses

    def as_plain(self) -> dict[str, Any]:
        """As an XCom value."""
        return asdict(self)


def run_stage(
    name: str,
    *,
    revision: str,
    upstream_locks: Mapping[str, Mapping[str, Any]],
    endpoints: Endpoints,
    workspace_root: Path,
    force: bool = False,
    stopping: threading.Event | None = None,
    say: Callable[[str], None] = print,
) -> StageResult:
    """Do one stage of the project at `revision`: find its result, or run it; the remote has its outputs afterwards.

    Args:
        name: as DVC addresses it.
        revision: a full git hash that the git remote, or the store's bundle, holds.
        upstream_locks: the `lock` of each stage that it reads from, by name.
        endpoints: where git, DVC's remote, the store and MLflow are.
        workspace_root: a folder of this machine; may be empty, and is shared by all tasks here.
        force: run it even where its result is known.
        stopping: set it, from a signal handler or a thread, and the stage is asked to write a checkpoint and end.
        say: takes each line that DVC and the stage print.

    Raises:
        AdoError: `failures.is_permanent` tells whether another attempt can help.
    """
    store = open_store(endpoints.store)
    entries = {other: load_lock(lock, store) for other, lock in upstream_locks.items()}
    with workspace(revision, endpoints, workspace_root) as tree:
        job = _Job(name, tree, endpoints, store, say)
        try:
            outcome = drive(
                tree, name, upstream=entries, force=force, while_running=job.surroundings,
                stopping=stopping or threading.Event(), say=say,
            )  # fmt: skip
        except AdoError:
            job.record()  # a failed run is logged too
            raise
        about = _recall(store, outcome.lock) if outcome.cached else job.finish(outcome.lock)
    lock = store_lock(outcome.lock, store)
    return StageResult(name, lock, outcome.cached, round(outcome.seconds, 3), job.joules, **about)


@dataclass
class _Job:
    """What surrounds a stage that runs."""

    name: str
    tree: Path
    endpoints: Endpoints
    store: Store
    say: Callable[[str], None]
    mirror: CheckpointMirror | None = None
    joules: float | None = None
    uploader: "records.Uploader | None" = None

    @contextmanager
    def surroundings(self, key: str | None, command: str) -> Iterator[None]:
        """Checkpoints of an earlier attempt are brought here, and new ones mirrored while it runs."""
        key = key or hashlib.sha256(self.name.encode()).hexdigest()
        self.mirror = CheckpointMirror(self.store, f"checkpoints/{key}", self.tree / SCRATCH)
        restored = self.mirror.restore()
        if restored:
            self.say(f"{self.name}: goes on from an earlier attempt's checkpoints ({restored} files)")
        if "ado_tasks" in command:
            self.uploader = records.Uploader.start(self.tree, self.endpoints)
        meter = Meter()
        with self.mirror.running():
            yield
        self.joules = meter.joules()

    def finish(self, lock: Mapping[str, Any]) -> dict[str, Any]:
        """Log the run, forget its checkpoints, and remember what is to be shown when its result is found again."""
        about = self.record()
        assert self.mirror is not None
        self.mirror.clear()
        self.store.put(_about_key(lock), json.dumps(about).encode())
        return about

    def record(self) -> dict[str, Any]:
        """Bring what the stage recorded to MLflow; returns what a task shows of it."""
        if self.uploader is None:
            return {}
        return self.uploader.finish(self.store, self.say)


def store_lock(lock: dict[str, Any], store: Store) -> dict[str, Any]:
    """The lock entry itself, or, where it is long, where in the store it now is."""
    text = _canonical(lock)
    if len(text) <= _INLINE_BYTES:
        return lock
    digest = hashlib.sha256(text).hexdigest()
    key = f"locks/{digest}.json"
    store.put(key, text)
    return {"store": key, "sha256": digest}


def load_lock(lock: Mapping[str, Any], store: Store) -> dict[str, Any]:
    """The lock entry that `store_lock` was given. Raises ArtifactError where the store lacks it or holds another."""
    if "store" not in lock:
        return dict(lock)
    found = store.get(lock["store"])
    if found is None:
        raise ArtifactError(f"{store.url}: nothing is stored under {lock['store']}")
    digest = hashlib.sha256(found.data).hexdigest()
    if digest != lock["sha256"]:
        raise ArtifactError(f"{store.url}: {lock['store']}: sha256 {lock['sha256']} expected, found {digest}")
    return json.loads(found.data)


def _canonical(lock: Mapping[str, Any]) -> bytes:
    return json.dumps(lock, separators=(",", ":")).encode()


def _about_key(lock: Mapping[str, Any]) -> str:
    text = json.dumps(lock, sort_keys=True)
    return f"results/{hashlib.sha256(text.encode()).hexdigest()}.json"


def _recall(store: Store, lock: Mapping[str, Any]) -> dict[str, Any]:
    """What was shown of the run that made this result; nothing where it was made elsewhere."""
    found = store.get(_about_key(lock))
    return {} if found is None else json.loads(found.data)
