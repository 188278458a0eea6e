"""What only S3 can do: lose an answer, be away, refuse credentials."""

import contextlib
import select
import socket
import threading
from collections.abc import Iterator

import pytest
import s3_server

from ado_tasks.errors import StorageError
from ado_tasks.stores import open_store


class LosingProxy:
    """Passes every request on to a server, and drops the connection instead of the answer to the first PUT."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("http://").partition(":")
        self._server = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.lost = threading.Event()
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._server) as server, contextlib.suppress(OSError):
            putting = False
            while True:
                for ready in select.select([client, server], [], [])[0]:
                    if not (data := ready.recv(1 << 16)):
                        return
                    putting = data.startswith(b"PUT") or (putting and not data.startswith((b"GET", b"HEAD")))
                    if ready is server and putting and data.startswith(b"HTTP/1.1 200") and not self.lost.is_set():
                        self.lost.set()
                        return
                    (server if ready is client else client).sendall(data)


@pytest.fixture
def losing(s3: s3_server.S3Server) -> Iterator[LosingProxy]:
    proxy = LosingProxy(s3.endpoint)
    yield proxy
    proxy.close()
    assert proxy.lost.is_set()


def test_a_create_whose_answer_was_lost_is_still_known_as_ours(
    losing: LosingProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = open_store(f"s3://{bucket}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", losing.endpoint)
    assert open_store(f"s3://{bucket}").create("lock", b"mine")
    assert not direct.create("lock", b"yours")


def test_a_replace_whose_answer_was_lost_is_still_known_as_ours(
    losing: LosingProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = open_store(f"s3://{bucket}")
    direct.put("record", b"one")
    etag = direct.get("record").etag
    monkeypatch.setenv("AWS_ENDPOINT_URL", losing.endpoint)
    assert open_store(f"s3://{bucket}").replace("record", b"two", etag)
    assert direct.get("record").data == b"two"


def test_a_server_that_is_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = f"http://127.0.0.1:{s3_server.free_port()}"
    for name, value in s3_server.S3Server(endpoint, "none", ()).environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    store = open_store("s3://bucket/prefix")
    for call in (lambda: store.get("a"), lambda: store.create("a", b""), store.list):
        with pytest.raises(StorageError, match=rf"s3://bucket/prefix \({endpoint}\).*gave up after retries"):
            call()


def test_a_bucket_that_is_not_there_is_named(bucket: str) -> None:
    store = open_store("s3://no-such-bucket-anywhere")
    with pytest.raises(StorageError, match="there is no bucket no-such-bucket-anywhere"):
        store.put("a", b"")
    with pytest.raises(StorageError, match="there is no bucket no-such-bucket-anywhere"):
        store.get("a")


def test_wrong_and_missing_credentials_are_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not s3_server.real_server_installed():
        pytest.skip("moto lets everyone in")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY is not this key's secret"):
        open_store(f"s3://{bucket}").get("a")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(StorageError, match="does not know this AWS_ACCESS_KEY_ID"):
        open_store(f"s3://{bucket}").get("a")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(StorageError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        open_store(f"s3://{bucket}").get("a")
