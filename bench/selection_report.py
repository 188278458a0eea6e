"""What `bench/student_selection.py` found: which family comes first, as a table and in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def choice(rows: Sequence[Mapping[str, Any]], by_nfe: Sequence[int] = ()) -> dict[str, Any]:
    """The family that comes first, by what, and every family's sum: over these NFE, or all that each has."""
    students = [row for row in rows if row["family"] != "teacher"]
    families = {name: [row for row in students if row["family"] == name] for name in (r["family"] for r in students)}
    shared = set.intersection(*({row["nfe"] for row in each} for each in families.values()))
    shared &= set(by_nfe) or shared
    by_agreement = all("agreement" in row for row in students)

    def figure(row: Mapping[str, Any]) -> float:
        return row["agreement"] if by_agreement else row["kid_minus_teacher"]["ci"][1]

    sums = {name: sum(figure(row) for row in each if row["nfe"] in shared) for name, each in families.items()}
    best = (max if by_agreement else min)(sums, key=lambda name: sums[name])
    by = "agreement in place and size" if by_agreement else "upper ends of KID − teacher"
    return {"family": best if shared else None, "by": by, "nfe": sorted(shared, reverse=True), "sums": sums}


def table(report: Mapping[str, Any]) -> Table:
    """A line a row of the report."""
    shown = Table(title=f"{report['part']} part, n = {report['n']}; margin {report['margin']:.4f}")
    for name in ("", "seed", "NFE", "KID − teacher [95 %]", "", "FD over train / floor", "paired ×10³", "classes",
                 "agree", "cost"):  # fmt: skip
        shown.add_column(name, justify="right", no_wrap=True)
    shown.columns[0].justify = "left"
    for row in report["rows"]:
        kid = row["kid_minus_teacher"]
        low, high = kid["ci"]
        shares = [f"{100 * row[name]:.1f} %" if name in row else "" for name in ("class_accuracy", "agreement")]
        shown.add_row(
            row["name"], "" if row["seed"] is None else str(row["seed"]), str(row["nfe"]),
            f"{kid['value']:+.4f} [{low:+.4f}, {high:+.4f}]", "✓" if kid["non_inferior"] else "✗",
            f"{row['fd_over_train']['ratio_to_floor']:+.2f}", f"{1e3 * row['paired_distance']:.3g}", *shares,
            "" if row["cost"] is None else f"{row['cost']:.2f}",
        )  # fmt: skip
    return shown


def verdict(found: Mapping[str, Any]) -> str:
    """The choice in a line."""
    if found["family"] is None:
        return "no family is named: there is no number of evaluations that each has a student of"
    extreme = "largest" if found["by"].startswith("agreement") else "least"
    sums = ", ".join(f"{name} {total:.4f}" for name, total in found["sums"].items())
    return f"{found['family']}: {extreme} sum of {found['by']} at NFE {', '.join(map(str, found['nfe']))} ({sums})"
