"""Processes that are started together and stopped together, with all that they started themselves.

Every process carries a mark in its environment, which its children inherit, whatever session they move to and whoever
dies between them. So nothing that was started here outlives `stop`, and what a killed launcher left is found again.
(Airflow retitles its processes; on Linux that overwrites the environment others can read, which SPT_NOENV forbids.)
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from ado_tasks.errors import AdoError, StorageError

MARK = "ADO_LAUNCH"
_TAIL_LINES = 20
GRACE_S = 5.0  # of a server: Airflow's parts end within 3 s; a task that it waits for never does
WORK_GRACE_S = 40.0  # of a stage: to write a checkpoint, and to push what it had finished


class LaunchError(AdoError):
    """A server could not be started: its port is taken, it died, or it did not answer in time."""

    exit_code = 9


@dataclass
class Group:
    """Processes that share a mark. `mark` is what tells this group from any other on the machine: its home folder."""

    mark: str
    logs: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, command: Sequence[str], environ: Mapping[str, str]) -> None:
        """Start one process in a session of its own: a terminal's Ctrl-C reaches the launcher only."""
        self.logs.mkdir(parents=True, exist_ok=True)
        with self.log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                list(command), env={**environ, MARK: self.mark, "SPT_NOENV": "1"}, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def log(self, name: str) -> Path:
        """Where a process writes."""
        return self.logs / f"{name}.log"

    def check(self) -> None:
        """Raise LaunchError, with the end of its log, where a process has ended by itself."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise LaunchError(
                    f"{name} ended with status {process.returncode}; the end of {self.log(name)}:\n{self.tail(name)}"
                )

    def tail(self, name: str) -> str:
        """The last lines that a process wrote."""
        try:
            lines = self.log(name).read_text(errors="replace", encoding="utf-8").splitlines()
        except OSError as problem:
            return f"({problem.strerror})"
        return "\n".join(lines[-_TAIL_LINES:])

    def wait_for(self, name: str, ready: Callable[[], bool], patience_s: float) -> float:
        """Wait until `ready()`; returns the seconds it took. Raises LaunchError when a process dies or time is up."""
        began = time.monotonic()
        while not ready():
            self.check()
            if time.monotonic() - began > patience_s:
                raise LaunchError(f"{name} is not ready after {patience_s:.0f} s; see {self.log(name)}")
            time.sleep(0.3)
        return time.monotonic() - began

    def stop(self) -> None:
        """End every process that carries the mark: SIGTERM, and SIGKILL for what is left after a grace period.

        Work is told first, servers after it, and while stages write their checkpoints everything else waits. Whatever
        is born meanwhile is told too. Processes are found by the mark, and by the sessions that were started here.
        """
        began, told = time.monotonic(), set[int]()
        sessions = {process.pid for process in self.processes.values()}
        while alive := marked(self.mark, sessions):
            patience_s = WORK_GRACE_S if any(map(_is_work, alive)) else GRACE_S
            late = time.monotonic() - began > patience_s
            for process in reversed(alive):
                if late or process.pid not in told:
                    told.add(process.pid)
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(signal.SIGKILL if late else signal.SIGTERM)
            for process in self.processes.values():
                process.poll()
            time.sleep(0.2)
        for process in self.processes.values():
            process.wait()


def _is_work(process: psutil.Process) -> bool:
    """Whether it runs a stage or an effect, not a part of Airflow or MLflow."""
    with suppress(psutil.Error):
        return any("ado_tasks" in part for part in process.cmdline())
    return False


def marked(mark: str, sessions: Collection[int] = ()) -> list[psutil.Process]:
    """Every live process that carries the mark or is of one of the sessions, oldest first; never this one itself."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if os.getsid(process.pid) in sessions or process.environ().get(MARK) == mark:
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def refuse_taken_port(host: str, port: int, variable: str) -> None:
    """Raise LaunchError where something listens on host:port already, or it cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as problem:
            raise LaunchError(
                f"{host}:{port} cannot be listened on ({problem.strerror}); set {variable} to a free one"
            ) from None


def hold_lock(path: Path) -> int:
    """Lock a file for the life of this process; raises LaunchError where another one holds it."""
    import fcntl  # noqa: PLC0415

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as problem:
        raise StorageError(f"{path}: {problem.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 20).decode(errors="replace").strip() or "another process"
        raise LaunchError(f"it runs already, started by process {holder} (lock: {path})") from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    return handle
