"""Files are whole or absent, whatever happens while they are written."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ado_tasks import storage
from ado_tasks.backend import mx
from ado_tasks.errors import ArtifactError, StorageError


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with storage.atomic_folder(out) as folder:
        (folder / "a.txt").write_text("a")
        assert not out.exists()
    assert everything(tmp_path) == ["model", "model/a.txt"]


def test_a_failure_leaves_the_former_folder(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with storage.atomic_folder(out) as folder:
        (folder / "old.txt").write_text("old")
    with pytest.raises(RuntimeError), storage.atomic_folder(out) as folder:
        (folder / "new.txt").write_text("new")
        raise RuntimeError
    assert everything(tmp_path) == ["model", "model/old.txt"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "model"
    for name in ("old", "new"):
        with storage.atomic_folder(out) as folder:
            (folder / f"{name}.txt").write_text(name)
    assert everything(tmp_path) == ["model", "model/new.txt"]


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".model.tmp-dead").mkdir()
    with storage.atomic_folder(tmp_path / "model") as folder:
        (folder / "a.txt").write_text("a")
    assert everything(tmp_path) == ["model", "model/a.txt"]


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "permission denied")])
def test_a_full_disk_is_a_named_error_and_leaves_nothing(tmp_path: Path, code: int, words: str) -> None:
    with pytest.raises(StorageError, match=words), storage.atomic_folder(tmp_path / "model") as folder:
        (folder / "half.bin").write_bytes(b"half")
        raise OSError(code, os.strerror(code), str(folder / "half.bin"))
    assert everything(tmp_path) == []


def test_a_folder_in_the_place_of_a_file_is_named_by_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "choice.json").mkdir()
    with pytest.raises(StorageError, match=r"choice\.json: Is a directory") as problem:
        storage.write_text(tmp_path / "choice.json", "{}")
    assert ".tmp-" not in str(problem.value)
    assert everything(tmp_path) == ["choice.json"]


def test_a_folder_that_cannot_step_aside_is_named_by_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that something is mounted on."""
    (tmp_path / "model").mkdir()

    def busy(self: Path, to: Path) -> None:
        raise OSError(errno.EBUSY, "busy", str(self), None, str(to))

    monkeypatch.setattr(Path, "rename", busy)
    with (
        pytest.raises(StorageError, match=r"model: busy; nothing was left") as problem,
        storage.atomic_folder(tmp_path / "model"),
    ):
        pass
    assert ".tmp-" not in str(problem.value)
    assert everything(tmp_path) == ["model"]


def test_files_move_together_and_the_last_one_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: (moved.append(Path(to).name), replace(self, to))[1])
    out = tmp_path / "reports"
    (out).mkdir()
    (out / "other.json").write_text("{}")
    with storage.atomic_files(out, last="a.json") as folder:
        (folder / "a.json").write_text("{}")
        (folder / "b.png").write_bytes(b"")
    assert moved == ["b.png", "a.json"]
    assert everything(tmp_path) == ["reports", "reports/a.json", "reports/b.png", "reports/other.json"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not finite"):
        storage.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert everything(tmp_path) == []


@given(st.dictionaries(st.text("abc.", min_size=1, max_size=8), st.integers(0, 5), max_size=4))
def test_arrays_come_back(tmp_path_factory: pytest.TempPathFactory, sizes: dict[str, int]) -> None:
    path = tmp_path_factory.mktemp("arrays") / "x.safetensors"
    arrays = {name: np.arange(size, dtype=np.float32) for name, size in sizes.items() if size}
    storage.save_arrays(path, arrays, {"made": "here"})
    found, metadata = storage.load_arrays_and_metadata(path)
    assert {name: np.array(a).tolist() for name, a in found.items()} == {n: a.tolist() for n, a in arrays.items()}
    assert metadata.get("made") == "here"


def test_equal_arrays_give_equal_bytes(tmp_path: Path) -> None:
    a, b = {"x": mx.ones(3), "y": mx.zeros((2, 2))}, {"y": mx.zeros((2, 2)), "x": mx.ones(3)}
    storage.save_arrays(tmp_path / "a.safetensors", a, {"p": "1", "q": "2"})
    storage.save_arrays(tmp_path / "b.safetensors", b, {"q": "2", "p": "1"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    storage.save_arrays(path, {"x": mx.ones((10, 10))})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"x\.safetensors"):
        storage.load_arrays(path)


@pytest.mark.parametrize("content", [b"not a safetensors file at all", b"\x02\x00\x00\x00\x00\x00\x00\x00[]"])
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"x\.safetensors"):
        storage.load_arrays(path)


def test_a_tree_has_one_sum(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("x")
    before = storage.sha256_tree(tmp_path)
    assert storage.sha256_tree(tmp_path) == before
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert storage.sha256_tree(tmp_path) != before


def test_json_is_read_or_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"x": 1})[:-1])
    with pytest.raises(ArtifactError, match="not valid JSON"):
        storage.read_json(tmp_path / "a.json")
    with pytest.raises(ArtifactError, match="cannot be read"):
        storage.read_json(tmp_path / "b.json")
