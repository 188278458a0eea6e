"""Settings of every test."""

import os
import uuid
from collections.abc import Iterator

import pytest
import s3_server
from hypothesis import HealthCheck, settings

# A busy machine is slow, not wrong: hypothesis neither times examples nor judges how fast they are made.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
if "PYTEST_XDIST_WORKER" in os.environ:  # two processes share the cores: threads that wait by spinning would take them
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["ADO_SYNC"] = "manual"  # no uploader is left running in the background; tests of uploads start their own


def pytest_report_header() -> str:
    """Say which S3 server the tests meet, if any asks for one."""
    return f"S3: {s3_server.kind()}"


LONG = {"dags", "orchestration", "pipeline"}  # folders of files that take minutes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: begun last, one of them would leave the other core idle for minutes."""
    items.sort(key=lambda item: not LONG & set(item.path.parts))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_server.S3Server]:
    """A running S3 server; started when the first test asks for it."""
    with s3_server.s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(s3: s3_server.S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket, with the environment in which boto3 finds it."""
    import boto3

    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    name = f"test-{uuid.uuid4().hex}"
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=name)
    return name
