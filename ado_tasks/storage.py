"""Files that are whole or absent: atomic folders and files, checksums, safetensors. Nothing is ever unpickled."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ado_tasks.backend import mx
from ado_tasks.errors import AdoError, ArtifactError, StorageError

_CHUNK = 1 << 20
_KERNEL_FAILED = "[Compile::eval_cpu]"  # how MLX begins; its compiler writes below the folder for temporary files
_SAFETENSORS_HEADER = 8  # bytes: the little-endian length of the JSON header (safetensors format, README "Format")


@contextmanager
def named_storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block, or a kernel that could not be stored, into a StorageError with its reason."""
    try:
        yield
    except AdoError:
        raise
    except RuntimeError as problem:
        if not str(problem).startswith(_KERNEL_FAILED):
            raise
        reason = "; ".join(str(problem).strip().splitlines()[-2:])
        raise StorageError(f"{tempfile.gettempdir()}: MLX could not compile a kernel there: {reason}") from problem
    except OSError as problem:
        reason = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EACCES: "permission denied",
            errno.EROFS: "the file system is read-only",
        }.get(problem.errno or 0, problem.strerror or str(problem))
        # Of a move: where to, unless that is the temporary one.
        named = [str(name) for name in (problem.filename2, problem.filename) if name and ".tmp-" not in str(name)]
        where = next(iter(named), path)
        raise StorageError(f"{where}: {reason}; nothing was left under its final name") from problem


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `out`; on success it becomes `out`, on any failure it is removed.

    A former `out` is replaced as a whole. What an earlier, killed run left behind beside `out` is removed first.

    Raises:
        StorageError: the disk is full, or the place cannot be written.
    """
    with named_storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        for stale in out.parent.glob(f".{out.name}.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.tmp-", dir=out.parent))
        try:
            yield partial
            _sync_tree(partial)
            partial.chmod(0o755)
            _replace_folder(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _replace_folder(partial: Path, out: Path) -> None:
    """Rename `partial` to `out`. POSIX cannot swap two folders, so a former `out` steps aside first."""
    if not out.exists():
        partial.rename(out)
        return
    former = Path(tempfile.mkdtemp(prefix=f".{out.name}.tmp-", dir=out.parent)) / "former"
    try:
        out.rename(former)
        try:
            partial.rename(out)
        except OSError:
            former.rename(out)
            raise
    finally:
        shutil.rmtree(former.parent, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


@contextmanager
def atomic_files(out: Path, *, last: str) -> Iterator[Path]:
    """Yield a temporary folder beside `out`; on success each file in it moves into `out`, replacing its former self.

    For a folder that several tasks write into. `last` names the file that moves last: who finds it finds the others.
    """
    with named_storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        pattern = f".{out.name}-{Path(last).stem}.tmp-"
        for stale in out.parent.glob(f"{pattern}*"):
            shutil.rmtree(stale, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=pattern, dir=out.parent))
        try:
            yield partial
            _sync_tree(partial)
            for path in sorted(partial.iterdir(), key=lambda path: (path.name == last, path.name)):
                path.replace(out / path.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling to write to; on success it replaces `path`, on failure it is removed."""
    with named_storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix is kept: writers such as MLX's choose a format by it.
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.tmp-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.chmod(0o644)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, always with the same bytes for the same value. NaN is refused: JSON has none."""
    try:
        text = json.dumps(value, indent=2, sort_keys=False, allow_nan=False)
    except ValueError as problem:
        raise ArtifactError(f"{path}: a figure is not finite and JSON cannot hold it ({problem})") from None
    write_text(path, text + "\n")


def read_json(path: Path, *keys: str) -> Any:
    """Read a JSON file. Raises ArtifactError where it is missing, not JSON, or lacks one of `keys` at its top."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise ArtifactError(f"{path}: cannot be read ({problem.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ArtifactError(f"{path}: not valid JSON ({problem})") from None
    missing = [key for key in keys if not isinstance(value, dict) or key not in value]
    if missing:
        raise ArtifactError(f"{path}: has no {', '.join(missing)}; made by another task, or damaged")
    return value


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as problem:
        raise ArtifactError(f"{path}: cannot be read ({problem.strerror})") from None
    return digest.hexdigest()


def sha256_tree(folder: Path) -> str:
    """One SHA-256 for a folder: of the sorted relative names and each file's own sum."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def save_arrays(
    path: Path, arrays: Mapping[str, mx.array | np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named arrays as safetensors, atomically; names are sorted, so equal content gives equal bytes."""
    ordered = {name: mx.array(arrays[name]) for name in sorted(arrays)}
    with atomic_file(path) as partial:
        try:
            mx.save_safetensors(str(partial), ordered, dict(sorted((metadata or {}).items())))
        except RuntimeError as problem:  # MLX reports a failed write this way
            raise StorageError(f"{path}: could not be written ({problem})") from problem


def load_arrays(path: Path) -> dict[str, mx.array]:
    """Read a safetensors file. Raises ArtifactError where it is missing, truncated or not safetensors."""
    return load_arrays_and_metadata(path)[0]


def load_arrays_and_metadata(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Read a safetensors file and the text metadata of its header."""
    _check_safetensors(path)
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        arrays, metadata = loaded
        mx.eval(arrays)
    except (RuntimeError, ValueError) as problem:
        raise ArtifactError(f"{path}: not a readable safetensors file ({problem})") from None
    return dict(arrays), dict(metadata)


def _check_safetensors(path: Path) -> None:
    """MLX reads lazily and would meet a truncated file late: compare the header's claim with the size first."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_SAFETENSORS_HEADER), "little")
            if size < _SAFETENSORS_HEADER or length > size - _SAFETENSORS_HEADER:
                raise ArtifactError(f"{path}: truncated: a header of {length} bytes is announced, the file has {size}")
            header = json.loads(file.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except OSError as problem:
        raise ArtifactError(f"{path}: cannot be read ({problem.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as problem:
        raise ArtifactError(f"{path}: not a safetensors file ({type(problem).__name__}: {problem})") from None
    expected = _SAFETENSORS_HEADER + length + end
    if size != expected:
        raise ArtifactError(f"{path}: {size} bytes, {expected} expected: truncated or damaged")
