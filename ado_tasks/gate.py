"""`ado gate`: may the challenger replace the champion? A pure decision, with reasons that a person can read.

The decision itself, `gate`, reads nothing: it compares plain figures with a policy. `decide` is the thin effect around
it: it reads the reports, has both models sampled from one noise (`ado_tasks.registry.contest`), writes the verdict.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ado_tasks.config import config, parse, read_params
from ado_tasks.errors import ArtifactError, StatisticsError
from ado_tasks.storage import write_json
from ado_tasks.verdict import VERDICT, Check, Figures, Verdict, as_text, named_report_errors

REFERENCE = "teacher-50"  # what students are held against, and what is measured beside them


@config
class GatePolicy:
    """What is required of a challenger: section `gate` of the params file."""

    min_speedup: Annotated[float, Field(gt=0)] = 4.0  # over the teacher at 50 steps: the lowest of the measured rounds
    max_latency_ms: Annotated[float | None, Field(gt=0)] = None  # an image, median; no limit where null
    max_memory_mb: Annotated[float | None, Field(gt=0)] = None  # peak while sampling; no limit where null
    max_latency_over_champion: Annotated[float, Field(gt=0)] = 1.25  # ratio of medians, on one machine only
    min_recall_of_teacher: Annotated[float, Field(gt=0, le=1)] = 0.8  # share of the teacher's recall: mode collapse
    max_accuracy_loss: Annotated[float, Field(ge=0, le=1)] = 0.03  # of class accuracy: lost classes
    min_memorisation: Annotated[float, Field(gt=0)] = 0.9  # lower end of the ratio of distances: science's "no copying"
    # Of a first champion, which no other model is held against; null asks for nothing.
    max_first_fd_over_floor: Annotated[float | None, Field(gt=0)] = 1.0  # the teacher's; see `_first`
    min_first_class_accuracy: Annotated[float | None, Field(ge=0, le=1)] = 0.9  # the variant's, where there are labels


def gate(challenger: Figures, champion: Figures | None, policy: GatePolicy) -> Verdict:
    """Whether the challenger may become the champion.

    Args:
        challenger: what `challenger_figures` makes of the reports. Where there is a champion, its `against` holds
            `champion` and `anchor`: KID(challenger) − KID(that model) with its interval, on one reference, one
            feature network and one noise: `{"value", "ci": [low, high]}`.
        champion: `version`, `model_sha256`; `cost` and `hardware` as measured when it was made (or None); and
            `withdrawn`: models that were rolled back, `{"model_sha256", "version", "reason"}` each. None where there is
            no champion yet: then quality is held against the challenger's own teacher at 50 steps, and that teacher
            against real images.
        policy: what is required.

    Returns:
        The verdict. A figure that is not finite refuses; so does the model that is the champion already.

    Raises:
        ArtifactError: figures that the decision needs are missing.
        StatisticsError: the margin is not positive.
    """
    known = _known_model(challenger, champion)
    if known is not None:
        return Verdict(False, [known.reason], [known])
    margin = challenger["margin"]
    if not (math.isfinite(margin) and margin > 0):
        raise StatisticsError(f"margin: must be positive, got {margin}")
    broken = _not_finite(challenger)
    if broken is not None:
        return Verdict(False, [broken.reason], [broken])
    checks = [
        *_quality(challenger, champion, margin),
        *_cost(challenger, champion, policy),
        *_sanity(challenger, policy),
        *([] if champion is not None else _first(challenger, policy)),
    ]
    failed = [check.reason for check in checks if check.passed is False]
    return Verdict(not failed, failed or [check.reason for check in checks if check.passed], checks)


def challenger_figures(
    evaluate: Figures, measure: Figures | None, model_sha256: str, name: str | None = None
) -> dict[str, Any]:
    """What the gate needs of `reports/evaluate.json` and `reports/measure.json` about one variant.

    Args:
        evaluate: the report of `evaluate`.
        measure: the report of `measure`; None where nothing was measured.
        model_sha256: of the variant's model and sampler (`ado_tasks.registry.package`).
        name: of the variant; by default the one that `evaluate` chose.

    Raises:
        ArtifactError: the variant is not in the report.
    """
    name = name or str(evaluate["chosen"])
    quality, teacher = _variant(evaluate, name), _variant(evaluate, REFERENCE)
    cost = None if measure is None else _variant(measure, name)
    return {
        "name": name,
        "model_sha256": model_sha256,
        "quality": quality,
        "teacher": teacher,
        "margin": quality["kid_minus_teacher"]["margin"],
        "cost": cost,
        "hardware": None if measure is None else measure["hardware"]["id"],
        "against": {},
    }


def _variant(report: Figures, name: str) -> dict[str, Any]:
    found = next((entry for entry in report["variants"] if entry["name"] == name), None)
    if found is None:
        known = ", ".join(entry["name"] for entry in report["variants"])
        raise ArtifactError(f"variant {name!r} is not in the report; there: {known}")
    return found


def _known_model(challenger: Figures, champion: Figures | None) -> Check | None:
    """The refusal of a model whose bytes the registry knows: the champion itself, or one that was rolled back."""
    if champion is None:
        return None
    sha = challenger["model_sha256"]
    if sha == champion["model_sha256"]:
        reason = f"The challenger is the champion: version {champion['version']} has the same bytes ({sha[:12]})."
        return Check("another model", sha[:12], f"not {sha[:12]}", False, reason)
    for former in champion.get("withdrawn", []):
        if former["model_sha256"] == sha:
            reason = (
                f"This model was rolled back before, as version {former['version']} ({sha[:12]}): {former['reason']}"
            )
            return Check("not rolled back", sha[:12], f"not {sha[:12]}", False, reason)
    return None


def _not_finite(challenger: Figures) -> Check | None:
    bad = [name for name, value in _numbers(challenger) if not math.isfinite(value)]
    if not bad:
        return None
    reason = f"Figures of the challenger are not finite: {', '.join(bad)}."
    return Check("finite figures", ", ".join(bad), "finite", False, reason)


def _numbers(values: Any, prefix: str = "") -> list[tuple[str, float]]:
    if isinstance(values, Mapping):
        return [pair for key, value in values.items() for pair in _numbers(value, f"{prefix}.{key}".lstrip("."))]
    if isinstance(values, list | tuple):
        return [pair for index, value in enumerate(values) for pair in _numbers(value, f"{prefix}[{index}]")]
    return [(prefix, float(values))] if isinstance(values, int | float) else []


def _quality(challenger: Figures, champion: Figures | None, margin: float) -> list[Check]:
    """Non-inferiority, by the upper end of the interval (docs/science.md, Metrics).

    To the champion, so that nothing gets worse by more than the margin; to the anchor, which promotions do not move, so
    that many small losses cannot add up. Without a champion: to the teacher at 50 steps.
    """
    if champion is None:
        return [_non_inferior(challenger["quality"]["kid_minus_teacher"], "the teacher at 50 steps", margin)]
    against = challenger["against"]
    missing = [name for name in ("champion", "anchor") if name not in against]
    if missing:
        raise ArtifactError(f"challenger.against: has no {', '.join(missing)}; with a champion both are compared")
    known = f"the champion (version {champion['version']})"
    return [
        _non_inferior(against["champion"], known, margin),
        _non_inferior(against["anchor"], "the anchor (which promotions do not move)", margin),
    ]


def _non_inferior(difference: Figures, to: str, margin: float) -> Check:
    low, high = difference["ci"]
    passed = high < margin
    found = f"{difference['value']:+.4f} [{low:+.4f}, {high:+.4f}]"
    verdict = "lies under" if passed else "does not lie under"
    reason = f"Quality beside {to}: KID difference {found}; the upper end {verdict} the margin of {margin:.4f}."
    return Check(f"KID beside {to}", found, f"upper end < {margin:.4f}", passed, reason)


def _cost(challenger: Figures, champion: Figures | None, policy: GatePolicy) -> list[Check]:
    cost = challenger["cost"]
    if cost is None:
        reason = "Nothing was measured: there is no reports/measure.json for this variant."
        return [Check("measured", "no", "yes", False, reason)]
    speedup, latency = cost["speedup_vs_teacher"], cost["latency_ms_per_image"]["median"]
    checks = [
        _limit("Speed-up over the teacher", speedup["min"], policy.min_speedup, _at_least, "×"),
        _limit("Latency an image", latency, policy.max_latency_ms, _at_most, " ms"),
        _limit("Peak memory", cost.get("peak_memory_mb"), policy.max_memory_mb, _at_most, " MB"),
    ]
    if champion is not None:
        checks.append(_beside_champion(challenger, champion, latency, policy))
    return [check for check in checks if check is not None]


def _beside_champion(challenger: Figures, champion: Figures, latency: float, policy: GatePolicy) -> Check:
    """Latency beside the champion's, where both were measured on one machine; figures of two machines say nothing."""
    name, cost = "Latency beside the champion", champion.get("cost")
    if cost is None or champion.get("hardware") != challenger["hardware"]:
        reason = f"{name} was not compared: it was measured on another machine."
        return Check(name, f"{latency:.3g} ms", "–", None, reason)
    theirs = cost["latency_ms_per_image"]["median"]
    limit = policy.max_latency_over_champion * theirs
    passed = latency <= limit
    reason = (
        f"{name}: {latency:.3g} ms an image, the champion's is {theirs:.3g} ms; allowed is "
        f"{policy.max_latency_over_champion:.3g} times that."
    )
    return Check(name, f"{latency:.3g} ms", f"≤ {limit:.3g} ms", passed, reason)


def _sanity(challenger: Figures, policy: GatePolicy) -> list[Check]:
    quality, teacher = challenger["quality"], challenger["teacher"]
    recall = policy.min_recall_of_teacher * teacher["recall"]
    checks = [
        _limit("Recall (mode collapse)", quality["recall"], recall, _at_least, ""),
        _limit("Distance to training images", quality["memorisation"]["low"], policy.min_memorisation, _at_least, ""),
    ]
    if quality["class_accuracy"] is not None and teacher["class_accuracy"] is not None:
        least = teacher["class_accuracy"] - policy.max_accuracy_loss
        checks.append(_limit("Class accuracy", quality["class_accuracy"], least, _at_least, ""))
    return [check for check in checks if check is not None]


def _first(challenger: Figures, policy: GatePolicy) -> list[Check]:
    """What a first champion needs besides: beside a bad teacher nothing is inferior, and its margin is wide.

    The margin is a tenth of what the teacher loses from 50 steps to 4; that of a teacher after 100 training steps is
    eight times the demo's. So the teacher is held against real images: its FD beyond that of as many fresh training
    images, in floors (FD of two halves of real images). At 1 it adds as much as chance makes of real images alone;
    the digits' teacher adds 0.07, that of the coloured shapes 0.31, the digits' at only 4 DDIM steps 0.86. And the
    variant's classes must be recognised: the relative check asks only that they are no worse than the teacher's.
    """
    beyond = (challenger["teacher"].get("fd_over_train") or {}).get("ratio_to_floor")
    accuracy = challenger["quality"]["class_accuracy"]
    most, least = policy.max_first_fd_over_floor, policy.min_first_class_accuracy
    checks = [
        _limit("Teacher's FD beyond fresh training images, in floors", beyond, most, _at_most, ""),
        None if accuracy is None else _limit("Class accuracy of a first champion", accuracy, least, _at_least, ""),
    ]
    return [_explained(check) for check in checks if check is not None]


def _explained(check: Check) -> Check:
    """A line that refuses a first champion, with why it is asked for and what to do."""
    if check.passed:
        return check
    why = "There is no champion to hold it against, and beside a hardly trained teacher nothing is inferior"
    return replace(check, reason=f"{check.reason} {why}: train longer, or change the limit (docs/operator.md).")


@dataclass(frozen=True)
class _Direction:
    holds: Callable[[float, float], bool]
    sign: str
    words: tuple[str, str]  # where it holds, where it does not


_at_least = _Direction(lambda found, limit: found >= limit, "≥", ("at least", "less than"))
_at_most = _Direction(lambda found, limit: found <= limit, "≤", ("at most", "more than"))


def _limit(name: str, found: float | None, limit: float | None, direction: _Direction, unit: str) -> Check | None:
    """A figure held against a limit; None where there is no limit. A figure that is missing does not pass."""
    if limit is None:
        return None
    required = f"{direction.sign} {limit:.3g}{unit}"
    if found is None:
        return Check(name, "–", required, False, f"{name}: was not measured, and {required} is required.")
    passed = direction.holds(found, limit)
    shown = f"{found:.3g}{unit}"
    reason = f"{name}: {shown} is {direction.words[not passed]} the required {limit:.3g}{unit}."
    return Check(name, shown, required, passed, reason)


def decide(
    workspace: Path, *, mlflow_uri: str, store_url: str, model: str, params: Path | None = None,
    variant: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Judge the variant that `evaluate` chose; writes and returns reports/verdict.json.

    Args:
        workspace: folder with the outputs of the graph: reports and models always; data and features as well where
            there is a champion to compare with.
        mlflow_uri: MLflow, where the champion's package is.
        store_url: the store, where the promotion record is.
        model: name of the registered model.
        params: file whose section `gate`, if any, is the policy; the workspace's params.yaml by default.
        variant: another variant than the chosen one.

    Returns:
        `approved`, `reasons`, `table`; `variant`, `model_sha256`; `champion`, the version it was held against (None:
        there was none), to which the verdict is bound; `figures`, what the gate was given.

    Raises:
        ArtifactError: a report, a model or a version is missing or damaged.
        RegistryError, StorageError: MLflow or the store cannot be reached.
    """
    from ado_tasks.registry.contest import hold  # noqa: PLC0415  (MLX, pandas: the pure decision needs neither)
    from ado_tasks.registry.workspace import Workspace  # noqa: PLC0415

    place = Workspace(workspace)
    policy = parse(GatePolicy, read_params(params or workspace / "params.yaml").get("gate") or {}, "gate")
    quality = place.quality()
    contest = hold(place, variant or quality["chosen"], mlflow_uri=mlflow_uri, store_url=store_url, model=model)
    with named_report_errors(f"{place.reports}/evaluate.json or measure.json"):
        challenger = challenger_figures(quality, place.cost(), contest.model_sha256, contest.name)
        challenger["against"] = contest.against
        verdict = gate(challenger, contest.champion, policy)
    result = {
        **verdict.as_plain(),
        "variant": contest.name,
        "model_sha256": contest.model_sha256,
        "champion": contest.champion and contest.champion["version"],
        "figures": challenger,
    }
    write_json(place.reports / VERDICT, result)
    return result


def main(arguments: Sequence[str]) -> int:
    """Judge, and print the verdict. A refusal is a result like an approval: exit status 0."""
    from ado_tasks.endpoints import endpoints  # noqa: PLC0415

    parser = argparse.ArgumentParser(prog="ado gate", description=__doc__)
    parser.add_argument("--workspace", type=Path, default=Path(), help="where the graph was run (default: here)")
    parser.add_argument("--variant", help="judge this one (default: what evaluate chose)")
    parser.add_argument("--params", type=Path, help="file with the section `gate` (default: the workspace's)")
    options = parser.parse_args(arguments)
    known = endpoints()
    verdict = decide(
        options.workspace, mlflow_uri=known.mlflow_uri, store_url=known.store, model=known.registered_model,
        params=options.params, variant=options.variant,
    )  # fmt: skip
    print(as_text(verdict))
    return 0
