"""Every stage depends on the code that it runs, and on the versions of what computes."""

import subprocess
import sys
from pathlib import Path

import pytest

from ado_tasks import closure, graph, versions
from ado_tasks.__main__ import TASKS
from ado_tasks.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def test_the_closure_is_what_python_really_imports() -> None:
    """The static closure covers every module of ours that importing the task loads."""
    script = (
        "import sys, ado_tasks.train\n"
        "for name, module in sys.modules.items():\n"
        "    if name.startswith('ado_tasks'): print(module.__file__)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {Path(line).resolve() for line in run.stdout.split()}
    assert loaded <= set(closure.import_closure("ado_tasks.train"))
    assert len(loaded) > 15


def test_the_hash_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "ado_tasks"
    package.mkdir()
    for name, text in {"__init__": "", "a": "from ado_tasks import b\n", "b": "X = 1\n", "c": ""}.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.setattr(closure, "_ROOT", package)

    def now() -> str:
        closure.import_closure.cache_clear()
        return closure.code_hash("ado_tasks.a")

    before = now()
    (package / "c.py").write_text("Y = 1\n")  # not imported
    assert now() == before
    (package / "b.py").write_text("X = 2\n")  # imported through a
    assert now() != before
    closure.import_closure.cache_clear()


def test_each_stages_deps_cover_its_code() -> None:
    missing = graph.missing_deps(graph.read_graph(ROOT / "dvc.yaml"))
    assert missing == {}, "renew them with: python -m ado_tasks.graph --write"


def test_a_dep_that_is_missing_is_found() -> None:
    stages = graph.read_graph(ROOT / "dvc.yaml")
    stages["stages"]["train"]["deps"].remove("ado_tasks/models/unet.py")
    assert graph.missing_deps(stages) == {"train": ["ado_tasks/models/unet.py"]}


def test_every_stage_runs_a_task() -> None:
    stages = graph.read_graph(ROOT / "dvc.yaml")["stages"]
    assert {graph.task_of(stage["cmd"]) for stage in stages.values()} == set(TASKS)
    with pytest.raises(ConfigError, match="not a stage's command"):
        graph.task_of("bash run.sh")


def test_renewing_keeps_comments_and_data(tmp_path: Path) -> None:
    path = tmp_path / "dvc.yaml"
    path.write_text((ROOT / "dvc.yaml").read_text())
    graph.write_code_deps(path)
    assert path.read_text() == (ROOT / "dvc.yaml").read_text()


def test_the_watched_versions_are_the_locked_ones() -> None:
    assert graph.NUMERIC_VERSIONS == str(versions.FILE)
    assert versions.read_json(ROOT / versions.FILE) == versions.locked(ROOT / "uv.lock")


def test_installed_versions_are_checked(tmp_path: Path) -> None:
    versions.check_installed(ROOT / versions.FILE)
    (tmp_path / "v.json").write_text('{"numpy": "0.1"}')
    with pytest.raises(ConfigError, match="numpy"):
        versions.check_installed(tmp_path / "v.json")
