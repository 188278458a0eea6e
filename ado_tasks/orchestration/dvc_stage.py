"""One stage of the project in the current folder, as a script: look its result up or run it, then push what it made.

What `dvc repro -s --pull STAGE`, `dvc push` and `dvc push --run-cache` do, in one process, and with no more than this
stage needs: a stage whose result is known moves no data, and of the remote's run cache one entry is read and written.
It tells its parent (see `driver`) lines of JSON; when the parent dies, its standard input ends, and it stops what it
runs.
"""

import argparse
import copy
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

_GRACE_S = 20.0  # for a command to write its checkpoint after our parent has died
# What the next attempt would meet again; anything else may pass.
_PERMANENT = {
    "DependencyDoesNotExistError", "OutputDoesNotExistError", "MissingParamsError", "StageNotFound", "ParamsLoadError",
    "ResolveError", "ParseError", "YAMLValidationError", "YAMLSyntaxError", "StageFileDoesNotExistError",
}  # fmt: skip


class FailedTransferError(Exception):
    """The remote did not take, or did not have, what this stage makes or needs."""


def main() -> int:
    """Do the stage; the last line told is {"done": …} or {"failed": {"kind", "message", …}}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("--locks", type=Path, required=True, help="JSON: lock entries of the stages that it reads from")
    parser.add_argument("--force", action="store_true", help="run it even where its result is known")
    parser.add_argument("--talk", type=int, required=True, help="file descriptor for the lines of JSON")
    options = parser.parse_args()
    # The stage's command gets the signal too, and ends by itself; then DVC says how, and so do we.
    signal.signal(signal.SIGTERM, lambda *_: None)
    parent = Parent(options.talk)
    threading.Thread(target=parent.listen, daemon=True).start()
    try:
        parse_each_text_once()
        upstream = json.loads(options.locks.read_text(encoding="utf-8"))
        parent.tell("done", Work(options.stage, upstream, parent).result(force=options.force))
    except Exception as problem:
        traceback.print_exc()
        parent.tell("failed", failure(problem))
        return 1
    return 0


def parse_each_text_once() -> None:
    """DVC parses dvc.yaml and dvc.lock anew for every stage that it looks at, a quarter of a second each time.

    The same text gives the same values, so they are kept, and copied for each who asks.
    """
    from dvc.utils import strictyaml  # noqa: PLC0415

    parse, kept = strictyaml.parse_yaml, {}

    def parse_once(text: str, path: str, typ: str = "safe") -> Any:
        if typ != "safe":
            return parse(text, path, typ=typ)  # keeps comments and places; for writing, so it is asked once
        if text not in kept:
            kept[text] = parse(text, path)
        return copy.deepcopy(kept[text])

    strictyaml.parse_yaml = parse_once


class Parent:
    """The process that started this one."""

    def __init__(self, talk: int) -> None:
        """Speak on the file descriptor `talk`, listen on standard input."""
        self._pipe = os.fdopen(talk, "w", buffering=1, encoding="utf-8")
        os.set_inheritable(talk, False)
        self._agreed = threading.Event()

    def tell(self, kind: str, what: Any) -> None:
        """One line of JSON."""
        self._pipe.write(json.dumps({kind: what}, default=str) + "\n")

    def ask(self, kind: str, what: Any) -> None:
        """Tell it, and wait until the parent says go."""
        self.tell(kind, what)
        self._agreed.wait()

    def listen(self) -> None:
        """Until the parent's end of standard input is closed, which its death does too: then end this process group."""
        for line in sys.stdin:
            if line.strip() == "go":
                self._agreed.set()
        os.killpg(0, signal.SIGTERM)
        time.sleep(_GRACE_S)
        os.killpg(0, signal.SIGKILL)


class Work:
    """A stage, the outputs of those above it, and the remote."""

    def __init__(self, name: str, upstream: dict[str, dict[str, Any]], parent: Parent) -> None:
        """Open the project in the current folder; `upstream` holds lock entries by stage."""
        from dvc.repo import Repo  # noqa: PLC0415

        self.repo = Repo(os.getcwd())
        self.name, self.parent = name, parent
        self.stage = self._load(name)
        self.made = [out for other, entry in upstream.items() for out in self._made_by(other, entry)]

    def _load(self, name: str) -> Any:
        folder, _, bare = name.rpartition("dvc.yaml:")
        return self.repo.stage.load_one(f"{folder}dvc.yaml", bare)

    def _made_by(self, name: str, entry: dict[str, Any]) -> list[Any]:
        """The outputs of another stage, as its lock entry says they are."""
        from dvc.stage.loader import StageLoader  # noqa: PLC0415

        stage = self._load(name)
        StageLoader.fill_from_lock(stage, entry)
        return stage.outs

    def result(self, *, force: bool) -> dict[str, Any]:
        """The stage's lock entry, whether it was known, and the seconds that its command took."""
        known = None if force and not self.stage.frozen else self._known()
        if known is not None and self._deliver(known):
            return {"lock": known, "cached": True, "seconds": 0.0}
        if self.stage.frozen:
            raise FileNotFoundError(f"{self.name} is frozen and dvc.lock has no result of it that can be found")
        self._fetch_deps()
        self.parent.ask("runs", {"key": self._key(), "command": str(self.stage.cmd)})
        # DVC would read all of it to write one entry, and this one is on its way.
        Path(os.path.dirname(self.stage.path), "dvc.lock").unlink(missing_ok=True)
        began_s = time.monotonic()
        reproduce: Any = self.repo.reproduce
        reproduce([self.name], single_item=True, force=True)
        seconds = time.monotonic() - began_s
        self.stage = self._load(self.name)
        entry = self._entry()
        if not self._deliver(entry):
            raise FailedTransferError(f"{self.name}: its outputs are not in the cache although it ran")
        self._push_run_cache(entry)
        return {"lock": entry, "cached": False, "seconds": seconds}

    # What is known ---------------------------------------------------------------------------------------------------

    def _known(self) -> dict[str, Any] | None:
        """The lock entry that this stage would end with, if it was run before with the same command and inputs."""
        from dvc.stage.cache import _get_cache_hash  # noqa: PLC0415

        locked = self._entry() if all(out.hash_info for out in self.stage.outs) else None
        if self.stage.frozen:
            return locked
        if self.stage.always_changed or self.stage.is_callback:
            return None
        self._hash_deps()
        if locked is not None and not self.stage.cmd_changed:
            if _get_cache_hash(dict(locked), key=True) == _get_cache_hash(self._entry(), key=True):
                return locked
        return self._from_run_cache()

    def _hash_deps(self) -> None:
        """Fill in what the deps are now: outputs of other stages by their lock entries, everything else by hashing."""
        made = {out.fs_path: out for out in self.made}
        for dep in self.stage.deps:
            maker = made.get(getattr(dep, "fs_path", None))
            if maker is not None and maker.hash_info and not dep.exists:
                dep.hash_info, dep.meta = maker.hash_info, maker.meta
                continue
            if dep.protocol == "local" and (not dep.exists or self._holds_missing(dep)):
                self._fetch_deps()  # a part of an output, or a folder around several: the files are needed
            dep.save()

    def _holds_missing(self, dep: Any) -> bool:
        return any(out.fs_path != dep.fs_path and _overlap(out, dep) and not out.exists for out in self.made)

    def _entry(self) -> dict[str, Any]:
        from dvc.stage.serialize import to_single_stage_lockfile  # noqa: PLC0415

        return to_single_stage_lockfile(self.stage)

    def _key(self) -> str | None:
        """DVC's own key of everything that decides the result; None for a stage whose results it does not keep."""
        from dvc.stage.cache import _get_cache_hash  # noqa: PLC0415

        # DVC's own function would read the files of every dep; here many are known by their hash only.
        kept = self.stage.deps and self.stage.outs and not self.stage.always_changed
        known = all(dep.protocol == "local" and dep.def_path and dep.hash_info for dep in self.stage.deps)
        return _get_cache_hash(self._entry(), key=True) if kept and known else None

    def _from_run_cache(self) -> dict[str, Any] | None:
        """The newest entry under this stage's key, of this machine's run cache or else of the remote's."""
        key = self._key()
        if key is None:
            return None
        cache = self.repo.stage_cache
        folder = Path(cache._get_cache_dir(key))
        if not folder.is_dir():
            self._pull_run_cache(key)
        entries = sorted(
            (path for path in folder.glob("*") if not path.name.startswith(".")), key=lambda path: path.stat().st_mtime
        )
        found: Any = cache._load_cache(key, entries[-1].name) if entries else None
        return found

    # What travels ----------------------------------------------------------------------------------------------------

    def _remote(self) -> Any:
        """The remote, or None where there is none: workspaces that share one cache need none."""
        from dvc.config import NoRemoteError  # noqa: PLC0415

        try:
            return self.repo.cloud.get_remote()
        except NoRemoteError:
            return None

    def _fetch_deps(self) -> None:
        """Bring what this stage reads into the folder. What nobody makes and nobody tracks is left for DVC to name."""
        from dvc.dependency import ParamsDependency  # noqa: PLC0415
        from dvc.exceptions import NoOutputOrStageError, OutputNotFoundError  # noqa: PLC0415

        for dep in self.stage.deps:
            if isinstance(dep, ParamsDependency):
                continue
            for out in self.made:
                if _overlap(out, dep) and not out.exists:
                    self._pull(out)
                    out.checkout(force=True)
                    out.ignore()  # as where it was made: a .gitignore in a folder that is read is part of its hash
            if dep.protocol == "local" and dep.fs_path and not dep.exists:
                with suppress(NoOutputOrStageError, OutputNotFoundError):
                    self.repo.pull([dep.fs_path])  # what `dvc add` tracks

    def _pull(self, out: Any) -> None:
        if not out.changed_cache():
            return
        for odb, objects in out.get_used_objs().items():
            _check_transfer(self.repo.cloud.pull(objects, odb=odb), f"{out} of {out.stage.addressing}")

    def _deliver(self, entry: dict[str, Any]) -> bool:
        """See that the remote has all outputs of `entry`; False where neither it nor the cache has one of them."""
        outs = self.repo.stage_cache._create_stage(entry, wdir=self.stage.wdir).outs
        here = [out for out in outs if not out.changed_cache()]
        remote = self._remote()
        for out in outs:
            if out not in here and not (remote and self._is_in(remote, out)):
                return out.def_path in {mine.def_path for mine in self.stage.outs if not mine.use_cache}
        if remote is not None:
            for out in here:
                for odb, objects in out.get_used_objs().items():
                    _check_transfer(self.repo.cloud.push(objects, odb=odb), f"{out} of {self.name}")
        return True

    def _is_in(self, remote: Any, out: Any) -> bool:
        """A folder's list of files is pushed after its files, so where the list is, all is."""
        odb = remote.legacy_odb if out.hash_name == "md5-dos2unix" else remote.odb
        return bool(out.hash_info) and odb.exists(out.hash_info.value)

    def _pull_run_cache(self, key: str) -> None:
        """Bring this key's entries from the remote's run cache."""
        remote = self._remote()
        if remote is None:
            return
        theirs = remote.fs.join(remote.path, "runs", key[:2], key)
        if not remote.fs.exists(theirs):
            return
        for source in remote.fs.find(theirs):
            target = Path(self.repo.stage_cache._get_cache_path(key, remote.fs.name(source)))
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.tmp-{os.getpid()}")
            remote.fs.get_file(source, str(partial))
            partial.replace(target)

    def _push_run_cache(self, entry: dict[str, Any]) -> None:
        """Bring this result into the remote's run cache: what was computed once is never computed again."""
        from dvc.stage.cache import _get_cache_hash  # noqa: PLC0415

        remote, key = self._remote(), self._key()
        if remote is None or key is None:
            return
        value = _get_cache_hash(dict(entry))
        source = self.repo.stage_cache._get_cache_path(key, value)
        if not os.path.exists(source):  # DVC keeps no entry for stages with outputs that it does not cache
            return
        folder = remote.fs.join(remote.path, "runs", key[:2], key)
        target = remote.fs.join(folder, value)
        if remote.fs.exists(target):
            return
        remote.fs.makedirs(folder, exist_ok=True)
        if remote.fs.protocol == "local":  # a copy could be seen half-written; an object in a bucket cannot
            partial = remote.fs.join(folder, f".{value}.tmp-{os.getpid()}")
            remote.fs.put_file(source, partial)
            os.replace(partial, target)
        else:
            remote.fs.put_file(source, target)


def _overlap(out: Any, dep: Any) -> bool:
    """Whether one path is the other, or lies in it."""
    mine, theirs = Path(out.fs_path), Path(getattr(dep, "fs_path", None) or "\0")
    return mine == theirs or mine.is_relative_to(theirs) or theirs.is_relative_to(mine)


def _check_transfer(result: Any, what: str) -> None:
    if result.failed:
        raise FailedTransferError(f"{len(result.failed)} files of {what} could not be transferred")


def failure(problem: BaseException) -> dict[str, Any]:
    """What went wrong, for the parent: the failed command and its exit code, or the chain of messages."""
    chain = [problem]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(below)
    names = [type(link).__name__ for link in chain]
    if "StageCmdFailedError" in names:
        text = str(chain[names.index("StageCmdFailedError")])
        told = re.fullmatch(r"failed to run: (.*), exited with (-?\d+)", text, re.DOTALL)
        if told:
            return {"kind": "command", "command": told[1], "exit": int(told[2])}
    messages = [text for link in chain if (text := str(link).strip())]
    message = f"{names[-1]}: {': '.join(dict.fromkeys(messages))}"
    if isinstance(chain[-1], OSError | FailedTransferError) and _PERMANENT.isdisjoint(names):
        return {"kind": "storage", "message": message}
    return {"kind": "dvc", "message": message, "permanent": not _PERMANENT.isdisjoint(names)}


if __name__ == "__main__":
    sys.exit(main())
