"""Where effects keep what several machines share: one small interface over a folder or an S3 bucket."""

from ado_tasks.stores.folder import FolderStore
from ado_tasks.stores.protocol import Store, Stored

__all__ = ["FolderStore", "Store", "Stored", "open_store"]


def open_store(url: str) -> Store:
    """The store at `url`: `s3://bucket/prefix`, or a folder, which appears with the first thing put in it.

    S3's endpoint and credentials come from boto3's own variables (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, …).

    Raises:
        ConfigError: the address is of another kind, or names no bucket.
        StorageError: boto3, which S3 needs, is not installed.
    """
    if url.startswith("s3://"):
        from ado_tasks.stores.s3 import S3Store  # noqa: PLC0415  (boto3 takes half a second, and a folder needs none)

        return S3Store.at(url)
    return FolderStore.at(url)
