"""Projects and machines for the tests of orchestration; see `dvc_projects`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from dvc_projects import Fleet, Project, git


@pytest.fixture
def make_project(tmp_path: Path) -> Callable[..., Project]:
    def make(files: Mapping[str, Any], name: str = "project") -> Project:
        folder = tmp_path / name
        folder.mkdir()
        git(folder, "init", "--quiet", "--initial-branch=main")
        project = Project(folder)
        project.write(
            {".dvc/config": "[core]\n    analytics = false\n", ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n"}
        )
        project.write(files)
        return project

    return make


@pytest.fixture
def make_fleet(tmp_path: Path) -> Callable[[Project], Fleet]:
    def make(project: Project) -> Fleet:
        fleet = Fleet(project, tmp_path / "shared", tmp_path / "machines")
        fleet.publish()
        return fleet

    return make
