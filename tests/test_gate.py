"""The gate's decision: every way to be refused, one figure at a time, with a reason that holds both figures."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from ado_tasks.config import parse
from ado_tasks.errors import ArtifactError, ConfigError, StatisticsError
from ado_tasks.gate import GatePolicy, challenger_figures, gate
from ado_tasks.verdict import as_text, question

MARGIN = 0.02
Figures = dict[str, Any]


def variant(name: str, **changes: Any) -> Figures:
    difference = {"value": 0.005, "ci": [0.001, 0.009], "margin": MARGIN, "non_inferior": True}
    return {
        "name": name, "nfe": 4, "kid_minus_teacher": difference, "recall": 0.8, "class_accuracy": 0.98,
        "memorisation": {"value": 1.0, "low": 0.97, "high": 1.03, "close": 0.02},
        "fd_over_train": {"value": 0.2, "ratio_to_floor": 0.13}, **changes,
    }  # fmt: skip


def cost(name: str, speedup: float = 10.0, latency_ms: float = 2.0) -> Figures:
    return {
        "name": name, "peak_memory_mb": 23.0, "latency_ms_per_image": {"median": latency_ms, "min": 1.9, "max": 2.1},
        "speedup_vs_teacher": {"median": speedup + 1, "min": speedup, "max": speedup + 2},
    }  # fmt: skip


def reports() -> tuple[Figures, Figures]:
    names = ["teacher-50", "progressive-4"]
    quality = {"variants": [variant(name) for name in names], "chosen": "progressive-4"}
    return quality, {"variants": [cost(name) for name in names], "hardware": {"id": "here"}}


@pytest.fixture
def challenger() -> Figures:
    found = challenger_figures(*reports(), "c" * 64)
    found["against"] = {
        role: {"version": "3", "value": 0.001, "ci": [-0.003, 0.005]} for role in ("champion", "anchor")
    }
    return found


@pytest.fixture
def champion() -> Figures:
    return {
        "version": "7", "model_sha256": "f" * 64, "cost": cost("progressive-4"), "hardware": "here", "withdrawn": [],
    }  # fmt: skip


def test_the_reports_chosen_variant_is_the_challenger(challenger: Figures) -> None:
    assert challenger["name"] == challenger["quality"]["name"] == challenger["cost"]["name"] == "progressive-4"
    assert challenger["teacher"]["name"] == "teacher-50"
    assert (challenger["margin"], challenger["hardware"]) == (MARGIN, "here")
    with pytest.raises(ArtifactError, match="'consistency-1' is not in the report; there: teacher-50, progressive-4"):
        challenger_figures(*reports(), "c" * 64, "consistency-1")


def test_what_holds_everything_is_approved_with_reasons(challenger: Figures, champion: Figures) -> None:
    for rival in (champion, None):
        verdict = gate(challenger, rival, GatePolicy())
        assert verdict.approved
        assert len(verdict.reasons) == len([check for check in verdict.table if check.passed])
        assert all(check.passed for check in verdict.table)


def test_the_gate_leaves_its_figures_alone(challenger: Figures, champion: Figures) -> None:
    before = copy.deepcopy((challenger, champion))
    gate(challenger, champion, GatePolicy())
    assert (challenger, champion) == before


def figure(path: str, value: Any) -> Callable[[Figures], None]:
    """A change of one figure of the challenger."""

    def change(figures: Figures) -> None:
        *above, last = path.split(".")
        for name in above:
            figures = figures[name]
        figures[last] = value

    return change


REFUSALS = {
    "beside the champion": (figure("against.champion.ci", [0, 0.0201]), {}, ["(version 7)", "0.0201", "0.0200"]),
    "at exactly the margin": (figure("against.champion.ci", [0.001, MARGIN]), {}, ["does not lie under the margin"]),
    "beside the anchor": (figure("against.anchor.ci", [0.001, 0.03]), {}, ["the anchor", "0.0300", "0.0200"]),
    "slow": (figure("cost.speedup_vs_teacher.min", 3.9), {}, ["Speed-up", "3.9×", "4×"]),
    "slower than the champion": (figure("cost.latency_ms_per_image.median", 2.6), {}, ["2.6 ms", "2 ms", "1.25"]),
    "late": (figure("name", "x"), {"max_latency_ms": 1.5}, ["Latency an image", "2 ms", "1.5 ms"]),
    "large": (figure("name", "x"), {"max_memory_mb": 20.0}, ["Peak memory", "23 MB", "20 MB"]),
    "of unknown size": (figure("cost.peak_memory_mb", None), {"max_memory_mb": 20.0}, ["was not measured", "20 MB"]),
    "collapsed": (figure("quality.recall", 0.63), {}, ["mode collapse", "0.63", "0.64"]),
    "classes lost": (figure("quality.class_accuracy", 0.94), {}, ["Class accuracy", "0.94", "0.95"]),
    "copying": (figure("quality.memorisation.low", 0.89), {}, ["training images", "0.89", "0.9"]),
    "not a number": (figure("quality.recall", float("nan")), {}, ["not finite", "quality.recall"]),
    "not measured": (figure("cost", None), {}, ["Nothing was measured"]),
    "the champion itself": (figure("model_sha256", "f" * 64), {}, ["The challenger is the champion", "version 7"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_one_figure_refuses_and_says_why(case: str, challenger: Figures, champion: Figures) -> None:
    change, limits, words = REFUSALS[case]
    change(challenger)
    verdict = gate(challenger, champion, GatePolicy(**limits))
    assert not verdict.approved
    assert len(verdict.reasons) == 1
    assert all(word in verdict.reasons[0] for word in words), verdict.reasons[0]
    assert [check.passed for check in verdict.table].count(False) == 1


def test_a_model_that_was_rolled_back_is_refused_with_the_reason(challenger: Figures, champion: Figures) -> None:
    champion["withdrawn"] = [{"version": "5", "model_sha256": "c" * 64, "reason": "blurred sevens"}]
    verdict = gate(challenger, champion, GatePolicy())
    assert verdict.reasons == ["This model was rolled back before, as version 5 (cccccccccccc): blurred sevens"]


def test_without_a_champion_quality_is_held_against_the_teacher(challenger: Figures) -> None:
    challenger["against"] = {}
    assert gate(challenger, None, GatePolicy()).approved
    challenger["quality"]["kid_minus_teacher"]["ci"] = [0.01, 0.021]
    verdict = gate(challenger, None, GatePolicy())
    assert not verdict.approved
    assert "the teacher at 50 steps" in verdict.reasons[0]


FIRST = {
    "a bad teacher": (figure("teacher.fd_over_train.ratio_to_floor", 1.01), ["FD beyond fresh", "1.01", "required 1"]),
    "of unknown quality": (figure("teacher.fd_over_train", None), ["FD beyond fresh", "was not measured"]),
    "unclear classes": (figure("quality.class_accuracy", 0.833), ["Class accuracy of a first", "0.833", "0.9"]),
}


@pytest.mark.parametrize("case", FIRST)
def test_a_first_champion_is_held_against_real_images_too(case: str, challenger: Figures, champion: Figures) -> None:
    change, words = FIRST[case]
    challenger["teacher"]["class_accuracy"] = 0.84  # as bad: beside such a teacher nothing is lost
    change(challenger)
    verdict = gate(challenger, None, GatePolicy())
    assert not verdict.approved
    assert len(verdict.reasons) == 1
    assert all(word in verdict.reasons[0] for word in [*words, "train longer"]), verdict.reasons[0]
    assert gate(challenger, champion, GatePolicy()).approved
    asking_nothing = GatePolicy(max_first_fd_over_floor=None, min_first_class_accuracy=None)
    assert gate(challenger, None, asking_nothing).approved


def test_a_first_champion_at_exactly_the_limits_is_approved(challenger: Figures) -> None:
    figure("teacher.fd_over_train.ratio_to_floor", 1.0)(challenger)
    figure("quality.class_accuracy", 0.9)(challenger)
    figure("teacher.class_accuracy", 0.9)(challenger)
    assert gate(challenger, None, GatePolicy()).approved


def test_the_question_says_whether_there_is_a_champion() -> None:
    assert question({"champion": "7"}) == "Replace the champion?"
    assert question({"champion": None}) == "Make this the first champion?"


def test_a_better_teacher_does_not_refuse_what_is_no_worse_than_the_champion(
    challenger: Figures, champion: Figures
) -> None:
    challenger["quality"]["kid_minus_teacher"]["ci"] = [0.01, 0.021]
    assert gate(challenger, champion, GatePolicy()).approved


def test_latency_on_another_machine_decides_nothing(challenger: Figures, champion: Figures) -> None:
    challenger["cost"]["latency_ms_per_image"]["median"] = 100.0
    for unknown in ({"hardware": "elsewhere"}, {"cost": None}):
        verdict = gate(challenger, champion | unknown, GatePolicy())
        assert verdict.approved
        assert [check.name for check in verdict.table if check.passed is None] == ["Latency beside the champion"]


def test_unconditional_models_have_no_class_accuracy_to_lose(challenger: Figures) -> None:
    challenger["quality"]["class_accuracy"] = challenger["teacher"]["class_accuracy"] = None
    assert gate(challenger, None, GatePolicy()).approved


def test_what_the_decision_needs_must_be_there(challenger: Figures, champion: Figures) -> None:
    with pytest.raises(StatisticsError, match="margin"):
        gate(challenger | {"margin": 0.0}, champion, GatePolicy())
    del challenger["against"]["anchor"]
    with pytest.raises(ArtifactError, match="has no anchor"):
        gate(challenger, champion, GatePolicy())


def test_the_policy_is_checked() -> None:
    assert parse(GatePolicy, {"min_speedup": 2}, "gate").min_speedup == 2
    with pytest.raises(ConfigError, match=r"gate.min_speed: unknown key"):
        parse(GatePolicy, {"min_speed": 2}, "gate")
    with pytest.raises(ConfigError, match=r"gate.min_speedup: 0"):
        parse(GatePolicy, {"min_speedup": 0}, "gate")
    with pytest.raises(ConfigError, match=r"gate.max_first_fd_over_floor: -1"):
        parse(GatePolicy, {"max_first_fd_over_floor": -1}, "gate")
    with pytest.raises(ConfigError, match=r"gate.min_first_class_accuracy: 90"):
        parse(GatePolicy, {"min_first_class_accuracy": 90}, "gate")


def test_the_verdict_reads_as_a_table(challenger: Figures, champion: Figures) -> None:
    verdict = gate(challenger, champion, GatePolicy(min_speedup=20)).as_plain()
    text = as_text(verdict | {"variant": "progressive-4", "champion": "7"})
    assert text.splitlines()[0] == "progressive-4 beside champion 7: REFUSED"
    assert "| Speed-up over the teacher | 10× | ≥ 20× | NO |" in text
    assert "- Speed-up over the teacher: 10× is less than the required 20×." in text
