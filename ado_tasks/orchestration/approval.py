"""Ask a person whether the challenger may become the champion. No answer in time is a refusal."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import Context

from ado_tasks.orchestration.notify import tell

ANSWER = "answer"  # key of the XCom
_EVENT = "event"  # key in the task's state store, which outlives its attempts


class ChampionApproval(ApprovalOperator):
    """Airflow's approval, which a parameter turns off, another one limits in time, and whose answer names who gave it.

    The run's parameters: `approval` ("ask" or "automatic") and `approval_hours`. The XCom `answer` is
    `{"approved", "by", "timed_out"}`; rejected, or without an answer, everything downstream is skipped.
    """

    def __init__(self, **kwargs: Any) -> None:
        """As ApprovalOperator; what happens without an answer is settled here."""
        super().__init__(defaults=self.REJECT, **kwargs)

    def execute(self, context: Context) -> dict[str, Any]:
        """Ask, or go on at once where nobody wants to be asked."""
        params: Mapping[str, Any] = context.get("params", {})
        if params["approval"] == "automatic":
            self.log.info("Not asked: the run's parameter `approval` is automatic.")
            return self._keep(context, {"approved": True, "by": "automatic", "timed_out": False})
        if (event := self._answered_before(context)) is not None:
            self.log.info("Not asked again: it was answered in an attempt whose end Airflow did not learn.")
            return self.execute_complete(context, event)
        self.response_timeout = timedelta(hours=params["approval_hours"])
        self._tell_who_listens(context)
        super().execute(context)  # waits: it leaves by an exception, and `execute_complete` goes on
        raise AssertionError("the approval returned without an answer")

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Record who answered what, before a rejection leaves by an exception."""
        if "error" in event:
            return super().execute_complete(context, event)  # raises
        user = event.get("responded_by_user") or {}
        answer = {
            "approved": event["chosen_options"] == [self.APPROVE],
            "by": user.get("name") or user.get("id"),
            "timed_out": bool(event.get("timedout")),
        }
        by = "nobody, in time" if answer["timed_out"] else answer["by"]
        self.log.info("%s by %s", "approved" if answer["approved"] else "rejected", by)
        self._store(context, event)
        self._keep(context, answer)
        super().execute_complete(context, event)
        return answer

    def _store(self, context: Context, event: dict[str, Any]) -> None:
        """For a retry: XComs are dropped when it begins, and Airflow would put the question to a person again."""
        store: Any = context.get("task_state_store")
        if store is not None:
            kept = ("chosen_options", "params_input", "responded_by_user", "timedout")
            plain = {name: event.get(name) for name in kept} | {"responded_at": event["responded_at"].isoformat()}
            store.set(_EVENT, {"event": plain, "asked": self._asked(context)})

    def _answered_before(self, context: Context) -> dict[str, Any] | None:
        """The event of an earlier attempt, where this one retries it and asks the same."""
        store: Any = context.get("task_state_store")
        kept = None if store is None else store.get(_EVENT)
        if kept is None or kept["asked"] != self._asked(context):
            return None
        return {**kept["event"], "responded_at": datetime.fromisoformat(kept["event"]["responded_at"])}

    def _asked(self, context: Context) -> dict[str, Any]:
        """What an answer holds for: this question; and not beyond a clearing of the task, which raises `max_tries`."""
        instance: Any = context["ti"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        return {"subject": self.subject, "body": self.body, "max_tries": instance.max_tries}

    def _keep(self, context: Context, answer: dict[str, Any]) -> dict[str, Any]:
        """A task that skips those after it returns nothing, so the answer is pushed under a name of its own."""
        instance: Any = context["ti"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        instance.xcom_push(key=ANSWER, value=answer)
        return answer

    def _tell_who_listens(self, context: Context) -> None:
        from ado_tasks.endpoints import endpoints  # noqa: PLC0415

        places, run = endpoints(), context.get("run_id", "")
        page = f"{places.airflow_url}/dags/{self.dag_id}/runs/{run}/required_actions"
        tell(places.notify, "approval wanted", f"{self.subject}: {page}", run=run, page=page)
