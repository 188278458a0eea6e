"""A direct call, `dvc repro` and `run_stage` give the same bytes: every pure stage of this project's own graph."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc_projects import dvc, git

from ado_tasks.__main__ import MEASURED
from ado_tasks.endpoints import LOOPBACK
from ado_tasks.orchestration.graph import StageGraph
from ado_tasks.orchestration.resolve import stage_graph
from ado_tasks.orchestration.workspace import merge_locks, pull
from ado_tasks.storage import sha256_file, sha256_tree

ROOT = Path(__file__).resolve().parents[2]
TINY = yaml.safe_load("""\
seed: 3
dataset: digits
hardware: {}
prepare: {name: digits, source: digits, train: 200, selection: 120, report: 120}
features: {dimensions: 8, filters: 4, steps: 20, batch: 16}
train:
  model: {block_out_channels: [8], down_block_types: [DownBlock2D], up_block_types: [UpBlock2D], layers_per_block: 1,
          norm_num_groups: 4}
  steps: 20
  batch_size: 16
  warmup_steps: 2
  ema_decay: 0.9
anchor: {n_generated: 100, steps: 6, coarse_steps: 1, batch_size: 50}
distill:
  progressive: {teacher_steps: 2, student_steps: [1], stage_steps: 10, batch_size: 16}
calibrate:
  teacher: {nfe: [2], samples: 8, validation_samples: 8, points: 12, max_solves: 3}
measure: {batch_size: 2, rounds: 3, shards: 1}
evaluate: {n_generated: 100, n_paired: 30, draws: 50, batch_size: 50, shards: 1}
""")


@pytest.fixture
def project(make_project):
    made = make_project({"params.yaml": TINY, ".gitignore": "__pycache__\n.ado\n"})
    for name in ("dvc.yaml", "numeric-versions.json"):
        shutil.copyfile(ROOT / name, made.folder / name)
    shutil.copytree(ROOT / "ado_tasks", made.folder / "ado_tasks", ignore=shutil.ignore_patterns("__pycache__"))
    return made


def called_directly(graph: StageGraph, folder: Path) -> None:
    """Every stage's command line, handed to the same entry point, in one process without DVC."""
    commands = [shlex.split(command)[3:] for stage in graph for command in stage.command]
    code = "import json, sys; from ado_tasks.__main__ import main; sys.exit(max(map(main, json.loads(sys.argv[1]))))"
    environment = {**os.environ, "ADO_SYNC": "manual"}
    subprocess.run([sys.executable, "-c", code, json.dumps(commands)], cwd=folder, env=environment, check=True)


def sums(graph: StageGraph, folder: Path) -> dict[str, str]:
    """A hash of each output of each pure stage; a measured one's hold timings."""
    pure = [stage for stage in graph if shlex.split(stage.command[0])[3] not in MEASURED]
    paths = {out.path: folder / out.path for stage in pure for out in stage.outs}
    return {name: sha256_tree(path) if path.is_dir() else sha256_file(path) for name, path in paths.items()}


@pytest.mark.parametrize(
    "wanted", [("train", "profile"), pytest.param((), marks=pytest.mark.bars, id="every stage")], ids=" ".join
)
def test_the_same_bytes(project, make_fleet, tmp_path: Path, monkeypatch, wanted: tuple[str, ...]) -> None:
    monkeypatch.setattr("ado_tasks.orchestration.records._PATIENCE_S", 300.0)  # a busy machine is slow, not wrong
    fleet = make_fleet(project)
    graph = stage_graph(project.folder)
    if wanted:
        above = {other.name for name in wanted for other in graph.upstream(name)}
        graph = StageGraph(tuple(stage for stage in graph if stage.name in above | set(wanted)))
    for name in ("direct", "orchestrated"):
        git(tmp_path, "clone", "--quiet", str(project.folder), name)
    called_directly(graph, tmp_path / "direct")
    dvc(project.folder, "repro", *wanted)
    results = [fleet.run(stage.name) for stage in graph]
    orchestrated = tmp_path / "orchestrated"
    dvc(orchestrated, "remote", "add", "--local", "--default", "there", str(fleet.places.dvc_remote))
    merge_locks(orchestrated, {name: entry for name, entry in fleet.lock_files()["dvc.lock"].items()})
    pull(orchestrated)
    expected = sums(graph, project.folder)
    assert len(expected) == (2 if wanted else 10)
    assert sums(graph, tmp_path / "direct") == expected
    assert sums(graph, orchestrated) == expected
    assert not any(result.cached for result in results)
    check_what_is_shown({result.stage: result.as_plain() for result in results})


def check_what_is_shown(results: dict[str, dict]) -> None:
    """Figures, the MLflow run and its pictures, within the size of an XCom value; `profile` leaves no record."""
    assert all(len(json.dumps(plain)) < 4000 for plain in results.values())
    assert [name for name, plain in results.items() if plain["mlflow_run"] is None] == ["profile"]
    train = results["train"]
    assert train["mlflow_run"] in train["mlflow_url"]
    assert any(host in train["mlflow_url"] for host in LOOPBACK)
    assert any("path=pictures/" in picture and train["mlflow_run"] in picture for picture in train["pictures"])
    assert results["prepare"]["metrics"]["images_train"] == 200
