"""`bench/student_times.py`: which times students are tried at."""

import sys
from pathlib import Path

import pytest

from ado_tasks.errors import ConfigError
from ado_tasks.storage import write_json

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import student_times


def test_every_so_manyth_knot_of_each_schedule_that_the_steps_divide(tmp_path: Path) -> None:
    write_json(tmp_path / "ddim-4.json", {"times": [0.97, 0.8, 0.6, 0.3, 0.0]})
    write_json(tmp_path / "ddim-6.json", {"times": [0.9, 0.8, 0.7, 0.5, 0.3, 0.1, 0.0]})
    write_json(tmp_path / "ipndm-4.json", {"times": [0.96, 0.7, 0.5, 0.2, 0.0]})
    assert student_times.learned_times(tmp_path, 4) == {"knots of ddim-4": (1.0, 0.8, 0.6, 0.3, 0.0)}
    found = student_times.learned_times(tmp_path, 2)
    assert found == {"knots of ddim-4": (1.0, 0.6, 0.0), "knots of ddim-6": (1.0, 0.5, 0.0)}
    assert list(student_times.learned_times(tmp_path, 2, of=[6])) == ["knots of ddim-6"]
    with pytest.raises(ConfigError, match="no schedule of DDIM whose steps 5 divides"):
        student_times.learned_times(tmp_path, 5)
