"""Costs carried to another chip: exact where times follow the formula, the error told is of networks not seen."""

import json
from pathlib import Path

import numpy as np
import pytest

from ado_tasks import rng
from ado_tasks.errors import ConfigError
from ado_tasks.fit.cost import CostModel
from ado_tasks.fit.target import Target, calibrated, described, foreseen, works_of
from ado_tasks.fit.work import KINDS, Op
from ado_tasks.hardware import capability
from ado_tasks.hardware.capability import Capability
from ado_tasks.models.quantised import quantised
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig

HERE = Capability("here", "cpu", 16, True, {"float32": 80.0}, 10.0, id="a" * 16)
FACTOR = 2.0  # of every kind: what the fit is pulled to, so that it finds it exactly
BATCH = 4
WIDTHS = {"teacher": (16, 3), "deep": (8, 4), "wide": (16, 1), "4": (12, 1), "5": (12, 2), "6": (4, 1), "7": (4, 3),
          "8": (20, 2), "9": (8, 1)}  # fmt: skip


def network(width: int, layers: int) -> UNet2D:
    return UNet2D(UNet2DConfig(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(width, width), layers_per_block=layers,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=4,
    ))  # fmt: skip


WORKS = works_of({name: network(*size) for name, size in WIDTHS.items()}, BATCH)


def at_the_roof(work: list[Op], gflops: float, gb_s: float) -> float:
    return sum(max(op.flops / (1e9 * gflops), 4 * op.elements / (1e9 * gb_s)) for op in work)


def taken(noise: float = 0.0, copies: int = 1) -> dict[str, list[float]]:
    """Seconds of a machine whose costs are the formula, in three rounds whose median they are."""
    found = {}
    for name, work in WORKS.items():
        wrong = float(np.exp(noise * rng.generator(0, name).standard_normal()))
        middle = wrong * FACTOR * at_the_roof(work, 80, 10)
        found |= {f"{name}{'+' * copy}": [0.9 * middle, middle, 5 * middle] for copy in range(copies)}
    return found


def chips(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Two of one sort of strength each, and one of which too little is known."""
    known = {
        "Sums": {"fp32_tflops": 1e3, "bandwidth_gb_s": 1, "memory_gb": [16, 32]},
        "Bytes": {"fp32_tflops": 1e-3, "bandwidth_gb_s": 1e6, "memory_gb": [16]},
        "Vague": {"bandwidth_gb_s": 100, "memory_gb": [16]},
    }
    (folder / "chips.json").write_text(json.dumps({"chips": known}))
    monkeypatch.setattr(capability, "CHIPS", folder / "chips.json")


def test_a_machine_of_the_formula_is_carried_exactly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Twice the roof here, so twice the roof there; and what is quickest depends on the chip."""
    chips(monkeypatch, tmp_path)
    model = calibrated(WORKS, taken(), HERE)
    assert model.worst_error < 1e-6 and model.fitted_on == len(WORKS)
    for name, gflops, gb_s in (("Sums", 1e6, 1), ("Bytes", 1, 1e6)):
        got = foreseen(model, WORKS, Target(name).reference(), BATCH, "teacher")
        for each, work in WORKS.items():
            wanted = 1e3 * FACTOR * at_the_roof(work, gflops, gb_s) / BATCH
            assert got[each].latency_ms_per_image == pytest.approx(wanted, rel=1e-6)
            ratio = at_the_roof(WORKS["teacher"], gflops, gb_s) / at_the_roof(work, gflops, gb_s)
            assert got[each].speedup_vs_teacher == pytest.approx(ratio, rel=1e-6)
            assert got[each].predicted and got[each].share_of_layers == pytest.approx(0, abs=1e-6)
        quicker = {"Sums": ("wide", "deep"), "Bytes": ("deep", "wide")}[name]
        assert got[quicker[0]].latency_ms_per_image < got[quicker[1]].latency_ms_per_image


def test_equal_networks_are_left_out_together() -> None:
    """A rung's survivors are the networks of the rung below: one of them would give away what the other takes."""
    once = calibrated(WORKS, taken(0.2), HERE)
    twice = calibrated({name: WORKS[name.rstrip("+")] for name in taken(copies=2)}, taken(0.2, copies=2), HERE)
    assert twice == once and once.median_error > 0.02


def test_what_a_layer_costs_is_this_machines() -> None:
    """40 µs a layer stay 40 µs on a chip whose other times are a hundredth: the share says how much that is."""
    model = CostModel("float32", dict.fromkeys(KINDS, FACTOR), 40.0, 9, 0.05, 0.1, HERE.id)
    chip = Capability("there", "metal", 16, True, {"float32": 8000.0}, 1000.0, predicted=True)
    got = foreseen(model, WORKS, chip, BATCH, "teacher")["deep"]
    rest, layers = FACTOR * at_the_roof(WORKS["deep"], 8000, 1000), 40e-6 * len(WORKS["deep"])
    assert got.latency_ms_per_image == pytest.approx(1e3 * (rest + layers) / BATCH)
    assert got.share_of_layers == pytest.approx(layers / (rest + layers))
    parameters, passing = sum(op.weights for op in WORKS["deep"]), max(op.passing for op in WORKS["deep"])
    assert got.peak_memory_mb == pytest.approx(4 * (parameters + 3.5 * passing) / 2**20, abs=0.005)
    said = described(model, chip, WORKS["teacher"])
    assert said["predicted"] and said["error"].startswith("not measured on there; on machine aaaa")
    assert said["relative_error"] == {"median": 0.05, "worst": 0.1, "left_out": 9}


@pytest.mark.parametrize(("head_width", "arrays"), [(4, 3.5), (64, 0.0)])
def test_memory_there_is_of_the_attention_that_runs_there(head_width: int, arrays: float) -> None:
    """Metal has a fused kernel for heads of 64: no scores are held; for heads of 4 all are."""
    attention = Op("attention", 1e9, 1e7, passing=2e6, scores=1e6, positions=1000, head_width=head_width)
    model = CostModel("float32", dict.fromkeys(KINDS, FACTOR), 0.0, 9, 0.05, 0.1, HERE.id)
    got = foreseen(model, {"one": [attention]}, Target("Apple M4").reference(), 1, "one")["one"]
    assert got.peak_memory_mb == pytest.approx(arrays * 4 * 2e6 / 2**20, abs=0.005)


def test_what_cannot_be_predicted_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for chip, memory, said in (
        ("Apple M9", None, r"weigh\.target: chip 'Apple M9': not known; allowed: Apple M1, .*Apple M5 Max"),
        ("Apple M4", 9, "weigh.target: chip Apple M4: 9 GB; allowed: 16, 24, 32"),
    ):
        with pytest.raises(ConfigError, match=said):
            Target(chip, memory)
    chips(monkeypatch, tmp_path)
    with pytest.raises(ConfigError, match=r"weigh.target: chip Vague: no fp32_tflops in chips.json; allowed: Sums, By"):
        Target("Vague")
    few = {name: network(*WIDTHS[name]) for name in list(WIDTHS)[:7]}
    with pytest.raises(ConfigError, match="7 different networks, teacher included; allowed: at least 8"):
        works_of({**few, "again": network(*WIDTHS["teacher"])}, BATCH)
    with pytest.raises(ConfigError, match="network bits has linear layers of 8 bits"):
        works_of({**few, "bits": quantised(network(32, 1), 8)}, BATCH)
