"""Ways to make students of few steps, what each costs in network evaluations, and how it is brought to a budget."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ado_tasks.config import as_plain, parse, section
from ado_tasks.errors import ConfigError
from ado_tasks.interop.diffusers_folder import read_model
from ado_tasks.optimise.consistency import ConsistencyConfig
from ado_tasks.optimise.cost import consistency_passes, progressive_passes, training_passes
from ado_tasks.optimise.distill_config import DistillConfig

Section = DistillConfig | ConsistencyConfig
STEPS = (2, 1)  # of the students that are compared
WALKS = {"walks", "walk_evaluations", "further_walks", "teachers_share", "hold_on_to"}  # keys about them
FURTHER = 4  # as many walks of the first student as its teacher's, where the workspace has none
CONSISTENCY = {  # where the workspace's params.yaml has none: that of params.consistency.yaml
    "method": "consistency", "steps": 1200, "batch_size": 64, "learning_rate": 3.0e-3, "ema_decay": 0.99,
    "level_mean": 0.0, "q": 8.0, "stages": 2, "student_steps": [2, 1],
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One distillation of a method."""

    section: Section
    share: float  # of the budget
    start: int | None  # steps of the student of the part before that it begins with; None: as its teacher


Methods = dict[str, tuple[Part, ...]]


# --- what is compared


def methods_of(params: Mapping[str, Any]) -> Methods:
    """The usual ones, from the workspace's own settings; two more where its students learn from walks."""
    progressive = dict(section(params, "distill.progressive"))
    matching = dict(progressive.pop("matching", None) or {})
    adversarial = matching.pop("adversarial", None) or {}
    if not matching:
        raise ConfigError("distill.progressive.matching: the workspace's params.yaml has none to compare with")
    free = {name: value for name, value in matching.items() if name != "hold_on_to"}  # samples from any noise
    tuned = dict(params["distill"].get("consistency", CONSISTENCY)) | {"student_steps": list(STEPS)}
    methods = {
        "progressive": progressive,
        "+ matching": {**progressive, "matching": matching},
        "+ matching, adversarial": {**progressive, "matching": {**free, "adversarial": adversarial}},
        "consistency": tuned,
        "consistency of a student": [{**progressive, "share": 0.5}, {**tuned, "share": 0.5, "start": 1}],
    }
    other = "adam" if progressive.get("optimiser") == "muon" else "muon"
    methods[f"+ matching, {other.title()}"] = {**progressive, "matching": matching, "optimiser": other}
    if progressive.get("walks"):
        methods["+ matching, no walks"] = {**without_walks(progressive), "matching": without_walks(matching)}
        further = None if progressive.get("further_walks") else FURTHER * progressive["walks"]
        name = "+ matching, further walks" if further else "+ matching, no further walks"
        methods[name] = {**progressive, "matching": matching, "further_walks": further, "teachers_share": None}
    return read_methods(methods, "bench")


def without_walks(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same section, or matching in it, learning from noised images: steps of the teacher that students divide."""
    found = {name: value for name, value in settings.items() if name not in WALKS}
    if "teacher_steps" in found:
        students = max(found["student_steps"])
        found["teacher_steps"] = students * max(2, found["teacher_steps"] // students)
    return found


def read_methods(values: Mapping[str, Any], where: str) -> Methods:
    """Methods from plain values. Raises ConfigError where a section, a share or a start is not allowed."""
    return {str(name): _parts(found, f"{where}: {name}") for name, found in values.items()}


def _parts(found: Any, where: str) -> tuple[Part, ...]:
    sections = found if isinstance(found, list) else [found]
    parts: list[Part] = []
    for each in sections:
        if not isinstance(each, Mapping):
            raise ConfigError(f"{where}: {each!r} is not allowed; a section, or a list of them")
        settings = dict(each)
        share, start = settings.pop("share", 1 / len(sections)), settings.pop("start", None)
        before = parts[-1].section.student_steps if parts else ()
        if start is not None and start not in before:
            raise ConfigError(f"{where}.start: {start!r} is not allowed; a student of the section before: {before}")
        parsed: Any = parse(Section, settings, where)  # pyright: ignore[reportArgumentType]: a union says the method
        parts.append(Part(parsed, share, start))
    if not all(isinstance(part.share, float) and 0 < part.share for part in parts):
        raise ConfigError(f"{where}.share: {[part.share for part in parts]}; allowed: numbers above 0")
    return tuple(parts)


# --- what it costs


def cost(config: Section) -> float:
    """Network evaluations of a distillation, all stages; a backward pass is two (`optimise/cost.py`)."""
    plain = as_plain(config)
    if isinstance(config, ConsistencyConfig):
        return float(consistency_passes(plain, max(config.student_steps)).evaluations)
    return float(progressive_passes(plain, config.student_steps[-1]).evaluations)


def scaled(config: Section, budget: float) -> Section:
    """The same with as many optimiser steps, in the same proportions, as the budget pays for."""
    if isinstance(config, ConsistencyConfig):
        fixed = cost(replace(config, steps=1)) - 4 * config.batch_size
        return replace(config, steps=max(1, round((budget - fixed) / (4 * config.batch_size))))
    factor = budget / cost(config)
    stages = range(len(config.student_steps))
    found = replace(config, stage_steps=tuple(max(1, round(factor * config.steps_of(stage))) for stage in stages))
    if config.walks:
        further = config.further_walks and max(1, round(factor * config.further_walks))
        found = replace(found, walks=max(1, round(factor * config.walks)), further_walks=further)
    if config.matching:
        matched = tuple(round(factor * steps) for steps in config.matching.steps)
        found = replace(found, matching=replace(config.matching, steps=matched))
    return found


def training_cost(teacher: Path) -> float:
    """Evaluations that the teacher's own training took: a forward and a backward pass of every image."""
    spent = training_passes(read_model(teacher).record)
    if spent is None:
        raise ConfigError(
            f"{teacher}: was not trained here, so that no budget follows from it; allowed: a teacher of `train`"
        )
    return float(spent.evaluations)
