"""What the gate says: a verdict, how it is checked when it is read again, and how a person sees it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from ado_tasks.errors import ArtifactError

Figures = Mapping[str, Any]
VERDICT = "verdict.json"


@dataclass(frozen=True)
class Check:
    """One line of the verdict's table."""

    name: str
    found: str  # the challenger's figure
    required: str  # what it was held against
    passed: bool | None  # None: nothing to hold it against, so it decides nothing
    reason: str  # the line as a sentence


@dataclass(frozen=True)
class Verdict:
    """What the gate says."""

    approved: bool
    reasons: list[str]  # why not, each with both figures; where approved, what was held
    table: list[Check] = field(default_factory=list)

    def as_plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


@contextmanager
def named_report_errors(what: str) -> Iterator[None]:
    """Turn what a report of another shape raises when it is read into an ArtifactError that names it."""
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as problem:
        raise ArtifactError(
            f"{what}: not what this version writes ({type(problem).__name__}: {problem}); made by another, or damaged"
        ) from problem


def checked_verdict(verdict: Figures, where: str) -> Figures:
    """A stored verdict, if it is one. Raises ArtifactError: what is not exactly true or false decides nothing."""
    kinds = {"approved": bool, "variant": str, "model_sha256": str, "reasons": list, "figures": dict}
    for key, kind in kinds.items():
        if key in verdict and not isinstance(verdict[key], kind):
            raise ArtifactError(f"{where}: {key} is {verdict[key]!r}; a {kind.__name__} is required")
    if not verdict.get("reasons"):
        raise ArtifactError(f"{where}: has no reasons; made by another tool, or damaged")
    return verdict


def as_text(verdict: Figures) -> str:
    """A verdict as a Markdown table with its reasons: for a terminal, a log, a form."""
    marks = {True: "yes", False: "NO", None: "–"}
    against = "the teacher at 50 steps" if verdict["champion"] is None else f"champion {verdict['champion']}"
    lines = [
        f"{verdict['variant']} beside {against}: {'approved' if verdict['approved'] else 'REFUSED'}",
        "",
        "| check | found | required | passed |",
        "|---|---|---|---|",
        *(f"| {c['name']} | {c['found']} | {c['required']} | {marks[c['passed']]} |" for c in verdict["table"]),
        "",
        *(f"- {reason}" for reason in verdict["reasons"]),
    ]
    return "\n".join(lines)


def question(verdict: Figures) -> str:
    """What a person is asked where the gate approves."""
    return "Make this the first champion?" if verdict["champion"] is None else "Replace the champion?"
