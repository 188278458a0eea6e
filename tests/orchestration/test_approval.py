"""The approval: an answer outlives an attempt whose end Airflow did not learn, and nothing more than that."""

import json
import os
from datetime import UTC, datetime
from typing import Any

import pytest


@pytest.fixture(scope="module", autouse=True)
def airflow_home(tmp_path_factory: pytest.TempPathFactory):
    """Airflow reads its folder when it is imported; these tests need no database."""
    os.environ.setdefault("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))


class Store(dict[str, Any]):
    """Airflow's state store of a task: it holds JSON, and outlives attempts."""

    def set(self, key: str, value: Any) -> None:
        self[key] = json.loads(json.dumps(value))


class Instance:
    """One attempt: its XComs begin empty."""

    id, map_index = "1", -1

    def __init__(self, max_tries: int = 4) -> None:
        self.max_tries = max_tries
        self.pushed: dict[str, Any] = {}

    def xcom_push(self, key: str, value: Any) -> None:
        self.pushed[key] = value


def attempt(store: Store, instance: Instance) -> Any:
    params = {"approval": "ask", "approval_hours": 1}
    return {"ti": instance, "task_instance": instance, "params": params, "task_state_store": store, "run_id": "r"}


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the task anew, as each attempt does; the question is written to no database."""
    from airflow.providers.standard.operators import hitl
    from airflow.providers.standard.operators.empty import EmptyOperator
    from airflow.sdk import DAG

    from ado_tasks.orchestration.approval import ChampionApproval

    monkeypatch.setattr(hitl, "upsert_hitl_detail", lambda **_: None)

    def make(body: str = "the table") -> Any:
        with DAG("test"):
            task = ChampionApproval(task_id="approval", subject="Replace the champion?", body=body)
            task.set_downstream(EmptyOperator(task_id="register"))
        return task

    return make


def event(choice: str) -> dict[str, Any]:
    return {
        "chosen_options": [choice], "params_input": {}, "responded_at": datetime(2026, 1, 1, tzinfo=UTC),
        "responded_by_user": {"id": "7", "name": "ann"}, "timedout": False,
    }  # fmt: skip


def test_a_retry_returns_the_approval_that_was_given(ask: Any) -> None:
    store = Store()
    answer = ask().execute_complete(attempt(store, Instance()), event("Approve"))
    again = Instance()
    assert ask().execute(attempt(store, again)) == answer == {"approved": True, "by": "ann", "timed_out": False}
    assert again.pushed["answer"] == answer


def test_a_retry_after_a_rejection_skips_what_follows_as_well(ask: Any) -> None:
    from airflow.sdk.exceptions import DownstreamTasksSkipped

    store, again = Store(), Instance()
    with pytest.raises(DownstreamTasksSkipped):
        task = ask()
        task.execute_complete(attempt(store, Instance()) | {"task": task}, event("Reject"))
    with pytest.raises(DownstreamTasksSkipped) as caught:
        task = ask()
        task.execute(attempt(store, again) | {"task": task})
    assert caught.value.tasks == ["register"]
    assert again.pushed["answer"] == {"approved": False, "by": "ann", "timed_out": False}


@pytest.mark.parametrize("change", ["nothing was answered", "the task was cleared", "another verdict"])
def test_what_was_not_answered_is_asked(ask: Any, change: str) -> None:
    from airflow.sdk.exceptions import TaskAwaitingInput

    store = Store()
    if change != "nothing was answered":
        ask().execute_complete(attempt(store, Instance()), event("Approve"))
    instance = Instance(max_tries=5 if change == "the task was cleared" else 4)
    with pytest.raises(TaskAwaitingInput):
        ask("another table" if change == "another verdict" else "the table").execute(attempt(store, instance))
    assert "answer" not in instance.pushed
