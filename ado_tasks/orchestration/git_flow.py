"""What a run does in git: a branch `run/<id>` from the configured remote, a commit of `dvc.lock`, a fast-forward.

Everything happens in clones that are thrown away. Nobody's checked-out tree is ever touched: where the branch that a
run would be merged into is checked out in the remote's own folder, the run says which command merges it.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ado_tasks.errors import AdoError

LOCK = "dvc.lock"
_AUTHOR = {
    "GIT_AUTHOR_NAME": "ado", "GIT_AUTHOR_EMAIL": "ado@localhost",
    "GIT_COMMITTER_NAME": "ado", "GIT_COMMITTER_EMAIL": "ado@localhost",
    "GIT_TERMINAL_PROMPT": "0",  # a password that nobody can type is an error, not a wait
}  # fmt: skip
_PATIENCE_S = 300.0
_OBSTACLE = (
    f"If git stops at an untracked or changed {LOCK} (a `dvc repro` in that folder wrote it), put it away first: "
    f"mv {LOCK} {LOCK}.mine; the run brings its own"
)


class GitError(AdoError):
    """The configured git remote could not be read or written. May pass: it is tried again."""

    exit_code = 34


class DirtyTreeError(AdoError):
    """The project has changes that are not committed; a run is always a revision."""

    exit_code = 35


def branch_name(run_id: str) -> str:
    """The branch of a run: readable, allowed by git, and the same one for each attempt of the run's tasks."""
    text = re.sub(r"[^A-Za-z0-9]+", "-", run_id.replace("+00:00", "")).strip("-")
    return f"run/{text}"


def git(*arguments: str, cwd: Path | None = None) -> str:
    """Run git and return what it printed. Raises GitError with the command and what git says."""
    # A hook or a worktree of the caller's own must not decide what these commands work on.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | _AUTHOR
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=cwd, env=environ, capture_output=True, text=True, timeout=_PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise GitError(f"git {' '.join(arguments)}: no end after {_PATIENCE_S:.0f} s") from None
    if done.returncode:
        raise GitError(f"git {' '.join(arguments)}: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout.strip()


@contextmanager
def clone(remote: str, branch: str, scratch: Path) -> Iterator[Path]:
    """Yield a clone of the remote with `branch` checked out; it is removed afterwards."""
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="git-", dir=scratch) as folder:
        copy = Path(folder) / "project"
        git("clone", "--quiet", "--branch", branch, remote, str(copy))
        yield copy


def check_clean(remote: str) -> None:
    """Refuse a remote that is a working folder with uncommitted changes: the run would silently be without them.

    A changed `dvc.lock` alone is what a run on this machine leaves; it is no change of what would run.

    Raises:
        DirtyTreeError: names the files.
    """
    folder = Path(remote)
    if not (folder / ".git").exists():
        return
    changed = [line[3:] for line in _status(folder) if not line.endswith(LOCK)]
    if changed:
        names = ", ".join(changed[:10]) + (" …" if len(changed) > 10 else "")
        raise DirtyTreeError(
            f"{remote}: not committed: {names}; a run starts from a revision: commit them, or stash them"
        )


def _status(folder: Path) -> list[str]:
    # Not stripped: a line begins with two columns of state, the first of which may be a blank.
    done = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise GitError(f"git status in {folder}: {done.stderr.strip()}")
    return done.stdout.splitlines()


def remote_branches(remote: str, pattern: str) -> dict[str, str]:
    """The remote's branches that match a pattern, and their revisions."""
    found = {}
    for line in git("ls-remote", "--heads", remote, pattern).splitlines():
        revision, _, name = line.partition("\trefs/heads/")
        found[name] = revision
    return found


def commit(copy: Path, message: str, *paths: str) -> str:
    """Commit `paths` where they changed; returns the revision, which is the former one where nothing did."""
    git("add", "--force", "--", *paths, cwd=copy)
    if git("status", "--porcelain", "--untracked-files=no", cwd=copy):
        git("commit", "--quiet", "--no-verify", "-m", message, cwd=copy)
    return git("rev-parse", "HEAD", cwd=copy)


def push(copy: Path, remote: str, branch: str) -> None:
    """Push HEAD to a branch of the remote, as a fast-forward only. Pushing what is there already changes nothing."""
    git("push", "--quiet", remote, f"HEAD:refs/heads/{branch}", cwd=copy)


def merge(remote: str, branch: str, into: str, scratch: Path) -> dict[str, str | bool]:
    """Merge a run by fast-forward on the remote.

    Returns:
        `merged`; and `how`: what was done, or what a person has to do and why.
    """
    with clone(remote, branch, scratch) as copy:
        revision = git("rev-parse", "HEAD", cwd=copy)
        base = git("rev-parse", f"refs/remotes/origin/{into}", cwd=copy)
        if git("merge-base", base, revision, cwd=copy) == revision:
            return {"merged": True, "how": f"{into} has {revision[:10]} already"}
        if git("merge-base", base, revision, cwd=copy) != base:
            return {
                "merged": False,
                "how": f"{into} has moved on since the run began; merge it with: git merge {branch}. {_OBSTACLE}",
            }
        if _is_checked_out(remote, into):
            how = f"{into} is checked out in {remote}; merge it there with: git merge --ff-only {branch}. {_OBSTACLE}"
            return {"merged": False, "how": how}
        push(copy, remote, into)
        return {"merged": True, "how": f"{into}: {base[:10]} → {revision[:10]}"}


def _is_checked_out(remote: str, branch: str) -> bool:
    """Whether a branch is the one that someone works on in the remote's own folder, or in a worktree of it."""
    if not Path(remote).is_dir():
        return False
    if git("rev-parse", "--is-bare-repository", cwd=Path(remote)) == "true":
        return False
    trees = git("worktree", "list", "--porcelain", cwd=Path(remote)).splitlines()
    return f"branch refs/heads/{branch}" in trees
