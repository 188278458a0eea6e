"""Functions that the tests of `apart` call in another process."""

import os
from pathlib import Path

from ado_tasks.errors import DataError


def echo(*arguments, name):
    return {
        "arguments": [type(value).__name__ for value in arguments], "name": name, "cwd": str(Path.cwd()),
        "own": os.getpid() != os.getppid(),
    }  # fmt: skip


def pid():
    return os.getpid()


def speak(text):
    print(text)


def fail(message):
    raise DataError(message)


def crash():
    return 1 / 0


def end_by(number):
    os.kill(os.getpid(), number)
