"""Who asked is written down even where the user has no name: a container that runs with a uid of the host's."""

import getpass
import os

import pytest

from ado_tasks import promote, rollback
from ado_tasks.storage import write_json

RECORD = {"champion": {"version": "1"}, "former": []}


@pytest.mark.parametrize("problem", [KeyError("getpwuid(): uid not found: 4321"), OSError("No username set")])
def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch, tmp_path, problem: Exception) -> None:
    """KeyError is what Python raises up to 3.12, OSError from 3.13 on."""

    def nameless() -> str:
        raise problem

    asked: list[str] = []
    monkeypatch.setattr(getpass, "getuser", nameless)
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    monkeypatch.setattr(rollback, "rollback", lambda reason, by, **rest: asked.append(by) or RECORD)
    monkeypatch.setattr(promote, "promote", lambda version, verdict, approver, **rest: asked.append(approver) or RECORD)
    verdict = {"approved": True, "champion": None, "model_sha256": "a", "reasons": ["good"]}
    write_json(tmp_path / "reports/verdict.json", verdict)
    monkeypatch.chdir(tmp_path)
    assert rollback.main(["it fails"]) == promote.main(["1"]) == 0
    assert asked == ["uid 4321"] * 2
    assert rollback.main(["it fails", "--by", "ann"]) == promote.main(["1", "--approver", "ben"]) == 0
    assert asked[2:] == ["ann", "ben"]


def test_a_user_with_a_name_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "ann")
    assert promote.whoever_asks() == "ann"
