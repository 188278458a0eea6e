"""Whatever comes from outside and cannot be used is refused by the command itself, and never with a traceback.

The message names the file or the key and what is allowed, the exit status is the error's, nothing half-written is left.

What one reader refuses lies with its tests (datasets/, test_prepare.py, test_storage.py, test_cli.py); here is the way
from there to the shell.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ado_tasks.__main__ import main
from ado_tasks.backend import HAS_CPU_COMPILER, on_cpu
from ado_tasks.errors import AdoError, ArtifactError, ConfigError, DataError, StorageError
from ado_tasks.variants import read_knots, student_variants

ROOT = Path(__file__).resolve().parents[2]
TRAIN = """\
train:
  model: {block_out_channels: [8], down_block_types: [DownBlock2D], up_block_types: [UpBlock2D], layers_per_block: 1,
          norm_num_groups: 4}
  steps: 4
  batch_size: 8
  checkpoint_every: 2
"""


def everything(folder: Path) -> list[str]:
    """All paths under a folder but the records of runs, which tell of failures too."""
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(path.as_posix() for path in paths if path.parts[0] != ".ado")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user stands: the working directory, and no uploader."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("ADO_SYNC", "manual")
    return tmp_path / "work"


def refused(command: str, error: type[AdoError], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with the error's status, one message that says all of this, and the folder as it was."""
    before = everything(Path())
    status = main(command.split())  # whatever has no name is raised from here, and shown by pytest
    message = capsys.readouterr().err
    assert status == error.exit_code
    for word in [f"ado {command.partition(' ')[0]}: {error.__name__}: ", *words]:
        assert word in message
    assert everything(Path()) == before
    assert list(Path().rglob("*tmp-*")) == []


# --- sources of images ---


@pytest.fixture
def photographs(workspace: Path) -> Path:
    """Twelve images of two classes, enough for three parts."""
    noise = np.random.default_rng(0)
    for number in range(12):
        path = workspace / "photographs" / ("cat" if number % 2 else "dog") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(path)
    return workspace / "photographs"


def cut_short(folder: Path) -> None:
    path = folder / "cat" / "05.png"
    path.write_bytes(path.read_bytes()[:300])


def of_another_shape(folder: Path) -> None:
    Image.new("RGB", (16, 20)).save(folder / "cat" / "05.png")


def leading_out(folder: Path) -> None:
    (folder.parent / "secret.png").write_bytes((folder / "cat" / "05.png").read_bytes())
    (folder / "cat" / "05.png").unlink()
    (folder / "cat" / "05.png").symlink_to(folder.parent / "secret.png")


def emptied(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_short, ["photographs/cat/05.png", "damaged", "truncated"]),
        (of_another_shape, ["photographs/cat/05.png", "20x16 pixels", "expected 16x16", "prepare.resize"]),
        (leading_out, ["photographs/cat/05.png", "leads out of photographs", "put the file itself there"]),
        (emptied, ["photographs: the folder is empty"]),
    ],
)
def test_a_folder_of_images(
    workspace: Path, photographs: Path, capsys, damage: Callable[[Path], None], words: list[str]
) -> None:
    (workspace / "params.yaml").write_text(
        "seed: 0\nprepare: {source: folder, train: 0.5, selection: 0.25, report: 0.25}\n"
    )
    assert main("prepare --source-path photographs --out good".split()) == 0  # it is the damage that is refused
    damage(photographs)
    refused("prepare --source-path photographs --out mine", DataError, words, capsys)


class Payload:
    """An object whose unpickling would leave a mark."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return Path.touch, (Path("was-unpickled"),)  # pyright: ignore[reportReturnType]


def test_a_pickle_in_an_archive_is_never_opened(workspace: Path, capsys) -> None:
    (workspace / "params.yaml").write_text("seed: 0\nprepare: {source: npz}\n")
    np.savez(workspace / "images.npz", images=np.array([Payload()]), labels=np.zeros(1, np.uint8))
    words = ["images.npz: images holds pickled objects", "Save plain numbers"]
    refused("prepare --source-path images.npz --out mine", DataError, words, capsys)
    with np.load(workspace / "images.npz", allow_pickle=True) as archive:
        assert archive["images"].shape == (1,)
    assert (workspace / "was-unpickled").exists()  # the payload was a live one


# --- params ---


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ("seed: 0\nprepare: {name: é}\n".encode("latin-1"), ["params.yaml", "utf-8"]),
        (b"seed: 0\nprepare: &a {name: *a}\n", ["prepare", "a mapping that holds itself"]),
        (b"seed: 0\nprepare: {train: .inf}\n", ["prepare.train", "inf is not allowed", "finite"]),
        (b"seed: 1" + 5000 * b"0" + b"\nprepare: {}\n", ["params.yaml", "digits"]),
    ],
)  # unknown keys and values out of range: test_cli.py; those of a network's own keys: test_train.py
def test_params_that_yaml_reads_and_nobody_else(workspace: Path, capsys, params: bytes, words: list[str]) -> None:
    (workspace / "params.yaml").write_bytes(params)
    refused("prepare --out mine", ConfigError, words, capsys)


# --- what other tasks should have made ---


@pytest.mark.parametrize("content", ["{}", "[]"])
def test_a_report_of_another_kind(workspace: Path, capsys, content: str) -> None:
    (workspace / "params.yaml").write_text("seed: 0\nmeasure: {}\nevaluate: {}\n")
    (workspace / "anchor").mkdir()
    for name in ("profile.json", "anchor/anchor.json"):
        (workspace / name).write_text(content)
    models = "--teacher t --students p --schedules s"
    refused(f"measure {models} --profile profile.json --out m.json", ArtifactError, ["profile.json: has no id"], capsys)
    words = ["anchor/anchor.json: has no features_sha256, margin"]
    refused(f"evaluate {models} --dataset d --features f --anchor anchor --out r", ArtifactError, words, capsys)


@pytest.mark.parametrize("read", [student_variants, read_knots])
def test_variants_that_are_not_there(tmp_path: Path, read: Callable[[Path], object]) -> None:
    """A folder that was not given, is empty, or is a file must not pass for one without variants."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("absent", "empty", "file"):
        with pytest.raises(ArtifactError, match=rf"{name}: no (student|schedule) in it; .* expected"):
            read(tmp_path / name)


# --- places that cannot be written ---


def test_an_output_that_would_take_the_working_directory_along(workspace: Path, capsys) -> None:
    (workspace / "params.yaml").write_text("seed: 0\nprepare: {}\n")
    refused("prepare --out .", ConfigError, ["--out .", "the folder that this runs in would be replaced"], capsys)


def test_records_that_cannot_be_kept(workspace: Path, capsys) -> None:
    (workspace / "params.yaml").write_text("seed: 0\nprepare: {}\n")
    (workspace / ".ado").write_text("a file")
    refused("prepare --out mine", StorageError, [".ado/runs", "Not a directory"], capsys)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    (folder / "params.yaml").write_text("seed: 0\nprepare: {}\n")
    assert main(["prepare", "--params", str(folder / "params.yaml"), "--out", str(folder / "data")]) == 0
    return folder / "data"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of so many KiB in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mounted(kib: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)]
        if not sys.platform.startswith("linux") or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("only root may mount, on Linux")
        return disk

    yield mounted
    if os.path.ismount(disk):
        subprocess.run(["umount", str(disk)], check=True)


def ends_with_a_storage_error(command: str, cwd: Path, words: list[str], before: str = "") -> None:
    """In a process of its own, started by a shell that may set limits and variables before."""
    (cwd / "params.yaml").write_text("seed: 0\nprepare: {}\n" + TRAIN)
    shell = ["sh", "-c", f'{before} exec "$@"', "sh", sys.executable, "-m", "ado_tasks", *command.split()]
    environment = {**os.environ, "ADO_SYNC": "manual", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(shell, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == StorageError.exit_code, done.stderr
    for word in ["StorageError: ", *words]:
        assert word in done.stderr
    assert everything(cwd) == ["params.yaml"]
    assert list(cwd.rglob("*tmp-*")) == []


@pytest.mark.parametrize(("kib", "words"), [(4, []), (64, ["mine: "])])
def test_a_disk_that_is_full_for_a_record_or_a_dataset(
    small_disk: Callable[[int], Path], kib: int, words: list[str]
) -> None:
    ends_with_a_storage_error("prepare --out mine", small_disk(kib), [*words, "the disk is full"])


def test_a_disk_that_is_full_for_a_checkpoint(small_disk: Callable[[int], Path], digits: Path) -> None:
    words = ["step-00000002.safetensors", "could not be written"]
    ends_with_a_storage_error(f"train --dataset {digits} --out mine", small_disk(64), words)


@pytest.mark.skipif(not (on_cpu() and HAS_CPU_COMPILER), reason="MLX calls no compiler here")
def test_a_disk_that_is_full_for_compiled_kernels(
    small_disk: Callable[[int], Path], tmp_path: Path, digits: Path
) -> None:
    (tmp_path / "work").mkdir()
    disk = small_disk(64)
    words = [f"{disk}: MLX could not compile a kernel there: ", "No space left on device"]
    before = f"export TMPDIR={shlex.quote(str(disk))} &&"
    ends_with_a_storage_error(f"train --dataset {digits} --out mine", tmp_path / "work", words, before)


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    """A limit of some KiB on the size of a file ends a write in the same place, where nobody may mount."""
    (tmp_path / "work").mkdir()
    ends_with_a_storage_error("prepare --out mine", tmp_path / "work", ["mine: "], before="ulimit -f 16 &&")
