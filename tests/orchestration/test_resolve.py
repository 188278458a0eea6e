"""DVC's reading of a project: kept until something that it read changes, and read without anything heavy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ado_tasks.orchestration import resolve
from ado_tasks.orchestration.failures import CycleError, GraphError
from ado_tasks.orchestration.resolve import stage_graph

ROOT = Path(__file__).resolve().parents[2]
PROJECT = {
    "params.yaml": {"names": ["a", "b"], "code": 1},
    "dvc.yaml": {"stages": {"make": {"foreach": "${names}", "do": {"cmd": "touch ${item}", "outs": ["${item}"]}}}},
}


@pytest.fixture
def runs(monkeypatch) -> list[Path]:
    """The projects for which DVC was started."""
    started: list[Path] = []
    run = resolve._run_resolver
    monkeypatch.setattr(
        resolve, "_run_resolver", lambda project, everything: started.append(project) or run(project, everything)
    )
    return started


def names(folder: Path) -> list[str]:
    return [stage.name for stage in stage_graph(folder)]


def test_dvc_is_asked_again_only_where_something_it_read_changed(make_project, runs) -> None:
    project = make_project(PROJECT)
    assert names(project.folder) == ["make@a", "make@b"]
    project.write({"notes.txt": "x", "dvc.lock": "schema: '2.0'\n"})
    assert names(project.folder) == ["make@a", "make@b"]
    assert len(runs) == 1
    project.write({"params.yaml": {"names": ["a", "b", "c"]}})
    assert names(project.folder) == ["make@a", "make@b", "make@c"]
    assert len(runs) == 2
    project.write({"deep/er/dvc.yaml": {"stages": {"x": {"cmd": "touch x", "outs": ["x"]}}}})
    assert [stage.name for stage in stage_graph(project.folder, all_pipelines=True)][-1] == "deep/er/dvc.yaml:x"
    assert names(project.folder)[-1] == "make@c"
    assert len(runs) == 4


def test_a_damaged_cache_is_made_anew(make_project, runs) -> None:
    project = make_project(PROJECT)
    names(project.folder)
    cache = project.folder / ".dvc" / "tmp" / "stage-graph" / "graph.json"
    for damage in ("{", json.dumps({"format": 0})):
        cache.write_text(damage)
        assert names(project.folder) == ["make@a", "make@b"]
    assert len(runs) == 3


@pytest.mark.parametrize(
    ("files", "error", "said"),
    [
        ({"dvc.yaml": "stages: ["}, GraphError, "dvc.yaml"),
        ({"dvc.yaml": {"vars": ["absent.yaml"], "stages": {"x": {"cmd": "true"}}}}, GraphError, "absent.yaml"),
        (
            {"dvc.yaml": {"stages": {"x": {"cmd": "t", "deps": ["b"], "outs": ["a"]},
                                     "y": {"cmd": "t", "deps": ["a"], "outs": ["b"]}}}},
            CycleError, "x",
        ),
        (
            {"dvc.yaml": {"stages": {"x": {"cmd": "t", "outs": ["a"]}, "y": {"cmd": "t", "outs": ["a/b"]}}}},
            GraphError, "overlap",
        ),
    ],
)  # fmt: skip
def test_what_dvc_refuses_is_a_named_error(make_project, files, error, said: str) -> None:
    with pytest.raises(error, match=said):
        stage_graph(make_project(files).folder)


def test_a_folder_that_is_no_project(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="no DVC project"):
        stage_graph(tmp_path)


def test_our_own_graph_has_every_stage_once() -> None:
    graph = stage_graph(ROOT)
    assert [stage.name for stage in graph][:4] == ["prepare", "features", "profile", "train"]
    assert graph.stage("distill@progressive").task_id == "distill-progressive"
    assert graph.stage("evaluate").upstream == (
        "prepare", "features", "anchor", "train", "distill@progressive", "distill_searched", "search",
        "calibrate_searched", "calibrate@teacher",
    )  # fmt: skip
    assert graph.stage("search").upstream == (
        "train", *(f"probe@{lane}" for lane in range(4)), "probe_1@4", "probe_1@5", "weigh",
    )  # fmt: skip
    assert graph.stage("profile").always_changed


def test_reading_the_graph_imports_nothing_heavy() -> None:
    stage_graph(ROOT)
    code = (
        "import sys, pathlib; from ado_tasks.orchestration.resolve import stage_graph; "
        f"stage_graph(pathlib.Path({str(ROOT)!r})); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    heavy = {"airflow", "boto3", "dvc", "mlflow", "mlx", "networkx", "numpy", "pandas", "pydantic", "yaml"}
    assert not heavy & set(loaded.split())
