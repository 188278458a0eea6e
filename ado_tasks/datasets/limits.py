"""What is refused before it is read: paths that leave their folder, and files that unpack to more than was agreed."""

from collections.abc import Sequence
from math import prod
from pathlib import Path

from ado_tasks.errors import DataError

MAX_NAMED = 10  # bad files listed in one message: enough to see a pattern


def resolved(path: Path) -> Path:
    """Where a path leads. Raises DataError for links that lead to one another in a circle."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # RuntimeError: pathlib's, until Python 3.12
        raise DataError(f"{path}: a link that leads back to itself") from None


def check_inside(path: Path, root: Path) -> None:
    """Raise DataError where `path` is a link that leads out of `root`, to a folder, or nowhere."""
    if not path.is_symlink():
        return
    target = resolved(path)
    if not target.exists():
        raise DataError(f"{path}: a link that leads nowhere")
    if not target.is_relative_to(root.resolve()):
        raise DataError(f"{path}: a link that leads out of {root}; put the file itself there")
    if target.is_dir():
        raise DataError(f"{path}: a link to a folder; links to folders are not followed")


def check_total(path: Path, count: int, shape: Sequence[int], max_gigabytes: float) -> None:
    """Raise DataError where `count` images of `shape`, one byte a value, are more than agreed, as a zip bomb is."""
    total = count * prod(shape)
    if total > max_gigabytes * 1e9:
        raise DataError(
            f"{path}: unpacks to {total / 1e9:.3g} GB; allowed are {max_gigabytes:g} GB (prepare.max_gigabytes)"
        )


def refuse(problems: Sequence[str], what: str) -> None:
    """Raise one DataError for all of these problems, of which the first ten are listed; none: do nothing."""
    if not problems:
        return
    listed = "\n  ".join(problems[:MAX_NAMED])
    more = f"\n  and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
    raise DataError(f"{len(problems)} {what}:\n  {listed}{more}")
