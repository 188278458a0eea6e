"""One stage in a workspace of its own: found where it is known, resumed where it was stopped, harmless when doubled."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from dvc_projects import Fleet, dvc, git

from ado_tasks.endpoints import endpoints
from ado_tasks.errors import ArtifactError, ConfigError, StorageError
from ado_tasks.orchestration.failures import (
    StageError,
    StageInterruptedError,
    WorkspaceError,
    command_failed,
    is_permanent,
)  # fmt: skip
from ado_tasks.orchestration.stage import load_lock, store_lock
from ado_tasks.stores import open_store

# Counts slowly, keeps a checkpoint every fifth step under a temporary name first, and says where it started.
COUNT = """\
import os, pathlib, time
scratch = pathlib.Path(".ado/scratch/count/key")
scratch.mkdir(parents=True, exist_ok=True)
done = max((int(path.name) for path in scratch.glob("[0-9]*")), default=0)
print("counts from", done, flush=True)
(scratch / ".half.tmp-1").write_text("never complete")
for step in range(done + 1, 41):
    time.sleep(float(os.environ.get("STEP_S", "0.1")))
    if step % 5 == 0:
        (scratch / ".new.tmp-1").write_text(str(step))
        (scratch / ".new.tmp-1").rename(scratch / str(step))
        for old in sorted(scratch.glob("[0-9]*"), key=lambda path: int(path.name))[:-2]:
            old.unlink()
pathlib.Path("count.txt").write_text("counted to 40")
"""
COUNTING = {
    "count.py": COUNT,
    "dvc.yaml": {
        "stages": {
            "count": {"cmd": "python count.py", "deps": ["count.py"], "outs": ["count.txt"]},
            "after": {"cmd": "wc -c < count.txt > after.txt", "deps": ["count.txt"], "outs": ["after.txt"]},
        }
    },
}


@pytest.fixture
def fleet(make_project, make_fleet, monkeypatch) -> Fleet:
    monkeypatch.setattr("ado_tasks.orchestration.checkpoints._LOOK_EVERY_S", 0.1)
    return make_fleet(make_project(COUNTING))


def checkpoints(fleet: Fleet) -> list[str]:
    return [key for key in open_store(fleet.places.store).list("checkpoints/")]


def starts(fleet: Fleet) -> list[int]:
    return [int(line.split()[-1]) for line in fleet.said if line.startswith("counts from")]


def wait_for(condition: Any) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s, "it never came"
        time.sleep(0.05)


def test_it_runs_once_for_all_machines(fleet: Fleet, monkeypatch) -> None:
    monkeypatch.setenv("STEP_S", "0")
    first = fleet.run_all()
    assert [(result.stage, result.cached) for result in first] == [("count", False), ("after", False)]
    second = fleet.run_all(machine="two")
    assert [result.cached for result in second] == [True, True]
    assert [result.lock for result in second] == [result.lock for result in first]
    assert starts(fleet) == [0]
    assert not list((fleet.machines / "two").rglob("count.txt"))
    assert not (fleet.machines / "two" / "cache" / "files").exists(), "data moved for results that were known"
    again = fleet.run("count", force=True)
    assert (again.cached, again.lock, starts(fleet)) == (False, first[0].lock, [0, 0])
    fleet.project.write({"count.py": COUNT + "# another\n"})
    fleet.publish()
    assert not fleet.run("count").cached


def test_a_committed_lock_is_enough(fleet: Fleet, monkeypatch) -> None:
    monkeypatch.setenv("STEP_S", "0")
    folder = fleet.project.folder
    dvc(folder, "remote", "add", "--local", "--default", "there", str(fleet.places.dvc_remote))
    dvc(folder, "repro")
    dvc(folder, "push", "--quiet")
    fleet.publish()
    assert [result.cached for result in fleet.run_all()] == [True, True]


def test_a_result_that_was_lost_is_computed_again(fleet: Fleet, monkeypatch) -> None:
    monkeypatch.setenv("STEP_S", "0")
    lock = fleet.run("count").lock
    shutil.rmtree(fleet.shared / "dvc" / "files")
    again = fleet.run("count", machine="two")
    assert (again.cached, again.lock) == (False, lock)


WORKER = """\
import json, pathlib, sys
from ado_tasks.endpoints import Endpoints
from ado_tasks.orchestration import checkpoints
from ado_tasks.orchestration.stage import run_stage
checkpoints._LOOK_EVERY_S = 0.1
places, revision, root = json.loads(sys.argv[1])
root = pathlib.Path(root)
run_stage("count", revision=revision, upstream_locks={}, endpoints=Endpoints(**places), workspace_root=root)
"""


def test_killed_work_goes_on_elsewhere(fleet: Fleet, monkeypatch) -> None:
    revision = fleet.publish()
    told = json.dumps([asdict(fleet.places), revision, str(fleet.machines / "one")])
    worker = subprocess.Popen([sys.executable, "-c", WORKER, told], stdout=subprocess.DEVNULL)
    wait_for(lambda: len(checkpoints(fleet)) >= 2)
    workspaces = fleet.machines / "one" / "workspaces"
    (place,) = workspaces.iterdir()
    worker.kill()
    worker.wait()
    wait_for(lambda: not processes_in(place))  # what it started notices that its parent is gone
    assert not any("half" in key or "new" in key for key in checkpoints(fleet)), "an incomplete file was mirrored"
    monkeypatch.setenv("STEP_S", "0")
    result = fleet.run("count", machine="two")
    assert not result.cached
    assert starts(fleet)[0] >= 5
    assert result.lock["outs"][0]["size"] == len("counted to 40")
    assert checkpoints(fleet) == []
    assert list((fleet.machines / "two" / "workspaces").iterdir()) == []
    fleet.run("count", machine="one")
    assert list(workspaces.iterdir()) == [], "what the killed attempt left behind is still there"


def processes_in(place: Path) -> list[str]:
    """Commands of the processes whose current folder lies in `place`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(process / "cwd")).is_relative_to(place):
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


def test_asked_to_stop_it_keeps_its_checkpoints(fleet: Fleet, monkeypatch) -> None:
    stopping = threading.Event()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(fleet.run, "count", stopping=stopping)
        wait_for(lambda: checkpoints(fleet))
        stopping.set()
        with pytest.raises(StageInterruptedError, match="goes on from the last checkpoint") as caught:
            running.result()
    assert not is_permanent(caught.value)
    assert list((fleet.machines / "one" / "workspaces").iterdir()) == []
    monkeypatch.setenv("STEP_S", "0")
    assert not fleet.run("count", machine="two").cached
    assert starts(fleet)[1] >= 5


def test_two_at_once_do_no_harm(fleet: Fleet) -> None:
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda machine: fleet.run("count", machine=machine), ["one", "two"]))
    assert both[0].lock == both[1].lock
    assert fleet.run("after", machine="three").lock["outs"][0]["size"] == len("13\n")
    remote = fleet.shared / "dvc"
    assert not list(remote.rglob("*tmp*"))
    assert len([path for path in (remote / "runs").rglob("*") if path.is_file()]) == 2


def test_a_result_fits_into_an_xcom(fleet: Fleet, monkeypatch) -> None:
    monkeypatch.setenv("STEP_S", "0")
    plain = fleet.run("count").as_plain()
    assert len(json.dumps(plain)) < 4000
    assert plain["lock"]["outs"] == [
        {"path": "count.txt", "hash": "md5", "md5": plain["lock"]["outs"][0]["md5"], "size": 13}
    ]


def test_a_long_lock_lies_in_the_store(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    long = {"cmd": "x", "deps": [{"path": f"{number}.py", "hash": "md5", "md5": "0" * 32} for number in range(60)]}
    pointer = store_lock(long, store)
    assert set(pointer) == {"store", "sha256"}
    assert load_lock(pointer, store) == long
    assert list(load_lock(pointer, store)["deps"][0]) == ["path", "hash", "md5"]
    store.put(pointer["store"], b"{}")
    with pytest.raises(ArtifactError, match=r"sha256 .* expected, found"):
        load_lock(pointer, store)
    store.delete(pointer["store"])
    with pytest.raises(ArtifactError, match="nothing is stored"):
        load_lock(pointer, store)


def test_failures_that_stay_and_failures_that_may_pass(fleet: Fleet) -> None:
    fleet.project.write(
        {
            "params.yaml": {"seed": 1, "prepare": {"sauce": "digits"}},
            "dvc.yaml": {
                "stages": {
                    "ours": {"cmd": "python -m ado_tasks prepare --out data", "outs": ["data"]},
                    "theirs": {"cmd": "exit 2", "outs": ["theirs"]},
                    "nothing": {"cmd": "true", "outs": ["nothing"]},
                    "absent": {"cmd": "true", "deps": ["absent.txt"], "outs": ["x"]},
                }
            },
        }
    )
    fleet.publish()
    verdicts = {}
    for name in ("ours", "theirs", "nothing", "absent"):
        with pytest.raises(StageError) as caught:
            fleet.run(name)
        verdicts[name] = (is_permanent(caught.value), str(caught.value))
    assert {name: verdict[0] for name, verdict in verdicts.items()} == {
        "ours": True, "theirs": False, "nothing": True, "absent": True,
    }  # fmt: skip
    assert "ended with 2 (ConfigError)" in verdicts["ours"][1]
    assert any("sauce" in line for line in fleet.said)
    assert "absent.txt" in verdicts["absent"][1]


@pytest.mark.parametrize(
    ("code", "permanent"),
    [(2, True), (3, True), (5, False), (6, True), (8, False), (1, False), (-9, False), (137, False)],
)
def test_exit_codes(code: int, permanent: bool) -> None:
    assert is_permanent(command_failed("train", "python -m ado_tasks train", code)) is permanent
    assert not is_permanent(command_failed("train", "python train.py", code))


def test_a_remote_that_is_gone_is_named_and_may_pass(fleet: Fleet, monkeypatch) -> None:
    monkeypatch.setenv("STEP_S", "0")
    (fleet.shared / "dvc").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match="count") as caught:
        fleet.run("count")
    assert not is_permanent(caught.value)


def test_the_revision_comes_from_the_bundle_where_git_cannot(fleet: Fleet, monkeypatch) -> None:
    monkeypatch.setenv("STEP_S", "0")
    revision = fleet.publish()
    places = replace(fleet.places, git_remote=str(fleet.shared / "nowhere.git"))
    with pytest.raises(WorkspaceError, match=f"revision {revision}: neither .*nowhere.git nor the store"):
        fleet.run("count", machine="two", endpoints=places)
    bundle = fleet.shared / "revision.bundle"
    git(fleet.project.folder, "bundle", "create", "--quiet", str(bundle), "HEAD")
    open_store(fleet.places.store).upload_file(f"git/{revision}.bundle", bundle)
    assert fleet.run("count", machine="two", endpoints=places).stage == "count"


def test_a_remote_that_is_a_folder_of_another_machine_is_refused(fleet: Fleet) -> None:
    fleet.project.write({".dvc/config": "[core]\n    remote = here\n['remote \"here\"']\n    url = ../../dvc-remote\n"})
    fleet.publish()
    with pytest.raises(ConfigError, match="set ADO_DVC_REMOTE"):
        fleet.run("count", endpoints=replace(fleet.places, dvc_remote=None))


def test_the_project_on_this_machine_shares_its_cache_and_remote(fleet: Fleet, monkeypatch) -> None:
    monkeypatch.setenv("STEP_S", "0")
    fleet.project.write({".dvc/config": "[core]\n    remote = here\n['remote \"here\"']\n    url = ../there\n"})
    revision = fleet.publish()
    alone = endpoints({"ADO_STORE": str(fleet.shared / "store")}, fleet.project.folder)
    assert not fleet.run("count", endpoints=alone, revision=revision).cached
    assert (fleet.project.folder / "there" / "files").is_dir()
    assert "Stage 'count' is cached" in dvc(fleet.project.folder, "repro", "count")
    assert git(fleet.project.folder, "status", "--porcelain", "--untracked-files=no") == ""


def test_over_s3(fleet: Fleet, bucket: str, monkeypatch) -> None:
    monkeypatch.setenv("STEP_S", "0")
    places = replace(
        fleet.places, dvc_remote=f"s3://{bucket}/dvc", store=f"s3://{bucket}/store",
        s3_endpoint=os.environ["AWS_ENDPOINT_URL"],
    )  # fmt: skip
    first = fleet.run("count", endpoints=places)
    assert not first.cached
    fleet.run("after", machine="two", endpoints=places)
    assert "after.txt" in json.dumps(fleet.locks["after"])
    again = fleet.run("count", machine="three", endpoints=places)
    assert (again.cached, again.lock) == (True, first.lock)
