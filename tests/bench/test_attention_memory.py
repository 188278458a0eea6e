"""bench/attention_memory.py: slopes, bars, and all of it at sizes that take no time."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import attention_memory
from attention_memory import ALL, BLOCKS, FUSED, Row


def rows(form: str, power: float, *sides: int) -> list[Row]:
    return [Row(form, "float32", side, True, float(side**2) ** power, 0.1) for side in sides]


def test_the_exponent_is_that_of_the_two_largest_sizes() -> None:
    assert attention_memory.exponent(rows(ALL, 2.0, 16, 64, 32)) == 2.0
    assert attention_memory.exponent([Row(ALL, "float32", 8, True, 9.0, 0.1), *rows(ALL, 0.5, 16, 32)]) == 0.5
    assert attention_memory.exponent(rows(ALL, 2.0, 16)) is None


@pytest.mark.parametrize(
    ("form", "precision", "apart", "fine"),
    [
        (BLOCKS, "float32", 9e-5, True), (BLOCKS, "float32", 2e-4, False),
        (FUSED, "bfloat16", 0.04, True), (FUSED, "bfloat16", 0.06, False),
        (ALL, "bfloat16", 0.5, True),  # what it is compared with, in a half: nobody takes it
    ],
)  # fmt: skip
def test_bars_depend_on_the_precision_and_hold_for_what_is_taken(
    form: str, precision: str, apart: float, fine: bool
) -> None:
    differences = {f"{form}, {precision}, 32x32": {"value": 1e-6, "dq": apart}}
    assert attention_memory.within_bars(differences, {}) is fine


def test_only_blocks_have_to_be_linear() -> None:
    slopes: dict[str, float | None] = {"all at once, float32, value": 2.0, "in blocks, float32, value": 1.05}
    assert attention_memory.within_bars({}, slopes)
    assert not attention_memory.within_bars({}, slopes | {"in blocks, float32, gradient": 1.2})


def test_each_form_is_compared_with_all_at_once_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")  # to be given back
    out, picture = tmp_path / "report.json", tmp_path / "picture.png"
    options = [
        "--sides",
        "24",
        "16",
        "--precisions",
        "float32",
        "bfloat16",
        "--out",
        str(out),
        "--picture",
        str(picture),
    ]
    attention_memory.main(options)
    report = json.loads(out.read_text())
    assert {(row["form"], row["precision"], row["side"], row["gradient"]) for row in report["rows"]} == {
        (form, precision, side, gradient)
        for form in (ALL, BLOCKS) for precision in ("float32", "bfloat16") for side in (16, 24)
        for gradient in (False, True)
    }  # fmt: skip
    apart = {name: max(each.values()) for name, each in report["largest_difference"].items()}
    assert set(apart) == {
        f"{form}, {side}x{side}" for side in (16, 24)
        for form in ("in blocks, float32", "all at once, bfloat16", "in blocks, bfloat16")
    }  # fmt: skip
    assert apart["in blocks, float32, 24x24"] < 1e-5 < apart["in blocks, bfloat16, 24x24"] < 0.05
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_float32_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        attention_memory.parse(["--precisions", "bfloat16"])
    assert "allowed: float32" in capsys.readouterr().err
