"""Bring the former champion back.

The promotion record is changed first, then MLflow's alias `champion`; the reason is kept in both, and the gate refuses
the withdrawn model from then on. Trigger it with a reason.
"""

from pathlib import Path
from typing import Any

from airflow.sdk import DAG, Param, task

from ado_tasks.orchestration import airflow_tasks, notify

ROOT = Path(__file__).resolve().parent.parent

PARAMS = {
    "reason": Param(
        type="string", minLength=10, title="Reason",
        description="What the present champion did wrong: whoever reads the record later will ask.",
    ),
}  # fmt: skip


@task(doc_md="The former champion is the champion again.")
def rollback(run_id: str, params: dict[str, Any], dag_run: Any) -> dict[str, Any]:
    """Returns the promotion record after it."""
    from ado_tasks.orchestration import effects

    places = airflow_tasks.places_of(ROOT)
    by = getattr(dag_run, "triggering_user_name", None) or "Airflow"
    with airflow_tasks.named_failures():
        record = effects.rollback(params["reason"], run_id=run_id, by=by, places=places)
    text = f"rollback to version {record['champion']['version']} by {by}: {params['reason']}"
    print(text)
    notify.tell(places.notify, "rolled back", text, run=run_id)
    return record


with DAG(
    dag_id="rollback",
    description="The former champion is back",
    doc_md=__doc__,
    schedule=None,
    start_date=airflow_tasks.began_on(ROOT),
    max_active_runs=1,
    params=PARAMS,
    default_args={"owner": "ado", "on_failure_callback": notify.tell_of_failure, **airflow_tasks.RETRIES},
    tags=["ado", "serve"],
) as dag:
    rollback()
