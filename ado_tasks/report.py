"""How a task says what it is doing: a small protocol, and the places such reports can go.

A pure task knows `Reporter` and nothing else: no tracker, no terminal. The edge (`__main__`) wires it to a progress bar
and to a JSONL record, from which MLflow is filled later.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TextIO, runtime_checkable

PLAIN_LINE_EVERY_S = 10.0  # without a terminal a bar becomes a line at most this often


@runtime_checkable
class Reporter(Protocol):
    """What a task may say."""

    def progress(self, done: int, total: int, **figures: float) -> None:
        """`done` of `total` steps are finished; figures such as the current loss.

        Raises:
            KeyboardInterrupt: the work is to stop here; what checkpoints are kept of may keep one first.
        """
        ...

    def metric(self, name: str, value: float, step: int | None = None) -> None:
        """A figure worth keeping; with `step`, a point of a curve."""
        ...

    def picture(self, name: str, path: Path) -> None:
        """A picture has been written at `path`."""
        ...


class _Silent:
    def progress(self, done: int, total: int, **figures: float) -> None:
        """Say nothing."""

    def metric(self, name: str, value: float, step: int | None = None) -> None:
        """Say nothing."""

    def picture(self, name: str, path: Path) -> None:
        """Say nothing."""


SILENT: Reporter = _Silent()


@dataclass(frozen=True)
class StopWhen:
    """Says nothing; ends the work at a report of progress once `asked` is true."""

    asked: Callable[[], bool]

    def progress(self, done: int, total: int, **figures: float) -> None:
        """Raise KeyboardInterrupt if it was asked to."""
        if self.asked():
            raise KeyboardInterrupt

    def metric(self, name: str, value: float, step: int | None = None) -> None:
        """Say nothing."""

    def picture(self, name: str, path: Path) -> None:
        """Say nothing."""


@dataclass
class Recorder:
    """Keeps everything in lists, for tests."""

    steps: list[tuple[int, int, dict[str, float]]] = field(default_factory=list)
    metrics: list[tuple[str, float, int | None]] = field(default_factory=list)
    pictures: list[tuple[str, Path]] = field(default_factory=list)

    def progress(self, done: int, total: int, **figures: float) -> None:
        """Keep it."""
        self.steps.append((done, total, figures))

    def metric(self, name: str, value: float, step: int | None = None) -> None:
        """Keep it."""
        self.metrics.append((name, value, step))

    def picture(self, name: str, path: Path) -> None:
        """Keep it."""
        self.pictures.append((name, path))


@dataclass
class JsonlRecorder:
    """Appends metrics and pictures, one JSON object a line, with the time they were said at."""

    path: Path

    def progress(self, done: int, total: int, **figures: float) -> None:
        """Progress is for the terminal; it is not recorded."""

    def metric(self, name: str, value: float, step: int | None = None) -> None:
        """Append a figure."""
        self._append({"kind": "metric", "name": name, "value": value, "step": step})

    def picture(self, name: str, path: Path) -> None:
        """Append where a picture lies."""
        self._append({"kind": "picture", "name": name, "path": str(path)})

    def _append(self, entry: dict[str, object]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time_ms": int(time.time() * 1e3), **entry}) + "\n")


@dataclass
class Terminal:
    """A progress bar where there is a terminal, plain lines at intervals where there is none."""

    title: str
    stream: TextIO = field(default_factory=lambda: sys.stderr)

    def __post_init__(self) -> None:
        """Start the clock, and the bar if there is a terminal to draw it on."""
        self._started_s = self._last_line_s = time.monotonic()
        self._bar = None
        if self.stream.isatty():
            from rich.console import Console  # noqa: PLC0415  (50 ms that a worker without a terminal need not pay)
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"), console=Console(file=self.stream), transient=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=None, figures="")

    def progress(self, done: int, total: int, **figures: float) -> None:
        """Move the bar, or write a line if the last one is old enough or the work is done."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, figures=text)
            return
        now_s = time.monotonic()
        if done >= total or now_s - self._last_line_s >= PLAIN_LINE_EVERY_S:
            self._last_line_s = now_s
            print(
                f"{self.title}: {done}/{total}  {now_s - self._started_s:.0f} s  {text}", file=self.stream, flush=True
            )

    def metric(self, name: str, value: float, step: int | None = None) -> None:
        """Figures of a whole task are printed; points of curves are not."""
        if step is None:
            self._say(f"{self.title}: {name} = {value:.6g}")

    def picture(self, name: str, path: Path) -> None:
        """Say where the picture is."""
        self._say(f"{self.title}: {name} → {path}")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line)
        else:
            print(line, file=self.stream, flush=True)


@dataclass(frozen=True)
class Tee:
    """Says everything to several reporters."""

    reporters: Sequence[Reporter]

    def progress(self, done: int, total: int, **figures: float) -> None:
        """Pass it on."""
        for reporter in self.reporters:
            reporter.progress(done, total, **figures)

    def metric(self, name: str, value: float, step: int | None = None) -> None:
        """Pass it on."""
        for reporter in self.reporters:
            reporter.metric(name, value, step)

    def picture(self, name: str, path: Path) -> None:
        """Pass it on."""
        for reporter in self.reporters:
            reporter.picture(name, path)
