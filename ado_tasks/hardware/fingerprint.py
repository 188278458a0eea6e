"""Which machine this is. Figures of one machine are never taken for another's."""

import hashlib
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ado_tasks.backend import mx, numeric_fingerprint
from ado_tasks.errors import HardwareError
from ado_tasks.storage import read_json

CPU_INFO = Path("/proc/cpuinfo")
MEMORY_INFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Machine:
    """What timings depend on. Two machines with equal fields may restore each other's figures."""

    chip: str  # "Apple M2 Pro", "Intel(R) Xeon(R) …"
    cores: int  # that this process may use
    memory_gib: int  # whole GiB
    system: str  # "Linux", "Darwin"
    device: str  # what MLX computes on
    numeric: dict[str, str]  # see backend.numeric_fingerprint

    @property
    def identity(self) -> str:
        """Sixteen hexadecimal digits, equal where all fields are."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def as_plain(self) -> dict[str, Any]:
        """As a report holds it."""
        return {"id": self.identity, **asdict(self)}


def this_machine() -> Machine:
    """The machine that this process runs on; takes a few milliseconds."""
    numeric = numeric_fingerprint()
    return Machine(_chip(), usable_cores(), _memory_gib(), platform.system(), numeric["device"], numeric)


def machine_of(profile: Path) -> Machine:
    """This machine, if a file made by `profile` is of it.

    Raises:
        HardwareError: the profile is another machine's.
    """
    machine, planned = this_machine(), read_json(profile, "id")
    if planned["id"] != machine.identity:
        raise HardwareError(
            f"{profile} is of machine {planned['id']}, this is {machine.identity}: run `profile` here first"
        )
    return machine


def check_target(target: str) -> Machine:
    """This machine, if it is the one whose figures are wanted ("auto" is any).

    Raises:
        HardwareError: it is another one: its timings must not be written into that one's reports.
    """
    here = this_machine()
    if target not in ("auto", here.identity):
        raise HardwareError(
            f"hardware.target: {target} is wanted, this machine is {here.identity} ({here.chip}); "
            f"allowed here: auto, {here.identity}"
        )
    return here


def usable_cores() -> int:
    """Cores that this process may run on (fewer than the machine's in a container)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chip() -> str:
    if platform.system() == "Darwin":
        return _first_line(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.machine()
    for line in CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> int:
    if platform.system() == "Darwin":
        total = mx.device_info().get("memory_size", 0)
        return round(int(total) / 2**30)
    for line in MEMORY_INFO.read_text(encoding="utf-8").splitlines() if MEMORY_INFO.exists() else []:
        if line.startswith("MemTotal"):
            return round(int(line.split()[1]) / 2**20)
    return 0


def _first_line(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
