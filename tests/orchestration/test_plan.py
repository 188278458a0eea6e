"""The plan of a run: its branch, its settings, what would run, and when it is not worth beginning."""

import json
from pathlib import Path

import pytest
import yaml
from dvc_projects import dvc, git

from ado_tasks.endpoints import endpoints
from ado_tasks.errors import ConfigError
from ado_tasks.orchestration import git_flow, outcome
from ado_tasks.orchestration.git_flow import DirtyTreeError, GitError
from ado_tasks.orchestration.plan import GraphShapeError, bundle_key, plan
from ado_tasks.orchestration.resolve import stage_graph
from ado_tasks.stores import open_store

WRITE = "python -c \"import sys; open(sys.argv[1], 'w').write(sys.argv[2])\""
FILES = {
    "params.yaml": "# settings\nfirst:\n  x: 3   # how much\nmethods: [a]\n",
    "params.large.yaml": "first:\n  x: 30\nmethods: [a]\n",
    "dvc.yaml": {
        "stages": {
            "first": {"cmd": f"{WRITE} one.txt ${{first.x}}", "params": ["first"], "outs": ["one.txt"]},
            "second": {
                "matrix": {"method": "${methods}"},
                "cmd": f"{WRITE} ${{item.method}}.txt 1", "deps": ["one.txt"], "outs": ["${item.method}.txt"],
            },
            "clock": {"cmd": f"{WRITE} clock.txt 1", "outs": ["clock.txt"], "always_changed": True},
        }
    },
    ".gitignore": "/one.txt\n/a.txt\n/b.txt\n/clock.txt\n.ado/\n",
}  # fmt: skip
RUN = "manual__2026-11-24T04:17:32.229+00:00"


@pytest.fixture
def project(make_project):
    made = make_project(FILES)
    made.commit()
    return made


def plan_of(project, run=RUN, **asked):
    shape = asked.pop("shape", None) or stage_graph(project.folder).shape
    places = endpoints({}, project.folder)
    return plan(run, shape=shape, places=places, scratch=project.folder / ".ado" / "work", **asked)


def ran(project, message="dvc.lock"):
    """What a run leaves: everything made, its lock committed."""
    dvc(project.folder, "repro", "--quiet")
    git(project.folder, "add", "--force", "dvc.lock")
    git(project.folder, "commit", "--quiet", "--message", message)


def test_a_first_run_runs_everything_on_a_branch_of_its_own(project):
    found = plan_of(project)
    assert found.proceed
    assert found.to_run == ["first", "second@a", "clock"]
    assert found.branch == "run/manual-2026-11-24T04-17-32-229"
    assert git(project.folder, "rev-parse", found.branch) == found.revision == found.base


def test_nothing_changed_ends_the_run_and_leaves_no_branch(project):
    ran(project)
    found = plan_of(project)
    assert (found.proceed, found.to_run) == (False, [])
    assert "nothing changed" in found.reason
    assert git(project.folder, "branch", "--list", "run/*") == ""


def test_force_goes_on_though_nothing_changed(project):
    ran(project)
    found = plan_of(project, force=True)
    assert (found.proceed, found.to_run) == (True, [])
    assert git(project.folder, "rev-parse", found.branch) == found.revision


def test_a_change_runs_what_reads_from_it_too(project):
    ran(project)
    found = plan_of(project, changes={"first.x": 4})
    assert found.to_run == ["first", "second@a"]


def test_overrides_are_committed_with_comments_kept(project):
    found = plan_of(project, changes={"first.x": 4})
    assert found.revision != found.base
    text = git(project.folder, "show", f"{found.branch}:params.yaml")
    assert text == "# settings\nfirst:\n  x: 4   # how much\nmethods: [a]"
    assert "first.x: 4" in git(project.folder, "log", "-1", "--format=%B", found.branch)
    assert git(project.folder, "status", "--porcelain") == ""


def test_a_preset_becomes_the_params_of_the_run(project):
    found = plan_of(project, preset="params.large.yaml", changes={"methods": ["a"]})
    assert yaml.safe_load(git(project.folder, "show", f"{found.branch}:params.yaml"))["first"]["x"] == 30
    with pytest.raises(ConfigError, match=r"params.huge.yaml.*there: params.large.yaml, params.yaml"):
        plan_of(project, run="other", preset="params.huge.yaml")


def test_a_preset_that_needs_other_stages_is_refused_and_leaves_nothing(make_project):
    """Its searches would be left out, or those of `dvc.yaml` run with no settings, hours after the run began."""
    root = Path(__file__).parents[2]
    names = ("dvc.yaml", "params.yaml", "params.shapes16.yaml")
    made = make_project({name: (root / name).read_text(encoding="utf-8") for name in names})
    made.commit()
    for asked in ({"preset": "params.shapes16.yaml"}, {"changes": {"probe.race.sizes": [6, 2]}}):
        with pytest.raises(GraphShapeError, match=r"(shapes16.yaml|probe.race.sizes): needs other .*probe.*methods-of"):
            plan_of(made, **asked)
    assert git(made.folder, "branch", "--list", "run/*") == ""
    assert "train" in plan_of(made, changes={"train.steps": 3000}).to_run


def test_a_second_attempt_finds_the_branch_of_the_first(project):
    first = plan_of(project, changes={"first.x": 4})
    assert plan_of(project, changes={"first.x": 4}) == first


def test_overrides_that_change_the_shape_are_refused_and_leave_nothing(project):
    with pytest.raises(GraphShapeError, match=r"methods: adds, removes or rewires stages.*second@b"):
        plan_of(project, changes={"methods": ["a", "b"]})
    assert git(project.folder, "branch", "--list", "run/*") == ""


def test_a_dag_of_another_graph_is_refused(project):
    with pytest.raises(GraphShapeError, match="same revision"):
        plan_of(project, shape="another")


def test_an_override_of_an_unknown_section_lists_what_there_is(project):
    with pytest.raises(ConfigError, match=r"'third.x'.*no section 'third' at the top; there: first, methods"):
        plan_of(project, changes={"third.x": 1})


def test_uncommitted_changes_are_named_and_a_changed_lock_is_not_one(project):
    ran(project)
    project.write({"dvc.lock": (project.folder / "dvc.lock").read_text() + "\n"})
    assert not plan_of(project).proceed
    project.write({"params.yaml": "first:\n  x: 5\nmethods: [a]\n"})
    with pytest.raises(DirtyTreeError, match=r"not committed: params.yaml;"):
        plan_of(project)


def test_a_remote_that_cannot_be_reached_is_named(project, tmp_path):
    places = endpoints({"ADO_GIT_REMOTE": str(tmp_path / "nowhere")}, project.folder)
    with pytest.raises(GitError, match="nowhere"):
        plan(RUN, shape="", places=places, scratch=tmp_path / "work")


def test_what_the_last_concluded_run_did_is_not_done_again(project):
    """A run that was refused is not merged: its lock is on its own branch, and says that nothing changed since."""
    git(project.folder, "checkout", "--quiet", "-b", "run/before")
    ran(project)
    git(project.folder, "checkout", "--quiet", "main")
    store = open_store(endpoints({}, project.folder).store)
    before = {"branch": "run/before", "revision": "0" * 40}
    outcome.record(store, "before", before, {"outcome": "failed", "why": ""})
    assert plan_of(project, run="a").proceed, "a run that failed is no reason to stop"
    outcome.record(store, "before", before, {"outcome": "refused", "why": ""})
    assert not plan_of(project, run="b").proceed
    assert plan_of(project, run="c", changes={"first.x": 9}).to_run == ["first", "second@a"]
    git(project.folder, "branch", "--quiet", "-D", "run/before")
    assert plan_of(project, run="d").proceed, "a deleted branch says nothing"


def test_the_store_has_a_bundle_of_the_revision(project, tmp_path):
    found = plan_of(project, changes={"first.x": 4})
    bundle = tmp_path / "it.bundle"
    open_store(endpoints({}, project.folder).store).download_file(bundle_key(found.revision), bundle)
    git(tmp_path, "init", "--quiet", "--bare", "mirror")
    git(tmp_path / "mirror", "fetch", "--quiet", str(bundle), "+refs/*:refs/*")
    assert git(tmp_path / "mirror", "show", f"{found.revision}:params.yaml").splitlines()[2] == "  x: 4   # how much"


def test_a_plan_is_small_and_plain(project):
    assert len(json.dumps(plan_of(project).as_plain())) < 4000


@pytest.mark.parametrize("run", ["scheduled__2026-11-23T04:00:00+00:00", "asset triggered~^: x", "..lock"])
def test_every_run_id_becomes_a_name_that_git_allows(run, tmp_path):
    git(tmp_path, "check-ref-format", "--branch", git_flow.branch_name(run))
