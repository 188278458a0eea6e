"""A folder of its own for each task instance: a clone at the run's revision, DVC's cache shared with its neighbours.

A workspace is held by a lock that the kernel lets go of when its process dies, so what a killed task left behind is
recognised, and removed by the next task on that machine; what a task that outlived its worker still uses is not.
"""

import configparser
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from ado_tasks.endpoints import Endpoints
from ado_tasks.errors import AdoError, ConfigError, StorageError
from ado_tasks.orchestration.failures import WorkspaceError
from ado_tasks.stores import open_store

_YAML = YAML()  # DVC's own library: what PyYAML reads of its files is not always the same (1e-05, on, off)
_LOCK = ".lock"  # beside each workspace, in the folder that holds both
_TREE = "tree"
_GIT_PATIENCE_S = 600.0


@contextmanager
def workspace(revision: str, endpoints: Endpoints, root: Path) -> Iterator[Path]:
    """Yield a fresh clone of the project at `revision`, ready for DVC; it is removed afterwards.

    Args:
        revision: a full git hash.
        endpoints: where git, the store and DVC's remote are.
        root: folder on this machine for workspaces, git objects and, where no other is at hand, DVC's cache.

    Raises:
        WorkspaceError: neither the git remote nor the store's bundle has the revision, or they cannot be reached.
        ConfigError: DVC's remote is a folder of another machine.
    """
    places = root / "workspaces"
    places.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(places)
    place = Path(tempfile.mkdtemp(prefix=f"{revision[:8]}-", dir=places))
    with (place / _LOCK).open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            tree = place / _TREE
            _clone(tree, revision, endpoints, root)
            _configure_dvc(tree, endpoints, root)
            yield tree
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _remove_abandoned(places: Path) -> None:
    for place in places.iterdir():
        # One without a lock file is just being made.
        with suppress(OSError), (place / _LOCK).open(encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(place, ignore_errors=True)


def merge_locks(tree: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Write entries into the workspace's lock files, over what the revision holds there.

    Args:
        tree: the workspace.
        entries: lock entries by stage name; "sub/dvc.yaml:train" belongs to `sub/dvc.lock`.
    """
    together: dict[Path, dict[str, dict[str, Any]]] = {}
    for name, entry in entries.items():
        together.setdefault(tree / lock_file(name), {})[bare_name(name)] = dict(entry)
    for path, stages in together.items():  # each file once: reading a long one takes seconds
        lock = _YAML.load(path.read_text(encoding="utf-8")) if path.exists() else None
        lock = lock or {"schema": "2.0", "stages": {}}
        lock.setdefault("stages", {}).update(stages)
        with path.open("w", encoding="utf-8") as file:
            _YAML.dump(lock, file)


def lock_file(name: str) -> Path:
    """Where the lock entry of a stage belongs, from the project's folder."""
    folder, separator, _ = name.rpartition("dvc.yaml:")
    return Path(folder if separator else "") / "dvc.lock"


def bare_name(name: str) -> str:
    """A stage's name within its own `dvc.yaml`."""
    return name.rpartition("dvc.yaml:")[2]


def _clone(tree: Path, revision: str, endpoints: Endpoints, root: Path) -> None:
    source = _local_repository(endpoints)
    if source is None or not _has(source, revision):
        source = _fetch(revision, endpoints, root)
    # --shared: objects are read where they are, so a clone costs what its checkout costs.
    _git("clone", "--quiet", "--shared", "--no-checkout", str(source), str(tree))
    _git("-C", str(tree), "checkout", "--quiet", "--detach", revision)


def _local_repository(endpoints: Endpoints) -> Path | None:
    path = Path(endpoints.git_remote.removeprefix("file://"))
    return path if path.is_dir() else None


def _project_here(endpoints: Endpoints) -> Path | None:
    """The project's own folder, where it lies on this machine and is what runs start from."""
    path = _local_repository(endpoints)
    return path if path is not None and (path / ".dvc").is_dir() else None


def _has(repository: Path, revision: str) -> bool:
    known = subprocess.run(
        ["git", "-C", str(repository), "cat-file", "-e", f"{revision}^{{commit}}"], capture_output=True, check=False
    )
    return known.returncode == 0


def _fetch(revision: str, endpoints: Endpoints, root: Path) -> Path:
    """This machine's own copy of the remote, with the revision in it: fetched from the remote, or from the bundle."""
    mirror = root / "git.git"
    with _exclusive(root / "git.lock"):
        if not (mirror / "HEAD").exists():
            _git("init", "--quiet", "--bare", str(mirror))
        reasons = []
        if not _has(mirror, revision):
            reasons += _attempt(mirror, endpoints.git_remote)
        if not _has(mirror, revision):
            reasons += _attempt_bundle(mirror, revision, endpoints)
        if not _has(mirror, revision):
            detail = "; ".join(reasons) or "fetched, and it is not there"
            raise WorkspaceError(f"revision {revision}: neither {endpoints.git_remote} nor the store has it: {detail}")
    return mirror


def _attempt(mirror: Path, remote: str) -> list[str]:
    try:
        _git("-C", str(mirror), "fetch", "--quiet", "--no-auto-gc", remote, "+refs/heads/*:refs/remotes/origin/*")
    except WorkspaceError as problem:
        return [str(problem)]
    return []


def _attempt_bundle(mirror: Path, revision: str, endpoints: Endpoints) -> list[str]:
    key = f"git/{revision}.bundle"
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "revision.bundle"
        try:
            open_store(endpoints.store).download_file(key, bundle)
            _git("-C", str(mirror), "bundle", "unbundle", str(bundle))
            _git("-C", str(mirror), "update-ref", f"refs/bundles/{revision}", revision)
        except AdoError as problem:
            return [str(problem)]
    return []


def _git(*arguments: str) -> str:
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            ["git", *arguments], env=environment, capture_output=True, text=True, timeout=_GIT_PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise WorkspaceError(f"git {' '.join(arguments[:4])}: {problem}") from problem
    if done.returncode != 0:
        raise WorkspaceError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _configure_dvc(tree: Path, endpoints: Endpoints, root: Path) -> None:
    """`.dvc/config.local` of a workspace: the machine's cache, the configured remote, and state that dies with it."""
    config = _dvc_config(tree / ".dvc" / "config")
    home = _project_here(endpoints)
    if home is not None:
        config.read(home / ".dvc" / "config.local")
    local = configparser.ConfigParser()
    local["core"] = {"site_cache_dir": str(tree / ".dvc" / "tmp" / "site"), "analytics": "false"}
    local["cache"] = {"dir": str(_cache_folder(config, home, root))}
    remote = _remote(config, endpoints, home)
    if remote is not None:
        local["core"]["remote"] = "ado"
        local["'remote \"ado\"'"] = remote
    with (tree / ".dvc" / "config.local").open("w", encoding="utf-8") as file:
        local.write(file)


def _dvc_config(path: Path) -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(path)
    return config


def _cache_folder(config: configparser.ConfigParser, home: Path | None, root: Path) -> Path:
    """The project's own cache where the project lies on this machine, else one for all workspaces here."""
    named = config.get("cache", "dir", fallback=None)
    if named is not None and Path(named).is_absolute():
        return Path(named)
    if home is not None:
        return (home / ".dvc" / (named or "cache")).resolve()
    return (root / "cache").absolute()


def _remote(config: configparser.ConfigParser, endpoints: Endpoints, home: Path | None) -> dict[str, str] | None:
    """The section of the remote that workspaces push to; None where neither the project nor anybody names one."""
    name = config.get("core", "remote", fallback=None)
    section = f"'remote \"{name}\"'"
    named = dict(config[section]) if name and config.has_section(section) else {}
    if endpoints.dvc_remote is not None:
        remote = {"url": endpoints.dvc_remote}
    elif not named:
        return None
    elif "://" in named["url"] or Path(named["url"]).is_absolute():
        remote = named
    elif home is not None:
        remote = {**named, "url": str((home / ".dvc" / named["url"]).resolve())}
    else:
        raise ConfigError(
            f"DVC's remote {name} is the folder {named['url']} of the machine that the project lies on; set "
            "ADO_DVC_REMOTE to one that every worker reaches: s3://bucket/prefix, or a folder that all of them mount"
        )
    if remote["url"].startswith("s3://") and endpoints.s3_endpoint:
        remote.setdefault("endpointurl", endpoints.s3_endpoint)
    return remote


def pull(tree: Path) -> None:
    """Bring everything that the lock files of a workspace name, and what `dvc add` tracks, into it.

    Raises:
        StorageError: the remote cannot be reached, or lacks a file.
    """
    tracked = _git("-C", str(tree), "ls-files", "*.dvc").splitlines()
    locked = []
    for path in sorted(tree.rglob("dvc.lock")):
        folder = path.parent.relative_to(tree).as_posix()
        stages = (_YAML.load(path.read_text(encoding="utf-8")) or {}).get("stages", {})
        locked += [f"{folder}/dvc.yaml:{name}" if folder != "." else name for name in stages]
    if not tracked and not locked:
        return
    command = [sys.executable, "-P", "-m", "dvc", "pull", *tracked, *locked]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StorageError(f"dvc pull: {done.stderr.strip() or done.stdout.strip()}")
