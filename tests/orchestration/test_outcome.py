"""How a run ended, in one word and a sentence."""

import pytest

from ado_tasks.orchestration import outcome
from ado_tasks.stores import open_store

PLAN = {"proceed": True, "reason": "2 of 3", "branch": "run/x", "revision": "abc"}
YES = {"approved": True, "reasons": ["faster"]}


NO = {"approved": False, "reasons": ["worse", "slower"]}
BY_ANN = {"approved": False, "by": "ann", "timed_out": False}
TOO_LATE = {"approved": False, "by": None, "timed_out": True}
PROMOTED = {"version": "3", "by": "ann"}


@pytest.mark.parametrize(
    ("told", "word", "part"),
    [
        (({**PLAN, "proceed": False}, None, None, None, None), "unchanged", "2 of 3"),
        ((PLAN, NO, None, None, None), "refused", "worse; slower"),
        ((PLAN, YES, BY_ANN, None, None), "rejected", "rejected by ann"),
        ((PLAN, YES, TOO_LATE, None, None), "rejected", "no answer in time"),
        ((PLAN, YES, {}, PROMOTED, {"how": "merged"}), "promoted", "version 3, approved by ann; merged"),
    ],
)
def test_each_end_has_its_word(told, word, part):
    ended = outcome.conclude(*told)
    assert ended["outcome"] == word
    assert part in ended["why"]


@pytest.mark.parametrize(("word", "kept"), [("promoted", 1), ("refused", 1), ("rejected", 1), ("unchanged", 0)])
def test_only_what_was_judged_to_the_end_is_kept(word, kept, tmp_path):
    store = open_store(str(tmp_path))
    outcome.record(store, "x", PLAN, {"outcome": word, "why": "because"})
    last = outcome.last_concluded(store)
    assert (last is not None) == bool(kept)
    if last:
        assert (last["branch"], last["outcome"]) == ("run/x", word)
