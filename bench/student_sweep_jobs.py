"""What `bench/student_sweep.py` runs: the commands of stages, families and reports, and what each needs before it."""

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ado_tasks.config import parse, read_params
from ado_tasks.errors import ConfigError
from ado_tasks.optimise.distill_config import DistillConfig

ROOT = Path(__file__).resolve().parents[1]
OWN = Path(".ado") / "sweep"  # of a workspace: logs, params files, and what was done
WARM = {"steps": 4, "warmup_steps": 1}  # of a training that only compiles
WARM_STUDENTS = {  # the same of students
    "walks": 512, "further_walks": 512, "teacher_steps": 8, "walk_evaluations": 4, "stage_steps": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One command, and what must be there before it."""

    name: str
    command: tuple[str, ...]
    out: Path  # what it makes, under the workspace
    needs: tuple[str, ...] = ()
    params: Path | None = None  # the file its settings are in
    accepts: tuple[int, ...] = (0,)  # exit codes that are no failure

    def fingerprint(self, jobs: Mapping[str, "Job"]) -> str:
        """Of the command, its settings, and those of all it needs."""
        settings = "" if self.params is None else self.params.read_text(encoding="utf-8")
        told = [self.command, settings, [jobs[name].fingerprint(jobs) for name in self.needs]]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def task(name: str, *options: str, params: Path) -> tuple[str, ...]:
    """A task's command."""
    return (sys.executable, "-m", "ado_tasks", name, "--params", str(params), *options)


def bench(name: str, *options: str) -> tuple[str, ...]:
    """A bench's command, in the workspace."""
    return (sys.executable, str(ROOT / "bench" / name), ".", *options)


def written(workspace: Path, name: str, params: Mapping[str, Any]) -> Path:
    """A params file of the sweep; the workspace's own is the base's."""
    path = workspace / ("params.yaml" if name == "base" else OWN / f"{name}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(params)), encoding="utf-8")
    return path


def changed(params: Mapping[str, Any], students: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    """The params with other keys of `distill.progressive`, and of the file itself."""
    own = {**params["distill"]["progressive"], **students}
    return {**params, **others, "distill": {**params["distill"], "progressive": own}}


def families_of(params: Mapping[str, Any], sweep: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The params of each family. Raises ConfigError where the sweep is none, or a setting is not possible."""
    if not isinstance(sweep, Mapping) or not sweep:
        raise ConfigError("--sweep: allowed: a mapping of names to keys of distill.progressive, and seed")
    found = {}
    for name, keys in sweep.items():
        if not isinstance(keys, Mapping | None) or not str(name).isidentifier():
            raise ConfigError(f"--sweep: {name}: {keys}: allowed: a plain name with a mapping of keys")
        own = dict(keys or {})
        found[str(name)] = changed(params, own, seed=own.pop("seed", params["seed"]))
        parse(DistillConfig, _plain(found[str(name)]["distill"]["progressive"]), f"--sweep: {name}")
    return found


def _plain(section: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name != "method"}


def base_jobs(workspace: Path, params: Mapping[str, Any], data: str) -> list[Job]:
    """The stages that all families share."""
    base = written(workspace, "base", params)
    on, seen = ("--dataset", f"data/{data}"), ("--features", f"features/{data}")
    taught = ("--teacher", "models/teacher")
    return [
        Job("prepare", task("prepare", "--out", on[1], params=base), Path(on[1]), (), base),
        Job("train", task("train", *on, "--out", taught[1], params=base), Path(taught[1]), ("prepare",), base),
        Job("features", task("features", *on, "--out", seen[1], params=base), Path(seen[1]), ("prepare",), base),
        Job(
            "anchor", task("anchor", *on, *seen, *taught, "--out", "anchor", params=base), Path("anchor"),
            ("train", "features"), base,
        ),
        Job(
            "calibrate",
            task("calibrate", "--section", "calibrate.teacher", "--model", taught[1], *on, "--out",
                 "schedules/teacher", params=base),
            Path("schedules/teacher"), ("train",), base,
        ),
    ]  # fmt: skip


def warm_jobs(workspace: Path, params: Mapping[str, Any], data: str) -> list[Job]:
    """What compiles the kernels of training and distillation while the teacher is trained."""
    own = params["distill"]["progressive"]
    students = {name: value for name, value in WARM_STUDENTS.items() if own.get(name) is not None}
    warm = written(workspace, "warm", changed(params, students, train={**params["train"], **WARM}))
    where, on = OWN / "warm", ("--dataset", f"data/{data}")
    teacher, after = str(where / "teacher"), ("prepare",)
    scratch = ("--scratch", str(where / "scratch"))
    return [
        Job("warm_train", task("train", *on, "--out", teacher, *scratch, params=warm), Path(teacher), after, warm),
        Job(
            "warm_distill",
            task("distill", "--section", "distill.progressive", "--teacher", teacher, *on, "--out",
                 str(where / "students"), *scratch, params=warm),
            where / "students", ("warm_train",), warm,
        ),
    ]  # fmt: skip


def family_job(workspace: Path, name: str, params: Mapping[str, Any], data: str) -> Job:
    """The distillation of one family."""
    own, out = written(workspace, name, params), f"models/{name}"
    command = task(
        "distill", "--section", "distill.progressive", "--teacher", "models/teacher", "--dataset", f"data/{data}",
        "--out", out, "--scratch", str(OWN / "scratch" / name), params=own,
    )  # fmt: skip
    return Job(name, command, Path(out), ("train",), own)


def report_jobs(
    workspace: Path, families: Sequence[str], data: str, drawn: bool, options: argparse.Namespace
) -> list[Job]:
    """The report part, of these families together."""
    name, base = "-".join(families), workspace / "params.yaml"
    out = Path("reports") / name
    command = task(
        "evaluate", "--dataset", f"data/{data}", "--features", f"features/{data}", "--anchor", "anchor", "--teacher",
        "models/teacher", "--students", *(f"models/{family}" for family in families), "--schedules",
        "schedules/teacher", "--out", str(out), params=base,
    )  # fmt: skip
    jobs = [Job(f"evaluate-{name}", command, out / "evaluate.json", ("anchor", "calibrate", *families), base)]
    if drawn:
        path = out / "shapes-attributes.json"
        counts = ("--n", str(options.attributes_n), "--threads", str(options.threads))
        command = bench("shapes_attributes.py", "--family", *families, *counts, "--out", str(path))
        jobs.append(Job(f"attributes-{name}", command, path, ("features", *families), accepts=(0, 1)))
    return jobs


def planned(workspace: Path, options: argparse.Namespace) -> list[Job]:
    """All that is to be run, what others wait for first."""
    params = read_params(options.params)
    data, drawn = str(params["dataset"]), params["prepare"].get("source") == "shapes"
    families = families_of(params, yaml.safe_load(options.sweep.read_text(encoding="utf-8")))
    unknown = [name for group in options.report for name in group if name not in families]
    if unknown:
        raise ConfigError(f"--report: {', '.join(unknown)}: allowed: {', '.join(families)}")
    prepare, train, *others = base_jobs(workspace, params, data)
    jobs = [prepare, train, *([] if options.no_warm else warm_jobs(workspace, params, data)), others[0]]
    jobs += [family_job(workspace, name, own, data) for name, own in families.items()] + others[1:]
    chosen = Path("reports") / "student-selection.json"
    counts = ("--n", str(options.selection_n), "--threads", str(options.threads))
    by = ("--by", *map(str, options.by)) if options.by else ()
    command = bench("student_selection.py", "--family", *families, *by, *counts, "--out", str(chosen))
    jobs.append(Job("selection", command, chosen, ("anchor", *families)))
    for group in options.report:
        jobs += report_jobs(workspace, group, data, drawn, options)
    return jobs
