"""Ask a person whether the challenger may become the champion. No answer in time is a refusal."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import Context

from ado_tasks.orchestration.notify import tell

ANSWER = "answer"  # key of the XCom


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
        self._keep(context, answer)
        super().execute_complete(context, event)
        return answer

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
