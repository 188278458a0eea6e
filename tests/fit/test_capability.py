"""A machine's figures: written and read again, published ones checked, and what a measurement holds."""

import pytest

from ado_tasks.errors import ArtifactError, ConfigError, HardwareError, StorageError
from ado_tasks.fit import probes
from ado_tasks.fit.roofline import save_roofline
from ado_tasks.hardware.capability import RECORDED, Capability, apple_chip, apple_chips, read_capability
from ado_tasks.hardware.fingerprint import this_machine
from ado_tasks.profile import HARDWARE, ROOFLINE, ProfileConfig, profile
from ado_tasks.storage import write_json


def test_published_chips_are_whole_and_sourced() -> None:
    chips = apple_chips()
    families = [f"Apple M{number}{kind}" for number in range(1, 6) for kind in ("", " Pro", " Max")]
    assert set(families) | {"Apple M1 Ultra", "Apple M2 Ultra", "Apple M3 Ultra"} == set(chips)
    for name, chip in chips.items():
        assert chip["sources"] and all(url.startswith("https://") for url in chip["sources"])
        per_core = chip["fp32_tflops"] / chip["gpu_cores"]
        assert 0.3 < per_core < 0.6, f"{name}: 128 units a core at 1.3 to 1.8 GHz give 0.33 to 0.46, not {per_core:.2f}"
        assert apple_chip(name).predicted and apple_chip(name).unified
    for number in range(1, 6):
        small, large = chips[f"Apple M{number}"], chips[f"Apple M{number} Max"]
        assert large["bandwidth_gb_s"] > 3 * small["bandwidth_gb_s"]


def test_a_chip_that_is_not_sold_is_refused() -> None:
    with pytest.raises(HardwareError, match=r"Apple M9.*allowed: Apple M1"):
        apple_chip("Apple M9")
    with pytest.raises(HardwareError, match="Apple M2: 64 GB; allowed: 8, 16, 24"):
        apple_chip("Apple M2", 64)


def test_there_and_back(tmp_path) -> None:
    for path in sorted(RECORDED.glob("*.json")):
        found = read_capability(path)
        write_json(tmp_path / path.name, found.as_plain())
        assert read_capability(tmp_path / path.name) == found


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"device": "tpu"}, "device: 'tpu' is not allowed: Input should be 'cpu', 'metal' or 'cuda'"),
        ({"colour": "red"}, "colour: unknown key; allowed here: chip, device, memory_gib"),
        ({"memory_gib": "much"}, "memory_gib: 'much' is not allowed"),
        ({"probes": [{"kind": "matmul"}]}, r"probes\.0\.shape: a value is required"),
    ],
)
def test_figures_of_another_kind_are_named(changed: dict, said: str) -> None:
    plain = {**read_capability(RECORDED / "cpu.json").as_plain(), **changed}
    with pytest.raises(ArtifactError, match=f"x.json: not what `ado profile --measured` writes: x.json.{said}"):
        Capability.from_plain(plain, "x.json")


def test_a_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """With the smallest shapes: every kind and precision; rates agree with times, the peak with the probes."""
    monkeypatch.setattr(probes, "PRODUCTS", (16, 32))
    monkeypatch.setattr(probes, "CONVOLUTIONS", ((1, 4, 8),))
    monkeypatch.setattr(probes, "ATTENTIONS", ((1, 2, 16, 8),))
    monkeypatch.setattr(probes, "COPIES", (1024,))
    monkeypatch.setattr(probes, "SPENT_S", 0.001)
    found = probes.measure_capability()
    assert len(found.probes) == 3 * (2 + 1 + 1) + 1
    for probe in found.probes:
        if probe.kind == "matmul":
            n = probe.shape[0]
            assert probe.gflops == pytest.approx(2 * n**3 / probe.milliseconds / 1e6, rel=0.05, abs=0.02)
    assert found.peak_gflops["float32"] == max(p.gflops for p in found.probes if p.precision == "float32")
    assert found.bandwidth_gb_s > 0 and found.memory_gib > 0 and found.overhead_us > 0 and not found.predicted
    save_roofline(tmp_path / "roofline.png", found)
    assert (tmp_path / "roofline.png").stat().st_size > 5000


def test_a_machine_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """In a folder of its fingerprint; without the option it is not measured at all."""
    asked: list[int] = []
    monkeypatch.setattr(probes, "measure_capability", lambda report: asked.append(1) or apple_chip("Apple M1"))
    out, measured = tmp_path / "profile.json", tmp_path / "machines"
    profile(ProfileConfig(), out=out)
    assert not asked
    for _ in range(2):
        result = profile(ProfileConfig(), out=out, measured=measured)
    assert len(asked) == 1 and {path.name for path in (measured / result.id).iterdir()} == {HARDWARE, ROOFLINE}
    assert read_capability(measured / result.id / HARDWARE).chip == "Apple M1"


def test_a_place_that_cannot_hold_figures_is_named_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    """A file, a folder under a file, figures that are damaged: nothing is measured, nothing is left behind."""
    monkeypatch.setattr(probes, "measure_capability", lambda report: pytest.fail("measured"))
    out, file, known = tmp_path / "profile.json", tmp_path / "file", tmp_path / "known"
    file.write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--measured .*file: is a file; allowed: a folder, which may be missing"):
        profile(ProfileConfig(), out=out, measured=file)
    (known / this_machine().identity).mkdir(parents=True)
    (known / this_machine().identity / HARDWARE).write_text('{"device": "cpu"}', encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"hardware\.json\.chip: a value is required"):
        profile(ProfileConfig(), out=out, measured=known)
    assert not out.exists()
    with pytest.raises(StorageError, match="file/machines"):
        profile(ProfileConfig(), out=out, measured=file / "machines")
    assert {path.name for path in tmp_path.iterdir()} == {"profile.json", "file", "known"}


def test_figures_appear_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(probes, "measure_capability", lambda report: apple_chip("Apple M9"))
    with pytest.raises(HardwareError):
        profile(ProfileConfig(), out=tmp_path / "profile.json", measured=tmp_path / "machines")
    assert list((tmp_path / "machines").iterdir()) == []


def test_larger_shapes_are_left_out_where_they_would_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "PRODUCTS", (16, 4096))
    monkeypatch.setattr(probes, "LONGEST_S", 1e-9)
    monkeypatch.setattr(probes, "SPENT_S", 0.001)
    cases = ("float32", [probes._product(n) for n in probes.PRODUCTS])
    assert [probe.shape[0] for probe in probes._timed(cases)] == [16]
