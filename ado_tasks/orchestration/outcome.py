"""How runs ended: kept in the store, so that a run which would only repeat the last one can say so and stop."""

import json
from collections.abc import Mapping
from typing import Any

from ado_tasks.stores.protocol import Store

_LAST = "runs/last.json"
# Judged to the end: the same inputs would be judged the same way. A run that failed is not among them.
CONCLUDED = frozenset({"promoted", "refused", "rejected"})


def conclude(
    plan: Mapping[str, Any], verdict: Mapping[str, Any] | None, approval: Mapping[str, Any] | None,
    promoted: Mapping[str, Any] | None, merged: Mapping[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """One word for how a run ended, and a sentence that says why.

    Args:
        plan: of `plan.Plan`.
        verdict: of the gate; None where the run stopped before it.
        approval: what the approval returned; None where nobody was asked.
        promoted: the promotion; None where there was none.
        merged: of `git_flow.merge`.
    """
    if not plan["proceed"]:
        return {"outcome": "unchanged", "why": plan["reason"]}
    if verdict is None or not verdict["approved"]:
        return {"outcome": "refused", "why": "; ".join(verdict["reasons"]) if verdict else "no verdict was reached"}
    if promoted is None:
        by = (approval or {}).get("by") or "nobody"
        why = "no answer in time" if (approval or {}).get("timed_out") else f"rejected by {by}"
        return {"outcome": "rejected", "why": why}
    how = f"; {merged['how']}" if merged else ""
    return {"outcome": "promoted", "why": f"version {promoted.get('version')}, approved by {promoted.get('by')}{how}"}


def record(store: Store, run_id: str, plan: Mapping[str, Any], ended: Mapping[str, Any]) -> None:
    """Keep how a run ended, where it was judged to the end."""
    if ended["outcome"] in CONCLUDED:
        kept = {"run": run_id, "branch": plan["branch"], "revision": plan["revision"], **ended}
        store.put(_LAST, json.dumps(kept, indent=2).encode())


def last_concluded(store: Store) -> dict[str, Any] | None:
    """The last run that was judged to the end, as `record` kept it."""
    found = store.get(_LAST)
    return None if found is None else json.loads(found.data)
