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
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from student_sweep_jobs import OWN, ROOT, Job, planned

from ado_tasks.errors import AdoError, ConfigError
from ado_tasks.storage import read_json, write_json

WAIT = 0.2  # seconds between looks at what runs


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
