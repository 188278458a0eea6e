"""Where a chain of students stops: at the first that is worse, whatever comes after it, and it says why."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ado_tasks.errors import ConfigError, StatisticsError
from ado_tasks.metrics.interval import Interval
from ado_tasks.optimise.stages import Stage, stages_of, stopping_point

MARGIN = 0.02


def chain(*highs: float, start: int = 8) -> list[Stage]:
    """Students of start, start/2, … steps whose intervals end at these values."""
    return [Stage(start >> place, Interval(high - 0.004, high - 0.008, high)) for place, high in enumerate(highs)]


def test_all_are_as_good():
    stop = stopping_point(chain(0.001, 0.005, 0.01, 0.019), MARGIN)
    assert (stop.steps, stop.failed, stop.decided) == (1, None, True)
    assert "down to 1 step:" in stop.reason and "0.019 < margin 0.02" in stop.reason
    stop = stopping_point(chain(0.001, 0.005), MARGIN)
    assert (stop.steps, stop.decided) == (4, False) and "not tried" in stop.reason


def test_the_first_failure_ends_it():
    stop = stopping_point(chain(0.001, 0.005, 0.031, 0.5), MARGIN)
    assert (stop.steps, stop.failed, stop.decided) == (4, 2, True)
    assert stop.reason.startswith("stops at 4 steps: at 2 steps KID − teacher upper end 0.031 ≥ margin 0.02")
    assert "lower end (0.023)" in stop.reason


def test_the_margin_itself_is_too_much():
    assert stopping_point(chain(0.0199999), MARGIN).steps == 8
    assert stopping_point(chain(MARGIN), MARGIN).steps is None


def test_not_even_the_first():
    stop = stopping_point(chain(0.1, 0.2), MARGIN)
    assert stop.steps is None and stop.failed == 8
    assert stop.reason.startswith("stops before its first student: at 8 steps")


def test_a_later_student_that_passes_is_named_and_not_taken():
    stop = stopping_point(chain(0.001, 0.03, 0.01, 0.4), MARGIN)
    assert stop.steps == 8 and "; 2 would pass again" in stop.reason


def test_a_wide_interval_asks_for_samples():
    stop = stopping_point([Stage(4, Interval(0.01, -0.02, 0.04))], MARGIN)
    assert stop.steps is None and "more samples might tell" in stop.reason


@given(st.lists(st.floats(-0.05, 0.1), min_size=1, max_size=4), st.floats(0.001, 0.05), st.floats(1.0, 4.0))
def test_a_wider_margin_never_stops_sooner_and_worse_students_never_later(highs, margin, factor):
    def kept(highs, margin):
        return stopping_point(chain(*highs), margin).steps or 16

    assert kept(highs, margin * factor) <= kept(highs, margin)
    assert kept([high + 0.01 for high in highs], margin) >= kept(highs, margin)


@given(st.lists(st.floats(-0.05, 0.1), min_size=1, max_size=4))
def test_what_is_kept_has_passed_and_all_before_it(highs):
    stages = chain(*highs)
    stop = stopping_point(stages, MARGIN)
    before = [stage for stage in stages if stop.steps is not None and stage.steps >= stop.steps]
    assert all(stage.difference.high < MARGIN for stage in before)
    assert stop.failed is None or next(s for s in stages if s.difference.high >= MARGIN).steps == stop.failed


def test_bad_chains_and_margins_are_named():
    for stages in ([], chain(0.1, 0.1)[::-1], [Stage(0, Interval(0, 0, 0))], chain(0.1) * 2):
        with pytest.raises(ConfigError, match="stages"):
            stopping_point(stages, MARGIN)
    with pytest.raises(StatisticsError, match="margin"):
        stopping_point(chain(0.1), 0.0)


def test_a_report_is_read_in_order_and_by_family():
    def entry(name, nfe, high):
        return {"name": name, "nfe": nfe, "kid_minus_teacher": {"value": high / 2, "ci": [0.0, high]}}

    entries = [entry("progressive-2", 2, 0.1), entry("teacher-8", 8, 0.3), entry("progressive-8", 8, 0.01)]
    stages = stages_of(entries, "progressive")
    assert [stage.steps for stage in stages] == [8, 2]
    assert stages[0].difference == Interval(0.005, 0.0, 0.01)
    assert stopping_point(stages, MARGIN).steps == 8


def test_the_table_says_where_it_stops_and_the_picture_is_the_same_each_time(tmp_path, capsys):
    from ado_tasks.compare import main
    from ado_tasks.storage import write_json

    def entry(name, nfe, high):
        return {
            "name": name, "solver": "ddim", "nfe": nfe, "fd": 2.0, "paired_distance": 0.01, "class_accuracy": None,
            "kid_minus_teacher": {"value": high / 2, "ci": [0.0, high], "non_inferior": high < MARGIN},
        }  # fmt: skip

    entries = [entry("teacher-50", 50, 0.0), entry("teacher-4", 4, 0.2), entry("progressive-4", 4, 0.01)]
    floor = {"mean": 1.0, "range": [0.5, 1.5], "n": 199}
    reference = {"floor_fd": floor, "anchor": {"margin": MARGIN}}
    report = {
        "variants": [*entries, entry("progressive-2", 2, 0.05)],
        "reference": reference,
        "chosen": "progressive-4",
    }
    write_json(tmp_path / "evaluate.json", report)
    for name in ("a.png", "b.png"):
        assert main(["--reports", str(tmp_path), "--stages", str(tmp_path / name)]) == 0
    said = capsys.readouterr().out
    assert "progressive distillation stops at 4 steps: at 2 steps KID − teacher upper end 0.05 ≥ margin 0.02" in said
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
