"""What Airflow and DVC add to each stage of a run: beside the time of its own command, on a running `make airflow`.

    python bench/orchestration_overhead.py [--url http://127.0.0.1:8080] [--set train.steps=50 ...] [--json OUT]
    python bench/orchestration_overhead.py --run RUN [--run RUN ...]      (of runs that have ended)

Without --run it triggers `reoptimize` twice with these overrides: as it is, then forced, so that every stage's result
is known. A stage's overhead is the time from the end of the last task that it waited for to its own end, less what its
command took: scheduling, the process of the task, a workspace, DVC, checkpoints, the record in MLflow. Bars:
at most 5 s for a stage that runs, 6 s for a cached one; the forced run ends within 30 s + 6 s a stage. In a first run
a stage's outputs are pushed to the remote too: that is a part of it.
"""

import argparse
import json
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

DAG, GROUP = "reoptimize", "stages."
RUNS_BAR_S, CACHED_BAR_S, FORCED_BAR_S = 5.0, 6.0, 30.0  # set beforehand


@dataclass(frozen=True)
class Stage:
    """One stage of one run; times in seconds."""

    name: str
    cached: bool
    command_s: float
    waited_s: float  # from the end of what it waited for to its start
    task_s: float  # from its start to its end

    @property
    def overhead_s(self) -> float:
        """What is not the command."""
        return self.waited_s + self.task_s - self.command_s


class Airflow:
    """The REST API of an Airflow on loopback, where nobody is asked who they are."""

    def __init__(self, url: str) -> None:
        """`url` without a slash at its end."""
        self.url = url

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """One request of /api/v2."""
        with urllib.request.urlopen(f"{self.url}/auth/token", timeout=60) as answer:
            token = json.loads(answer.read())["access_token"]
        request = urllib.request.Request(
            f"{self.url}/api/v2{quote(path, safe='/?=&')}", None if body is None else json.dumps(body).encode(),
            {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}, method=method,
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def run_to_its_end(self, run: str, conf: dict[str, Any]) -> None:
        """Trigger a run and wait; SystemExit where it fails."""
        self.ask("POST", f"/dags/{DAG}/dagRuns", {"logical_date": None, "dag_run_id": run, "conf": conf})
        while (state := self.ask("GET", f"/dags/{DAG}/dagRuns/{run}")["state"]) not in {"success", "failed"}:
            time.sleep(1)
        if state == "failed":
            sys.exit(f"run {run} failed: see {self.url}/dags/{DAG}/runs/{quote(run)}")

    def stages(self, run: str) -> list[Stage]:
        """The stages of a run that has ended, in the order in which they began."""
        upstream: dict[str, set[str]] = {}
        for task in self.ask("GET", f"/dags/{DAG}/tasks")["tasks"]:
            for below in task["downstream_task_ids"]:
                upstream.setdefault(below, set()).add(task["task_id"])
        instances = self._instances(run)
        found = []
        for name, instance in instances.items():
            if not name.startswith(GROUP) or instance["state"] != "success":
                continue
            path = f"/dags/{DAG}/dagRuns/{run}/taskInstances/{name}/xcomEntries/return_value?deserialize=true"
            result = self.ask("GET", path)["value"]
            free = max(_time(instances[above]["end_date"]) for above in upstream[name])
            # One stage at a time: what another stage took is not overhead of this one.
            busy = [_time(other["end_date"]) for other in instances.values()
                    if other["end_date"] and _time(other["end_date"]) <= _time(instance["start_date"])]  # fmt: skip
            began, ended = _time(instance["start_date"]), _time(instance["end_date"])
            found.append(
                Stage(result["stage"], result["cached"], result["seconds"], began - max([free, *busy]), ended - began)
            )
        return found

    def _instances(self, run: str) -> dict[str, dict[str, Any]]:
        found = self.ask("GET", f"/dags/{DAG}/dagRuns/{run}/taskInstances")["task_instances"]
        return {task["task_id"]: task for task in sorted(found, key=lambda task: task["start_date"] or "~")}

    def wall_s(self, run: str) -> float:
        """From the trigger to the last task's end."""
        about = self.ask("GET", f"/dags/{DAG}/dagRuns/{run}")
        return _time(about["end_date"]) - _time(about["queued_at"])


def _time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def table(run: str, stages: list[Stage], wall_s: float) -> str:
    """One run as text, with its figures beside the bars."""
    lines = [f"run {run}: {wall_s:.1f} s, {len(stages)} stages", ""]
    lines.append(f"{'stage':<24}{'':<8}{'command':>9}{'waited':>9}{'task':>9}{'overhead':>10}   s")
    for stage in stages:
        word = "cached" if stage.cached else "ran"
        lines.append(f"{stage.name:<24}{word:<8}{stage.command_s:9.1f}{stage.waited_s:9.1f}{stage.task_s:9.1f}"
                     f"{stage.overhead_s:10.1f}")  # fmt: skip
    for word, cached, bar_s in (("ran", False, RUNS_BAR_S), ("cached", True, CACHED_BAR_S)):
        found = [stage.overhead_s for stage in stages if stage.cached is cached]
        if found:
            lines.append(f"{word}: overhead median {median(found):.1f}, most {max(found):.1f} s; bar {bar_s:.0f} s")
    if stages and sum(stage.cached for stage in stages) >= len(stages) - 1:  # a stage that runs always may be one
        lines.append(f"forced run: {wall_s:.1f} s; bar {FORCED_BAR_S + CACHED_BAR_S * len(stages):.0f} s")
    return "\n".join(lines)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="of Airflow (default: %(default)s)")
    parser.add_argument("--run", action="append", default=[], help="of a run that has ended, instead of new ones")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of params.yaml")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    airflow, runs = Airflow(options.url), list(options.run)
    if not runs:
        pairs = (pair.partition("=") for pair in options.set)
        conf = {"approval": "automatic", "overrides": {key: json.loads(value) for key, _, value in pairs}}
        stamp = time.strftime("%Y%m%dT%H%M%S")
        for kind, force in (("first", False), ("forced", True)):
            runs.append(f"overhead-{stamp}-{kind}")
            airflow.run_to_its_end(runs[-1], {**conf, "force": force})
    figures = {}
    for run in runs:
        stages, wall_s = airflow.stages(run), airflow.wall_s(run)
        print(table(run, stages, wall_s), end="\n\n")
        figures[run] = {
            "wall_s": wall_s,
            "stages": [asdict(stage) | {"overhead_s": stage.overhead_s} for stage in stages],
        }
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
