"""Three DVC projects in other styles than ours: the same order and the same results as `dvc repro`."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc_projects import dvc, git

from ado_tasks.orchestration.resolve import stage_graph

# Text statistics: a matrix of two axes, a list of commands, params of two files, a metric that DVC does not cache.
WORDS = {
    "words.py": "import sys, pathlib\nsize, out = int(sys.argv[1]), pathlib.Path(sys.argv[2])\n"
    "out.parent.mkdir(exist_ok=True)\nout.write_text(' '.join(f'w{i % size}' for i in range(size * 3)))\n",
    "count.py": "import json, sys\ntext = ' '.join(open(path).read() for path in sys.argv[2:])\n"
    "json.dump({'words': len(text.split()), 'kinds': len(set(text.split()))}, open(sys.argv[1], 'w'))\n",
    "params.yaml": {"sizes": {"small": 2, "large": 5}, "unused": 1},
    "limits.json": '{"most": 7}',
    "dvc.yaml": {
        "stages": {
            "write": {
                "matrix": {"size": [2, 5], "tone": ["loud"]},
                "cmd": [
                    "python words.py ${item.size} text/${item.tone}-${item.size}.txt",
                    "echo ${item.tone} >> text/${item.tone}-${item.size}.txt",
                ],
                "deps": ["words.py"],
                "outs": ["text/${item.tone}-${item.size}.txt"],
            },
            "count": {
                "cmd": "python count.py counts.json text/loud-2.txt text/loud-5.txt",
                "deps": ["count.py", "text"],  # the folder that two stages write into
                "params": ["sizes", {"limits.json": ["most"]}],
                "metrics": [{"counts.json": {"cache": False}}],
            },
        }
    },
}

# Nested: a pipeline below another, with variables of its own, reading what the upper one makes, which reads its output.
NESTED = {
    "settings.yaml": {"cities": {"rome": {"people": 3}, "oslo": {"people": 1}}, "unit": "k"},
    "dvc.yaml": {
        "vars": ["settings.yaml", {"folder": "made"}],
        "stages": {
            "report": {
                "cmd": "cat ../${folder}/rome.txt ../sub/total.txt > report.txt",
                "wdir": "reports",
                "deps": ["../${folder}/rome.txt", "../sub/total.txt"],
                "outs": ["report.txt"],
            },
            "city": {
                "foreach": "${cities}",
                "do": {
                    "cmd": "mkdir -p ${folder} && echo ${key} ${item.people}${unit} > ${folder}/${key}.txt",
                    "outs": ["${folder}/${key}.txt"],
                },
            },
        },
    },
    "reports/.keep": "",
    "sub/local.yaml": {"label": "total"},
    "sub/dvc.yaml": {
        "vars": ["local.yaml"],
        "stages": {
            "total": {
                "cmd": "cat ../made/*.txt ../raw.csv > ${label}.txt",
                "deps": ["../made/rome.txt", "../made/oslo.txt", "../raw.csv"],
                "outs": ["${label}.txt"],
            }
        },
    },
    "unrelated/dvc.yaml": {"stages": {"aside": {"cmd": "echo aside > aside.txt", "outs": ["aside.txt"]}}},
}

# Odd ones: an output inside which another stage reads one file, a stage that always runs, one that is frozen.
ODD = {
    "params.yaml": {"seed": 4},
    "dvc.yaml": {
        "stages": {
            "pack": {
                "cmd": "python -c \"import pathlib; p = pathlib.Path('pack'); p.mkdir(); "
                '[(p / str(i)).write_text(str(i * ${seed})) for i in range(3)]"',
                "params": ["seed"],
                "outs": ["pack"],
            },
            "one": {"cmd": "cat pack/2 > one.txt", "deps": ["pack/2"], "outs": ["one.txt"]},
            "stamp": {"cmd": "echo fixed > stamp.txt", "always_changed": True, "outs": ["stamp.txt"]},
            "kept": {"cmd": "cat one.txt > kept.txt", "deps": ["one.txt"], "outs": ["kept.txt"], "frozen": True},
            "last": {
                "cmd": "cat kept.txt stamp.txt one.txt > last.txt",
                "deps": ["kept.txt", "stamp.txt", "one.txt"],
                "plots": ["last.txt"],
            },
        }
    },
}


def stages_run(log: str) -> list[str]:
    return re.findall(r"^Running stage '(.+)':$", log, re.MULTILINE)


def locks_below(folder: Path) -> dict[str, Any]:
    files = {path.relative_to(folder).as_posix(): yaml.safe_load(path.read_text()) for path in folder.rglob("dvc.lock")}
    return {name: lock["stages"] for name, lock in files.items()}


def reproduced(project, tmp_path: Path) -> tuple[list[str], dict[str, Any]]:
    """What `dvc repro` runs, in which order, and the locks that it writes, in a clone of its own."""
    git(tmp_path, "clone", "--quiet", str(project.folder), "plain")
    clone = tmp_path / "plain"
    config = project.folder / ".dvc" / "config.local"
    if config.exists():
        (clone / ".dvc" / "config.local").write_text(config.read_text())
        dvc(clone, "pull", "--quiet", "--allow-missing")
    return stages_run(dvc(clone, "repro", "--pull")), locks_below(clone)


def check_like_dvc(project, fleet, tmp_path: Path) -> None:
    order, locks = reproduced(project, tmp_path)
    results = fleet.run_all()
    assert [result.stage for result in results if not result.cached] == order
    assert fleet.lock_files() == locks


def test_matrix_commands_and_uncached_metrics(make_project, make_fleet, tmp_path: Path) -> None:
    project = make_project(WORDS)
    fleet = make_fleet(project)
    check_like_dvc(project, fleet, tmp_path)
    assert stages_run("\n".join(fleet.said)) == ["write@2-loud", "write@5-loud", "count"]
    fleet.locks.clear()
    assert [result.cached for result in fleet.run_all(machine="two")] == [True] * 3  # from the remote's run cache alone


def test_nested_pipelines_foreach_and_tracked_data(make_project, make_fleet, tmp_path: Path) -> None:
    project = make_project(NESTED)
    fleet = make_fleet(project)
    project.write({"raw.csv": "1,2\n"})
    dvc(project.folder, "remote", "add", "--local", "--default", "there", fleet.places.dvc_remote)
    dvc(project.folder, "add", "raw.csv")
    dvc(project.folder, "push", "--quiet")
    fleet.publish()
    check_like_dvc(project, fleet, tmp_path)
    assert "sub/dvc.yaml:total" in fleet.locks
    assert "unrelated/dvc.yaml:aside" not in fleet.locks
    everything = {stage.name for stage in stage_graph(project.folder, all_pipelines=True)}
    assert everything == {*fleet.locks, "unrelated/dvc.yaml:aside"}


def test_frozen_always_changed_and_a_file_of_a_folder(make_project, make_fleet, tmp_path: Path) -> None:
    project = make_project(ODD)
    fleet = make_fleet(project)
    dvc(project.folder, "remote", "add", "--local", "--default", "there", fleet.places.dvc_remote)
    project.write({"dvc.yaml": (project.folder / "dvc.yaml").read_text().replace("frozen: true", "frozen: false")})
    dvc(project.folder, "repro", "kept")
    dvc(project.folder, "push", "--quiet")
    project.write({"dvc.yaml": ODD["dvc.yaml"]})
    fleet.publish()
    check_like_dvc(project, fleet, tmp_path)
    graph = stage_graph(project.folder)
    assert graph.stage("kept").upstream == ()


@pytest.mark.parametrize("seed", ["0", "1"])
def test_the_same_graph_whatever_the_hash_seed(make_project, monkeypatch, seed: str) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", seed)
    names = [stage.name for stage in stage_graph(make_project(NESTED).folder)]
    assert names == ["city@rome", "city@oslo", "sub/dvc.yaml:total", "report"]
