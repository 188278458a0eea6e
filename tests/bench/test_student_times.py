"""`bench/student_times.py`: which times students are tried at."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

from ado_tasks.config import read_params, section
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


def test_options_take_the_place_of_the_sections_own_and_are_refused_where_they_do_not_go_with_the_rest() -> None:
    """Also where the section asks its teacher's walks less often than they have steps."""
    given = section(read_params(Path(__file__).parents[2] / "params.shapes32.yaml"), "distill.progressive")
    options = Namespace(students=[4, 2], stage_steps=30, learning_rate=1e-3, teacher_steps=32)
    times = (1.0, 0.9, 0.8, 0.5, 0.0)
    found = student_times.settings_of(given, times, options)
    assert (found.student_steps, found.stage_steps, found.teacher_steps, found.times) == ((4, 2), 30, 32, times)
    assert (found.matching, found.walks, found.walk_evaluations) == (None, given["walks"], given["walk_evaluations"])
    options.teacher_steps = given["walk_evaluations"] - 1
    with pytest.raises(ConfigError, match="walk_evaluations: 16; allowed: at most teacher_steps, 15"):
        student_times.settings_of(given, times, options)
