"""One contender of `bench/mac.py`, in a process of its own: what crashes or is missing takes nothing else with it.

Lines of JSON on standard input and output. The first line is the job; the answer says what can be run, or why nothing
can. Then `{"run": name}` takes one step or one sampling and answers with its seconds, `{"memory": name}` with what it
needs at most, `{"profile": name}` with figures of another kind, `{"rest": true}` gives cached memory back. The end of
input ends the process.
"""

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Job = dict[str, Any]  # see mac.job
MIB = 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Unsupported(Exception):
    """This machine cannot run this form; the message says why."""


@dataclass(frozen=True)
class Contender:
    """What a form offers. Actions wait for their own results."""

    actions: dict[str, Callable[[], object]]
    device: str  # as the framework names it
    versions: dict[str, str]
    check: list[float]  # what every form has to agree on: first losses, or samples of the teacher
    peak_mib: Callable[[Callable[[], object]], float | None]  # the framework's own count over an action
    peak_is: str  # what that count is
    rest: Callable[[], None]  # give cached memory back
    profiles: Mapping[str, Callable[[], dict[str, Any]]] = field(default_factory=dict)  # measurements of another kind


def build(job: Job) -> Callable[[], Contender]:
    """Import the form's framework; what is returned makes the contender. Raises Unsupported."""
    if job["form"].startswith("mlx"):
        import mac_mlx

        return lambda: mac_mlx.contender(job)
    try:
        import diffusers  # noqa: F401
        import torch  # noqa: F401
    except ImportError as problem:
        raise Unsupported(f"PyTorch or Diffusers is not installed ({problem}): `make parity`") from None
    import mac_torch

    return lambda: mac_torch.contender(job)


def resident_mib(kind: str) -> float:
    """Memory of this process: "VmRSS", now; "VmHWM", at most since the last `forget_peak` (macOS: ever)."""
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith(kind + ":"):
                return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def forget_peak() -> bool:
    """Whether the peak of this process could be set back to what it holds now (Linux only)."""
    try:
        _CLEAR.write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def timed(action: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def memory(contender: Contender, action: Callable[[], object], before_mib: float) -> dict[str, Any]:
    """What an action needs at most: by the framework's count, and by what the process grew since its imports."""
    reset = forget_peak()
    counted = contender.peak_mib(action)
    grown = resident_mib("VmHWM") - before_mib
    return {
        "framework_mib": None if counted is None else round(counted, 1), "framework_counts": contender.peak_is,
        "process_mib": round(grown, 1), "process_counts": "during the action" if reset else "since the start",
    }  # fmt: skip


def serve(answer: Callable[[dict[str, Any]], None]) -> None:
    job = json.loads(sys.stdin.readline())
    try:
        make = build(job)
        before_mib = resident_mib("VmRSS")
        contender = make()
    except Unsupported as reason:
        answer({"skipped": str(reason)})
        return
    except Exception as problem:  # whatever a framework raises where it cannot compile or allocate
        answer({"skipped": said(problem)})
        return
    answer(
        {
            "actions": list(contender.actions), "device": contender.device, "versions": contender.versions,
            "check": contender.check,
        }
    )  # fmt: skip
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if "run" in order:
                answer({"seconds": timed(contender.actions[order["run"]])})
            elif "memory" in order:
                answer(memory(contender, contender.actions[order["memory"]], before_mib))
            elif "profile" in order:
                answer(contender.profiles[order["profile"]]())
            else:
                contender.rest()
                answer({})
        except Exception as problem:
            answer({"skipped": said(problem)})
            return


def said(problem: Exception) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return without_folders(f"{type(problem).__name__}: {lines[0] if lines else 'without a message'}")[:300]


def without_folders(text: str) -> str:
    """Files by their names alone: a report is contributed, and a folder would name its owner."""
    return re.sub(r"(?<![:/\w])(?:/[^\s/:'\"]+)+/(?=[^\s/:'\"])", "", text)


def main() -> int:
    # What libraries print goes to standard error: the answers have a channel of their own.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        channel.write(json.dumps(value) + "\n")
        channel.flush()

    serve(answer)
    return 0


if __name__ == "__main__":
    # Its classes are those that the forms import, not a second copy of them under the name __main__.
    sys.modules["mac_contender"] = sys.modules["__main__"]
    raise SystemExit(main())
