"""An S3 server on loopback: a real one, Ceph's radosgw, where it is installed; else moto's."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
KEY, SECRET = "testkey", "testsecret"
_PROGRAMS = ("radosgw", "ceph-mon", "ceph-osd", "ceph", "radosgw-admin", "monmaptool", "uuidgen")
_START_S = 120
_GRACE_S = 2  # then it is killed: nobody needs its data any more


@dataclass(frozen=True)
class S3Server:
    """A server that answers."""

    endpoint: str
    kind: str
    pids: tuple[int, ...]

    @property
    def environment(self) -> dict[str, str]:
        """What boto3 needs to reach it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def real_server_installed() -> bool:
    """Whether Ceph is here and may be started (and ADO_TEST_S3=moto does not ask for the mock)."""
    if os.environ.get("ADO_TEST_S3") == "moto":
        return False
    return os.geteuid() == 0 and all(shutil.which(program) for program in _PROGRAMS)


def kind() -> str:
    """Which server the tests meet."""
    return "Ceph radosgw (a real server)" if real_server_installed() else "moto (a mock: tests/install-radosgw.sh)"


@contextmanager
def s3_server(folder: Path, port: int | None = None) -> Iterator[S3Server]:
    """Start a server whose data lies in `folder`, on a free port by default; it is gone when the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (_radosgw if real_server_installed() else _moto)(folder, port or free_port()) as server:
        yield server


@contextmanager
def _radosgw(folder: Path, port: int) -> Iterator[S3Server]:
    try:
        subprocess.run([HERE / "radosgw.sh", folder, str(free_port()), str(port)], check=True, timeout=_START_S)
        yield S3Server(f"http://127.0.0.1:{port}", kind(), tuple(_pids(folder)))
    finally:
        for pid in reversed(_pids(folder)):
            end(pid)


@contextmanager
def _moto(folder: Path, port: int) -> Iterator[S3Server]:
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with (folder / "moto.out").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            wait_for_port(port)
            yield S3Server(f"http://127.0.0.1:{port}", kind(), (process.pid,))
        finally:
            process.kill()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port: int, patience_s: float = 60) -> None:
    """Return when somebody listens on it."""
    deadline_s = time.monotonic() + patience_s
    while time.monotonic() < deadline_s:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"nobody listens on port {port}")


def end(pid: int) -> None:
    """End a process of ours, and see that it is gone."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, sign)
        except ProcessLookupError:
            return
        deadline_s = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline_s and _alive(pid):
            time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            return False
    except ChildProcessError:
        pass
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"  # nobody may be there to collect a child of the script


def _pids(folder: Path) -> list[int]:
    """In the order of starting."""
    files = sorted(folder.glob("*.pid"), key=lambda path: path.stat().st_mtime_ns)
    return [int(path.read_text()) for path in files if path.read_text().strip()]
