"""Make the model again, judge it against the champion, and replace the champion where a person agrees.

- **plan** decides whether anything changed, and makes the branch `run/<id>`.
- **stages** are those of `dvc.yaml`, one task each; what is known already is restored in seconds.
- **commit_lock** commits what they made, as `dvc.lock`, on that branch.
- **gate** holds the challenger against the champion. A refusal ends the run here: as a success, its reasons in the log.
- **approval** waits for a person (*Required Actions* in the UI). No answer in time is a refusal.
- **register** and **promote** move the alias `champion` in MLflow; **merge** brings the branch into the main one.
- **outcome** says how it ended: `unchanged`, `refused`, `rejected` or `promoted`.

Nothing has to be done again after a failure: clear the failed task, or trigger a new run; what was computed is found.
"""

from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import (
    DAG,
    Asset,
    AssetOrTimeSchedule,
    AsyncCallback,
    CronTriggerTimetable,
    DeadlineAlert,
    DeadlineReference,
    Param,
    task,
)

from ado_tasks.orchestration import airflow_tasks, notify
from ado_tasks.orchestration.resolve import stage_graph

ROOT = Path(__file__).resolve().parent.parent
GRAPH = stage_graph(ROOT)
QUEUE = airflow_tasks.places_of(ROOT).worker_queue
DATASET = Asset("ado-dataset", uri="ado://dataset")  # an event of it says that a new version of the data arrived
PRESETS = sorted(path.name for path in ROOT.glob("params*.yaml"))

PARAMS = {
    "force": Param(
        False, type="boolean",
        description="Go on even where nothing changed since the last run: every stage is restored, and the challenger "
        "is judged again.",
    ),
    "preset": Param(
        "params.yaml", type="string", enum=PRESETS,
        description="The settings to run with: this file of the repository becomes the run's params.yaml.",
    ),
    "overrides": Param(
        {}, type="object",
        description='Settings to change for this run, by dotted name: {"train.steps": 3000}. They are committed on the '
        "run's branch. Changes that add or remove stages are refused.",
    ),
    "approval": Param(
        "ask", type="string", enum=["ask", "automatic"],
        description="Whether a person is asked before the champion is replaced.",
    ),
    "approval_hours": Param(
        24, type="number", exclusiveMinimum=0, maximum=720,
        description="How long to wait for the answer; after that the challenger is rejected.",
    ),
}  # fmt: skip


@task.short_circuit(ignore_downstream_trigger_rules=False, doc_md="What would run, and on which branch.")
def plan(run_id: str, params: dict[str, Any], ti: Any) -> bool:
    """Make the run's branch; skip everything where nothing changed."""
    from ado_tasks.orchestration import plan as planning

    with airflow_tasks.named_failures():
        found = planning.plan(
            run_id, shape=GRAPH.shape, places=airflow_tasks.places_of(ROOT), scratch=airflow_tasks.scratch_of(ROOT),
            preset=params["preset"], changes=params["overrides"], force=params["force"],
        )  # fmt: skip
    print(f"{found.reason}\nbranch {found.branch}, revision {found.revision}")
    ti.xcom_push("plan", found.as_plain())
    return found.proceed


@task(doc_md="Writes what the stages made into dvc.lock on the run's branch.")
def commit_lock(run_id: str, ti: Any) -> str:
    """Returns the revision that holds the results of all stages."""
    from ado_tasks.orchestration import effects, tables

    results = _results(ti)
    print(tables.stages(results))
    entries = {result["stage"]: result["lock"] for result in results}
    with airflow_tasks.named_failures():
        return effects.commit_lock(
            entries, branch=_plan(ti)["branch"], run_id=run_id, places=airflow_tasks.places_of(ROOT),
            scratch=airflow_tasks.scratch_of(ROOT),
        )  # fmt: skip


@task.short_circuit(ignore_downstream_trigger_rules=False, doc_md="Is the challenger better? The log has the table.")
def gate(revision: str, ti: Any) -> bool:
    """Judge the challenger; a refusal skips what follows."""
    from ado_tasks.orchestration import effects, tables
    from ado_tasks.verdict import as_text, question

    with airflow_tasks.named_failures():
        verdict = effects.judge(
            revision, places=airflow_tasks.places_of(ROOT), root=airflow_tasks.scratch_of(ROOT)
        )  # fmt: skip
    text = as_text(verdict)
    print(text)
    ti.xcom_push("verdict", verdict)
    ti.xcom_push("question", question(verdict))
    ti.xcom_push("grounds", f"{text}\n\n{tables.pictures(_results(ti))}")
    return verdict["approved"]


@task(doc_md="Makes the approved model a version of the registered model in MLflow.")
def register(revision: str, run_id: str, ti: Any) -> dict[str, Any]:
    """Returns the version."""
    from ado_tasks.orchestration import effects

    with airflow_tasks.named_failures():
        return effects.register(
            revision, ti.xcom_pull(task_ids="gate", key="verdict"), run_id=run_id,
            places=airflow_tasks.places_of(ROOT), root=airflow_tasks.scratch_of(ROOT),
        )  # fmt: skip


@task(doc_md="Makes the version the champion: first in the promotion record, then as MLflow's alias.")
def promote(registered: dict[str, Any], run_id: str, ti: Any) -> dict[str, Any]:
    """Returns the version, who approved it, and the promotion record."""
    from ado_tasks.orchestration import effects

    approval = ti.xcom_pull(task_ids="approval", key="answer")
    with airflow_tasks.named_failures():
        return effects.promote(
            str(registered["version"]), ti.xcom_pull(task_ids="gate", key="verdict"), run_id=run_id,
            approver=approval["by"], places=airflow_tasks.places_of(ROOT),
        )  # fmt: skip


# Deployment and its verification take their place here, between promote and merge.


@task(doc_md="Brings the run's branch into the main one, by fast-forward on the remote.")
def merge(ti: Any) -> dict[str, Any]:
    """Returns whether it was merged, and how, or what a person has to do."""
    from ado_tasks.orchestration import git_flow

    places = airflow_tasks.places_of(ROOT)
    with airflow_tasks.named_failures():
        merged = git_flow.merge(
            places.git_remote, _plan(ti)["branch"], places.git_branch, airflow_tasks.scratch_of(ROOT)
        )  # fmt: skip
    print(merged["how"])
    return merged


@task(trigger_rule="none_failed", doc_md="How the run ended: unchanged, refused, rejected or promoted, and why.")
def outcome(run_id: str, ti: Any) -> dict[str, Any]:
    """Say it in the log, to those who listen, and to the next run."""
    from ado_tasks.orchestration import effects

    places = airflow_tasks.places_of(ROOT)
    ended = effects.conclude(
        run_id, _plan(ti), places=places, verdict=ti.xcom_pull(task_ids="gate", key="verdict"),
        approval=ti.xcom_pull(task_ids="approval", key="answer"), promoted=ti.xcom_pull(task_ids="promote"),
        merged=ti.xcom_pull(task_ids="merge"),
    )  # fmt: skip
    print(f"{ended['outcome']}: {ended['why']}")
    notify.tell(places.notify, ended["outcome"], f"reoptimize: {ended['outcome']}: {ended['why']}", run=run_id)
    return ended


def _plan(ti: Any) -> dict[str, Any]:
    return ti.xcom_pull(task_ids="plan", key="plan")


def _results(ti: Any) -> list[dict[str, Any]]:
    return [ti.xcom_pull(task_ids=f"stages.{stage.task_id}") for stage in GRAPH.stages]


with DAG(
    dag_id="reoptimize",
    description="Train, distil, judge; promote what is better",
    doc_md=__doc__,
    schedule=AssetOrTimeSchedule(timetable=CronTriggerTimetable("0 4 * * 1", timezone="UTC"), assets=[DATASET]),
    start_date=airflow_tasks.began_on(ROOT),
    catchup=False,
    max_active_runs=1,  # one writer of the champion at a time; the next run waits
    # Stages on this machine take turns, as under `dvc repro`; with workers, as many run as there are workers.
    max_active_tasks=1 if QUEUE is None else 64,
    params=PARAMS,
    default_args={"owner": "ado", "on_failure_callback": notify.tell_of_failure, **airflow_tasks.RETRIES},
    deadline=DeadlineAlert(
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=timedelta(hours=36),
        callback=AsyncCallback("ado_tasks.orchestration.notify.tell_of_deadline"),
    ),
    tags=["ado", "optimise"],
) as dag:
    from ado_tasks.orchestration.approval import ChampionApproval
    from ado_tasks.orchestration.render import render

    planned = plan()
    stages = render(
        GRAPH,
        root=ROOT,
        revision="{{ ti.xcom_pull(task_ids='plan', key='plan')['revision'] }}",
        queue=QUEUE,
        links=airflow_tasks.STAGE_LINKS,
    )
    locked = commit_lock()
    approval = ChampionApproval(
        task_id="approval",
        subject="{{ ti.xcom_pull(task_ids='gate', key='question') }}",
        body="{{ ti.xcom_pull(task_ids='gate', key='grounds') }}",
        doc_md="Waits for a person: Required Actions. No answer in time is a refusal.",
    )
    registered = register(locked)
    promoted = promote(registered)
    planned >> stages >> locked >> gate(locked) >> approval >> registered >> promoted >> merge() >> outcome()
