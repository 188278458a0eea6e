"""A store in a folder: for one machine, or several that share a POSIX file system."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ado_tasks.errors import ArtifactError, ConfigError, StorageError
from ado_tasks.storage import atomic_file, named_storage_errors
from ado_tasks.stores.protocol import Stored, checked_key

_PARTIAL = ".partial"  # files on their way; beside the keys, so that a rename stays on one file system
_LOCK = ".lock"


@dataclass(frozen=True)
class FolderStore:
    """Keys are paths below `root`. Files appear by rename, so a reader sees an old or a new one, never a part."""

    root: Path

    @staticmethod
    def at(url: str) -> "FolderStore":
        """The store in a folder given as a path. Raises ConfigError for an address that is no path."""
        if "://" in url or not url:
            raise ConfigError(f"store {url!r} is not allowed: s3://bucket/prefix or a folder")
        return FolderStore(Path(url).absolute())

    @property
    def url(self) -> str:
        """The folder."""
        return str(self.root)

    def get(self, key: str) -> Stored | None:
        """See Store."""
        path = self._path(key)
        if self.root.exists() and not self.root.is_dir():
            raise StorageError(f"{self.root}: the store is a file; a folder is required")
        with named_storage_errors(path):
            try:
                data = path.read_bytes()
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                return None
        return Stored(data, _etag(data))

    def put(self, key: str, data: bytes) -> None:
        """See Store."""
        with self._partial(key) as partial, self._locked():
            partial.write_bytes(data)
            self._publish(partial, key)

    def create(self, key: str, data: bytes) -> bool:
        """See Store. A hard link is made only where no file is: by the file system, with or without our lock."""
        with self._partial(key) as partial, self._locked():
            partial.write_bytes(data)
            _to_disk(partial)
            path = self._path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(partial, path)
            except FileExistsError:
                return False
            return True

    def replace(self, key: str, data: bytes, etag: str) -> bool:
        """See Store. Every writer holds one lock, so nothing changes between the comparison and the rename."""
        with self._partial(key) as partial, self._locked():
            stored = self.get(key)
            if stored is None or stored.etag != etag:
                return False
            partial.write_bytes(data)
            self._publish(partial, key)
            return True

    def list(self, prefix: str = "") -> list[str]:
        """See Store."""
        with named_storage_errors(self.root):
            found = (path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())
            return sorted(key for key in found if key.startswith(prefix) and not key.startswith("."))

    def delete(self, key: str) -> None:
        """See Store."""
        with named_storage_errors(self._path(key)), self._locked():
            self._path(key).unlink(missing_ok=True)

    def upload_file(self, key: str, path: Path) -> None:
        """See Store."""
        if not path.is_file():
            raise ArtifactError(f"{path}: cannot be stored as {key}: no such file")
        with self._partial(key) as partial:
            shutil.copyfile(path, partial)
            with self._locked():
                self._publish(partial, key)

    def download_file(self, key: str, path: Path) -> None:
        """See Store."""
        source = self._path(key)
        if not source.is_file():
            raise ArtifactError(f"{self.url}: nothing is stored under {key}")
        with atomic_file(path) as partial:
            shutil.copyfile(source, partial)

    def _path(self, key: str) -> Path:
        return self.root / checked_key(key)

    @contextmanager
    def _partial(self, key: str) -> Iterator[Path]:
        """A temporary file; it is gone afterwards, unless it was published."""
        with named_storage_errors(self._path(key)):
            (self.root / _PARTIAL).mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.root / _PARTIAL)
            os.close(handle)
            try:
                yield Path(name)
            finally:
                Path(name).unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the store's write lock. The kernel lets go of it when its holder dies."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / _LOCK).open("w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _publish(self, partial: Path, key: str) -> None:
        _to_disk(partial)
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(path)


def _to_disk(partial: Path) -> None:
    partial.chmod(0o644)
    with partial.open("rb") as file:
        os.fsync(file.fileno())


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
