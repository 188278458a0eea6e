"""Settings that follow from a machine and a network: one pure function, each choice with its reason."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from ado_tasks.errors import ConfigError, HardwareError
from ado_tasks.fit.memory import Plan, needed
from ado_tasks.fit.work import unet_work
from ado_tasks.hardware.capability import GIB, Capability, Precision
from ado_tasks.models.attention_choice import Form, attention_form
from ado_tasks.models.unet_config import UNet2DConfig

GAIN = 1.3  # a half has to beat float32's rate by this: below it, rounding is risked for little
FLOAT16_GAIN = 1.2  # float16, whose range needs care, has to beat bfloat16 by this
# What Metal recommends as working set, as MLX and llama.cpp print it: 2/3 of 8 to 32 GB, 3/4 of 36 GB and more.
METAL_LARGE_GIB, METAL_SHARE, METAL_LARGE_SHARE = 36, 2 / 3, 3 / 4
SHARE = {"cpu": 0.75, "cuda": 0.92}  # the rest is the system's, and the library's own
HEADROOM = 0.85  # of the budget is planned with: predictions err (docs/hardware.md says by how much)
SMALL_GIB = 8  # a Mac of this size has nothing to wire down
MEMORY_SIZES = (4, 8, 16, 18, 24, 32, 36, 48, 64, 80, 96, 128, 141, 192, 256, 512, 1024)  # GiB that are sold


@dataclass(frozen=True)
class Settings:
    """What to run a network with on a machine."""

    precision: Precision  # of weights and activations in a pass; the optimiser's and the sampler's state stay float32
    batch: int  # images a training step holds at once
    accumulation: int  # steps that make up the batch asked for
    checkpointing: bool  # activations computed anew in the backward pass, block by block
    attention_training: Form | None  # none: the network has no attention
    attention_sampling: Form | None
    shards: int  # parts of a batch at the same time, on a CPU
    compile: bool  # with mx.compile
    wired_limit_gib: float | None  # for mx.set_wired_limit; none = leave it
    cache_limit_gib: float | None  # for mx.set_cache_limit; none = leave it
    budget_gib: float  # of memory, to plan with
    training_gib: float  # predicted peak
    sampling_gib: float  # predicted peak, of the same batch
    reasons: dict[str, str] = field(default_factory=dict)


OVERRIDES = ("precision", "batch", "checkpointing", "shards", "compile", "wired_limit_gib", "cache_limit_gib")


def choose_settings(
    machine: Capability, config: UNet2DConfig, *, wanted_batch: int = 64, size: tuple[int, int] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Settings:  # fmt: skip
    """Choose.

    Args:
        machine: what it can do.
        config: of the network.
        wanted_batch: images an optimiser step is to see.
        size: height and width; none = the configuration's.
        overrides: values of OVERRIDES that are taken as they are.

    Raises:
        ConfigError: an override that is none, or a batch of no image.
        HardwareError: the network does not fit, even one image at a time: says how much memory would do.
    """
    if wanted_batch < 1:
        raise ConfigError(f"batch: {wanted_batch}; allowed: a whole number from 1")
    given = _checked(overrides or {})
    reasons: dict[str, str] = {}
    precision = _pick(given, reasons, "precision", _precision(machine))
    budget = memory_budget(machine)
    shards = _pick(given, reasons, "shards", _shards(machine, wanted_batch))
    forms = _attention(machine, config, size, precision, reasons)
    plan = Plan(machine.device, precision, forms[0], forms[1], checkpointing=False, shards=shards)
    batch, plan = _fitted(machine, config, wanted_batch, size, plan, budget, given, reasons)
    need = needed(unet_work(config, batch, size), plan)
    training, sampling = need.training / GIB, need.sampling / GIB
    return Settings(
        precision, batch, -(-wanted_batch // batch), plan.checkpointing, *forms, shards=min(shards, batch),
        compile=_pick(given, reasons, "compile", (True, "fused kernels; shapes do not change")),
        wired_limit_gib=_pick(given, reasons, "wired_limit_gib", _wired(machine, training)),
        cache_limit_gib=_pick(given, reasons, "cache_limit_gib", _cache(machine, budget, training)),
        budget_gib=round(budget, 2), training_gib=round(training, 3), sampling_gib=round(sampling, 3), reasons=reasons,
    )  # fmt: skip


def memory_budget(machine: Capability) -> float:
    """GiB to plan with. Raises HardwareError where the machine's memory is not known."""
    if machine.memory_gib <= 0:
        raise HardwareError(f"memory_gib of {machine.chip}: {machine.memory_gib}; allowed: the device's memory in GiB")
    if machine.usable_gib:
        return HEADROOM * machine.usable_gib
    share = SHARE.get(machine.device)
    if share is None:
        share = METAL_LARGE_SHARE if machine.memory_gib >= METAL_LARGE_GIB else METAL_SHARE
    return HEADROOM * share * machine.memory_gib


def smallest_memory(machine: Capability, bytes_needed: float) -> int | None:
    """The least memory sold, in GiB, whose budget holds so much on such a machine; none where no size does."""
    for size in MEMORY_SIZES:
        if memory_budget(replace(machine, memory_gib=float(size), usable_gib=None)) * GIB >= bytes_needed:
            return size
    return None


def _checked(overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    for name, value in overrides.items():
        if name not in OVERRIDES:
            raise ConfigError(f"settings.{name}: unknown key; allowed here: {', '.join(OVERRIDES)}")
        if name == "precision" and value not in get_args(Precision):
            raise ConfigError(f"settings.precision: {value!r}; allowed: {', '.join(get_args(Precision))}")
        if name in ("batch", "shards") and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"settings.{name}: {value!r}; allowed: a whole number from 1")
        if name in ("checkpointing", "compile") and not isinstance(value, bool):
            raise ConfigError(f"settings.{name}: {value!r}; allowed: true or false")
        if name.endswith("_gib") and value is not None and not _is_memory(value):
            raise ConfigError(f"settings.{name}: {value!r}; allowed: GiB from 0, or null to leave it")
    return overrides


def _is_memory(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _pick(given: Mapping[str, Any], reasons: dict[str, str], name: str, chosen: tuple[Any, str]) -> Any:
    value, reason = (given[name], "as asked for") if name in given else chosen
    reasons[name] = reason
    return value


def _precision(machine: Capability) -> tuple[Precision, str]:
    full = machine.peak_gflops.get("float32", 0.0)
    bfloat, half = (machine.peak_gflops.get(name, 0.0) for name in ("bfloat16", "float16"))
    kind: Precision = "float16" if half > FLOAT16_GAIN * bfloat else "bfloat16"
    best = max(bfloat, half)
    if full > 0 and best >= GAIN * full:
        return kind, f"{best / full:.1f} times float32's rate; norms, softmax and the optimiser's state stay float32"
    if machine.predicted:
        return "float32", "no rate published for halves that is above float32's; measure, and this may change"
    return "float32", f"a half reaches {best / full if full else 0:.2f} times float32's rate, {GAIN} is asked for"


def _shards(machine: Capability, batch: int) -> tuple[int, str]:
    if machine.device != "cpu":
        return 1, "an accelerator fills itself"
    return max(1, min(machine.cores or 1, batch)), "as many parts as cores"


def _attention(
    machine: Capability,
    config: UNet2DConfig,
    size: tuple[int, int] | None,
    precision: Precision,
    reasons: dict[str, str],
) -> tuple[Form | None, Form | None]:
    """The forms of the attention with the most positions, in training and in sampling."""
    widest = max((op for op in unet_work(config, 1, size) if op.scores), key=lambda op: op.scores, default=None)
    if widest is None:
        reasons["attention"] = "the network has none"
        return None, None
    positions, width, half = widest.positions, widest.head_width, precision != "float32"

    def form(*, gradient: bool) -> Form:
        return attention_form(machine.device, half=half, head_width=width, positions=positions, gradient=gradient)

    training, sampling = form(gradient=True), form(gradient=False)
    reasons["attention"] = f"{positions} positions, heads of {width}: {training} in training, {sampling} in sampling"
    return training, sampling


def _fitted(
    machine: Capability, config: UNet2DConfig, wanted: int, size: tuple[int, int] | None, plan: Plan, budget: float,
    given: Mapping[str, Any], reasons: dict[str, str],
) -> tuple[int, Plan]:  # fmt: skip
    """The largest batch that fits: first without checkpointing, at half the batch or less with it."""

    def bytes_of(batch: int, plan: Plan) -> float:
        return needed(unet_work(config, batch, size), plan).training

    kinds = [given["checkpointing"]] if "checkpointing" in given else [False, True]
    batches = [given["batch"]] if "batch" in given else _halvings(wanted)
    room = budget * GIB
    for batch in batches:
        for checkpointing in kinds:
            tried = replace(plan, checkpointing=checkpointing)
            if bytes_of(batch, tried) <= room:
                reasons["batch"] = "as asked for" if "batch" in given else _why_batch(batch, wanted)
                saved = f"without it {bytes_of(batch, plan) / GIB:.2f} GiB would be needed of {budget:.2f}"
                reasons["checkpointing"] = saved if checkpointing else "activations fit"
                return batch, tried
    least = bytes_of(batches[-1], replace(plan, checkpointing=kinds[-1]))
    enough = smallest_memory(machine, least)
    would_do = f"{enough} GiB" if enough else f"none of up to {MEMORY_SIZES[-1]} GiB"
    raise HardwareError(
        f"{machine.chip}, {machine.memory_gib:g} GiB: training with a batch of {batches[-1]} needs "
        f"{least / GIB:.2f} GiB, the budget is {budget:.2f} GiB; the smallest that would do: {would_do}"
    )


def _halvings(wanted: int) -> list[int]:
    sizes = [wanted]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes


def _why_batch(batch: int, wanted: int) -> str:
    return "as wanted" if batch == wanted else f"the most that fits of {wanted}, halved until it does"


def _wired(machine: Capability, training: float) -> tuple[float | None, str]:
    if machine.device != "metal":
        return None, "only unified memory under Metal can be wired down"
    if machine.memory_gib <= SMALL_GIB:
        return None, "too little memory to take any from the system for good"
    limit = memory_budget(machine) / HEADROOM
    return round(
        min(limit, 1.25 * training + 0.5), 1
    ), "what the run needs and a quarter more, at most what Metal recommends"


def _cache(machine: Capability, budget: float, training: float) -> tuple[float | None, str]:
    if machine.device != "metal":
        return None, "MLX's own limit: nothing else competes for this memory"
    return round(max(0.25, min(budget - training, budget / 4)), 2), "freed buffers are the system's memory too"
