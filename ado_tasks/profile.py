"""Task `profile`: which machine this is and, where asked, what it can do. Another machine measures anew."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ado_tasks.config import config
from ado_tasks.errors import ConfigError
from ado_tasks.hardware.capability import read_capability
from ado_tasks.hardware.fingerprint import check_target
from ado_tasks.report import SILENT, Reporter
from ado_tasks.storage import atomic_folder, write_json

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
        ConfigError: `measured` is a file.
        ArtifactError: what is known of this machine in `measured` is damaged.
        StorageError: nothing can be written there: said before anything is measured.
    """
    machine = check_target(config.target)
    folder = None if measured is None else measured / machine.identity
    known = folder is None or _is_measured(folder)
    write_json(out, machine.as_plain())
    if folder is not None and not known:
        _measure(folder, report)
    return ProfileResult(machine.identity, machine.chip)


def _is_measured(folder: Path) -> bool:
    """Whether a machine's figures are there, and whole."""
    if folder.parent.exists() and not folder.parent.is_dir():
        raise ConfigError(f"--measured {folder.parent}: is a file; allowed: a folder, which may be missing")
    if not (folder / HARDWARE).exists():
        return False
    read_capability(folder / HARDWARE)
    return True


def _measure(folder: Path, report: Reporter) -> None:
    """Networks and pictures are imported here: a fingerprint alone takes no time."""
    from ado_tasks.fit.probes import measure_capability  # noqa: PLC0415
    from ado_tasks.fit.roofline import save_roofline  # noqa: PLC0415

    with atomic_folder(folder) as partial:  # opened first: a place that cannot be written is worth no measurement
        capability = measure_capability(report)
        save_roofline(partial / ROOFLINE, capability)
        write_json(partial / HARDWARE, capability.as_plain())
    report.picture("roofline", folder / ROOFLINE)
