"""The stages of a search, for a params file that has a section `probe`: added to the graph, or taken out of it.

They are made here, not written in `dvc.yaml`: their number is that of the race's lanes, and `make demo` has none of
them. Each lane is a stage of its own, so that DVC keeps it and a rung runs on as many workers as there are.
"""

import re
from collections.abc import Mapping
from typing import Any

from ado_tasks.architecture.race import RaceConfig
from ado_tasks.config import parse
from ado_tasks.errors import ConfigError

SEARCHED = "models/searched"  # the family of students of the chosen architecture
NAMES = re.compile(r"probe(_guided|_\d+)?|weigh|search|sensitivity|distill_searched", re.ASCII)  # of its stages


def search_stages(probe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages, in their order, without the code among their deps. `probe` is that section of the params file.

    Raises:
        ConfigError: the section is no mapping, or the race's in it is not allowed.
    """
    if not isinstance(probe, Mapping):
        raise ConfigError(f"probe: {probe!r} is not allowed: a mapping of keys, such as race and tune")
    race = parse(RaceConfig, probe.get("race", {}), "probe.race")
    stages: dict[str, dict[str, Any]] = {}
    lanes: list[str] = []
    for rung, size in enumerate(race.sizes):
        below, mine = lanes[-race.sizes[rung - 1] :] if rung else [], _numbers(len(lanes), size)
        if rung:
            stages[f"probe_{rung}"] = _rung(below, mine)
        else:
            stages["probe"] = _rung([], mine[: race.unguided])
            if mine[race.unguided :]:
                stages["probe_guided"] = _rung(mine[: race.unguided], mine[race.unguided :])
        lanes += mine
    probes = [f"models/probes/{lane}" for lane in lanes]
    stages["weigh"] = _stage(
        "time every probe, in turn, on this machine",
        f"weigh --teacher models/teacher --probes {' '.join(probes)} --profile reports/profile.json"
        " --out reports/probes.json",
        ["models/teacher", *probes, "reports/profile.json"], ["seed", "weigh", "hardware"], ["reports/probes.json"],
    )  # fmt: skip
    stages["search"] = _stage(
        "choose an architecture among the probes",
        f"search --teacher models/teacher --probes {' '.join(probes)} --measured reports/probes.json"
        " --out models/architecture",
        ["models/teacher", *probes, "reports/probes.json"], ["search"], ["models/architecture"],
    )  # fmt: skip
    stages["sensitivity"] = _stage(
        "what each block of the teacher is worth, and costs on this machine",
        "sensitivity --teacher models/teacher --dataset data/${dataset} --profile reports/profile.json"
        " --out reports/sensitivity.json",
        ["models/teacher", "data/${dataset}", "reports/profile.json"], ["seed", "sensitivity", "hardware"],
        ["reports/sensitivity.json", "reports/sensitivity.png"],
    )  # fmt: skip
    stages["distill_searched"] = _stage(
        "students of the chosen architecture that need fewer steps, taught by the teacher",
        "distill --section distill_searched --teacher models/teacher --start models/architecture"
        f" --dataset data/${{dataset}} --out {SEARCHED}",
        ["data/${dataset}", "models/teacher", "models/architecture"], ["seed", "distill_searched"], [SEARCHED],
    )  # fmt: skip
    return stages


def set_search(graph: Any, probe: Mapping[str, Any] | None) -> None:
    """Let the graph have exactly the search of this section; with none, no search. What compares students follows.

    Whatever a former race had is taken out first; a stage of another name is not the search's, and stays.
    """
    for name in [name for name in graph["stages"] if NAMES.fullmatch(name)]:
        del graph["stages"][name]
    stages = search_stages(probe) if probe is not None else {}
    for stage in graph["stages"].values():
        if "--students " not in stage["cmd"]:
            continue
        families = stage["cmd"].partition("--students ")[2].partition(" --")[0]
        wanted = [family for family in families.split() if family != SEARCHED] + [SEARCHED] * bool(stages)
        stage["cmd"] = stage["cmd"].replace(f"--students {families}", f"--students {' '.join(wanted)}")
        deps = [dep for dep in stage["deps"] if dep != SEARCHED]
        if stages:
            deps.insert(deps.index(wanted[-2]) + 1, SEARCHED)
        if deps != list(stage["deps"]):
            stage["deps"] = deps
    graph["stages"].update(stages)


def _rung(below: list[str], lanes: list[str]) -> dict[str, Any]:
    before = [f"models/probes/{lane}" for lane in below]
    option = f" --before {' '.join(before)}" if before else ""
    return {
        "desc": "one candidate architecture: its teacher's weights, cut and tuned",
        "matrix": {"lane": lanes},
        "cmd": "python -m ado_tasks probe --teacher models/teacher --dataset data/${dataset}"
        f"{option} --out models/probes/${{item.lane}}",
        "deps": ["data/${dataset}", "models/teacher", *before],
        "params": ["seed", "probe"],
        "outs": ["models/probes/${item.lane}"],
    }


def _stage(desc: str, command: str, deps: list[str], params: list[str], outs: list[str]) -> dict[str, Any]:
    return {"desc": desc, "cmd": f"python -m ado_tasks {command}", "deps": deps, "params": params, "outs": outs}


def _numbers(first: int, count: int) -> list[str]:
    """Lanes as text: a matrix's items are part of names."""
    return [str(number) for number in range(first, first + count)]
