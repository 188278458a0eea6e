"""DVC's own judgement of which stages changed, as a script: prints their names as JSON, for the project in this folder.

Data need not be at hand: what is missing is taken to be what `dvc.lock` says. (`dvc repro --dry --allow-missing` means
the same, but ends at the first stage whose inputs no lock file names.) It runs in a process of its own: see `plan`.
"""

import json
import sys
from pathlib import Path


def main() -> int:
    """Print {"changed": names}, or {"error": message}."""
    from dvc.exceptions import DvcException  # noqa: PLC0415
    from dvc.repo import Repo  # noqa: PLC0415

    stdout, sys.stdout = sys.stdout, sys.stderr  # DVC prints
    try:
        with Repo(str(Path.cwd())) as repo, repo.lock:
            stages = [stage for stage in repo.index.stages if stage.cmd]
            names = [stage.addressing for stage in stages if stage.changed(allow_missing=True, upstream=stages)]
        found = {"changed": names}
    except (DvcException, OSError, ValueError) as problem:
        found = {"error": f"{type(problem).__name__}: {problem}"}
    json.dump(found, stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
