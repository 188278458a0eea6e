"""The stages of a search, for a params file that has a section `probe`: added to the graph, or taken out of it.

They are made here: their number is that of the race's lanes. Each lane is a stage of its own, so that DVC keeps it and
a rung runs on as many workers as there are.
"""

import re
from collections.abc import Mapping
from typing import Any

from ado_tasks.architecture.race import RaceConfig
from ado_tasks.config import parse
from ado_tasks.errors import ConfigError

ARCHITECTURE = "models/architecture"  # the chosen one
SEARCHED = "models/searched"  # the family of its students
SCHEDULES = "schedules/architecture"  # where it should step itself
CALIBRATE, SENSITIVITY = "calibrate_searched", "sensitivity"  # sections that a search may have or not, and their stages
SECTIONS = ("weigh", "search", "distill_searched", SENSITIVITY, CALIBRATE)  # of a search, beside `probe`
NAMES = re.compile(rf"probe(_guided|_\d+)?|weigh|search|distill_searched|{SENSITIVITY}|{CALIBRATE}", re.ASCII)  # stages
_COMPARED = f" --architecture {ARCHITECTURE} --architecture-schedules {SCHEDULES}"  # by what compares students


def search_stages(
    probe: Mapping[str, Any], *, calibrated: bool = False, explained: bool = False
) -> dict[str, dict[str, Any]]:
    """The stages, in their order, without the code among their deps.

    Args:
        probe: that section of the params file.
        calibrated: whether the chosen architecture is calibrated too.
        explained: whether it is measured what each block of the teacher is worth.

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
        f" --out {ARCHITECTURE}",
        ["models/teacher", *probes, "reports/probes.json"], ["search"], [ARCHITECTURE],
    )  # fmt: skip
    if explained:
        stages[SENSITIVITY] = _stage(
            "what each block of the teacher is worth, and costs on this machine",
            f"{SENSITIVITY} --teacher models/teacher --dataset data/${{dataset}} --profile reports/profile.json"
            " --out reports/sensitivity.json",
            ["models/teacher", "data/${dataset}", "reports/profile.json"], ["seed", SENSITIVITY, "hardware"],
            ["reports/sensitivity.json", "reports/sensitivity.png"],
        )  # fmt: skip
    stages["distill_searched"] = _stage(
        "students of the chosen architecture that need fewer steps, taught by the teacher",
        f"distill --section distill_searched --teacher models/teacher --start {ARCHITECTURE}"
        f" --dataset data/${{dataset}} --out {SEARCHED}",
        ["data/${dataset}", "models/teacher", ARCHITECTURE], ["seed", "distill_searched"], [SEARCHED],
    )  # fmt: skip
    if calibrated:
        stages[CALIBRATE] = _stage(
            "where the chosen architecture's own sampler should step",
            f"calibrate --section {CALIBRATE} --model {ARCHITECTURE} --dataset data/${{dataset}} --out {SCHEDULES}",
            ["data/${dataset}", ARCHITECTURE], ["seed", CALIBRATE], [SCHEDULES],
        )  # fmt: skip
    return stages


def set_search(graph: Any, params: Mapping[str, Any]) -> None:
    """Let the graph have exactly the search of these params: of `probe`, or none. What compares students follows.

    With a section `calibrate_searched` the chosen architecture is calibrated, and compared itself; without, only its
    students are; `sensitivity` likewise is a stage where there is such a section. Whatever a former race had is taken
    out first; a stage of another name is not the search's, and stays.

    Raises:
        ConfigError: there is something of a search, and no search; or as `search_stages`. The graph is as it was.
    """
    searches, calibrated, explained = (params.get(name) is not None for name in ("probe", CALIBRATE, SENSITIVITY))
    left = [name for name in SECTIONS if params.get(name) is not None and not searches]
    if left:
        raise ConfigError(f"{', '.join(left)}: of a search, and there is no section probe; allowed: with it")
    stages = search_stages(params["probe"], calibrated=calibrated, explained=explained) if searches else {}
    for name in [name for name in graph["stages"] if NAMES.fullmatch(name)]:
        del graph["stages"][name]
    added = [SEARCHED] * searches + [ARCHITECTURE, SCHEDULES] * (searches and calibrated)
    for stage in graph["stages"].values():
        if "--students " in stage["cmd"]:
            _compare(stage, added)
    graph["stages"].update(stages)


def _compare(stage: Any, added: list[str]) -> None:
    """Let a stage that compares students compare exactly these outputs of a search too."""
    command = stage["cmd"].replace(_COMPARED, "")
    families = command.partition("--students ")[2].partition(" --")[0]
    wanted = [family for family in families.split() if family != SEARCHED]
    after = wanted[-1]
    wanted += [SEARCHED] * (SEARCHED in added)
    command = command.replace(f"--students {families}", f"--students {' '.join(wanted)}")
    stage["cmd"] = command.replace(" --out ", f"{_COMPARED} --out ") if SCHEDULES in added else command
    deps = [dep for dep in stage["deps"] if dep not in {SEARCHED, ARCHITECTURE, SCHEDULES}]
    if added:
        place = deps.index(after) + 1
        deps[place:place] = added
    if deps != list(stage["deps"]):
        stage["deps"] = deps


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
