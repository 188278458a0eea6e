"""Task `profile`: which machine this is and, where asked, what it can do. Another machine measures anew."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ado_tasks.config import config
from ado_tasks.hardware.fingerprint import check_target
from ado_tasks.report import SILENT, Reporter
from ado_tasks.storage import write_json

HARDWARE, ROOFLINE = "hardware.json", "roofline.png"


@config
class ProfileConfig:
    """Whose timings are wanted, and how much memory tasks may hold there."""

    target: Annotated[str, Field(pattern=r"^(auto|[0-9a-f]{16})$")] = (
        "auto"  # a machine's id, or the one that runs this
    )
    wired_limit_gib: Annotated[float, Field(gt=0)] | None = None  # on Metal, of every task; none = MLX's own
    cache_limit_gib: Annotated[float, Field(ge=0)] | None = None  # freed memory that MLX keeps there; none = MLX's own


@dataclass(frozen=True)
class ProfileResult:
    """The machine."""

    id: str  # its fingerprint
    chip: str  # its processor


def profile(
    config: ProfileConfig, *, out: Path, measured: Path | None = None, report: Reporter = SILENT
) -> ProfileResult:
    """Write the machine's fingerprint. A measured task: its output is this machine's, and equal on each run here.

    With `measured`, a machine that is not in that folder yet is measured, in under a minute: products, convolutions and
    attention by shape and precision, bandwidth, memory.

    Args:
        config: see ProfileConfig.
        out: the JSON file.
        measured: folder of measured machines: <id>/hardware.json and <id>/roofline.png; delete one to measure it anew.
        report: where figures go.

    Raises:
        HardwareError: `target` names another machine.
    """
    machine = check_target(config.target)
    write_json(out, machine.as_plain())
    if measured is not None and not (measured / machine.identity / HARDWARE).exists():
        _measure(measured / machine.identity, report)
    return ProfileResult(machine.identity, machine.chip)


def _measure(folder: Path, report: Reporter) -> None:
    """Networks and pictures are imported here: a fingerprint alone takes no time."""
    from ado_tasks.fit.probes import measure_capability  # noqa: PLC0415
    from ado_tasks.fit.roofline import save_roofline  # noqa: PLC0415

    capability = measure_capability(report)
    save_roofline(folder / ROOFLINE, capability)
    report.picture("roofline", folder / ROOFLINE)
    write_json(folder / HARDWARE, capability.as_plain())  # last: it says that the folder is complete
