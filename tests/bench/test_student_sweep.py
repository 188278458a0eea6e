"""`bench/student_sweep.py`: what it plans, and how it runs it."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ado_tasks.__main__ import task_parser
from ado_tasks.config import parse, read_params
from ado_tasks.errors import ConfigError
from ado_tasks.optimise.distill_config import DistillConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import shapes_attributes
import student_selection
import student_sweep
import student_sweep_jobs
from student_sweep import ROOT, Job, Sweep

PARAMS = ROOT / "params.shapes32.yaml"


def fake(name: str, *needs: str, code: int = 0, seconds: float = 0.0, makes: bool = True) -> Job:
    """Notes when it ran and on which card, and makes its folder."""
    text = (
        f"import os, pathlib, sys, time; began = time.time(); time.sleep({seconds}); "
        + (f"pathlib.Path({name!r}).mkdir(exist_ok=True); " if makes else "")
        + "file = open('notes', 'a'); "
        f"file.write(f'{name} {{began}} {{time.time()}} ' + os.environ['CUDA_VISIBLE_DEVICES'] + chr(10)); "
        f"print('last words of {name}'); sys.exit({code})"
    )
    return Job(name, (sys.executable, "-c", text), Path(name), needs)


def notes(folder: Path) -> dict[str, tuple[float, float, str]]:
    lines = (folder / "notes").read_text(encoding="utf-8").split("\n")
    return {
        name: (float(began), float(ended), card) for name, began, ended, card in map(str.split, filter(None, lines))
    }


def test_each_waits_for_what_it_needs_and_lanes_run_beside_each_other(tmp_path: Path) -> None:
    jobs = [fake("base"), fake("one", "base", seconds=1), fake("two", "base", seconds=1), fake("end", "one", "two")]
    assert Sweep(tmp_path, jobs, ["4", "7"]).run() == set()
    found = notes(tmp_path)
    assert found["base"][1] <= min(found["one"][0], found["two"][0])
    assert max(found["one"][0], found["two"][0]) < min(found["one"][1], found["two"][1])  # at the same time
    assert {found["one"][2], found["two"][2]} == {"4", "7"}
    assert found["end"][0] >= max(found["one"][1], found["two"][1])


def test_a_card_that_is_named_twice_is_shared_only_where_the_others_are_busy(tmp_path: Path) -> None:
    jobs = [fake("one", seconds=1), fake("two", seconds=1), fake("three", seconds=1)]
    Sweep(tmp_path, jobs, ["1", "1", "0"]).run()
    found = notes(tmp_path)
    assert [found[name][2] for name in ("one", "two", "three")] == ["1", "0", "1"]


def test_what_fails_stops_what_needs_it_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [fake("bad", code=3), fake("empty", makes=False), fake("after", "bad"), fake("later", "after"), fake("good")]
    assert Sweep(tmp_path, jobs, ["0"]).run() == {"bad", "empty", "after", "later"}
    assert (tmp_path / "good").exists()
    assert not (tmp_path / "after").exists()
    shown = capsys.readouterr().out
    assert "bad: FAILED with 3: last words of bad (see bad.log)" in shown
    assert "later: not run: it needs what failed" in shown


def test_what_is_done_is_kept_and_of_other_settings_refused(tmp_path: Path) -> None:
    jobs = [fake("base"), fake("next", "base")]
    Sweep(tmp_path, jobs, ["0"]).run()
    before = (tmp_path / "notes").read_text(encoding="utf-8")
    assert Sweep(tmp_path, jobs, ["0"]).run() == set()
    assert (tmp_path / "notes").read_text(encoding="utf-8") == before
    with pytest.raises(ConfigError, match="base: it was made with other settings"):
        Sweep(tmp_path, [fake("base", seconds=0.01), jobs[1]], ["0"])
    with pytest.raises(ConfigError, match="next: it was made with other settings"):  # of what it needs
        Sweep(tmp_path, [fake("other"), fake("next", "other")], ["0"])


def test_a_report_is_written_anew_where_what_it_is_of_has_changed(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("old", encoding="utf-8")
    command = (sys.executable, "-c", "open('report', 'w').write('new')")
    assert Sweep(tmp_path, [Job("report", command, Path("report"))], ["0"]).run() == set()
    assert (tmp_path / "report").read_text(encoding="utf-8") == "new"


def planned(tmp_path: Path, sweep: Any, *options: str) -> dict[str, Job]:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    given = student_sweep.parse_arguments([str(tmp_path), "--params", str(PARAMS), "--sweep", str(file), *options])
    return {job.name: job for job in student_sweep.planned(tmp_path, given)}


def test_families_differ_in_what_the_sweep_says_and_in_nothing_else(tmp_path: Path) -> None:
    jobs = planned(tmp_path, {"a": None, "b": {"seed": 3, "walks": 99}}, "--report", "a", "b", "--report", "b")
    base = read_params(PARAMS)
    params = {name: jobs[name].params for name in ("a", "b", "train")}
    one, other, own = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in params.values() if path)
    assert own == one == base
    assert other.pop("seed") == 3
    assert other["distill"]["progressive"].pop("walks") == 99
    del base["distill"]["progressive"]["walks"], base["seed"]
    assert other == base
    assert jobs["selection"].command[3:6] == ("--family", "a", "b")
    assert {"evaluate-a-b", "attributes-a-b", "evaluate-b", "attributes-b"} <= set(jobs)
    for job in jobs.values():
        assert set(job.needs) <= set(jobs), job.name


@pytest.mark.parametrize(
    ("preset", "walks"),
    [
        ("params.yaml", {}),  # another solver walks there
        ("params.shapes32.yaml", {}),
        ("params.shapes32.yaml", {"further_walks": 99}),
        ("params.shapes32.yaml", {"walk_evaluations": None, "teacher_solver": "dpmpp_2m"}),
    ],
)
def test_what_only_compiles_has_settings_that_are_possible(tmp_path: Path, preset: str, walks: dict[str, Any]) -> None:
    params = student_sweep_jobs.changed(read_params(ROOT / preset), walks)
    *_, warm = student_sweep_jobs.warm_jobs(tmp_path, params, "any")
    assert warm.params
    section = read_params(warm.params)["distill"]["progressive"]
    found = parse(DistillConfig, section, "warm")
    assert (found.walks, found.teacher_steps, found.stage_steps) == (512, 8, 3)
    fewer = params["distill"]["progressive"].get("walk_evaluations") is not None
    assert (found.walk_evaluations or 8) < 8 if fewer else found.walk_evaluations is None


def test_every_command_is_one_that_its_program_takes(tmp_path: Path) -> None:
    benches = {"student_selection.py": student_selection, "shapes_attributes.py": shapes_attributes}
    counts = ("--selection-n", "41", "--attributes-n", "42", "--threads", "3", "--by", "4", "2")
    seen = {}
    for job in planned(tmp_path, {"a": {}}, "--report", "a", *counts).values():
        _, program, *words = job.command
        if program == "-m":
            name = words[1]
            function = getattr(importlib.import_module(f"ado_tasks.{name}"), name)
            options = task_parser(name, function).parse_args(words[2:])
            assert options.out == (job.out.parent if name == "evaluate" else job.out)
        else:
            options = benches[Path(program).name].parse_arguments(words)
            assert (options.workspace, options.out, options.family) == (Path("."), job.out, ["a"])
            seen[job.name] = options.n, options.threads
            assert getattr(options, "by", [4, 2]) == [4, 2]
    assert seen == {"selection": (41, 3), "attributes-a": (42, 3)}


@pytest.mark.parametrize(
    ("sweep", "options", "message"),
    [
        ([], [], "a mapping of names"),
        ({"a": 3}, [], "a: 3: allowed: a plain name with a mapping"),
        ({"a/b": {}}, [], "a/b"),
        ({"a": {"walks": 0}}, [], "--sweep: a.*walks"),
        ({"a": {"wlaks": 5}}, [], "wlaks"),
        ({"a": {}}, ["--report", "a", "z"], "--report: z: allowed: a"),
    ],
)
def test_what_is_no_sweep_is_refused(tmp_path: Path, sweep: Any, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(tmp_path, sweep, *options)


def test_it_says_what_is_wrong_and_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps({"a": {"walks": 0}}), encoding="utf-8")
    assert student_sweep.main([str(tmp_path / "new"), "--params", str(PARAMS), "--sweep", str(file)]) == 2
    assert "student-sweep: ConfigError" in capsys.readouterr().err
