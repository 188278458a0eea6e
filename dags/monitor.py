"""Does the champion still do what it was promoted for?

Once a day it is sampled anew, from noise that nobody has seen, and held against the teacher that it came from. The
figures go to MLflow. A champion that is *degraded* is told to those who listen (`ADO_NOTIFY`), with what can be done
about it: trigger `reoptimize`, or `rollback`.
"""

from pathlib import Path
from typing import Any

from airflow.sdk import DAG, CronTriggerTimetable, task

from ado_tasks.orchestration import airflow_tasks, notify

ROOT = Path(__file__).resolve().parent.parent


@task(doc_md="The champion's figures, from new noise.")
def evaluate(run_id: str) -> dict[str, Any]:
    """Returns the state and the figures behind it."""
    import zlib

    from ado_tasks.orchestration import effects

    with airflow_tasks.named_failures():
        found = effects.watch(
            seed=zlib.crc32(run_id.encode()),  # another noise each run, the same one when a run is tried again
            places=airflow_tasks.places_of(ROOT),
            root=airflow_tasks.scratch_of(ROOT),
        )
    print(f"{found['state']}: {found['why']}")
    return found


@task(doc_md="Tells those who listen when the champion is degraded.")
def alert(found: dict[str, Any], run_id: str) -> bool:
    """Returns whether there was something to tell."""
    if found["state"] != "degraded":
        return False
    text = f"the champion, version {found['version']}, is degraded: {found['why']}"
    print(text)
    notify.tell(airflow_tasks.places_of(ROOT).notify, "degraded", text, run=run_id, suggestion="reoptimize")
    return True


with DAG(
    dag_id="monitor",
    description="Is the champion still good?",
    doc_md=__doc__,
    schedule=CronTriggerTimetable("0 6 * * *", timezone="UTC"),
    start_date=airflow_tasks.began_on(ROOT),
    catchup=False,
    max_active_runs=1,
    default_args={"owner": "ado", "on_failure_callback": notify.tell_of_failure, **airflow_tasks.RETRIES},
    tags=["ado", "watch"],
) as dag:
    alert(evaluate())
