"""Ask a person whether the challenger may become the champion. No answer in time is a refusal."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import Context

from ado_tasks.orchestration.notify import tell


class ChampionApproval(ApprovalOperator):
    """Airflow's approval, which a parameter turns off, another one limits in time, and whose result names who answered.

    The run's parameters: `approval` ("ask" or "automatic") and `approval_hours`. Returns `{"approved", "by",
    "timed_out"}`; rejected, or without an answer, everything downstream is skipped.
    """

    def __init__(self, **kwargs: Any) -> None:
        """As ApprovalOperator; what happens without an answer is settled here."""
        super().__init__(defaults=self.REJECT, **kwargs)

    def execute(self, context: Context) -> dict[str, Any]:
        """Ask, or go on at once where nobody wants to be asked."""
        params: Mapping[str, Any] = context.get("params", {})
        if params["approval"] == "automatic":
            self.log.info("Not asked: the run's parameter `approval` is automatic.")
            return {"approved": True, "by": "automatic", "timed_out": False}
        self.response_timeout = timedelta(hours=params["approval_hours"])
        self._tell_who_listens(context)
        super().execute(context)  # waits: it leaves by an exception, and `execute_complete` goes on
        raise AssertionError("the approval returned without an answer")

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Record who answered what."""
        answer = super().execute_complete(context, event)
        approved = answer["chosen_options"] == [self.APPROVE]
        user = answer["responded_by_user"] or {}
        by = user.get("name") or user.get("id")
        timed_out = bool(event.get("timedout"))
        self.log.info("%s by %s", "approved" if approved else "rejected", "nobody, in time" if timed_out else by)
        return {"approved": approved, "by": by, "timed_out": timed_out}

    def _tell_who_listens(self, context: Context) -> None:
        from ado_tasks.endpoints import endpoints  # noqa: PLC0415

        places, run = endpoints(), context.get("run_id", "")
        page = f"{places.airflow_url}/dags/{self.dag_id}/runs/{run}/required_actions"
        tell(places.notify, "approval wanted", f"{self.subject}: {page}", run=run, page=page)
