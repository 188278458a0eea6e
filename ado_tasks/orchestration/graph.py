"""The stage graph of a DVC project as plain dataclasses, checked for what an orchestrator cannot run.

Nothing here knows DVC or Airflow: `from_plain` takes what the resolver found (see `resolve`), `render` makes tasks.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any

from ado_tasks.orchestration.failures import CycleError, GraphError, HintError, TaskIdError, UnsupportedStageError

_TASK_ID_CHARACTERS = 200  # Airflow allows 250, with the name of the group and a dot before it
_LONGEST_S = 31_536_000  # a year: Airflow keeps times as timedelta, which ends, and infinity is none
_NOT_IN_TASK_IDS = re.compile(r"[^\w-]+")


@dataclass(frozen=True)
class Hints:
    """How a stage wants to be scheduled: its `meta.airflow` in `dvc.yaml`. None leaves Airflow's own default."""

    queue: str | None = None  # of the workers that may take it
    executor: str | None = None  # name of one of the configured executors
    pool: str | None = None  # shares its slots with other stages
    pool_slots: int | None = None  # that it takes, from 1
    priority: int | None = None  # the higher goes first where slots are short
    retries: int | None = None  # after a failure that may pass, from 0
    retry_delay_seconds: float | None = None  # before the first of them; it doubles each time
    timeout_seconds: float | None = None  # of one attempt

    @staticmethod
    def parse(values: Any, stage: str) -> "Hints":
        """Check what `meta.airflow` of `stage` says. Raises HintError naming the key, the value and what is allowed."""
        if not isinstance(values, Mapping):
            raise HintError(f"{stage}: meta.airflow is {values!r}; a mapping is required")
        allowed = ", ".join(item.name for item in fields(Hints))
        for key, value in values.items():
            if key not in _HINT_CHECKS:
                raise HintError(f"{stage}: meta.airflow has an unknown key {key!r}; allowed: {allowed}")
            fits, wanted = _HINT_CHECKS[key]
            if not fits(value):
                raise HintError(f"{stage}: meta.airflow.{key} is {value!r}; {wanted} is required")
        return Hints(**values)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_whole(lowest: int) -> Any:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= lowest


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _LONGEST_S


_HINT_CHECKS: dict[str, tuple[Any, str]] = {
    "queue": (_is_text, "a name"),
    "executor": (_is_text, "a name"),
    "pool": (_is_text, "a name"),
    "pool_slots": (_is_whole(1), "a whole number from 1"),
    "priority": (_is_whole(1), "a whole number from 1"),
    "retries": (_is_whole(0), "a whole number from 0"),
    "retry_delay_seconds": (_is_seconds, f"a number above 0, at most {_LONGEST_S}"),
    "timeout_seconds": (_is_seconds, f"a number above 0, at most {_LONGEST_S}"),
}


@dataclass(frozen=True)
class Out:
    """One output of a stage."""

    path: str  # from the project's folder, or an address elsewhere
    cached: bool = True  # kept by DVC: it travels between machines
    persist: bool = False  # DVC leaves the former version in place when the stage runs
    local: bool = True  # it lies inside the project


@dataclass(frozen=True)
class Stage:
    """One stage, resolved: nothing is left to be filled in."""

    name: str  # as DVC addresses it: "train", "distill@progressive", "sub/dvc.yaml:train"
    task_id: str  # as Airflow allows it
    command: tuple[str, ...]
    wdir: str  # from the project's folder
    deps: tuple[str, ...]
    outs: tuple[Out, ...]
    params: Mapping[str, tuple[str, ...]]  # keys by params file; empty means the whole file
    upstream: tuple[str, ...]  # names of the stages whose outputs it reads; none where it is frozen
    frozen: bool = False  # never run: what the committed dvc.lock says holds
    always_changed: bool = False  # run every time
    description: str = ""
    hints: Hints = field(default_factory=Hints)


@dataclass(frozen=True)
class StageGraph:
    """Stages in the order in which `dvc repro` runs them: each after all it reads from."""

    stages: tuple[Stage, ...]

    def __iter__(self) -> Any:
        return iter(self.stages)

    def stage(self, name: str) -> Stage:
        """The stage of this name. Raises GraphError that lists what there is."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise GraphError(f"no stage {name!r}; there is: {', '.join(stage.name for stage in self.stages)}")

    def upstream(self, name: str) -> tuple[Stage, ...]:
        """The stages whose outputs this one reads, in the graph's order."""
        wanted = set(self.stage(name).upstream)
        return tuple(stage for stage in self.stages if stage.name in wanted)

    @property
    def shape(self) -> str:
        """A hash of the stages and their edges: equal for two graphs that the same DAG can run."""
        edges = sorted((stage.name, sorted(stage.upstream)) for stage in self.stages)
        return hashlib.sha256(json.dumps(edges).encode()).hexdigest()[:16]


def from_plain(found: Iterable[Mapping[str, Any]]) -> StageGraph:
    """Build and check the graph from the resolver's plain mappings.

    Raises:
        CycleError: stages wait for each other; names them.
        HintError: an unknown or ill-typed key under `meta.airflow`.
        TaskIdError: a name that no id can be made of.
        UnsupportedStageError: what cannot run in workspaces that share no disk.
    """
    entries = [{**entry, "name": str(entry["name"])} for entry in found]
    ids = task_ids([entry["name"] for entry in entries])
    stages = {entry["name"]: _stage(entry, ids[entry["name"]]) for entry in entries}
    ordered = _in_order(stages)
    for stage in ordered:
        _check_travels(stage, stages)
    return StageGraph(ordered)


def _stage(entry: Mapping[str, Any], task_id: str) -> Stage:
    meta = entry.get("meta") or {}
    hints = meta.get("airflow", {}) if isinstance(meta, Mapping) else {}
    return Stage(
        name=entry["name"],
        task_id=task_id,
        command=tuple(entry["command"]),
        wdir=entry["wdir"],
        deps=tuple(entry["deps"]),
        outs=tuple(Out(**out) for out in entry["outs"]),
        params={path: tuple(keys) for path, keys in entry["params"].items()},
        upstream=() if entry["frozen"] else tuple(entry["upstream"]),
        frozen=entry["frozen"],
        always_changed=entry["always_changed"],
        description=entry.get("description") or "",
        hints=Hints.parse(hints, entry["name"]),
    )


def task_ids(names: Iterable[str]) -> dict[str, str]:
    """An id for each stage name: readable, allowed by Airflow, and no two alike.

    "distill@progressive" becomes "distill-progressive". Names that would share an id each get a hash behind.

    Raises:
        TaskIdError: the name is longer than Airflow allows, or nothing of it can be kept.
    """
    wanted = {name: _NOT_IN_TASK_IDS.sub("-", name.replace("/dvc.yaml:", "-")).strip("-") for name in names}
    taken = list(wanted.values())
    ids = {}
    for name, task_id in wanted.items():
        if not task_id or len(task_id) > _TASK_ID_CHARACTERS:
            raise TaskIdError(
                f"stage {name!r}: Airflow's task ids have 1 to {_TASK_ID_CHARACTERS} letters, digits, '-' and '_'"
            )
        clash = taken.count(task_id) > 1
        ids[name] = f"{task_id}-{hashlib.sha256(name.encode()).hexdigest()[:8]}" if clash else task_id
    return ids


def _in_order(stages: Mapping[str, Stage]) -> tuple[Stage, ...]:
    """Depth first, in the order of the file: the order of `dvc repro`, and the same one each time."""
    ordered: dict[str, Stage] = {}
    path: list[str] = []

    def visit(name: str) -> None:
        if name in ordered:
            return
        if name in path:
            raise CycleError(f"stages wait for each other: {' → '.join([*path[path.index(name) :], name])}")
        path.append(name)
        for above in stages[name].upstream:
            visit(above)
        ordered[path.pop()] = stages[name]

    for name in stages:
        visit(name)
    return tuple(ordered.values())


def _check_travels(stage: Stage, stages: Mapping[str, Stage]) -> None:
    """What a stage reads and writes must be able to travel between workers that share no disk."""
    if not stage.command:
        raise UnsupportedStageError(
            f"{stage.name}: an import that `dvc repro` would fetch anew; `dvc freeze` it and fetch it with `dvc update`"
        )
    for out in stage.outs:
        if not out.local:
            raise UnsupportedStageError(f"{stage.name}: output {out.path} lies outside the project; allowed: inside it")
        if out.persist:
            raise UnsupportedStageError(
                f"{stage.name}: output {out.path} is `persist: true`: what a run leaves behind would decide the next "
                "one's result, and each run here starts with an empty workspace; remove `persist`"
            )
    uncached = {out.path: above for above in stage.upstream for out in stages[above].outs if not out.cached}
    for dep in stage.deps:
        for path, above in uncached.items():
            here, there = PurePosixPath(dep), PurePosixPath(path)
            if here.is_relative_to(there) or there.is_relative_to(here):
                raise UnsupportedStageError(
                    f"{stage.name} reads {dep}, which {above} makes with `cache: false`: it does not travel between "
                    f"workers; remove `cache: false` from {path}"
                )
