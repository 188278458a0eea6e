"""DVC projects made on the spot, and machines that share a store and a remote with each other and nothing else."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ado_tasks.endpoints import Endpoints, endpoints
from ado_tasks.orchestration.resolve import stage_graph
from ado_tasks.orchestration.stage import StageResult, load_lock, run_stage
from ado_tasks.orchestration.workspace import bare_name, lock_file
from ado_tasks.stores import open_store


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def dvc(folder: Path, *arguments: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # stages say `python`
    done = subprocess.run(
        [sys.executable, "-P", "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": path, "ADO_SYNC": "manual"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass
class Project:
    """A git repository with a DVC project in it."""

    folder: Path

    def write(self, files: Mapping[str, Any]) -> None:
        """Write files: text as it is, everything else as YAML."""
        for name, content in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))

    def commit(self) -> str:
        """Commit all; returns the revision."""
        git(self.folder, "add", "--all")
        git(self.folder, "commit", "--quiet", "--allow-empty", "--message", "as it is")
        return git(self.folder, "rev-parse", "HEAD")


@dataclass
class Fleet:
    """Machines without a common disk: a git remote, a DVC remote and a store lie between them."""

    project: Project
    shared: Path
    machines: Path
    said: list[str] = field(default_factory=list)
    locks: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the stages done so far

    @property
    def places(self) -> Endpoints:
        """Where they meet."""
        return endpoints(
            {
                "ADO_GIT_REMOTE": str(self.shared / "remote.git"),
                "ADO_DVC_REMOTE": str(self.shared / "dvc"),
                "ADO_STORE": str(self.shared / "store"),
                "MLFLOW_TRACKING_URI": f"sqlite:///{self.shared / 'mlflow.db'}",
            },
            self.project.folder,
        )

    def publish(self) -> str:
        """Push what the project is now to the git remote; returns the revision."""
        revision = self.project.commit()
        bare = self.shared / "remote.git"
        if not bare.exists():
            self.shared.mkdir(exist_ok=True)
            git(self.shared, "init", "--quiet", "--bare", str(bare))
        git(self.project.folder, "push", "--quiet", "--force", str(bare), "HEAD:main")
        return revision

    def run(self, name: str, *, machine: str = "one", **options: Any) -> StageResult:
        """Do one stage on one machine, with the locks of what was done before."""
        revision = git(self.shared / "remote.git", "rev-parse", "main")
        above = {stage.name: self.locks[stage.name] for stage in stage_graph(self.project.folder).upstream(name)}
        arguments: dict[str, Any] = {
            "revision": revision, "upstream_locks": above, "endpoints": self.places,
            "workspace_root": self.machines / machine, "say": self.said.append,
        }  # fmt: skip
        result = run_stage(name, **{**arguments, **options})
        self.locks[name] = result.lock
        return result

    def run_all(self, *, machine: str = "one") -> list[StageResult]:
        """Do every stage, in the graph's order."""
        return [self.run(stage.name, machine=machine) for stage in stage_graph(self.project.folder)]

    def lock_files(self) -> dict[str, dict[str, Any]]:
        """What the locks so far would be as dvc.lock files: stages by file."""
        files: dict[str, dict[str, Any]] = {}
        for name, lock in self.locks.items():
            entry = load_lock(lock, open_store(self.places.store))
            files.setdefault(lock_file(name).as_posix(), {})[bare_name(name)] = entry
        return files
