"""Reports and verdicts of another shape than this version's are named, and decide nothing."""

import json
from pathlib import Path

import pytest

from ado_tasks.__main__ import main
from ado_tasks.errors import ArtifactError, StorageError
from ado_tasks.registry.workspace import Workspace
from ado_tasks.stores import FolderStore
from ado_tasks.verdict import checked_verdict


@pytest.mark.parametrize(
    ("quality", "cost"),
    [
        ("[]", None),
        ("{}", None),
        ('{"variants": [{}], "reference": {}, "chosen": "x"}', None),
        ('{"variants": [{"name": "a-1", "kid_minus_teacher": {"ci": [1]}}], "reference": {}, "chosen": "x"}', None),
        ('{"variants": [], "reference": {}, "chosen": "x"}', None),
        ('{"variants": [], "reference": {}, "chosen": "x"}', "{}"),
        ('{"variants": [], "reference": {}, "chosen": "x"}', '{"variants": [{}]}'),
    ],
)
def test_a_report_of_another_shape_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quality: str, cost: str | None
) -> None:
    (tmp_path / "evaluate.json").write_text(quality)
    if cost is not None:
        (tmp_path / "measure.json").write_text(cost)
    assert main(["compare", "--reports", str(tmp_path)]) == ArtifactError.exit_code
    said = capsys.readouterr()
    assert f"ArtifactError: {tmp_path}/" in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    "change", [{"approved": "no"}, {"approved": 1}, {"variant": 5}, {"figures": None}, {"reasons": []}]
)
def test_a_damaged_verdict_approves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict) -> None:
    verdict = {"approved": True, "variant": "a-1", "model_sha256": "0", "reasons": ["all held"], "figures": {}}
    assert checked_verdict(verdict, "x") == verdict
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/verdict.json").write_text(json.dumps({**verdict, "champion": None, **change}))
    monkeypatch.chdir(tmp_path)
    assert main(["register"]) == ArtifactError.exit_code
    if "figures" not in change and "variant" not in change:
        assert main(["promote", "1"]) == ArtifactError.exit_code


def test_a_variants_number_is_written_in_plain_digits(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="progressive-²"):
        Workspace(tmp_path).package("progressive-²")


def test_a_store_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(StorageError, match="store: the store is a file"):
        FolderStore(tmp_path / "store").get("promotion/ado.json")
