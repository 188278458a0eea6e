"""bench/few_steps.py: what a distillation costs, budgets, methods from plain values, and what is run again."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from ado_tasks.config import parse, read_params
from ado_tasks.errors import ConfigError
from ado_tasks.optimise.consistency import ConsistencyConfig
from ado_tasks.optimise.distill_config import DistillConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import few_steps
import few_steps_methods as ways

PARAMS = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())


def test_the_costs_are_those_counted_by_hand():
    small = {"teacher_steps": 8, "student_steps": [2, 1], "stage_steps": [10, 20], "batch_size": 4}
    # 4 teacher steps and 3 for the student's own; 2 and 3.
    regression = 10 * 4 * 7 + 20 * 4 * 5
    assert ways.cost(parse(DistillConfig, small, "x")) == regression
    # One step: the sample 1, teacher and critic 2, what it is held to 2, student 3, critic 3.
    matching = {"steps": [0, 5], "batch_size": 6}
    assert ways.cost(parse(DistillConfig, {**small, "matching": matching}, "x")) == regression + 5 * 6 * 11
    # Back through half of the critic, and real images forth and back through half of it.
    matching["adversarial"] = {"weight": [1.0, 1.0]}
    assert ways.cost(parse(DistillConfig, {**small, "matching": matching}, "x")) == regression + 5 * 6 * 13.5
    matching["adversarial"] = {"weight": [1.0, 0.0]}  # of a student that is not matched
    assert ways.cost(parse(DistillConfig, {**small, "matching": matching}, "x")) == regression + 5 * 6 * 11
    tuned = ConsistencyConfig(steps=10, batch_size=4, student_steps=(2, 1), search_levels=3, search_samples=50)
    assert ways.cost(tuned) == 10 * 4 * 4 + 3 * 50 * 2  # one point is searched for, with two evaluations each


def test_the_default_methods_spend_the_budget_and_keep_their_proportions():
    methods = ways.methods_of(PARAMS)
    assert len(methods) == 8
    for parts in methods.values():
        for part in parts:
            found = ways.scaled(part.section, part.share * 300_000)
            assert ways.cost(found) == pytest.approx(part.share * 300_000, rel=0.01)
    [matched] = methods["+ matching"]
    half = ways.scaled(matched.section, ways.cost(matched.section) / 2)
    assert half.stage_steps == (150, 100, 125)
    assert half.matching.steps == (0, 15, 90)
    assert half.walks == 1500
    assert methods["progressive"][0].section.matching is None
    assert matched.section.matching.adversarial is None
    assert methods["+ matching, adversarial"][0].section.matching.adversarial is not None
    [noised] = methods["+ matching, no walks"]
    assert (noised.section.walks, noised.section.teacher_steps) == (None, 20)
    assert noised.section.matching == matched.section.matching
    [muon], [further] = methods["+ matching, Muon"], methods["+ matching, further walks"]
    assert muon.section == replace(matched.section, optimiser="muon")
    assert further.section == replace(matched.section, further_walks=4 * matched.section.walks)
    assert ways.scaled(further.section, ways.cost(further.section) / 2).further_walks == 2 * matched.section.walks
    first, second = methods["consistency of a student"]
    assert (first.start, second.start, second.section.method) == (None, 1, "consistency")


def test_a_workspace_with_muon_and_further_walks_is_compared_with_itself_without_them():
    own = {**PARAMS["distill"]["progressive"], "optimiser": "muon", "further_walks": 40}
    methods = ways.methods_of({**PARAMS, "distill": {"progressive": own}})
    assert len(methods) == 8
    [matched], [adam], [alone] = (
        methods[name] for name in ("+ matching", "+ matching, Adam", "+ matching, no further walks")
    )
    assert adam.section == replace(matched.section, optimiser="adam")
    assert alone.section == replace(matched.section, further_walks=None)
    assert matched.section.further_walks == 40


def test_without_walks_the_teachers_steps_are_some_that_students_divide():
    own = {"walks": 9, "walk_evaluations": 20, "further_walks": 9, "teachers_share": 0.5, "hold_on_to": "walks"}
    kept = {**own, "teacher_steps": 50, "student_steps": [8, 4]}
    assert ways.without_walks(kept) == {"teacher_steps": 48, "student_steps": [8, 4]}
    assert ways.without_walks({**kept, "teacher_steps": 10})["teacher_steps"] == 16  # 8 would be the student's own


@pytest.mark.parametrize("preset", sorted(Path(__file__).parents[2].glob("params*.yaml")), ids=lambda path: path.stem)
def test_every_preset_has_its_usual_methods(preset):
    """Also one whose matching holds on to walks, which does not go with an adversarial term."""
    assert {"+ matching", "+ matching, adversarial"} <= set(ways.methods_of(yaml.safe_load(preset.read_text())))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"a": 3}, "sweep: a: 3 is not allowed"),
        ({"a": {"method": "other"}}, r"sweep: a\.method: 'other' is not allowed"),
        ({"a": [{"method": "consistency"}, {"start": 4}]}, r"sweep: a\.start: 4 is not allowed; .*\(2, 1\)"),
        ({"a": {"start": 1}}, r"sweep: a\.start: 1"),
        ({"a": [{"share": -0.5}]}, r"sweep: a\.share"),
    ],
)
def test_what_is_wrong_in_a_file_of_methods_is_named(values, said):
    with pytest.raises(ConfigError, match=said):
        ways.read_methods(values, "sweep")


def figures(kid: float, share: float) -> dict:
    return {
        "kid_minus_teacher": {"value": kid, "ci": [kid - 0.01, kid + 0.01]}, "margin": 0.02,
        "non_inferior": kid < 0.01, "fd_over_train": share, "fd": 2.0, "floor": 1.9, "class_accuracy": 0.99,
        "copying": {"value": 1.0, "low": 0.97, "high": 1.1, "close": 0.02},
    }  # fmt: skip


def result(name: str, seed: int, students: dict) -> dict:
    return {"name": name, "seed": seed, "evaluations": 100, "students": students}


RESULTS = [
    result("teacher", 0, {"teacher": figures(0.0, 0.12)}),
    result("a", 0, {"2": figures(0.0, 0.2), "1": figures(0.0, 0.3)}),
    result("a", 1, {"2": figures(0.0, 0.4), "1": figures(0.05, 0.1)}),
    result("b", 0, {"1": figures(-0.01, 0.08)}),
]


def test_rows_are_means_over_seeds_with_the_best_first(tmp_path):
    rows = few_steps.summary(RESULTS)
    assert [(row["name"], row["steps"]) for row in rows] == [("b", "1"), ("a", "1"), ("a", "2"), ("teacher", "teacher")]
    assert [row["non_inferior"] for row in rows] == [1, 1, 2, 1]
    assert rows[1]["fd_over_train"] == [0.3, 0.1]
    few_steps.save_picture(tmp_path / "picture.png", rows, 0.02)
    assert (tmp_path / "picture.png").stat().st_size > 1000
    few_steps.show(rows, 0.02, 50.0)


def test_what_is_finished_is_not_run_again_and_a_failure_is_told(tmp_path, monkeypatch, capsys):
    begun = []

    def begin(options, name, seed, folder):
        begun.append((name, seed))
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result(name, seed, {}))
        ending = "sys.exit(3)" if name == "bad" else f"open({str(folder / 'result.json')!r}, 'w').write({text!r})"
        return subprocess.Popen([sys.executable, "-c", f"import sys; {ending}"])

    monkeypatch.setattr(few_steps, "_begin", begin)
    bench = SimpleNamespace(key=lambda parts, seed: f"{len(parts)}")
    options = SimpleNamespace(out=tmp_path, seeds=[0, 1], jobs=2)
    first = few_steps.run_all(bench, {"a": (1,), "bad": (1,)}, options)
    assert [(found["name"], found["seed"]) for found in first] == [("teacher", 0), ("a", 0), ("a", 1)]
    assert capsys.readouterr().out.count("FAILED") == 2
    begun.clear()
    assert few_steps.run_all(bench, {"a": (1,)}, options) == first
    assert begun == []
    few_steps.run_all(bench, {"a": (1, 2)}, options)  # other settings: another folder
    assert begun == [("a", 0), ("a", 1)]


def test_methods_whose_names_differ_have_folders_that_differ():
    names = [*ways.methods_of(PARAMS), "a + b", "a b"]
    assert len({few_steps.folder_of(Path(), name, 0, "k") for name in names}) == len(names)
    assert few_steps.folder_of(Path(), "+ matching", 3, "k") == Path("plus-matching/3-k")


def test_the_sweep_that_is_kept_is_of_the_settings_that_the_search_preset_kept():
    preset = read_params(Path(__file__).parents[2] / "params.search.yaml")
    path = Path(few_steps.__file__).with_name("few_steps_sweep.yaml")
    methods = ways.read_methods(read_params(path), str(path))
    [default] = methods.pop("w0")
    assert default.section == parse(DistillConfig, preset["distill"]["progressive"], "x")
    assert len({str(parts) for parts in methods.values()}) == len(methods)
