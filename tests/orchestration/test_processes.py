"""Processes are stopped with everything they started, whatever that did to get away."""

import os
import socket
import subprocess
import sys

import psutil
import pytest

from ado_tasks.orchestration import processes
from ado_tasks.orchestration.processes import Group, LaunchError, hold_lock, marked, refuse_taken_port

SLEEP = "import time; time.sleep(600)"
# A child in a session of its own, whose parent has gone: what `setsid`, daemons and Airflow's tasks do.
DAEMON = f"""
import subprocess, sys, time
for _ in range(2):
    subprocess.Popen([sys.executable, "-c", {SLEEP!r}], start_new_session=True)
print("started", flush=True)
"""
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('started', flush=True); time.sleep(600)"
)
RETITLED = (
    "import setproctitle, time; setproctitle.setproctitle('x' * 5000); print('started', flush=True); time.sleep(600)"
)


@pytest.fixture
def group(tmp_path):
    made = Group(mark=str(tmp_path), logs=tmp_path / "logs")
    yield made
    made.stop()


def start(group, code, name="part"):
    group.start(name, [sys.executable, "-c", code], os.environ)
    if "started" in code:
        group.wait_for(name, lambda: "started" in group.tail(name) or group.processes[name].poll() is not None, 60)


def gone(found):
    return not psutil.pid_exists(found.pid) or psutil.Process(found.pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("code", [SLEEP, STUBBORN, RETITLED], ids=["plain", "ignores SIGTERM", "retitled"])
def test_a_process_is_stopped(code, group, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_S", 0.5)
    start(group, code)
    group.stop()
    assert marked(group.mark) == []
    assert group.processes["part"].poll() is not None


def test_daemons_whose_parent_has_gone_are_found_and_stopped(group):
    start(group, DAEMON)
    group.processes.pop("part").wait()
    found = marked(group.mark)
    assert len(found) == 2
    group.stop()
    assert all(gone(process) for process in found)


def test_a_retitled_process_is_found_by_its_mark_alone(group):
    start(group, RETITLED)
    assert [process.pid for process in marked(group.mark)] == [group.processes["part"].pid]


def test_others_are_left_alone(group, tmp_path):
    other = Group(mark=str(tmp_path / "other"), logs=tmp_path / "other")
    start(other, SLEEP)
    start(group, SLEEP)
    group.stop()
    assert other.processes["part"].poll() is None
    other.stop()


def test_a_process_that_ends_by_itself_is_named_with_its_last_words(group):
    start(group, "raise SystemExit('no database')")
    group.processes["part"].wait()
    with pytest.raises(LaunchError, match=r"part ended with status 1.*\n.*no database"):
        group.check()


def test_waiting_ends_when_time_is_up_and_names_the_log(group):
    start(group, SLEEP)
    with pytest.raises(LaunchError, match=r"part is not ready after 0 s; see .*part.log"):
        group.wait_for("part", lambda: False, 0.0)


def test_work_is_given_longer_than_servers(group, monkeypatch):
    """A stage writes its checkpoint while a server that ignores SIGTERM would long have been killed."""
    monkeypatch.setattr(processes, "GRACE_S", 0.1)
    code = (
        "import signal, sys, time\n"
        "def end(*_):\n    time.sleep(1.5); print('checkpoint', flush=True); sys.exit()\n"
        "signal.signal(signal.SIGTERM, end); print('started', flush=True)\nwhile True: time.sleep(0.1)  # ado_tasks"
    )
    start(group, code)
    group.stop()
    assert "checkpoint" in group.tail("part")


def test_a_taken_port_is_refused_with_the_variable_to_set():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"127.0.0.1:{port} .*set ADO_AIRFLOW_PORT"):
            refuse_taken_port("127.0.0.1", port, "ADO_AIRFLOW_PORT")
    refuse_taken_port("127.0.0.1", port, "ADO_AIRFLOW_PORT")


def test_a_lock_is_held_until_its_process_dies(tmp_path):
    path = tmp_path / "lock"
    code = f"from pathlib import Path; from ado_tasks.orchestration.processes import hold_lock; hold_lock(Path({str(path)!r})); print('held', flush=True); import time; time.sleep(600)"  # noqa: E501
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(LaunchError, match=f"process {holder.pid}"):
        hold_lock(path)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    os.close(hold_lock(path))
