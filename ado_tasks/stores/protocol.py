"""What a store promises. One contract test holds every implementation to it (`tests/stores/test_contract.py`)."""

from pathlib import Path
from typing import NamedTuple, Protocol

from ado_tasks.errors import ConfigError

LONGEST_KEY = 900  # bytes; S3 allows 1,024 with its prefix, file systems 255 in a part


class Stored(NamedTuple):
    """What `get` found."""

    data: bytes
    etag: str  # changes when the data changes: hand it back to `replace`


class Store(Protocol):
    """Named byte strings that are whole or absent, with the two conditional writes that agreement needs.

    A key is a relative path in POSIX form; every method refuses another with ConfigError. What cannot be reached, read
    or written is a StorageError, after retries with back-off where a retry can help. A write that was reported as done
    is seen by every later read, whichever machine reads.
    """

    @property
    def url(self) -> str:
        """Where it is: what `open_store` takes."""
        ...

    def get(self, key: str) -> Stored | None:
        """What is stored under `key`; None where nothing is."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Store `data` under `key`, replacing what was there."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Store `data` only where nothing is stored yet; False where something is. Of many at once, one gets True."""
        ...

    def replace(self, key: str, data: bytes, etag: str) -> bool:
        """Store `data` only where `get` would still return `etag`; False where it would not (or nothing is there)."""
        ...

    def list(self, prefix: str = "") -> list[str]:
        """The keys that start with `prefix`, sorted."""
        ...

    def delete(self, key: str) -> None:
        """Remove what is stored under `key`; nothing happens where nothing is."""
        ...

    def upload_file(self, key: str, path: Path) -> None:
        """`put` for a file too large to hold in memory."""
        ...

    def download_file(self, key: str, path: Path) -> None:
        """Write what is stored under `key` to `path`, atomically. Raises ArtifactError where nothing is."""
        ...


def checked_key(key: str) -> str:
    """The key itself. Raises ConfigError where it could climb out of the store or means two things on two stores."""
    parts = key.split("/")
    if (
        not key
        or any(part in {"", ".", ".."} for part in parts)
        or parts[0].startswith(".")
        or "\\" in key
        or not key.isprintable()
        or len(key.encode()) > LONGEST_KEY
    ):
        raise ConfigError(
            f"store key {key!r} is not allowed: a relative path of printable characters, at most {LONGEST_KEY} bytes, "
            "without empty parts, '.', '..', backslashes or a leading dot"
        )
    return key
