"""What a task says reaches the terminal, the record, and tests, in their own forms."""

import io
import json
from pathlib import Path

import pytest

from ado_tasks.report import SILENT, JsonlRecorder, Recorder, Reporter, Tee, Terminal


def speak(report: Reporter) -> None:
    report.progress(1, 3, loss=0.5)
    report.progress(3, 3, loss=0.25)
    report.metric("loss", 0.25, 3)
    report.metric("accuracy", 0.75)
    report.picture("samples", Path("out/samples.png"))


def test_lists_keep_everything() -> None:
    heard = Recorder()
    speak(Tee([SILENT, heard]))
    assert heard.steps == [(1, 3, {"loss": 0.5}), (3, 3, {"loss": 0.25})]
    assert heard.metrics == [("loss", 0.25, 3), ("accuracy", 0.75, None)]
    assert heard.pictures == [("samples", Path("out/samples.png"))]


def test_without_a_terminal_there_are_plain_lines() -> None:
    stream = io.StringIO()
    speak(Terminal("train", stream))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3  # the first step is not worth a line, nor is a point of a curve
    assert lines[0].startswith("train: 3/3") and "loss 0.25" in lines[0]
    assert lines[1] == "train: accuracy = 0.75"
    assert "\x1b" not in stream.getvalue()


def test_with_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")  # on a dumb terminal no bar can be drawn

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Screen()
    terminal = Terminal("train", stream)
    speak(terminal)
    terminal.close()
    assert "\x1b" in stream.getvalue()
    assert "train" in stream.getvalue()


def test_the_record_is_one_object_a_line(tmp_path: Path) -> None:
    speak(JsonlRecorder(tmp_path / "events.jsonl"))
    entries = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["name"]) for e in entries] == [
        ("metric", "loss"), ("metric", "accuracy"), ("picture", "samples"),
    ]  # fmt: skip
    assert entries[0]["step"] == 3
    assert entries[0]["time_ms"] > 1.7e12
