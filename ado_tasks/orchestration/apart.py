"""Call a function in a process of its own: JSON in, JSON out, named errors come back as what they are.

An Airflow task is a forked process. MLX's Metal does not survive a fork, and what MLflow and DVC import would stay in
the task's memory; so whatever needs them runs apart. What the function prints goes where the caller's output goes.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ado_tasks.errors import AdoError


class ApartError(AdoError):
    """The process ended without a result: it was killed, or failed in a way that has no name."""

    exit_code = 36


def call(function: str, *arguments: Any, cwd: Path | None = None, **named: Any) -> Any:
    """Call `module:function` in a process of its own and return its result.

    Args:
        function: "ado_tasks.promote:promote".
        arguments: what JSON holds; a Path arrives as a Path.
        cwd: folder that it runs in.
        named: the function's keyword arguments.

    Raises:
        AdoError: the error that the function raised, of the same class where the project has it.
        ApartError: any other end.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        request = json.dumps({"function": function, "arguments": arguments, "named": named}, default=_plain)
        process = subprocess.Popen(
            [sys.executable, "-m", "ado_tasks.orchestration.apart", str(answer)], cwd=cwd, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environment(),
        )  # fmt: skip
        with process, _ended_with_us(process):
            _converse(process, request)
        return _result(answer, function, process.returncode)


def _converse(process: "subprocess.Popen[str]", request: str) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(request)
    process.stdin.close()
    for line in process.stdout:
        print(line, end="", flush=True)
    process.wait()


def _environment() -> dict[str, str]:
    # The project is found by its name wherever the process starts.
    project = str(Path(__file__).resolve().parent.parent.parent)
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{project}{os.pathsep}{known}" if known else project, "PYTHONUNBUFFERED": "1"}


@contextmanager
def _ended_with_us(process: "subprocess.Popen[str]") -> Iterator[None]:
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _result(answer: Path, function: str, status: int) -> Any:
    try:
        told = json.loads(answer.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        raise ApartError(f"{function} {how}; what it printed is above") from None
    if "result" in told:
        return told["result"]
    raise _error(told["error"], told["message"])


def _error(path: str, message: str) -> AdoError:
    module, _, name = path.rpartition(":")
    try:
        found = getattr(importlib.import_module(module), name)
        return found(message) if issubclass(found, AdoError) else ApartError(f"{name}: {message}")
    except (ImportError, AttributeError, TypeError):
        return ApartError(f"{name}: {message}")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return {"path": str(value)}
    raise TypeError(f"{value!r} cannot be handed to another process")


def _revive(value: dict[str, Any]) -> Any:
    return Path(value["path"]) if set(value) == {"path"} else value


def main() -> int:
    """The other process: read a request, call the function, leave the answer in the file that was named."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    answer = Path(sys.argv[1])
    request = json.loads(sys.stdin.read(), object_hook=_revive)
    module, _, name = request["function"].partition(":")
    try:
        result = getattr(importlib.import_module(module), name)(*request["arguments"], **request["named"])
        answer.write_text(json.dumps({"result": result}), encoding="utf-8")
    except AdoError as problem:
        kind = type(problem)
        answer.write_text(
            json.dumps({"error": f"{kind.__module__}:{kind.__name__}", "message": str(problem)}), encoding="utf-8"
        )
        return problem.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
