"""Merging a run: by fast-forward on the remote, never in a folder that someone works in."""

import pytest
from dvc_projects import git

from ado_tasks.orchestration import git_flow


@pytest.fixture
def work(make_project):
    made = make_project({"a.txt": "1"})
    made.commit()
    git(made.folder, "checkout", "--quiet", "-b", "run/x")
    made.write({"dvc.lock": "schema: '2.0'\n"})
    made.commit()
    git(made.folder, "checkout", "--quiet", "main")
    return made


@pytest.fixture
def remote(work, tmp_path):
    git(tmp_path, "clone", "--quiet", "--bare", str(work.folder), "remote.git")
    return str(tmp_path / "remote.git")


def test_a_run_is_merged_by_fast_forward_and_a_second_time_changes_nothing(work, remote, tmp_path):
    found = git_flow.merge(remote, "run/x", "main", tmp_path)
    assert found["merged"]
    branches = git_flow.remote_branches(remote, "*")
    assert branches["main"] == branches["run/x"]
    assert git_flow.merge(remote, "run/x", "main", tmp_path)["merged"]


def test_a_branch_that_moved_on_is_left_and_said(work, remote, tmp_path):
    work.write({"a.txt": "2"})
    work.commit()
    git(work.folder, "push", "--quiet", remote, "main")
    before = git_flow.remote_branches(remote, "*")
    found = git_flow.merge(remote, "run/x", "main", tmp_path)
    assert not found["merged"]
    assert "git merge run/x" in found["how"]
    assert git_flow.remote_branches(remote, "*") == before


@pytest.mark.parametrize("where", ["folder", "worktree"])
def test_a_checked_out_branch_is_not_touched_and_the_command_is_said(where, work, tmp_path):
    if where == "worktree":
        git(work.folder, "checkout", "--quiet", "--detach")
        git(work.folder, "worktree", "add", "--quiet", str(tmp_path / "tree"), "main")
    before = git_flow.remote_branches(str(work.folder), "main")
    found = git_flow.merge(str(work.folder), "run/x", "main", tmp_path / "scratch")
    assert not found["merged"]
    assert "git merge --ff-only run/x" in found["how"]
    assert git_flow.remote_branches(str(work.folder), "main") == before


@pytest.mark.parametrize("tracked", [True, False])
def test_the_usual_obstacle_is_named_with_a_way_that_works(make_project, tracked, tmp_path):
    work = make_project({"a.txt": "1", **({"dvc.lock": "old"} if tracked else {})})
    work.commit()
    git(work.folder, "checkout", "--quiet", "-b", "run/x")
    work.write({"dvc.lock": "of the run"})
    work.commit()
    git(work.folder, "checkout", "--quiet", "main")
    work.write({"dvc.lock": "of a dvc repro"})
    how = str(git_flow.merge(str(work.folder), "run/x", "main", tmp_path / "scratch")["how"])
    with pytest.raises(AssertionError, match=r"dvc\.lock"):
        git(work.folder, "merge", "--ff-only", "run/x")
    assert "mv dvc.lock dvc.lock.mine" in how
    (work.folder / "dvc.lock").rename(work.folder / "dvc.lock.mine")
    git(work.folder, "merge", "--ff-only", "run/x")
    assert (work.folder / "dvc.lock").read_text() == "of the run"


def test_a_folder_whose_main_branch_is_not_checked_out_is_a_remote_like_any_other(work, tmp_path):
    git(work.folder, "checkout", "--quiet", "run/x")
    assert git_flow.merge(str(work.folder), "run/x", "main", tmp_path / "scratch")["merged"]


def test_hooks_and_git_variables_of_the_caller_decide_nothing(work, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert set(git_flow.remote_branches(str(work.folder), "*")) == {"main", "run/x"}


def test_an_error_says_the_command_and_what_git_says(tmp_path):
    with pytest.raises(git_flow.GitError, match=r"git ls-remote .*nowhere"):
        git_flow.remote_branches(str(tmp_path / "nowhere"), "*")
