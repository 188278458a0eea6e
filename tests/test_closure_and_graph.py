"""Every stage depends on the code that it runs, and on the versions of what computes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ado_tasks import closure, graph, versions
from ado_tasks.__main__ import TASKS
from ado_tasks.config import read_params
from ado_tasks.errors import ConfigError
from ado_tasks.search_stages import search_stages, set_search

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
    stages |= search_stages({}, explained=True)
    assert {graph.task_of(stage["cmd"]) for stage in stages.values()} == set(TASKS)
    with pytest.raises(ConfigError, match="not a stage's command"):
        graph.task_of("bash run.sh")


def test_renewing_keeps_comments_and_data(tmp_path: Path) -> None:
    path = tmp_path / "dvc.yaml"
    path.write_text((ROOT / "dvc.yaml").read_text())
    graph.write_code_deps(path)
    assert path.read_text() == (ROOT / "dvc.yaml").read_text()


def test_methods_are_those_of_a_params_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another method is a word in the matrix, and a folder in the commands and deps of what compares; and back."""
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    Path("one.yaml").write_text("distill: {progressive: {}}")
    Path("two.yaml").write_text("distill: {progressive: {}, consistency: {method: consistency}}")
    Path("none.yaml").write_text("distill: {}")
    before = ""
    for name in ("one", "two", "two", "one", "two"):
        monkeypatch.setattr(sys, "argv", ["graph", "--methods-of", f"{name}.yaml"])
        assert graph.main() == 0
        if name == "one":
            before = before or Path("dvc.yaml").read_text()
            assert Path("dvc.yaml").read_text() == before
    stages = graph.read_graph(Path("dvc.yaml"))["stages"]
    assert stages["distill"]["matrix"]["method"] == ["progressive", "consistency"]
    for name in ("measure", "evaluate"):
        assert "--students models/progressive models/consistency --schedules" in stages[name]["cmd"]
        assert {"models/progressive", "models/consistency"} <= set(stages[name]["deps"])
        assert len(stages[name]["deps"]) == len(set(stages[name]["deps"]))
    assert len(Path("dvc.yaml").read_text().splitlines()) == len(before.splitlines()) + 2
    with pytest.raises(ConfigError, match=r"none\.yaml: distill: \{\} is not allowed"):
        graph.methods_in(Path("none.yaml"))


def test_a_search_is_in_the_graph_where_params_have_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lanes follow from the race, each rung depends on the one below, its students are compared; and back."""
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    Path("without.yaml").write_text("distill: {progressive: {}}")
    race = "{sizes: [4, 2], steps: [1, 2], unguided: 3}"
    Path("with.yaml").write_text(f"distill: {{progressive: {{}}}}\nprobe: {{race: {race}}}")
    written = set()
    for name in ("without", "with", "with", "without", "with"):
        monkeypatch.setattr(sys, "argv", ["graph", "--methods-of", f"{name}.yaml"])
        assert graph.main() == 0
        if name == "without":
            written.add(Path("dvc.yaml").read_text())
    assert len(written) == 1 and "models/probes" not in written.pop()
    stages = graph.read_graph(Path("dvc.yaml"))["stages"]
    lanes = {name: list(stage["matrix"]["lane"]) for name, stage in stages.items() if name.startswith("probe")}
    assert lanes == {"probe": ["0", "1", "2"], "probe_guided": ["3"], "probe_1": ["4", "5"]}
    assert {f"models/probes/{lane}" for lane in range(4)} <= set(stages["probe_1"]["deps"])
    assert "--before models/probes/0 models/probes/1 models/probes/2 --out" in stages["probe_guided"]["cmd"]
    for name in ("measure", "evaluate"):
        assert "--students models/progressive models/searched --schedules" in stages[name]["cmd"]
        assert "models/searched" in stages[name]["deps"]


def test_what_a_search_chose_is_calibrated_and_compared_where_params_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not where they have no such section, as they had none before it existed."""
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text((ROOT / "dvc.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    probe, section = "probe: {race: {sizes: [2, 1], steps: [1, 2], unguided: 2}}\n", "calibrate_searched: {nfe: [2]}\n"
    for name, text in {"old": probe, "new": probe + section, "without": ""}.items():
        Path(f"{name}.yaml").write_text(f"distill: {{progressive: {{}}}}\n{text}", encoding="utf-8")

    def written(name: str) -> str:
        monkeypatch.setattr(sys, "argv", ["graph", "--methods-of", f"{name}.yaml"])
        assert graph.main() == 0
        return Path("dvc.yaml").read_text(encoding="utf-8")

    before, old, new = written("without"), written("old"), written("new")
    assert "calibrate_searched" not in old and "--architecture" not in old
    assert (written("new"), written("old"), written("new")) == (new, old, new)
    assert written("without") == before
    written("new")
    stages = graph.read_graph(Path("dvc.yaml"))["stages"]
    calibrate = stages["calibrate_searched"]
    assert "--section calibrate_searched --model models/architecture --dataset data/${dataset}" in calibrate["cmd"]
    assert list(calibrate["outs"]) == ["schedules/architecture"] and "models/architecture" in calibrate["deps"]
    assert list(calibrate["params"]) == ["seed", "calibrate_searched"]
    compared = "--architecture models/architecture --architecture-schedules schedules/architecture --out reports"
    for name in ("measure", "evaluate"):
        assert stages[name]["cmd"].count(compared) == 1
        assert stages[name]["deps"].count("models/architecture") == stages[name]["deps"].count("models/searched") == 1
        assert stages[name]["deps"].count("schedules/architecture") == 1


def test_a_stage_that_only_begins_like_one_of_the_search_stays() -> None:
    """And every name that a race of any size gives is the search's own: a smaller race leaves none behind."""
    race = {"sizes": [4, 3, 2, 1], "steps": [1, 1, 1, 1], "unguided": 3}
    own, others = search_stages({"race": race}, calibrated=True, explained=True), [
        "probes_report", "probe_mine", "probe_1_again", "searching", "search_log", "weigh_in", "sensitivity_map",
        "calibrate_searched_again",
    ]  # fmt: skip
    assert {"probe_guided", "probe_3", "distill_searched", "calibrate_searched"} <= set(own)
    stage = {"cmd": "python -m ado_tasks profile --out reports/mine.json", "deps": []}
    stages = {"stages": {name: stage for name in (*others, *own)}}
    set_search(stages, {})
    assert list(stages["stages"]) == others


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (None, "given.yaml: cannot be read"),
        ("distill: []", "a section for each method is required"),
        ("distill: {teacher: {}}", "distill.teacher: is the name of a folder"),
        ("distill: {a b: {}}", "distill.a b: is the name of a folder"),
        ("distill: {1: {}}", "distill.1: is the name of a folder"),
        ("distill: {progressive: {}}\nprobe: 3", "probe: 3 is not allowed"),
        ("distill: {progressive: {}}\ncalibrate_searched: {}", "calibrate_searched: of a search, and there is no"),
        ("distill: {progressive: {}}\nweigh: {}\nsearch: {}", "weigh, search: of"),
        ("distill: {progressive: {}}\nprobe: {race: {sizes: [257], steps: [1]}}", "probe.race.sizes.0: 257"),
    ],
)
def test_params_that_give_no_graph_are_named_and_the_graph_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], params: str | None, said: str
) -> None:
    before = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    (tmp_path / "dvc.yaml").write_text(before, encoding="utf-8")
    if params is not None:
        (tmp_path / "given.yaml").write_text(params)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["graph", "--methods-of", "given.yaml"])
    assert graph.main() == ConfigError.exit_code
    assert said in capsys.readouterr().err
    assert (tmp_path / "dvc.yaml").read_text(encoding="utf-8") == before


@pytest.mark.parametrize("text", [None, "", "foo: {}", ": [", "stages: {a: {cmd: python -m ado_tasks nix, deps: []}}"])
def test_a_graph_that_is_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    """A task that is none has no code to list: its stage would pass the check, and never run anew."""
    if text is not None:
        (tmp_path / "dvc.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["graph"])
    assert graph.main() == ConfigError.exit_code
    assert capsys.readouterr().err.startswith("ado_tasks.graph: ConfigError: ")


def test_the_preset_of_the_search_measures_as_the_small_one_and_searches_more() -> None:
    small, search = (read_params(ROOT / f"params{name}.yaml") for name in ("", ".search"))
    assert set(search) - set(small) == {"sensitivity"}
    measured = ("seed", "dataset", "hardware", "prepare", "features", "anchor", "measure")
    assert all(search[name] == small[name] for name in measured)
    taught = ("teacher_steps", "teacher_solver", "student_steps", "batch_size", "charbonnier")
    for params in (small, search):  # how long is their own
        assert all(params["distill_searched"][key] == params["distill"]["progressive"][key] for key in taught)
    assert search["calibrate_searched"] == search["calibrate"]["teacher"]


def test_the_committed_graph_is_that_of_the_small_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    (tmp_path / "dvc.yaml").write_text(before, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["graph", "--methods-of", str(ROOT / "params.yaml")])
    assert graph.main() == 0
    assert (tmp_path / "dvc.yaml").read_text(encoding="utf-8") == before


def test_what_each_block_is_worth_is_a_stage_where_it_is_asked_for() -> None:
    race = {"sizes": [2], "steps": [1], "unguided": 2}
    assert "sensitivity" not in search_stages({"race": race})
    assert "sensitivity" in search_stages({"race": race}, explained=True)
    graph_of: dict[str, Any] = {"stages": {}}
    for params, there in (({"sensitivity": {}}, True), ({}, False)):
        set_search(graph_of, {"probe": {"race": race}, **params})
        assert ("sensitivity" in graph_of["stages"]) is there


def test_the_search_for_shapes_takes_their_teacher_as_it_is() -> None:
    """The same text up to `distill`: a teacher that was stored is that of both; so is what students are judged by."""
    texts = [(ROOT / f"params.{name}.yaml").read_text(encoding="utf-8") for name in ("shapes32", "search32")]
    shapes, search = (text.partition("\nseed:")[2].partition("\ndistill:") for text in texts)
    assert search[0] == shapes[0]
    after = [rest.partition("\ncalibrate:")[2].partition("\nprobe:")[0].strip() for _, _, rest in (shapes, search)]
    assert after[0] == after[1]
    added = {"probe", "weigh", "search", "sensitivity", "distill_searched", "calibrate_searched"}
    assert set(read_params(ROOT / "params.search32.yaml")) - set(read_params(ROOT / "params.shapes32.yaml")) == added
    both = read_params(ROOT / "params.search32.yaml")
    assert both["calibrate_searched"] == both["calibrate"]["teacher"]


def test_the_watched_versions_are_the_locked_ones() -> None:
    assert graph.NUMERIC_VERSIONS == str(versions.FILE)
    assert versions.read_json(ROOT / versions.FILE) == versions.locked(ROOT / "uv.lock")


def test_installed_versions_are_checked(tmp_path: Path) -> None:
    versions.check_installed(ROOT / versions.FILE)
    (tmp_path / "v.json").write_text('{"numpy": "0.1"}')
    with pytest.raises(ConfigError, match="numpy"):
        versions.check_installed(tmp_path / "v.json")
