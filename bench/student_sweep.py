"""Settings of distillation side by side, a card each: from nothing to the table they are chosen by, without DVC.

    python bench/student_sweep.py WORKSPACE --params params.shapes32.yaml --sweep bench/shapes32_sweep.yaml \
        --cards 0 1 2 3 3 --report a0 a1

The sweep file names families of students and says in what each differs from `distill.progressive` of the params file
(and `seed`). In WORKSPACE the stages prepare, features, train, anchor and calibrate are run once, and each family is
distilled into models/<name>; `student_selection.py` then compares all of them on the selection part, and for each
`--report` the families named are held against the report part together (`evaluate`, and `shapes_attributes.py` where
the data are drawn shapes). As much runs at a time as there are `--cards`, each a GPU's number; one that is named twice
takes two. On a GPU what will be compiled is compiled meanwhile, on networks that have learned nothing.

What is done is not done again: an interrupted sweep goes on. A log of each part is in WORKSPACE/.ado/sweep. The exit
code is 1 where a part failed; what does not need it is run all the same.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ado_tasks.config import parse, read_params
from ado_tasks.errors import AdoError, ConfigError
from ado_tasks.optimise.distill_config import DistillConfig
from ado_tasks.storage import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
OWN = Path(".ado") / "sweep"  # of a workspace: logs, params files, and what was done
WARM = {"steps": 4, "warmup_steps": 1}  # of a training that only compiles
WARM_STUDENTS = {  # the same of students
    "walks": 512, "further_walks": 512, "teacher_steps": 8, "walk_evaluations": 4, "stage_steps": 3,
}  # fmt: skip
WAIT = 0.2  # seconds between looks at what runs


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


class Sweep:
    """What runs, what is done, and what failed."""

    def __init__(self, workspace: Path, jobs: Sequence[Job], cards: Sequence[str]) -> None:
        """Raises ConfigError where a result is there that was made with other settings."""
        self.workspace, self.jobs, self.cards = workspace, {job.name: job for job in jobs}, list(cards)
        self.done = {job.name for job in jobs if self._is_done(job)}
        self.failed: set[str] = set()
        self.running: dict[str, tuple[subprocess.Popen[bytes], str, float]] = {}

    def run(self) -> set[str]:
        """Run all that can be run; returns the names of what failed."""
        try:
            while self._start() or self.running:
                time.sleep(WAIT)
                for name in [name for name, (process, _, _) in self.running.items() if process.poll() is not None]:
                    self._end(name)
        finally:
            for process, _, _ in self.running.values():
                process.terminate()
                process.wait()
        return self.failed

    def _start(self) -> bool:
        """Start what is ready, where a card is free; whether anything is still to come."""
        waiting = [job for name, job in self.jobs.items() if name not in self.done | self.failed | set(self.running)]
        for job in waiting:
            if self.failed & set(job.needs):
                print(f"{job.name}: not run: it needs what failed", flush=True)
                self.failed.add(job.name)
            elif self.cards and set(job.needs) <= self.done:
                busy = [card for _, card, _ in self.running.values()]
                card = min(self.cards, key=busy.count)
                self.cards.remove(card)
                print(f"{job.name}: starts on card {card}", flush=True)
                with self._path(job, "log").open("wb") as log:
                    process = subprocess.Popen(
                        job.command, cwd=self.workspace, env=self._environment(card), stdout=log,
                        stderr=subprocess.STDOUT,
                    )  # fmt: skip
                self.running[job.name] = process, card, time.monotonic()
        return bool(waiting)

    def _end(self, name: str) -> None:
        process, card, began = self.running.pop(name)
        job, spent = self.jobs[name], time.monotonic() - began
        self.cards.append(card)
        if process.returncode in job.accepts and (self.workspace / job.out).exists():
            write_json(self._path(job, "json"), {"fingerprint": job.fingerprint(self.jobs), "seconds": spent})
            self.done.add(name)
            print(f"{name}: done in {spent:.0f} s", flush=True)
        else:
            self.failed.add(name)
            log = self._path(job, "log").read_bytes().decode(errors="replace").strip().splitlines()
            print(
                f"{name}: FAILED with {process.returncode}: {log[-1] if log else ''} (see {job.name}.log)", flush=True
            )

    def _is_done(self, job: Job) -> bool:
        mark, out = self._path(job, "json"), self.workspace / job.out
        if mark.exists() and out.exists() and read_json(mark).get("fingerprint") == job.fingerprint(self.jobs):
            return True
        if not out.is_dir():  # a report is written anew
            return False
        raise ConfigError(f"{out}: it was made with other settings, or elsewhere; move it away, or give another name")

    def _path(self, job: Job, kind: str) -> Path:
        path = self.workspace / OWN / f"{job.name}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _environment(self, card: str) -> dict[str, str]:
        own = {"CUDA_VISIBLE_DEVICES": card, "PYTHONPATH": str(ROOT), "ADO_SYNC": "manual", "PYTHONUNBUFFERED": "1"}
        path = os.environ.get("PYTHONPATH")
        if path:
            own["PYTHONPATH"] += os.pathsep + path
        return {"MLX_PTX_CACHE_DIR": str(self.workspace.resolve() / OWN / "kernels"), **os.environ, **own}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path, help="made where it is not there")
    parser.add_argument("--params", type=Path, required=True, help="a params file")
    parser.add_argument("--sweep", type=Path, required=True, help="names of families, and in what each differs")
    parser.add_argument("--cards", nargs="+", default=["0"], help="GPUs' numbers (default: 0)")
    parser.add_argument("--report", nargs="+", action="append", default=[], metavar="NAME",
                        help="families to be read on the report part together; may be given again")  # fmt: skip
    parser.add_argument("--by", type=int, nargs="+", default=[], help="evaluations that families are chosen by (all)")
    parser.add_argument("--selection-n", type=int, default=5000, help="pictures a student on the selection part")
    parser.add_argument(
        "--attributes-n", type=int, default=5000, help="pictures whose place and size are read on the report part"
    )
    parser.add_argument("--threads", type=int, default=2, help="that read place and size")
    parser.add_argument("--no-warm", action="store_true", help="compile nothing beforehand")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 where a part failed, 2 where the sweep cannot run, 130 where it was interrupted."""
    options = parse_arguments(arguments)
    try:
        options.workspace.mkdir(parents=True, exist_ok=True)
        workspace = options.workspace.resolve()
        failed = Sweep(workspace, planned(workspace, options), options.cards).run()
    except AdoError as problem:
        print(f"student-sweep: {type(problem).__name__}: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("student-sweep: interrupted; the same command goes on", file=sys.stderr)
        return 130
    selection = workspace / OWN / "selection.log"
    if "selection" not in failed and selection.exists():
        print(selection.read_text(encoding="utf-8"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
