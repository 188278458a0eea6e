"""Checkpoints: what is damaged, foreign or misnamed is passed over for the one before it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ado_tasks.backend import mx
from ado_tasks.optimise.checkpoints import Checkpoints


@pytest.fixture
def kept(tmp_path: Path) -> Checkpoints:
    """Two checkpoints, of steps 10 and 20."""
    checkpoints = Checkpoints.under(tmp_path, "key")
    for step in (10, 20):
        checkpoints.save(
            step,
            {"weights": mx.full((4, 3), step, mx.float32), "half": mx.ones(5, mx.bfloat16), "step": mx.array(step)},
        )
    return checkpoints


def test_the_newest_comes_back_as_it_was(kept: Checkpoints) -> None:
    step, state = kept.latest() or (0, {})
    assert (step, state["step"].item(), state["half"].dtype) == (20, 20, mx.bfloat16)
    np.testing.assert_array_equal(np.array(state["weights"]), np.full((4, 3), 20, np.float32))


def flip(path: Path) -> None:
    """One bit of one number: the file is as long as before and every header is whole."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: mx.save_safetensors(str(path), {"weights": mx.zeros(3)}),  # another program's
        lambda path: path.rename(path.with_name("step-last.safetensors")),
    ],
    ids=["a flipped bit", "truncated", "foreign", "misnamed"],
)
def test_a_damaged_one_is_passed_over_for_the_one_before(kept: Checkpoints, damage: Callable[[Path], None]) -> None:
    damage(kept.folder / "step-00000020.safetensors")
    step, state = kept.latest() or (0, {})
    assert (step, state["step"].item()) == (10, 10)
    flip(kept.folder / "step-00000010.safetensors")
    assert kept.latest() is None
