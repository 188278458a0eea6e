"""One contract, every store: what is promised in ado_tasks/stores/protocol.py."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ado_tasks.errors import ArtifactError, ConfigError, StorageError
from ado_tasks.stores import Store, open_store

WRITERS = 8


@pytest.fixture(params=["folder", "s3", "s3 with prefix"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "store")
    bucket = request.getfixturevalue("bucket")
    return f"s3://{bucket}" + ("/some/prefix" if "prefix" in request.param else "")


@pytest.fixture
def store(url: str) -> Store:
    return open_store(url)


def test_what_is_put_is_got_and_nothing_else(store: Store) -> None:
    assert store.get("a/b.json") is None
    store.put("a/b.json", b"first")
    assert store.get("a/b.json").data == b"first"
    store.put("a/b.json", b"")
    assert store.get("a/b.json").data == b""
    assert store.get("a") is None


def test_create_is_exclusive(store: Store) -> None:
    assert store.create("lock", b"mine")
    assert not store.create("lock", b"yours")
    assert store.get("lock").data == b"mine"
    store.delete("lock")
    store.delete("lock")  # nothing is there: nothing happens
    assert store.create("lock", b"yours")


def test_replace_needs_the_present_etag(store: Store) -> None:
    assert not store.replace("record", b"one", "0" * 32)  # nothing is there
    assert store.create("record", b"one")
    etag = store.get("record").etag
    assert not store.replace("record", b"two", "0" * 32)
    assert store.replace("record", b"two", etag)
    assert not store.replace("record", b"three", etag)  # it has changed since
    assert store.get("record").data == b"two"
    assert store.replace("record", b"three", store.get("record").etag)


def test_list_is_sorted_and_by_prefix(store: Store) -> None:
    assert store.list() == []
    for key in ("b/2", "a/1", "b/1", "bc"):
        store.put(key, b"")
    assert store.list() == ["a/1", "b/1", "b/2", "bc"]
    assert store.list("b/") == ["b/1", "b/2"]
    assert store.list("b") == ["b/1", "b/2", "bc"]
    assert store.list("nothing") == []


def test_more_keys_than_one_page_lists(bucket: str) -> None:
    store = open_store(f"s3://{bucket}")
    names = [f"many/{number:04d}" for number in range(1005)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put(name, b""), names))
    assert store.list("many/") == names


def test_files_large_and_small(store: Store, tmp_path: Path) -> None:
    large = os.urandom(9 << 20)  # more than boto3 sends in one part
    for name, data in {"small": b"x", "large": large}.items():
        (tmp_path / name).write_bytes(data)
        store.upload_file(f"files/{name}", tmp_path / name)
        store.download_file(f"files/{name}", tmp_path / "back" / name)
        assert (tmp_path / "back" / name).read_bytes() == data
        assert store.get(f"files/{name}").data == data
    with pytest.raises(ArtifactError, match="nothing is stored under files/none"):
        store.download_file("files/none", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ArtifactError, match="no such file"):
        store.upload_file("files/none", tmp_path / "none")


@pytest.mark.parametrize(
    "key", ["", "/", "/etc/passwd", "../out", "a/../../out", "a//b", "a/.", "a\\b", ".lock", "a\nb", "x" * 901]
)
def test_keys_that_climb_out_or_mean_two_things_are_refused(store: Store, key: str, tmp_path: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.get(key), lambda: store.put(key, b""), lambda: store.create(key, b""),
        lambda: store.replace(key, b"", "e"), lambda: store.delete(key),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ConfigError, match="store key"):
            call()


RACE = """
import sys
from ado_tasks.stores import open_store
url, name = sys.argv[1:]
store = open_store(url)
store.list()  # connected
sys.stdin.readline()  # the start
won = [str(number) for number in range(10) if store.create(f"race/{number}", name.encode())]
counted = 0
while counted < 5:
    found = store.get("counter")
    counted += store.replace("counter", str(int(found.data) + 1).encode(), found.etag)
print(" ".join(won))
"""


def test_of_many_processes_one_creates_and_no_replacement_is_lost(store: Store, url: str) -> None:
    store.put("counter", b"0")
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, url, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for number in range(WRITERS)
    ]
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    won = {str(number): writer.communicate(timeout=120)[0].split() for number, writer in enumerate(writers)}
    assert [writer.returncode for writer in writers] == [0] * WRITERS
    assert sorted(key for keys in won.values() for key in keys) == [str(number) for number in range(10)]
    for name, keys in won.items():
        assert all(store.get(f"race/{key}").data == name.encode() for key in keys)
    assert store.get("counter").data == str(5 * WRITERS).encode()


def test_readers_see_whole_values_while_writers_write(store: Store) -> None:
    sizes = [1, 1 << 18]
    store.put("value", b"a" * sizes[0])
    done = threading.Event()
    seen: set[int] = set()

    def read() -> None:
        while not done.is_set():
            seen.add(len(store.get("value").data))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(30):
        store.put("value", b"a" * sizes[number % 2])
    done.set()
    reader.join()
    assert seen <= set(sizes)


@pytest.mark.parametrize("address", ["", "http://host/path", "s3://", "gs://bucket"])
def test_addresses_of_another_kind_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="s3://bucket/prefix or a folder"):
        open_store(address)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="file"):
        open_store(str(tmp_path / "file" / "store")).put("a", b"")
