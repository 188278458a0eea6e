"""What the machine at hand can do, measured in under a minute: products, convolutions, attention, copies."""

import time
from collections.abc import Callable, Iterator

from ado_tasks import rng
from ado_tasks.backend import mx, on_cpu
from ado_tasks.fit.work import Image, convolution_flops
from ado_tasks.hardware.capability import GIB, Capability, Device, Precision, Probe
from ado_tasks.hardware.fingerprint import Machine, this_machine
from ado_tasks.models import ops
from ado_tasks.report import SILENT, Reporter

TYPES: dict[Precision, mx.Dtype] = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# What a U-Net meets, small to large; a CPU stops where a larger one would take too long.
PRODUCTS = (64, 256, 1024, 4096)  # n × n by n × n
CONVOLUTIONS = ((16, 8, 64), (16, 16, 128), (16, 32, 256), (16, 64, 256))  # images, side, channels in and out
ATTENTIONS = (
    (16, 4, 64, 16),
    (16, 4, 256, 64),
    (16, 4, 1024, 64),
    (16, 4, 4096, 64),
)  # images, heads, positions, width
COPIES = (2**18, 2**22, 2**24, 2**26)  # elements; bandwidth is that of the two largest, which few caches hold
OVERHEAD_CHAIN = 200  # tiny operations one after another
LONGEST_S = 0.6  # of one probe's single run: a longer one is left out, as are those after it
SPENT_S = 0.35  # on repeating one probe
MOST_REPEATS = 30

Run = Callable[[], object]


def device_kind() -> Device:
    """What MLX computes on."""
    if on_cpu():
        return "cpu"
    return "cuda" if mx.cuda.is_available() else "metal"


def measure_capability(report: Reporter = SILENT) -> Capability:
    """Time every probe, alone and in turn; takes 20 to 50 s."""
    machine, device = this_machine(), device_kind()
    found: list[Probe] = []
    series = list(_series())
    for number, each in enumerate(series):
        found += _timed(each)
        report.progress(number + 1, len(series))
    peak = {
        precision: max((p.gflops for p in found if p.precision == precision), default=0.0) for precision in TYPES
    }  # fmt: skip
    bandwidth = max([p.gb_s for p in found if p.kind == "copy"][-2:])
    total, usable = _memory(machine, device)
    return Capability(
        chip=machine.chip if device != "cuda" else machine.device, device=device, memory_gib=total,
        unified=device != "cuda", peak_gflops=peak, bandwidth_gb_s=bandwidth, overhead_us=_overhead_us(),
        usable_gib=usable, cores=machine.cores, id=machine.identity, probes=tuple(found),
    )  # fmt: skip


def _memory(machine: Machine, device: Device) -> tuple[float, float | None]:
    """GiB of the device, and how much of it the system recommends; MLX's keys differ by backend."""
    told = mx.device_info()
    sizes = [told[key] for key in ("total_memory", "memory_size") if key in told] if device != "cpu" else []
    total = int(sizes[0]) / GIB if sizes else float(machine.memory_gib)
    usable = told.get("max_recommended_working_set_size")
    return round(total, 1), round(int(usable) / GIB, 1) if usable else None


class _Case:
    """One probe before it is run. `make` gives the run; arrays are made then, not earlier."""

    def __init__(self, kind: str, shape: tuple[int, ...], flops: float, elements: float, make: Callable[..., Run]):
        self.kind, self.shape, self.flops, self.elements, self.make = kind, shape, flops, elements, make


def _series() -> Iterator[tuple[Precision, list[_Case]]]:
    """Cases of one kind and precision, growing."""
    for precision in TYPES:
        yield precision, [_product(n) for n in PRODUCTS]
        yield precision, [_convolution(*shape) for shape in CONVOLUTIONS]
        yield precision, [_attention(*shape) for shape in ATTENTIONS]
    yield "float32", [_copy(size) for size in COPIES]


def _product(n: int) -> _Case:
    def make(dtype: mx.Dtype) -> Run:
        a, b = _drawn(dtype, n, n), _drawn(dtype, n, n, name="b")
        return lambda: mx.eval(a @ b)

    return _Case("matmul", (n, n, n), 2.0 * n**3, 3.0 * n**2, make)


def _convolution(batch: int, side: int, channels: int) -> _Case:
    def make(dtype: mx.Dtype) -> Run:
        x, w = _drawn(dtype, batch, side, side, channels), _drawn(dtype, channels, 3, 3, channels, name="w")
        step = mx.compile(lambda x, w: ops.conv2d(x, w, None, padding=1))
        return lambda: mx.eval(step(x, w))

    image = Image(batch, side, side)
    flops = convolution_flops(image, channels, channels)
    return _Case("convolution", (batch, side, side, channels), flops, 2 * image.pixels * channels, make)


def _attention(batch: int, heads: int, length: int, width: int) -> _Case:
    def make(dtype: mx.Dtype) -> Run:
        q, k, v = (_drawn(dtype, batch, heads, length, width, name=name) for name in "qkv")
        step = mx.compile(lambda q, k, v: ops.attention(q, k, v, width**-0.5))
        return lambda: mx.eval(step(q, k, v))

    flops = 4.0 * batch * heads * length**2 * width
    return _Case("attention", (batch, heads, length, width), flops, 4.0 * batch * heads * length * width, make)


def _copy(size: int) -> _Case:
    def make(dtype: mx.Dtype) -> Run:
        x = _drawn(dtype, size)
        return lambda: mx.eval(x + 1)

    return _Case("copy", (size,), 0.0, 2.0 * size, make)


def _drawn(dtype: mx.Dtype, *shape: int, name: str = "x") -> mx.array:
    x = mx.random.normal(shape, key=rng.key(0, "probe", name)).astype(dtype)
    mx.eval(x)
    return x


def _timed(series: tuple[Precision, list[_Case]]) -> Iterator[Probe]:
    precision, cases = series
    guessed = 0.0
    for number, case in enumerate(cases):
        if guessed > LONGEST_S:
            return
        run = case.make(TYPES[precision])
        seconds = _seconds(run)
        weight = TYPES[precision].size * case.elements
        yield Probe(
            case.kind, case.shape, precision, round(1e3 * seconds, 4),
            round(case.flops / seconds / 1e9, 2), round(weight / seconds / 1e9, 2),
        )  # fmt: skip
        if number + 1 < len(cases):
            following = cases[number + 1]
            guessed = seconds * max(following.flops, 1) / max(case.flops, 1)
            guessed = guessed if case.flops else seconds * following.elements / case.elements


def _seconds(run: Run) -> float:
    """The quickest of several runs after one that is not counted: what the machine can do, not what else it did."""
    run()
    taken: list[float] = []
    while len(taken) < 2 or (sum(taken) < SPENT_S and len(taken) < MOST_REPEATS):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return min(taken)


def _overhead_us() -> float:
    """Of one tiny operation in a chain that cannot be fused."""
    x = _drawn(mx.float32, 8)

    def chain() -> object:
        y = x
        for _ in range(OVERHEAD_CHAIN):
            y = mx.cumsum(y)
        return mx.eval(y)

    return round(1e6 * _seconds(chain) / OVERHEAD_CHAIN, 2)
