"""Named errors of orchestration, and which failures may pass when they are tried again."""

from ado_tasks.errors import (
    AdoError,
    ArtifactError,
    ConfigError,
    DataError,
    DivergenceError,
    HardwareError,
    PromotionError,
    StatisticsError,
    StorageError,
)
from ado_tasks.orchestration.git_flow import DirtyTreeError


class GraphError(AdoError):
    """`dvc.yaml` cannot be read or rendered. Says which stage, and what is allowed."""

    exit_code = 30


class CycleError(GraphError):
    """Stages wait for each other."""


class HintError(GraphError):
    """`meta.airflow` of a stage has an unknown key or a value of the wrong kind."""


class TaskIdError(GraphError):
    """A stage's name cannot become a task id."""


class UnsupportedStageError(GraphError):
    """A stage uses something of DVC that does not work between workers that share no disk."""


class WorkspaceError(AdoError):
    """A workspace could not be made: the revision or the remote cannot be reached. May pass."""

    exit_code = 31


class StageError(AdoError):
    """A stage's command failed. `permanent` says that the same command would fail again."""

    exit_code = 32

    def __init__(self, message: str, *, permanent: bool) -> None:
        """Keep the message and the verdict."""
        super().__init__(message)
        self.permanent = permanent


class StageInterruptedError(AdoError):
    """The stage was asked to stop; its checkpoints are kept, and a retry goes on from them."""

    exit_code = 33


_PERMANENT_EXITS = {
    error.exit_code: error
    for error in (ConfigError, DataError, ArtifactError, DivergenceError, StatisticsError)
}  # fmt: skip
_NAMED_EXITS = {**_PERMANENT_EXITS, **{error.exit_code: error for error in (StorageError, HardwareError)}}

_FOR_A_PERSON = (
    GraphError, ConfigError, DataError, DivergenceError, StatisticsError, DirtyTreeError, PromotionError,
)  # fmt: skip


def is_permanent(problem: BaseException) -> bool:
    """Whether trying again would fail the same way, until a person mends it.

    Bad configuration or data, divergence, a graph that cannot run, uncommitted changes, a promotion that is refused.

    Storage, network, a wrong machine and whatever is not known may pass.
    """
    if isinstance(problem, StageError):
        return problem.permanent
    return isinstance(problem, _FOR_A_PERSON)


def command_failed(stage: str, command: str, exit_code: int) -> StageError:
    """The error for a stage whose command ended with `exit_code` (negative: killed by that signal).

    Our own commands end with the codes of `errors`; what another project's codes mean is not known, so they may pass.
    """
    known = _NAMED_EXITS.get(exit_code)
    reason = f" ({known.__name__})" if known and "ado_tasks" in command else ""
    permanent = exit_code in _PERMANENT_EXITS and "ado_tasks" in command
    return StageError(f"{stage}: {command!r} ended with {exit_code}{reason}; its log is above", permanent=permanent)
