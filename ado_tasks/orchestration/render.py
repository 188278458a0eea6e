"""The stage graph as Airflow tasks: one task a stage, one edge wherever a stage reads what another makes.

The only module here that a DAG file needs Airflow for; everything that takes time to import is imported by the task.
"""

import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import BaseOperator, BaseOperatorLink, Context, TaskGroup
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from ado_tasks.orchestration.graph import Hints, Stage, StageGraph

_EDGE = "EdgeExecutor"


def render(
    graph: StageGraph,
    *,
    root: Path,
    revision: str,
    force: str = "False",
    queue: str | None = None,
    links: Sequence[BaseOperatorLink] = (),
    group_id: str = "stages",
) -> TaskGroup:
    """Make the tasks of a graph within the current DAG.

    Args:
        graph: see `resolve.stage_graph`.
        root: the project's folder on this machine; workspaces are made below its `.ado`.
        revision: the git hash to run, usually a template that reads another task's result.
        force: a template; where it renders to "True" stages run although their results are known.
        queue: Edge workers of this queue take stages without a queue of their own. None: stages run where Airflow's
            own executor runs tasks, whatever queue they name.
        links: shown beside each task in the UI.
        group_id: of the task group; task ids begin with it and a dot.

    Returns:
        The group. Every task returns a plain `StageResult`.
    """
    with TaskGroup(group_id=group_id, tooltip="the stages of dvc.yaml") as group:
        tasks = {
            stage.name: StageOperator(
                task_id=stage.task_id,
                stage=stage.name,
                upstream={above.name: f"{group_id}.{above.task_id}" for above in graph.upstream(stage.name)},
                root=root,
                revision=revision,
                force=force,
                links=links,
                task_display_name=stage.name,
                doc_md=_about(stage),
                **_scheduling(stage.hints, queue),
            )
            for stage in graph
        }
        for stage in graph:
            for above in stage.upstream:
                tasks[stage.name].set_upstream(tasks[above])
    return group


class StageOperator(BaseOperator):
    """Runs one stage with `stage.run_stage`, and returns its plain `StageResult`."""

    template_fields = ("revision", "force")
    ui_color = "#e8f0e4"

    def __init__(
        self,
        *,
        stage: str,
        upstream: Mapping[str, str],
        root: Path,
        revision: str,
        force: str = "False",
        links: Sequence[BaseOperatorLink] = (),
        **kwargs: Any,
    ) -> None:
        """Keep what to run. `upstream` maps the names of stages to the ids of their tasks."""
        super().__init__(**kwargs)
        self.stage = stage
        self.upstream = dict(upstream)
        self.root = str(root)
        self.revision = revision
        self.force = force
        self.operator_extra_links = tuple(links)
        self._stop: threading.Event | None = None

    def execute(self, context: Context) -> dict[str, Any]:
        """Run the stage. What another attempt would meet again fails at once; everything else is tried again."""
        from ado_tasks.endpoints import endpoints  # noqa: PLC0415
        from ado_tasks.errors import AdoError  # noqa: PLC0415
        from ado_tasks.orchestration import tables  # noqa: PLC0415
        from ado_tasks.orchestration.failures import is_permanent  # noqa: PLC0415
        from ado_tasks.orchestration.stage import run_stage  # noqa: PLC0415

        self._stop = threading.Event()
        instance: Any = context["ti"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        results = {name: instance.xcom_pull(task_ids=task) for name, task in self.upstream.items()}
        root = Path(self.root)
        try:
            result = run_stage(
                self.stage,
                revision=self.revision,
                upstream_locks={name: found["lock"] for name, found in results.items()},
                endpoints=endpoints(root=root),
                workspace_root=root / ".ado" / "work",
                force=self.force == "True",
                stopping=self._stop,
                say=self.log.info,
            )
        except AdoError as problem:
            fails = AirflowFailException if is_permanent(problem) else AirflowException
            raise fails(f"{type(problem).__name__}: {problem}") from problem
        self.log.info("%s: %s", self.stage, "its result was known" if result.cached else f"ran {result.seconds:.1f} s")
        if result.metrics:
            print(tables.metrics(result.metrics))
        return result.as_plain()

    def on_kill(self) -> None:
        """Airflow stops the task (SIGTERM, or its time is up): let the stage write a checkpoint and end."""
        if self._stop is not None:
            self._stop.set()


def _scheduling(hints: Hints, queue: str | None) -> dict[str, Any]:
    """A stage's hints as arguments of an operator; what they leave open is the DAG's or Airflow's default."""
    wanted = {
        "executor": hints.executor or (_EDGE if queue else None),
        "queue": (hints.queue or queue) if queue or hints.executor else None,
        "pool": hints.pool,
        "pool_slots": hints.pool_slots,
        "priority_weight": hints.priority,
        "execution_timeout": timedelta(seconds=hints.timeout_seconds) if hints.timeout_seconds else None,
        "retries": hints.retries,
        "retry_delay": timedelta(seconds=hints.retry_delay_seconds) if hints.retry_delay_seconds else None,
    }
    return {name: value for name, value in wanted.items() if value is not None}


def _about(stage: Stage) -> str:
    """What the task's page says of the stage."""
    lines = [stage.description, "", *(f"    {command}" for command in stage.command), ""]
    lines.append("makes " + ", ".join(f"`{out.path}`" for out in stage.outs) if stage.outs else "makes nothing")
    return "\n".join(lines).strip()
