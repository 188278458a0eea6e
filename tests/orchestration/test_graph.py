"""The stage graph: what is refused, and ids and orders that are always the same."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ado_tasks.orchestration.failures import CycleError, GraphError, HintError, TaskIdError, UnsupportedStageError
from ado_tasks.orchestration.graph import Hints, from_plain, task_ids


def entry(name: str, *upstream: str, **changes: Any) -> dict[str, Any]:
    plain = {
        "name": name, "command": ["true"], "wdir": ".", "deps": [], "params": {}, "upstream": list(upstream),
        "outs": [{"path": f"{name}.txt"}], "frozen": False, "always_changed": False, "description": None, "meta": None,
    }  # fmt: skip
    return {**plain, **changes}


def test_stages_come_after_what_they_read() -> None:
    graph = from_plain(
        [entry("last", "left", "right"), entry("left", "first"), entry("right", "first"), entry("first")]
    )
    assert [stage.name for stage in graph] == ["first", "left", "right", "last"]
    assert [stage.name for stage in graph.upstream("last")] == ["left", "right"]


def test_a_cycle_is_named() -> None:
    with pytest.raises(CycleError, match="a → b → c → a"):
        from_plain([entry("a", "b"), entry("b", "c"), entry("c", "a")])


def test_hints_are_read() -> None:
    hints = {"queue": "gpu", "pool": "gpus", "pool_slots": 2, "retries": 0, "timeout_seconds": 1.5, "priority": 3}
    (stage,) = from_plain([entry("a", meta={"airflow": hints, "owner": "someone"})])
    assert stage.hints == Hints(**hints)


@pytest.mark.parametrize(
    ("hints", "said"),
    [
        ({"que": "gpu"}, "unknown key 'que'; allowed: queue, executor, pool"),
        ({"retries": -1}, "retries is -1; a whole number from 0"),
        ({"retries": True}, "retries is True"),
        ({"pool_slots": 0}, "pool_slots is 0"),
        ({"timeout_seconds": "1h"}, "timeout_seconds is '1h'; a number above 0"),
        ({"queue": ""}, "queue is ''; a name"),
        ({"timeout_seconds": float("inf")}, "timeout_seconds is inf; a number above 0, at most 31536000"),
        ({"retry_delay_seconds": 1e300}, r"retry_delay_seconds is 1e\+300; a number above 0"),
        (["gpu"], "a mapping is required"),
    ],
)
def test_wrong_hints_are_named(hints: Any, said: str) -> None:
    with pytest.raises(HintError, match=said) as caught:
        from_plain([entry("train", meta={"airflow": hints})])
    assert str(caught.value).startswith("train: ")


def test_task_ids_are_readable_and_apart() -> None:
    ids = task_ids(["train", "distill@progressive", "sub/dvc.yaml:train", "a@b", "a-b", "länge@µ"])
    assert ids["train"] == "train"
    assert ids["distill@progressive"] == "distill-progressive"
    assert ids["sub/dvc.yaml:train"] == "sub-train"
    assert ids["a@b"].startswith("a-b-") and ids["a-b"].startswith("a-b-") and ids["a@b"] != ids["a-b"]


@given(st.lists(st.text(min_size=1, max_size=30), unique=True, max_size=12))
def test_task_ids_are_ids(names: list[str]) -> None:
    from airflow.sdk.definitions._internal.node import validate_key

    try:
        ids = task_ids(names)
    except TaskIdError:
        return
    assert len(set(ids.values())) == len(names)
    for task_id in ids.values():
        validate_key(f"stages.{task_id}")


@pytest.mark.parametrize("name", ["@@", "x" * 201])
def test_a_name_without_an_id_is_refused(name: str) -> None:
    with pytest.raises(TaskIdError, match="1 to 200 letters"):
        task_ids([name])


@pytest.mark.parametrize("dep", ["made", "made/part", "."])
def test_what_does_not_travel_is_refused(dep: str) -> None:
    above = entry("above", outs=[{"path": "made", "cached": False}])
    with pytest.raises(UnsupportedStageError, match=r"below reads .*which above makes with `cache: false`"):
        from_plain([above, entry("below", "above", deps=[dep])])


def test_an_uncached_output_that_nobody_reads_is_fine() -> None:
    from_plain(
        [entry("above", outs=[{"path": "made", "cached": False}, {"path": "kept"}]), entry("b", "above", deps=["kept"])]
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"outs": [{"path": "x", "persist": True}]}, "persist"),
        ({"outs": [{"path": "s3://x", "local": False}]}, "outside the project"),
        ({"command": []}, "import"),
    ],
)
def test_the_unsupported_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedStageError, match=said):
        from_plain([entry("odd", **changes)])


def test_a_frozen_stage_waits_for_nobody() -> None:
    graph = from_plain([entry("late"), entry("ice", "late", frozen=True)])
    assert graph.upstream("ice") == ()


def test_shape_is_of_names_and_edges() -> None:
    shape = from_plain([entry("a"), entry("b", "a")]).shape
    assert from_plain([entry("a", command=["other"]), entry("b", "a")]).shape == shape
    assert from_plain([entry("a"), entry("b")]).shape != shape


def test_an_unknown_stage_is_named() -> None:
    with pytest.raises(GraphError, match="no stage 'c'; there is: a, b"):
        from_plain([entry("a"), entry("b")]).stage("c")
