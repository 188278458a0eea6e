"""What the DAG files share: how tasks fail, where they work, links.

Heavy parts of Airflow are imported when a DAG is made or a task runs, not with this module.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperatorLink

from ado_tasks.endpoints import Endpoints, endpoints
from ado_tasks.errors import AdoError

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator

# What may pass is tried again after 15 s, 30 s, 60 s; what cannot fails at once (see `named_failures`).
RETRIES = {
    "retries": 3,
    "retry_delay": timedelta(seconds=15),
    "retry_exponential_backoff": True,
    "max_retry_delay": timedelta(minutes=10),
}


@contextmanager
def named_failures() -> Iterator[None]:
    """Turn a named error that trying again would not cure into the exception that Airflow does not retry."""
    from airflow.sdk.exceptions import AirflowFailException  # noqa: PLC0415

    from ado_tasks.orchestration.failures import is_permanent  # noqa: PLC0415

    try:
        yield
    except AdoError as problem:
        if is_permanent(problem):
            raise AirflowFailException(f"{type(problem).__name__}: {problem}") from problem
        raise


def places_of(root: Path) -> Endpoints:
    """The endpoints of the machine that a task runs on."""
    return endpoints(root=root)


def scratch_of(root: Path) -> Path:
    """Where tasks keep clones and workspaces on this machine."""
    return root / ".ado" / "work"  # as the stages do


def began_on(root: Path) -> datetime:
    """The day on which this Airflow was set up (by `make airflow`): schedules count from there, not from before.

    Elsewhere, on a worker or in a test, the date decides nothing.
    """
    try:
        return datetime.fromisoformat((root / ".ado" / "airflow" / "since").read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return datetime(2026, 1, 1, tzinfo=UTC)


class MlflowRunLink(BaseOperatorLink):
    """From a stage's task to what MLflow recorded of it."""

    name = "MLflow run"  # pyright: ignore[reportAssignmentType,reportIncompatibleMethodOverride]

    def get_link(self, operator: "BaseOperator", *, ti_key: Any) -> str:
        """The page of the run; empty where nothing was recorded. Airflow asks once, when the task has ended."""
        return _result(ti_key).get("mlflow_url") or ""


class PictureLink(BaseOperatorLink):
    """From a stage's task to the first picture that it made: a sample grid, a curve."""

    name = "Picture"  # pyright: ignore[reportAssignmentType,reportIncompatibleMethodOverride]

    def get_link(self, operator: "BaseOperator", *, ti_key: Any) -> str:
        """The address of the picture; empty where there is none."""
        return next(iter(_result(ti_key).get("pictures", [])), "")


STAGE_LINKS = (MlflowRunLink(), PictureLink())


def _result(task_instance: Any) -> Mapping[str, Any]:
    found = task_instance.xcom_pull(task_ids=task_instance.task_id, map_indexes=task_instance.map_index)
    return found if isinstance(found, Mapping) else {}
