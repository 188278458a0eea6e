"""What a machine can do, as `ado profile --measured` finds it and as a maker publishes it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from ado_tasks.config import config, parse
from ado_tasks.errors import ArtifactError, ConfigError, HardwareError
from ado_tasks.storage import read_json

Device = Literal["cpu", "metal", "cuda"]
Precision = Literal["float32", "float16", "bfloat16"]
DEVICES: tuple[Device, ...] = ("cpu", "metal", "cuda")
CHIPS = Path(__file__).parent / "apple_chips.json"
NEEDED = ("fp32_tflops", "bandwidth_gb_s", "memory_gb")  # of a published chip, to predict from
RECORDED = Path(__file__).parent / "recorded"
GIB = 2**30
C = TypeVar("C")


@config
class Probe:
    """One operation, timed."""

    kind: str  # matmul, convolution, attention, copy
    shape: tuple[int, ...]
    precision: Precision
    milliseconds: float
    gflops: float  # operations a second; of a copy 0
    gb_s: float  # bytes read and written once, a second


@config
class Capability:
    """The figures that settings and predictions are made from."""

    chip: str
    device: Device
    memory_gib: float  # of the device; of the machine where both share it
    unified: bool  # processor and accelerator share their memory
    peak_gflops: dict[str, float]  # by precision, the best found or published
    bandwidth_gb_s: float
    overhead_us: float = 0.0  # of handing out one operation
    usable_gib: float | None = None  # what the system recommends to use at most; none = not told
    cores: int = 0  # of the processor; 0 = not told
    predicted: bool = False  # published figures instead of measured ones
    id: str = ""  # fingerprint of the machine that was measured
    probes: tuple[Probe, ...] = field(default=())

    def as_plain(self) -> dict[str, Any]:
        """As hardware.json holds it."""
        return asdict(self)

    @staticmethod
    def from_plain(plain: Mapping[str, Any], where: str = "hardware.json") -> "Capability":
        """Back from JSON. Raises ArtifactError that names each key that is missing, unknown or of another kind."""
        return stored(Capability, plain, where, "`ado profile --measured`")


def stored(cls: type[C], plain: Mapping[str, Any], where: str, maker: str) -> C:
    """What `maker` wrote of a class made with `@config`, from JSON. Raises ArtifactError where it wrote something else.

    Figures that are read are figures, not settings: whose file is another one is not told to edit its keys.
    """
    try:
        return parse(cls, plain, where)
    except ConfigError as problem:
        lines = "; ".join(str(problem).splitlines())
        raise ArtifactError(f"{where}: not what {maker} writes: {lines}") from None


def read_capability(path: Path) -> Capability:
    """Of a hardware.json. Raises ArtifactError where it is none."""
    return Capability.from_plain(read_json(path, "device"), str(path))


def apple_chips() -> dict[str, dict[str, Any]]:
    """Published figures of Apple's chips by name, each with its sources."""
    return json.loads(CHIPS.read_text(encoding="utf-8"))["chips"]


def apple_chip(name: str, memory_gb: int | None = None) -> Capability:
    """A chip's published figures, with its largest number of GPU cores; half precision at float32's rate.

    Apple publishes no separate rate for halves; GPUs up to M4 run them at float32's
    (philipturner/metal-benchmarks, "Operations per Second"). The accelerators for matrices in M5 are left out.

    Raises:
        HardwareError: no such chip, it was never sold with so much memory, or a figure of it is not known.
    """
    chips = apple_chips()
    if name not in chips:
        raise HardwareError(f"chip {name!r}: not known; allowed: {', '.join(chips)}")
    chip = chips[name]
    absent = [figure for figure in NEEDED if not chip.get(figure)]
    if absent:
        whole = [each for each, known in chips.items() if all(known.get(figure) for figure in NEEDED)]
        raise HardwareError(f"chip {name}: no {', '.join(absent)} in {CHIPS.name}; allowed: {', '.join(whole)}")
    memory = memory_gb or chip["memory_gb"][0]
    if memory not in chip["memory_gb"]:
        raise HardwareError(f"chip {name}: {memory} GB; allowed: {', '.join(map(str, chip['memory_gb']))}")
    peak = 1e3 * chip["fp32_tflops"]
    return Capability(
        name, "metal", memory, unified=True, peak_gflops={"float32": peak, "float16": peak, "bfloat16": peak},
        bandwidth_gb_s=chip["bandwidth_gb_s"], predicted=True,
    )  # fmt: skip
