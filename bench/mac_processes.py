"""The contenders of `bench/mac.py` and `bench/gpu_step.py` as processes: started, asked, timed in turn, ended."""

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mac_contender import without_folders

SCRIPT = Path(__file__).with_name("mac_contender.py")
QUICK_S = 0.5  # an action that takes less is repeated in its turn, after one call that is not timed
REPEATS = 3  # of a quick action
ANSWER_S = 900.0  # longest wait: a cold torch.compile of a large network takes minutes
TURNS_SHARE = 0.3  # of the time there is, kept for the turns: who is not ready by then is left out


class Gone(Exception):
    """A contender ended, or cannot go on; the message is the reason."""


class Process:
    """A contender's process."""

    def __init__(self, job: Mapping[str, Any], wait_s: float = ANSWER_S) -> None:
        """Start it and wait until it can run. Raises Gone with the reason where it cannot."""
        self.wait_s = wait_s
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env={**os.environ, **job.get("env", {}), "PYTHONPATH": _path()},
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
        deadline = time.monotonic() + self.wait_s
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not waiting.select(max(0.0, deadline - time.monotonic())):
                    raise Gone(f"no answer in {self.wait_s:.0f} s")
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
        said = f"its process ended with {code}: {lines[-1] if lines else 'without a word'}"
        return without_folders(said)[:300]

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


def take_turns(
    jobs: Mapping[str, Mapping[str, Any]], rounds: int, on_step: Callable[[int, int, str], None], *,
    at_once: int = 1, deadline: float | None = None, before: Callable[[str, Process], None] | None = None,
) -> Turns:  # fmt: skip
    """Run every action of every form in every round, one after another; the order turns by one each round.

    All processes stay alive and only one computes at a time, but that `at_once` of them warm up together. A form that
    cannot start, or fails on the way, is left out whole, with its reason. No round begins that would not be over by the
    `deadline` (of time.monotonic), if the longest so far is a guide. `before` is called once for each form that is
    ready, ahead of the rounds.
    """
    turns, processes = Turns(), dict[str, Process]()
    total, done = len(jobs) * (1 + rounds), 0
    try:
        for form, process in _started(jobs, at_once, deadline):
            on_step(done, total, form)
            done += 1
            if isinstance(process, Process):
                processes[form], turns.ready[form] = process, process.ready
            else:
                turns.skipped[form] = str(process)
        _alone(turns, processes, deadline, before)
        longest = 0.0
        for number in range(rounds):
            began = time.monotonic()
            if deadline is not None and began + longest > deadline:
                break
            for form in _in_turn(list(processes), number):
                on_step(done, total, form)
                try:
                    _limited(processes[form], deadline)
                    _turn(form, processes[form], turns)
                except Gone as reason:
                    _leave(form, str(reason), turns, processes)
                done += 1
            longest = max(longest, time.monotonic() - began)
        on_step(total, total, "")
    finally:
        for process in processes.values():
            process.end()
    return turns


def _in_turn(forms: list[str], number: int) -> list[str]:
    """The order of a round: each begins with another form."""
    shift = number % max(1, len(forms))
    return forms[shift:] + forms[:shift]


def _started(
    jobs: Mapping[str, Mapping[str, Any]], at_once: int, deadline: float | None
) -> Iterator[tuple[str, Process | Gone]]:
    """Each form's process in order, ready and with its cached memory given back; or why there is none."""
    latest = None if deadline is None else deadline - TURNS_SHARE * max(0.0, deadline - time.monotonic())

    def start(job: Mapping[str, Any]) -> Process | Gone:
        try:
            process = Process(job, ANSWER_S if latest is None else max(1.0, latest - time.monotonic()))
        except Gone as reason:
            return reason
        try:
            process.ask({"rest": True})
        except Gone as reason:
            process.end()
            return reason
        return process

    with ThreadPoolExecutor(at_once) as pool:
        yield from zip(jobs, pool.map(start, jobs.values()), strict=True)


def _alone(
    turns: Turns,
    processes: dict[str, Process],
    deadline: float | None,
    before: Callable[[str, Process], None] | None,
) -> None:
    """What each form needs of memory, and what is asked of it before the rounds."""
    for form in list(processes):
        try:
            _limited(processes[form], deadline)
            for action in processes[form].ready["actions"]:
                turns.memory[form, action] = processes[form].ask({"memory": action})
            if before is not None:
                before(form, processes[form])
            processes[form].ask({"rest": True})
        except Gone as reason:
            _leave(form, str(reason), turns, processes)


def _limited(process: Process, deadline: float | None) -> None:
    if deadline is not None:
        process.wait_s = max(1.0, deadline - time.monotonic())


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
