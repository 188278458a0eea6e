"""Every run of a task leaves a record on disk; a separate process carries records to MLflow.

A task never waits for a tracker: it appends to `.ado/runs/<run>/events.jsonl`, and when it ends, well or badly, the
record is closed and an uploader is started in the background (`ado sync`, at the lowest priority). If MLflow is away
the record stays where it is, and the next uploader takes it.
"""

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ado_tasks import storage
from ado_tasks.backend import numeric_fingerprint
from ado_tasks.config import as_plain
from ado_tasks.errors import ArtifactError
from ado_tasks.report import JsonlRecorder, Reporter, Tee, Terminal

HOME = Path(".ado")
RUNS = HOME / "runs"
LOCK = HOME / "sync.lock"
_KEYS = ("section", "task", "params", "inputs", "command", "git", "hardware", "started_ms", "status")  # of a record
_EVENTS = {"metric": {"name", "value", "time_ms", "step"}, "picture": {"path"}}  # what is needed of each kind
UPLOADER_PATIENCE_S = 60.0  # a measured task waits this long for the background uploader to leave the CPU alone


@contextmanager
def recorded(
    section: str, task: str, settings: Any, inputs: Mapping[str, Any], *, measured: bool = False
) -> Iterator[Reporter]:
    """Record one run of a task; yields the reporter it should speak to.

    Args:
        section: name of the params section, which is the run's name ("distill.progressive").
        task: name of the task ("distill").
        settings: its config.
        inputs: the paths and the seed it is called with.
        measured: the task takes timings, so wait until the uploader is done.
    """
    if measured:
        _wait_for_uploader()
    folder = RUNS / f"{time.strftime('%Y%m%dT%H%M%S')}-{section}-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "section": section,
        "task": task,
        "params": as_plain(settings),
        "inputs": {name: _plain(value) for name, value in inputs.items()},
        "command": [Path(sys.executable).name, "-m", "ado_tasks", *sys.argv[1:]],
        "git": _git_revision(),
        "hardware": {**numeric_fingerprint(), "cores": os.cpu_count(), "system": platform.platform()},
        "started_ms": int(time.time() * 1e3),
        "status": "RUNNING",
    }
    storage.write_json(folder / "record.json", record)
    terminal = Terminal(section)
    try:
        yield Tee((terminal, JsonlRecorder(folder / "events.jsonl")))
        record["status"] = "FINISHED"
    except BaseException as problem:
        record |= {"status": "KILLED" if isinstance(problem, KeyboardInterrupt) else "FAILED", "error": str(problem)}
        raise
    finally:
        terminal.close()
        record["ended_ms"] = int(time.time() * 1e3)
        storage.write_json(folder / "record.json", record)
        start_uploader()


def _plain(value: Any) -> int | str:
    """A seed, a path, or several paths, as a record keeps them."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return value if isinstance(value, int) else str(value)


def start_uploader() -> None:
    """Start `ado sync` in a session of its own, unless ADO_SYNC=manual says that someone else will."""
    if os.environ.get("ADO_SYNC") == "manual":
        return
    HOME.mkdir(exist_ok=True)
    with (HOME / "sync.log").open("a", encoding="utf-8") as log:
        subprocess.Popen(
            ["nice", "-n", "19", sys.executable, "-m", "ado_tasks", "sync", "--background"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


@contextmanager
def uploader_lock(wait: bool) -> Iterator[bool]:
    """Hold the uploader's lock; yields False at once where another holds it and `wait` is False."""
    HOME.mkdir(exist_ok=True)
    with LOCK.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def pending() -> list[Path]:
    """Folders of closed records that have not reached MLflow completely, oldest first; damaged ones are left out."""
    return [folder for folder, problem in _waiting() if problem is None]


def damaged() -> list[str]:
    """What is wrong with each record that cannot be uploaded."""
    return [problem for _, problem in _waiting() if problem is not None]


def _waiting() -> Iterator[tuple[Path, str | None]]:
    for path in sorted(RUNS.glob("*/record.json")):
        if (path.parent / "uploaded.json").exists():
            continue
        try:
            closed = read_record(path.parent)["status"] != "RUNNING"
        except ArtifactError as problem:
            yield path.parent, str(problem)
            continue
        if closed:
            yield path.parent, None


def read_record(folder: Path) -> dict[str, Any]:
    """The record of one run. Raises ArtifactError where it is damaged."""
    record = storage.read_json(folder / "record.json", *_KEYS)
    if record["status"] != "RUNNING" and "ended_ms" not in record:
        raise ArtifactError(f"{folder / 'record.json'}: has no ended_ms; made by another tool, or damaged")
    return record


def read_events(folder: Path) -> list[dict[str, Any]]:
    """What a run said. A last line cut short by a kill is left out, and so is what is no event."""
    path = folder / "events.jsonl"
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            break
        if isinstance(event, dict) and _EVENTS.get(str(event.get("kind")), {"?"}) <= event.keys():
            events.append(event)
    return events


def _wait_for_uploader() -> None:
    deadline_s = time.monotonic() + UPLOADER_PATIENCE_S
    while time.monotonic() < deadline_s:
        with uploader_lock(wait=False) as free:
            if free:
                return
        time.sleep(0.2)


def _git_revision() -> dict[str, Any]:
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"revision": "none", "dirty": False}
    # A changed dvc.lock is what a run produces; it does not make the code that ran another code.
    changed = [line for line in status.splitlines() if not line.endswith("dvc.lock")]
    return {"revision": revision, "dirty": bool(changed)}
