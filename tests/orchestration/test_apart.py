"""A function called in a process of its own: values, named errors, prints and endings come back."""

import os
import signal
from pathlib import Path

import pytest

from ado_tasks.errors import AdoError, DataError
from ado_tasks.orchestration.apart import ApartError, call

HERE = {"PYTHONPATH": str(Path(__file__).parent)}


@pytest.fixture(autouse=True)
def _found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", HERE["PYTHONPATH"])


def test_arguments_and_result_travel(tmp_path):
    found = call("apart_samples:echo", 1, tmp_path, cwd=tmp_path, name={"a": [None, "é"]})
    assert found == {"arguments": ["int", "PosixPath"], "name": {"a": [None, "é"]}, "cwd": str(tmp_path), "own": True}


def test_it_runs_in_another_process():
    assert call("apart_samples:pid") != os.getpid()


def test_what_it_prints_is_seen(capfd):
    call("apart_samples:speak", "a line")
    assert "a line" in capfd.readouterr().out


def test_a_named_error_is_that_error():
    with pytest.raises(DataError, match="no such image"):
        call("apart_samples:fail", "no such image")


def test_an_error_without_a_name_says_where_and_shows_its_trace(capfd):
    with pytest.raises(ApartError, match="apart_samples:crash ended with status 1"):
        call("apart_samples:crash")
    assert "ZeroDivisionError" in capfd.readouterr().out


def test_a_kill_is_named():
    with pytest.raises(ApartError, match="ended by SIGKILL"):
        call("apart_samples:end_by", int(signal.SIGKILL))


def test_every_error_of_the_project_can_be_made_from_its_message():
    """What `call` relies on; `StageError` is made here, never apart."""
    from ado_tasks.orchestration import failures, git_flow, plan  # noqa: F401

    pending, seen = [AdoError], []
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        seen.append(kind)
    for kind in seen:
        if kind is not failures.StageError:
            assert str(kind("what happened")) == "what happened"
