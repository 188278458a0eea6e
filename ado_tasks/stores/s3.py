"""A store in an S3 bucket: AWS, or any server that knows conditional PUT (MinIO, Ceph's radosgw, …)."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ado_tasks.errors import ArtifactError, ConfigError, StorageError
from ado_tasks.storage import atomic_file
from ado_tasks.stores.protocol import Stored, checked_key

try:
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
except ImportError as problem:
    raise StorageError("an s3:// store needs boto3, which is not installed; make install-all installs it") from problem

_TOTAL_ATTEMPTS = 5  # of one request, with exponential back-off (botocore's standard mode); AWS_MAX_ATTEMPTS overrides
_CONNECT_S, _READ_S = 5, 60
_CONFLICTS = 20  # of writers of one key at the same time: AWS answers 409 to some, who have to ask again
_REFUSED = {"PreconditionFailed", "412"}
_ABSENT = {"NoSuchKey", "404", "NotFound"}
_WRITER = "ado-writer"  # metadata: which write this is


@dataclass(frozen=True)
class S3Store:
    """Keys below `prefix` of one bucket, which must exist."""

    client: Any
    bucket: str
    prefix: str  # empty, or ends with a slash

    @staticmethod
    def at(url: str) -> "S3Store":
        """The store at `s3://bucket/prefix`. Nothing is asked of the server yet."""
        bucket, _, prefix = url.removeprefix("s3://").strip("/").partition("/")
        if not bucket:
            raise ConfigError(f"store {url!r} is not allowed: s3://bucket/prefix or a folder")
        return S3Store(_client(), bucket, f"{prefix}/" if prefix else "")

    @property
    def url(self) -> str:
        """The address."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def get(self, key: str) -> Stored | None:
        """See Store."""
        with self._named_errors(key):
            try:
                found = self.client.get_object(Bucket=self.bucket, Key=self._name(key))
                return Stored(found["Body"].read(), _bare(found["ETag"]))
            except ClientError as problem:
                if _code(problem) in _ABSENT:
                    return None
                raise

    def put(self, key: str, data: bytes) -> None:
        """See Store."""
        with self._named_errors(key):
            self.client.put_object(Bucket=self.bucket, Key=self._name(key), Body=data)

    def create(self, key: str, data: bytes) -> bool:
        """See Store."""
        return self._conditionally(key, data, IfNoneMatch="*")

    def replace(self, key: str, data: bytes, etag: str) -> bool:
        """See Store.

        RFC 9110 and AWS want an ETag in quotes; radosgw compares what it gets with the bare one. So it is sent in
        quotes, and once more without where that was refused although the ETag is still the wanted one. Either is
        conditional: neither can overwrite what another wrote.
        """
        if self._conditionally(key, data, IfMatch=f'"{etag}"'):
            return True
        return self._etag(key) == etag and self._conditionally(key, data, IfMatch=etag)

    def list(self, prefix: str = "") -> list[str]:
        """See Store."""
        with self._named_errors(prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.prefix + prefix
            )
            return sorted(item["Key"][len(self.prefix) :] for page in pages for item in page.get("Contents", []))

    def delete(self, key: str) -> None:
        """See Store."""
        with self._named_errors(key):
            self.client.delete_object(Bucket=self.bucket, Key=self._name(key))

    def upload_file(self, key: str, path: Path) -> None:
        """See Store. In parts, of which nothing is visible before the last."""
        if not path.is_file():
            raise ArtifactError(f"{path}: cannot be stored as {key}: no such file")
        with self._named_errors(key):
            self.client.upload_file(str(path), self.bucket, self._name(key))

    def download_file(self, key: str, path: Path) -> None:
        """See Store."""
        with self._named_errors(key), atomic_file(path) as partial:
            try:
                self.client.download_file(self.bucket, self._name(key), str(partial))
            except ClientError as problem:
                if _code(problem) in _ABSENT:
                    raise ArtifactError(f"{self.url}: nothing is stored under {key}") from None
                raise

    def _conditionally(self, key: str, data: bytes, **condition: str) -> bool:
        """One conditional PUT; whether it took place.

        botocore repeats a request whose answer was lost, and then meets its own first attempt: so what refused us is
        looked at, and where this very call wrote it, it took place.
        """
        writer = uuid.uuid4().hex
        with self._named_errors(key):
            for _ in range(_CONFLICTS):
                try:
                    self.client.put_object(
                        Bucket=self.bucket, Key=self._name(key), Body=data, Metadata={_WRITER: writer}, **condition
                    )
                    return True
                except ClientError as problem:
                    if _code(problem) in _REFUSED:
                        return (self._head(key) or {}).get("Metadata", {}).get(_WRITER) == writer
                    if _code(problem) in _ABSENT:
                        return False
                    if _code(problem) != "ConditionalRequestConflict":
                        raise
        raise StorageError(f"{self.url}: {key} was written by others {_CONFLICTS} times while this process tried")

    def _etag(self, key: str) -> str | None:
        with self._named_errors(key):
            head = self._head(key)
        return None if head is None else _bare(head["ETag"])

    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            return self.client.head_object(Bucket=self.bucket, Key=self._name(key))
        except ClientError as problem:
            if _code(problem) in _ABSENT:
                return None
            raise

    def _name(self, key: str) -> str:
        return self.prefix + checked_key(key)

    @contextmanager
    def _named_errors(self, key: str) -> Iterator[None]:
        """Turn what boto3 raises into a StorageError that says which server, which key and what to look at."""
        where = f"{self.url} ({self.client.meta.endpoint_url}): {key}"
        try:
            yield
        except NoCredentialsError as problem:
            raise StorageError(f"{where}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from problem
        except ClientError as problem:
            reason = {
                "NoSuchBucket": f"there is no bucket {self.bucket}",
                "AccessDenied": "access denied to these credentials",
                "InvalidAccessKeyId": "the server does not know this AWS_ACCESS_KEY_ID",
                "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY is not this key's secret",
            }.get(_code(problem), str(problem))
            raise StorageError(f"{where}: {reason}") from problem
        except BotoCoreError as problem:
            raise StorageError(f"{where}: {problem}; gave up after retries with back-off") from problem
        except Boto3Error as problem:
            raise StorageError(f"{where}: {problem}") from problem


def _client() -> Any:
    attempts = {} if "AWS_MAX_ATTEMPTS" in os.environ else {"total_max_attempts": _TOTAL_ATTEMPTS}
    return boto3.Session().client(  # a session of its own: the default one keeps the first credentials it saw
        "s3",
        region_name=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        config=Config(
            retries={"mode": "standard", **attempts},
            connect_timeout=_CONNECT_S,
            read_timeout=_READ_S,
            s3={"addressing_style": "path"} if "AWS_ENDPOINT_URL" in os.environ else {},
            # Servers older than AWS's checksum trailers of 2024 refuse them.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def _code(problem: ClientError) -> str:
    return str(problem.response.get("Error", {}).get("Code"))


def _bare(etag: str) -> str:
    return etag.strip('"')
