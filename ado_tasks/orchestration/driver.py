"""Start `dvc_stage` in a workspace, pass on what it prints, stop it when asked to, and name how it ended."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ado_tasks.errors import StorageError
from ado_tasks.orchestration.failures import StageError, StageInterruptedError, command_failed

_SCRIPT = Path(__file__).with_name("dvc_stage.py")
_LOCKS = Path(".dvc/tmp/upstream-locks.json")  # in the workspace
_GRACE_S = 25.0  # for a stage that was asked to stop: to write its checkpoint, and to push what it had finished
_LOOK_EVERY_S = 0.2

# Called when the stage has to run, with DVC's key of its inputs and its command; entered before it starts, left after
# the process has ended.
WhileRunning = Callable[[str | None, str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Outcome:
    """How a stage ended well."""

    lock: dict[str, Any]  # its entry for dvc.lock
    cached: bool  # its result was known: nothing ran
    seconds: float  # that its command took


def drive(
    tree: Path,
    name: str,
    *,
    upstream: Mapping[str, Mapping[str, Any]],
    force: bool,
    while_running: WhileRunning,
    stopping: threading.Event,
    say: Callable[[str], None],
) -> Outcome:
    """Do one stage in the workspace `tree`.

    Args:
        tree: its folder.
        name: the stage.
        upstream: lock entries of the stages that it reads from, by name.
        force: run it even where its result is known.
        while_running: see WhileRunning.
        stopping: set it to stop the stage: it is told SIGTERM, and killed after a grace period.
        say: takes each line that DVC and the stage print.

    Raises:
        StageError: the command failed, or DVC did; says whether that is permanent.
        StorageError: a file could not be read, written or transferred.
        StageInterruptedError: `stopping` was set before it was done.
    """
    with ExitStack() as stack:
        process = _Process(tree, name, upstream, force, say)
        stack.callback(process.end)
        kind, told = process.wait(stopping)
        if kind == "runs":
            stack.enter_context(while_running(told["key"], told["command"]))
            stack.callback(process.end)  # before `while_running` is left: nothing writes any more then
            process.go()
            kind, told = process.wait(stopping)
    if kind == "done":
        return Outcome(**told)
    if stopping.is_set():
        raise StageInterruptedError(f"{name}: stopped as asked; a retry goes on from the last checkpoint")
    raise _named(name, told)


def _named(name: str, told: dict[str, Any]) -> StageError | StorageError:
    if told["kind"] == "command":
        return command_failed(name, told["command"], told["exit"])
    if told["kind"] == "storage":
        return StorageError(f"{name}: {told['message']}")
    return StageError(f"{name}: {told['message']}", permanent=bool(told.get("permanent")))


class _Process:
    """The script, in a session of its own: a signal to its group reaches the stage's command as well."""

    def __init__(
        self, tree: Path, name: str, upstream: Mapping[str, Any], force: bool, say: Callable[[str], None]
    ) -> None:
        locks = tree / _LOCKS
        locks.parent.mkdir(parents=True, exist_ok=True)
        locks.write_text(json.dumps(upstream), encoding="utf-8")
        ours, theirs = os.pipe()
        # -P: neither the script's folder nor the workspace is on the module path of DVC's own process.
        command = [sys.executable, "-P", str(_SCRIPT), name, "--talk", str(theirs)]
        command += ["--locks", str(locks), *(["--force"] if force else [])]
        self._popen = subprocess.Popen(
            command, cwd=tree, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, pass_fds=[theirs], start_new_session=True, text=True, errors="replace",
        )  # fmt: skip
        os.close(theirs)
        self._told: queue.Queue[tuple[str, Any] | None] = queue.Queue()
        output = self._popen.stdout
        assert output is not None
        self._threads = [
            threading.Thread(target=self._listen, args=(os.fdopen(ours, encoding="utf-8"),), daemon=True),
            threading.Thread(target=_pass_on, args=(output, say), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def go(self) -> None:
        """Let the stage's command start."""
        with suppress(BrokenPipeError):
            assert self._popen.stdin is not None
            self._popen.stdin.write("go\n")
            self._popen.stdin.flush()

    def wait(self, stopping: threading.Event) -> tuple[str, Any]:
        """The next thing that it tells. Once `stopping` is set it is asked to end, and killed after a while."""
        deadline_s = None
        while True:
            if stopping.is_set() and deadline_s is None:
                deadline_s = time.monotonic() + _GRACE_S
                self._signal(signal.SIGTERM)
            try:
                told = self._told.get(timeout=_LOOK_EVERY_S)
            except queue.Empty:
                if deadline_s is not None and time.monotonic() > deadline_s:
                    self._signal(signal.SIGKILL)
                continue
            if told is not None:
                return told
            code = self._popen.wait()
            return "failed", {"kind": "dvc", "message": f"the process that ran it ended with {code} and said nothing"}

    def end(self) -> None:
        """See to it that no process of the group is left, and that all of its output was passed on."""
        if self._popen.poll() is None and not _ends_within(self._popen, _LOOK_EVERY_S * 5):
            self._signal(signal.SIGTERM)
            _ends_within(self._popen, _GRACE_S)
        self._signal(signal.SIGKILL)  # whatever the command left behind
        self._popen.wait()
        for thread in self._threads:
            thread.join(timeout=_GRACE_S)
        assert self._popen.stdin is not None
        with suppress(BrokenPipeError):
            self._popen.stdin.close()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):  # macOS refuses a group of which only a zombie is left
            os.killpg(self._popen.pid, number)

    def _listen(self, pipe: IO[str]) -> None:
        with pipe:
            for line in pipe:
                (kind, told), *_ = json.loads(line).items()
                self._told.put((kind, told))
        self._told.put(None)


def _ends_within(process: "subprocess.Popen[str]", seconds: float) -> bool:
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _pass_on(output: IO[str], say: Callable[[str], None]) -> None:
    with output:
        for line in output:
            say(line.rstrip("\n"))


def _environment() -> dict[str, str]:
    """Ours, with this interpreter first in the path (stages say `python`); records are uploaded by us, not by them."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, "ADO_SYNC": "manual", "DVC_NO_ANALYTICS": "1", "PYTHONUNBUFFERED": "1"}
