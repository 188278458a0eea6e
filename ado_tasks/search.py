"""Task `search`: the Pareto front of the probes, and the one that the written policy chooses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ado_tasks.architecture.choice import Measured, Policy, choose, pareto_front
from ado_tasks.architecture.cost import multiply_adds, probe_multiply_adds
from ado_tasks.config import as_plain, config
from ado_tasks.errors import ArtifactError, ConfigError
from ado_tasks.interop.diffusers_folder import RECORD, StoredModel, extended, read_model, write_model
from ado_tasks.optimise.cost import training_passes
from ado_tasks.pictures import plain_axes, save_figure
from ado_tasks.probe import read_probe
from ado_tasks.report import SILENT, Reporter
from ado_tasks.storage import atomic_folder, read_json, write_json

TEACHER = "teacher"
FIGURES, PICTURE = "search.json", "search.png"


@config
class SearchConfig:
    """What is wanted."""

    policy: Policy = field(default_factory=Policy)


@dataclass(frozen=True)
class SearchResult:
    """What was chosen."""

    chosen: str  # number of its lane, or "teacher" where no probe is within the limits and faster
    quality_loss: float  # see Lesson.quality_loss
    speedup: float  # of one evaluation, over the teacher's
    latency: str = "measured"  # or for which chip it was predicted, and how surely


def search(
    config: SearchConfig, *, teacher: Path, probes: tuple[Path, ...], measured: Path, out: Path,
    report: Reporter = SILENT,
) -> SearchResult:  # fmt: skip
    """Choose among the probes of the highest rung. Nothing is trained or timed here.

    Where `weigh` was given a target, costs are those predicted for it, and all that is written says so.

    `out/` is the chosen network as a Diffusers folder, with search.json (every probe's figures, the front, the policy,
    its reason, and what the probes took) and search.png. Where nothing is within the policy's limits it is the teacher,
    which loses nothing.

    Args:
        config: see SearchConfig.
        teacher: a Diffusers folder.
        probes: folders made by `probe`, of all rungs.
        measured: file made by `weigh`, of these probes.
        out: models/architecture.
        report: where figures and the picture go.

    Raises:
        ConfigError: two probes of one name, not all lanes of one race, or a limit on memory that nothing was measured
            for.
        ArtifactError: a probe is damaged, or was not weighed; a target, and nothing predicted for a network.
    """
    said = {folder.name: read_probe(folder) for folder in probes}
    if len(said) < len(probes):
        raise ConfigError(f"probes: {', '.join(map(str, probes))}: two of one name; allowed: different ones")
    candidates = [read_model(folder) for folder in probes]
    _check_whole(probes, candidates)
    told = read_json(measured, "networks")
    weighed, target = told["networks"], told.get("target")
    absent = sorted(name for name in (TEACHER, *said) if name not in weighed)
    if absent:
        raise ArtifactError(f"{measured}: probe {absent[0]} was not weighed; it has {', '.join(sorted(weighed))}")
    counted = weighed if target is None else _predicted(measured, target, weighed)
    _check_memory(config.policy, measured, counted)
    policy = config.policy if target is None else _within_memory(config.policy, target)
    everyone = {name: _measured(name, each["quality_loss"], counted[name]) for name, each in said.items()}
    everyone[TEACHER] = _measured(TEACHER, 0.0, counted[TEACHER])
    top = max(each["rung"] for each in said.values())
    last = [everyone[name] for name, each in said.items() if each["rung"] == top] + [everyone[TEACHER]]
    chosen = choose(last, policy) or everyone[TEACHER]
    front = pareto_front(last)
    folder = teacher if chosen.name == TEACHER else next(each for each in probes if each.name == chosen.name)
    speedup = counted[chosen.name]["speedup_vs_teacher"]["median"]
    origin = {} if target is None else {"latency": _origin(target)}
    reason = "; latency ".join([_reason(chosen, last, policy, speedup), *origin.values()])
    cost = _cost(read_model(teacher), candidates, list(said.values()))
    with atomic_folder(out) as made:
        stored = read_model(folder)
        event = {"task": "search", "chosen": chosen.name, "policy": as_plain(config.policy), **origin}
        write_model(made, stored.unet, stored.scheduler_config, extended(stored.record, event))
        plain = {
            "chosen": chosen.name, "reason": reason, **origin, "policy": as_plain(config.policy),
            "front": [each.name for each in front],
            "cost": cost,
            "probes": [_entry(each, said.get(each.name), weighed[each.name]) for each in everyone.values()],
        }  # fmt: skip
        write_json(made / FIGURES, plain)
        _save_picture(made / PICTURE, everyone, said, top, front, chosen, config.policy, target)
    report.metric("quality_loss", chosen.quality_loss)
    report.metric("speedup" if target is None else "predicted_speedup", speedup)
    if cost["share_of_training"] is not None:
        report.metric("share_of_training", cost["share_of_training"])
    report.picture("search", out / PICTURE)
    return SearchResult(chosen.name, chosen.quality_loss, speedup, origin.get("latency", "measured"))


def _check_whole(probes: Sequence[Path], candidates: Sequence[StoredModel]) -> None:
    """A graph made for a race of other sizes would choose among networks that were not tuned to the end.

    Raises ConfigError, or ArtifactError where a probe's record does not say of which race it is.
    """
    sizes = {_race_of(*each) for each in zip(probes, candidates, strict=True)}
    lanes = {str(lane) for lane in range(sum(next(iter(sizes))))}
    if len(sizes) > 1 or {folder.name for folder in probes} != lanes:
        races = " and ".join(str(list(each)) for each in sorted(sizes))
        raise ConfigError(
            f"probes: {', '.join(folder.name for folder in probes)}: of a race of {races}; allowed: every lane of one "
            "race, whose stages `python -m ado_tasks.graph --methods-of params.yaml` makes"
        )


def _race_of(folder: Path, probe: StoredModel) -> tuple[int, ...]:
    try:
        return tuple(probe.record["history"][-1]["config"]["race"]["sizes"])
    except (IndexError, KeyError, TypeError):
        raise ArtifactError(f"{folder / RECORD}: does not end with what `probe` did, and of which race") from None


def _predicted(measured: Path, target: Mapping[str, Any], weighed: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What is predicted for the target, shaped as what is measured is. Raises ArtifactError where it is not there."""
    absent = [f"target.{key}" for key in ("chip", "relative_error", "memory_budget_mb") if key not in target]
    absent += [f"networks.{name}.predicted" for name, each in weighed.items() if "predicted" not in each]
    if absent:
        raise ArtifactError(f"{measured}: a target, and no {absent[0]}; allowed: what `weigh` writes")
    spread = ("latency_ms_per_image", "speedup_vs_teacher")
    return {
        name: {"peak_memory_mb": each["predicted"]["peak_memory_mb"]}
        | {key: {"median": each["predicted"][key]} for key in spread}
        for name, each in weighed.items()
    }


def _within_memory(policy: Policy, target: Mapping[str, Any]) -> Policy:
    """The policy, with what the target's memory leaves as a limit too."""
    limits = [policy.max_peak_memory_mb, target["memory_budget_mb"]]
    return replace(policy, max_peak_memory_mb=min(limit for limit in limits if limit is not None))


def _origin(target: Mapping[str, Any]) -> str:
    """Where the latencies come from, and how sure they are."""
    error = target["relative_error"]
    return (
        f"predicted for {target['chip']}, ± {error['median']:.0%} on the machine that was measured (median of "
        f"{error['left_out']} networks left out; worst {error['worst']:.0%}); not measured on {target['chip']}"
    )


def _check_memory(policy: Policy, measured: Path, weighed: Mapping[str, Any]) -> None:
    """A limit that nothing is held against would be kept by all. Raises ConfigError."""
    if policy.max_peak_memory_mb is not None and any(each["peak_memory_mb"] is None for each in weighed.values()):
        raise ConfigError(
            f"search.policy.max_peak_memory_mb: {policy.max_peak_memory_mb:g} is not allowed with {measured}, in which "
            "no peak memory was measured (a CPU counts none); allowed: null"
        )


def _measured(name: str, quality_loss: float, weighed: Mapping[str, Any]) -> Measured:
    memory = weighed["peak_memory_mb"]
    return Measured(name, quality_loss, weighed["latency_ms_per_image"]["median"], 0.0 if memory is None else memory)


def _reason(chosen: Measured, candidates: Sequence[Measured], policy: Policy, speedup: float) -> str:
    limits = f"quality loss at most {policy.max_quality_loss:g}"
    if policy.max_peak_memory_mb is not None:
        limits += f", peak memory at most {policy.max_peak_memory_mb:g} MB"
    if chosen.name == TEACHER:
        return f"none of {len(candidates) - 1} probes is within the limits ({limits}) and faster: the teacher stays"
    return (
        f"the fastest of those within the limits ({limits}): {chosen.quality_loss:.3g} lost, {speedup:.2f} times as "
        "fast as the teacher"
    )


def _cost(teacher: StoredModel, probes: Sequence[StoredModel], said: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all probes took, in multiply-adds and beside the teacher's training; None where it was not trained here."""
    network = teacher.unet.config
    size = network.sample_size or network.size_multiple
    whole = multiply_adds(network, *(size if isinstance(size, tuple) else (size, size)))
    events = [stored.record["history"][-1] for stored in probes]  # of the lane's own rung
    total = sum(
        probe_multiply_adds(event["config"], each["rung"], each["multiply_adds"], whole)
        for event, each in zip(events, said, strict=True)
    )
    training = training_passes(teacher.record)
    share = total / (training.evaluations * whole) if training else None
    return {"multiply_adds": total, "share_of_training": share}


def _entry(each: Measured, said: Mapping[str, Any] | None, weighed: Mapping[str, Any]) -> dict[str, Any]:
    """A probe's figures; without the channels that it kept."""
    kept = {key: value for key, value in (said or {}).items() if key not in {"kept", "curve"}}
    return {"name": each.name, "quality_loss": each.quality_loss, **kept, **weighed}


def _save_picture(
    path: Path, everyone: Mapping[str, Measured], said: Mapping[str, Any], top: int, front: Sequence[Measured],
    chosen: Measured, policy: Policy, target: Mapping[str, Any] | None,
) -> None:  # fmt: skip
    figure = Figure((7.5, 4.5))
    axes = plain_axes(figure)
    for rung in range(top + 1):
        mine = [each for name, each in everyone.items() if name in said and said[name]["rung"] == rung]
        axes.scatter([e.cost for e in mine], [e.quality_loss for e in mine], s=22 + 14 * rung, label=f"rung {rung}",
                     color=f"C{rung}", alpha=1.0 if rung == top else 0.45)  # fmt: skip
    teacher = everyone[TEACHER]
    axes.scatter([teacher.cost], [0], s=60, marker="D", color="black", label=TEACHER, clip_on=False, zorder=3)
    # What can be had at each cost: the least loss up to there, so a staircase.
    axes.step([e.cost for e in front], [e.quality_loss for e in front], where="post", color="black", linewidth=0.8,
              label="front")  # fmt: skip
    axes.scatter([chosen.cost], [chosen.quality_loss], s=180, facecolors="none", edgecolors="black", label="chosen",
                 clip_on=False, zorder=4)  # fmt: skip
    for each in {each.name: each for each in (*front, chosen)}.values():
        if each.name != TEACHER:
            axes.annotate(each.name, (each.cost, each.quality_loss), (9, 6), textcoords="offset points", fontsize=8)
    axes.axhline(policy.max_quality_loss, color="C3", linewidth=0.8, linestyle="--", label="limit")
    axes.set_yscale("symlog", linthresh=0.01)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0, 2 * max(policy.max_quality_loss, *(each.quality_loss for each in everyone.values())))
    axes.set_xlim(left=0)
    axes.set_xlabel(_cost_label(target))
    axes.set_ylabel("quality loss (the teacher: 0)")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(path, figure)


def _cost_label(target: Mapping[str, Any] | None) -> str:
    label = "one evaluation, ms an image"
    if target is None:
        return label
    error = target["relative_error"]["median"]
    return f"{label}: predicted for {target['chip']} (± {error:.0%} here), not measured there"
