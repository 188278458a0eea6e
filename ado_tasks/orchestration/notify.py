"""Tell the configured webhooks what happened. A message that cannot be delivered is a warning, never a failed run."""

import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from typing import Any

log = logging.getLogger(__name__)

_ATTEMPTS = 3
_PATIENCE_S = 10.0


def tell(urls: Iterable[str], event: str, text: str, **facts: Any) -> int:
    """POST `{"event", "text", …}` as JSON to each URL; returns how many took it.

    `text` is what chat services (Slack, Mattermost, Teams workflows) show; the other keys are for programs.
    """
    body = json.dumps({"event": event, "text": text, **facts}, default=str).encode()
    log.info("%s: %s", event, text)
    return sum(_post(url, body) for url in urls)


def _post(url: str, body: bytes) -> bool:
    problem: Exception | None = None
    for attempt in range(_ATTEMPTS):
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=_PATIENCE_S):
                return True
        except (urllib.error.URLError, OSError, ValueError) as raised:
            problem = raised
            if isinstance(raised, urllib.error.HTTPError):
                raised.close()  # it holds the connection
            time.sleep(attempt)
    # An address may hold a token: only where it leads to is written down.
    log.warning("not told: %s (%s)", url.split("?", maxsplit=1)[0][:40], problem)
    return False


def tell_of_failure(context: Mapping[str, Any]) -> None:
    """Airflow's callback for a task that failed for good."""
    from ado_tasks.endpoints import endpoints  # noqa: PLC0415

    task = context["task_instance"]
    error = context.get("exception")
    text = f"{task.dag_id} / {task.task_id} failed: {type(error).__name__}: {error}"
    tell(endpoints().notify, "failed", text, run=task.run_id, dag=task.dag_id, task=task.task_id)


async def tell_of_deadline(**facts: Any) -> None:
    """Airflow's callback for a run that is not done in time."""
    import asyncio  # noqa: PLC0415

    from ado_tasks.endpoints import endpoints  # noqa: PLC0415

    run = facts.get("context", {}).get("dag_run", {})
    text = f"{run.get('dag_id', 'a run')} is not done in time: {run.get('dag_run_id', '')}"
    await asyncio.to_thread(tell, endpoints().notify, "late", text)
