"""Task `profile`: which machine this is. What is measured depends on it, so another machine measures anew."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ado_tasks.config import config
from ado_tasks.hardware.fingerprint import check_target
from ado_tasks.report import SILENT, Reporter
from ado_tasks.storage import write_json


@config
class ProfileConfig:
    """Whose timings are wanted."""

    target: Annotated[str, Field(pattern=r"^(auto|[0-9a-f]{16})$")] = (
        "auto"  # a machine's id, or the one that runs this
    )


@dataclass(frozen=True)
class ProfileResult:
    """The machine."""

    id: str  # its fingerprint
    chip: str  # its processor


def profile(config: ProfileConfig, *, out: Path, report: Reporter = SILENT) -> ProfileResult:
    """Write the machine's fingerprint. A measured task: its output is this machine's, and equal on each run here.

    Args:
        config: see ProfileConfig.
        out: the JSON file.
        report: where figures go.

    Raises:
        HardwareError: `target` names another machine.
    """
    machine = check_target(config.target)
    write_json(out, machine.as_plain())
    return ProfileResult(machine.identity, machine.chip)
