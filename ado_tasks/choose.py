"""`ado choose`: which variant, solver, number of evaluations and batch size to use on this machine, under a budget.

Costs are those of reports/measure.json: of one step, by solver and batch size (`measure.step_batches`). Quality is what
was found on the selection part and its noise: KID − teacher in reports/evaluate.json (`choice`), distance to the fine
solution in schedules/teacher/index.json. Nothing is chosen by a figure of the report part.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ado_tasks.config import config, parse, read_params
from ado_tasks.errors import ArtifactError, ConfigError
from ado_tasks.optimise.choice import (
    LIMITS,
    QUALITIES,
    TOLERANCE,
    Budget,
    Choice,
    StepCost,
    Way,
    at_every_batch,
    choose,
)
from ado_tasks.storage import read_json, write_json
from ado_tasks.verdict import named_report_errors

SECTION = "choose"
PARAMS = Path("params.yaml")
TEACHER = "teacher"  # the family whose network learned schedules run on
CALIBRATED = "calibrated"  # the family of those schedules that were judged by their images

Limit = Annotated[float | None, Field(gt=0)]


@config
class ChooseConfig:
    """A user's budget: section `choose` of the params file, which may be missing. Where none is given: non-inferior."""

    ms_per_image: Limit = None  # most
    ms_per_batch: Limit = None  # most, from asking to having a batch
    kid: Limit = None  # most of KID − teacher's upper end
    distance: Limit = None  # most of the squared distance to the fine solution
    quality: Literal["kid", "distance"] | None = None  # what a limit on cost alone makes least; none = kid
    tolerance: Annotated[float, Field(ge=0, lt=1)] = TOLERANCE  # costs that differ by less, relatively, are equal

    def budget(self, margin: float) -> Budget:
        """With no limit at all: KID − teacher within the margin of non-inferiority, as cheaply as can be.

        Raises:
            ConfigError: a quality that is to be made least, and no limit: the best would cost whatever it does.
        """
        found = Budget(self.ms_per_image, self.ms_per_batch, self.kid, self.distance, self.quality or QUALITIES[0])
        if found.limits():
            return found
        if self.quality is not None:
            raise ConfigError(
                f"{SECTION}.quality: {self.quality!r} is what is made least within a limit on cost, and there is no "
                "limit; allowed with --ms-per-image or --ms-per-batch; or limit the quality itself, by --kid or "
                "--distance"
            )
        return Budget(kid=margin)


def main(arguments: Sequence[str]) -> int:
    """Print the choice, and why."""
    parser = argparse.ArgumentParser(
        prog="ado choose", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Where a limit on quality is given, the cheapest way that keeps it is taken; else the best within the\n"
        "limits on cost. With no limit: the cheapest that is non-inferior to the teacher at 50 steps.",
    )  # fmt: skip
    parser.add_argument("--params", type=Path, help=f"its section `choose` is read (default: {PARAMS}, if there)")
    parser.add_argument("--reports", type=Path, default=Path("reports"), help="folder (default: %(default)s)")
    parser.add_argument("--schedules", type=Path, default=Path("schedules/teacher"), help="folder made by `calibrate`")
    parser.add_argument("--out", type=Path, metavar="JSON", help="also write the choice there")
    for name, text in LIMITS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=float, help=f"most {text}, in the place of the section's"
        )
    parser.add_argument("--quality", choices=("kid", "distance"), help="what a limit on cost alone makes least")
    options = parser.parse_args(arguments)
    params = options.params or (PARAMS if PARAMS.exists() else None)
    section = {} if params is None else read_params(params).get(SECTION, {})
    given = {name: getattr(options, name) for name in (*LIMITS, "quality") if getattr(options, name) is not None}
    wanted = parse(ChooseConfig, {**(section or {}), **given}, SECTION)

    quality = read_json(options.reports / "evaluate.json", "variants", "reference", "choice")
    measured = read_json(options.reports / "measure.json", "hardware")
    index = read_json(options.schedules / "index.json", "schedules")
    with named_report_errors(f"{options.reports} or {options.schedules}/index.json"):
        found = choose(
            ways(quality, index, measured), wanted.budget(quality["reference"]["anchor"]["margin"]), wanted.tolerance
        )
    for line in said(found, measured["hardware"]):
        print(line)
    if options.out:
        write_json(options.out, {"chosen": asdict(found.way), "reason": found.reason, "budget": asdict(wanted)})
    return 0


def ways(quality: dict[str, Any], index: dict[str, Any], measured: dict[str, Any]) -> list[Way]:
    """Every way to sample whose quality is known from the selection part, at every batch size that was measured.

    Args:
        quality: reports/evaluate.json. Its `choice` holds the variants that were judged on the selection part.
        index: index.json of the teacher's learned schedules.
        measured: reports/measure.json.

    Raises:
        ArtifactError: the report holds no cost of a step.
    """
    if not measured.get("steps"):
        raise ArtifactError(
            "measure.json: holds no cost of a step; set measure.step_batches in the params file, such as [1, 8, 64], "
            "and run `measure` again"
        )
    variants = {entry["name"]: entry for entry in quality["variants"]}
    judged = {entry["name"]: entry["upper_end"] for entry in quality["choice"]}
    found: dict[str, list[Way]] = {TEACHER: [Way("teacher-50", "ddim", 50, kid=0.0)]}  # beside itself
    nearness = {(entry["solver"], entry["nfe"]): entry["distance"] for entry in index["schedules"]}
    for (solver, nfe), distance in nearness.items():
        found[TEACHER].append(Way(f"{solver}-{nfe}", solver, nfe, distance=distance))
    for name, upper in judged.items():
        family, solver = name.rpartition("-")[0], variants[name]["solver"].partition("+")[0]
        nfe, calibrated = variants[name]["nfe"], family == CALIBRATED
        # One of the schedules above, judged. A searched network's are near to another fine solution: no distance.
        distance = nearness.get((solver, nfe)) if calibrated else None
        found.setdefault(TEACHER if calibrated else family, []).append(Way(name, solver, nfe, upper, distance))
    return [
        way
        for network, each in found.items()
        for way in at_every_batch(each, costs_of(measured, network))
    ]  # fmt: skip


def costs_of(measured: dict[str, Any], family: str) -> list[StepCost]:
    """What a step costs with a family's network: medians.

    Raises:
        ArtifactError: a step took no time at all.
    """
    rows = [row for row in measured["steps"] if family in row["families"]]
    for row in rows:
        if row["step_ms"]["median"] <= 0:
            raise ArtifactError(
                f"measure.json: a step of {row['solver']} in batches of {row['batch']} took "
                f"{row['step_ms']['median']:.3g} ms, which cannot be: run `measure` again while the machine is idle"
            )
    return [StepCost(row["solver"], row["batch"], row["fixed_ms"]["median"], row["step_ms"]["median"]) for row in rows]


def said(found: Choice, hardware: dict[str, Any]) -> list[str]:
    """The choice in words."""
    from ado_tasks.hardware.fingerprint import this_machine  # noqa: PLC0415  (MLX)

    way = found.way
    quality = [
        *([] if way.kid is None else [f"KID − teacher at most {way.kid:+.4f}"]),
        *([] if way.distance is None else [f"squared distance to the fine solution {way.distance:.3g}"]),
    ]
    here = this_machine().identity == hardware["id"]
    whose = "this machine" if here else "another machine than this one: run `measure` here for its own"
    evaluations = f"{way.nfe} evaluation{'s' if way.nfe > 1 else ''} an image"
    return [
        f"chosen: {way.name}: {way.solver}, {evaluations}, batches of {way.batch}.",
        f"cost: {way.ms_per_image:.3g} ms an image, {way.ms_per_batch:.3g} ms a batch; quality, on the selection part: "
        f"{', '.join(quality)}.",
        f"why: {found.reason}.",
        f"costs are of {whose} ({hardware['chip']}, {hardware['cores']} cores, {hardware['device']}).",
    ]
