"""The command line: help that says what a task needs, and named errors with an exit status of their own."""

import importlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ado_tasks.__main__ import TASKS, main
from ado_tasks.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def ado(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ADO_SYNC": "manual", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "ado_tasks", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )


def test_help_lists_every_task(tmp_path: Path) -> None:
    done = ado("--help", cwd=tmp_path)
    assert done.returncode == 0
    for task in TASKS:
        assert task in done.stdout


@pytest.mark.parametrize("task", sorted(TASKS))
def test_a_tasks_help_says_what_it_reads_and_its_keys(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([task, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--out" in text
    assert "--params" in text
    assert "keys of its section" in text


@pytest.mark.parametrize(
    ("params", "words", "status"),
    [
        ("seed: 0\nprepare: {source: cats}\n", ["prepare.source", "'cats'", "digits"], 2),
        ("seed: 0\nprepare: {sorce: digits}\n", ["prepare.sorce", "unknown key"], 2),
        ("prepare: {}\n", ["seed"], 2),
        ("seed: -1\nprepare: {}\n", ["seed", "-1"], 2),
        ("seed: 0\n", ["prepare"], 2),
        ("seed: [\n", ["params.yaml", "YAML"], 2),
    ],
)
def test_bad_params_are_named_and_nothing_is_written(
    tmp_path: Path, params: str, words: list[str], status: int
) -> None:
    (tmp_path / "params.yaml").write_text(params)
    done = ado("prepare", "--out", "data/x", cwd=tmp_path)
    assert done.returncode == status
    assert "ConfigError" in done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "data").exists()


def test_an_absent_input_is_named(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("seed: 0\ntrain: {model: {}}\n")
    done = ado("train", "--dataset", "data/none", "--out", "models/x", cwd=tmp_path)
    assert done.returncode == 4
    assert "data/none" in done.stderr
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("out", "words", "status"),
    [
        (".", ["would be replaced"], 2),
        ("..", ["would be replaced"], 2),
        ("a-file", ["is a file", "allowed: a folder"], 2),
        ("a-file/x", ["a-file is not a folder"], 5),
        ("nowhere", ["leads nowhere"], 2),
        ("x" * 300, ["too long"], 5),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: str, words: list[str],
    status: int,
) -> None:  # fmt: skip
    (tmp_path / "params.yaml").write_text("seed: 0\nprepare: {}\n")
    (tmp_path / "a-file").write_text("precious")
    (tmp_path / "nowhere").symlink_to("not-there")
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "--out", out]) == status
    said = capsys.readouterr().err
    assert "prepare: 1797" not in said
    for word in words:
        assert word in said
    assert (tmp_path / "a-file").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-file", "nowhere", "params.yaml"]


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "tasks" in capsys.readouterr().out


def test_help_says_what_options_and_keys_are(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    text = capsys.readouterr().out
    assert "--dataset DATASET folder made by `prepare`; the train part is used." in " ".join(text.split())
    assert "(default: .ado/scratch/SECTION)" in text
    assert "Args:" not in text
    assert "method: progressive (the default)" in text
    assert "method: consistency\n" in text and "method: guided\n" in text
    assert "stop: never | inferior, default never" in text
    assert "    batch_size: int ≥ 1, default 64     images a step\n" in text
    assert "        average: float ≥ 0 and < 1, default 0.95" in text  # of matching
    assert "seed, at the top of the params file: of the order of images" in text


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"ado {importlib.metadata.version('adaptive-diffusion-optimizer')}\n"


def test_an_unknown_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--datset", "x"], ["train", "--datset=data/x"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert "unknown option: --datset; allowed: " in capsys.readouterr().err


@pytest.mark.parametrize(("task", "goes_on"), [("train", True), ("prepare", False), ("compare", False)])
def test_only_tasks_with_checkpoints_promise_to_go_on(
    task: str, goes_on: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    importlib.import_module(f"ado_tasks.{task}")

    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("ado_tasks.__main__.run_task", interrupted)
    monkeypatch.setattr("ado_tasks.compare.main", interrupted)
    assert main([task]) == 130
    said = capsys.readouterr().err
    assert f"ado {task}: interrupted" in said
    assert ("goes on from the last checkpoint" in said) == goes_on


def test_an_edge_command_reads_ado_env_and_a_task_does_not(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADO_STORE", raising=False)
    Path("ado.env").write_text("not a line\n")
    Path("params.yaml").write_text("seed: 0\nhardware: {}\n")
    assert main(["compare"]) == ConfigError.exit_code
    assert "ado.env" in capsys.readouterr().err
    assert main(["profile", "--section", "hardware", "--out", "profile.json"]) == 0
