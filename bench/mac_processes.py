"""The contenders of `bench/mac.py` as processes: started, asked, timed in turn, ended."""

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("mac_contender.py")
QUICK_S = 0.5  # an action that takes less is repeated in its turn, after one call that is not timed
REPEATS = 3  # of a quick action
ANSWER_S = 900.0  # longest wait: a cold torch.compile of a large network takes minutes


class Gone(Exception):
    """A contender ended, or cannot go on; the message is the reason."""


class Process:
    """A contender's process."""

    def __init__(self, job: Mapping[str, Any], wait_s: float = ANSWER_S) -> None:
        """Start it and wait until it can run. Raises Gone with the reason where it cannot."""
        self._wait_s = wait_s
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env={**os.environ, "PYTHONPATH": _path()},
        )  # fmt: skip
        self._rest = b""
        try:
            self.ready = self.ask(dict(job))
        except BaseException:
            self.end()
            raise

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a line. Raises Gone where the process ended, says that it cannot, or says nothing in time."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:  # it ended; why stands in what it wrote
            raise Gone(self._last_words()) from None
        answer = json.loads(self._line())
        if "skipped" in answer:
            raise Gone(answer["skipped"])
        return answer

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + self._wait_s
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not waiting.select(max(0.0, deadline - time.monotonic())):
                    raise Gone(f"no answer in {self._wait_s:.0f} s")
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    raise Gone(self._last_words())
                self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return f"its process ended with {code}: {lines[-1] if lines else 'without a word'}"[:300]

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            try:
                stream.close() if stream else None
            except OSError:  # what stood unsent
                pass


def _path() -> str:
    """Where a contender finds this project: the repository that this file is of, then what was there before."""
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(SCRIPT.parents[1]), *([before] if before else [])])


@dataclass
class Turns:
    """What came of one part: seconds of every action of every form, by round, and who fell out."""

    seconds: dict[tuple[str, str], list[list[float]]] = field(default_factory=dict)  # (form, action): a list a round
    memory: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    ready: dict[str, dict[str, Any]] = field(default_factory=dict)  # by form: device, versions, check
    skipped: dict[str, str] = field(default_factory=dict)  # by form: why


def take_turns(jobs: Mapping[str, Mapping[str, Any]], rounds: int, on_step: Callable[[int, int, str], None]) -> Turns:
    """Run every action of every form in every round, one after another; the order turns by one each round.

    All processes stay alive and only one computes at a time. A form that cannot start, or fails on the way, is
    left out whole, with its reason.
    """
    turns, processes = Turns(), dict[str, Process]()
    total, done = len(jobs) * (1 + rounds), 0
    try:
        for form, job in jobs.items():
            on_step(done, total, form)
            try:
                processes[form] = Process(job)
                turns.ready[form] = processes[form].ready
                for action in processes[form].ready["actions"]:
                    turns.memory[form, action] = processes[form].ask({"memory": action})
                processes[form].ask({"rest": True})
            except Gone as reason:
                _leave(form, str(reason), turns, processes)
            done += 1
        for number in range(rounds):
            forms = list(processes)
            shift = number % max(1, len(forms))
            for form in forms[shift:] + forms[:shift]:
                on_step(done, total, form)
                try:
                    _turn(form, processes[form], turns)
                except Gone as reason:
                    _leave(form, str(reason), turns, processes)
                done += 1
        on_step(total, total, "")
    finally:
        for process in processes.values():
            process.end()
    return turns


def _turn(form: str, process: Process, turns: Turns) -> None:
    """One turn of a form: each of its actions, and then its cached memory given back."""
    for action in process.ready["actions"]:
        times = [process.ask({"run": action})["seconds"]]
        if times[0] < QUICK_S:  # the first call of a turn meets cold caches
            times = [process.ask({"run": action})["seconds"] for _ in range(REPEATS)]
        turns.seconds.setdefault((form, action), []).append(times)
    process.ask({"rest": True})


def _leave(form: str, reason: str, turns: Turns, processes: dict[str, Process]) -> None:
    turns.skipped[form] = reason
    turns.ready.pop(form, None)
    for kept in (turns.seconds, turns.memory):
        for key in [key for key in kept if key[0] == form]:
            del kept[key]
    if form in processes:
        processes.pop(form).end()
