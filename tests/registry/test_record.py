"""The promotion record: one order whoever writes, retries that change nothing, rollbacks that remember."""

from pathlib import Path
from typing import Any

import pytest
from at_once import promote_at_once

from ado_tasks.errors import ArtifactError, PromotionError
from ado_tasks.promote import promoted
from ado_tasks.registry.aliases import wanted_aliases
from ado_tasks.registry.record import Record, Version, read_record, record_key, update_record
from ado_tasks.rollback import rolled_back
from ado_tasks.stores import FolderStore, open_store

MODEL = "ado"


def verdict(champion: str | None) -> dict[str, Any]:
    return {"approved": True, "champion": champion, "reasons": ["fine"]}


def version(number: int) -> Version:
    return Version(str(number), f"{number:064x}")


def after(record: Record, number: int, over: str | None) -> Record:
    changed = promoted(record, version(number), verdict(over), key=f"run-{number}", by="ann")
    assert changed is not None
    return changed


def test_promotions_follow_each_other() -> None:
    first = after(Record(challenger=version(1)), 1, None)
    assert (first.champion, first.previous, first.challenger, first.anchor) == (version(1), None, None, version(1))
    second = after(first, 2, "1")
    assert (second.champion, second.previous, second.anchor) == (version(2), version(1), version(1))
    assert wanted_aliases(second) == {"champion": "2", "previous": "1", "challenger": None}
    assert [(event.version, event.former, event.by) for event in second.history] == [
        ("1", None, "ann"), ("2", "1", "ann"),
    ]  # fmt: skip


def test_a_stale_verdict_does_not_promote() -> None:
    record = after(after(Record(), 1, None), 2, "1")
    with pytest.raises(PromotionError, match="judged against champion 1, and by now there is champion 2"):
        promoted(record, version(3), verdict("1"), key="late", by="bob")
    with pytest.raises(PromotionError, match="judged against no champion, and by now there is champion 2"):
        promoted(record, version(3), verdict(None), key="late", by="bob")
    with pytest.raises(PromotionError, match="is the champion already"):
        promoted(record, version(2), verdict("2"), key="other", by="bob")


def test_a_retry_changes_nothing_even_after_others_came() -> None:
    record = after(after(Record(), 1, None), 2, "1")
    assert promoted(record, version(1), verdict(None), key="run-1", by="ann") is None
    rolled = rolled_back(record, "blurred", "undo", "ann", MODEL)
    assert promoted(rolled, version(2), verdict("1"), key="run-2", by="ann") is None
    assert rolled_back(rolled, "blurred", "undo", "ann", MODEL) is None


def test_a_newer_challenger_survives_a_promotion() -> None:
    assert after(Record(challenger=version(5)), 1, None).challenger == version(5)


def test_rollbacks_go_back_one_by_one_and_remember() -> None:
    record = after(after(after(Record(), 1, None), 2, "1"), 3, "2")
    back = rolled_back(record, "blurred", "a", "ann", MODEL)
    assert (back.champion, back.previous) == (version(2), version(1))
    assert [(each.version, each.reason) for each in back.withdrawn] == [("3", "blurred")]
    assert (back.history[-1].action, back.history[-1].reason, back.history[-1].former) == ("rollback", "blurred", "3")
    again = rolled_back(back, "slow", "b", "ann", MODEL)
    assert (again.champion, again.previous, again.anchor) == (version(1), None, version(1))
    with pytest.raises(PromotionError, match="nothing to roll back to: the record knows only the champion 1"):
        rolled_back(again, "more", "c", "ann", MODEL)
    with pytest.raises(PromotionError, match="the record knows no champion"):
        rolled_back(Record(), "more", "c", "ann", MODEL)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    assert read_record(store, MODEL) == Record()
    record = after(after(Record(), 1, None), 2, "1")
    record = rolled_back(record, "größer als erlaubt", "x", "ann", MODEL)
    written = update_record(store, MODEL, lambda _: record)
    assert read_record(store, MODEL) == written
    assert written.sequence == 1
    assert update_record(store, MODEL, lambda _: None) == written


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"champion": 3}', b"\xff"])
def test_a_damaged_record_is_named_and_left(tmp_path: Path, data: bytes) -> None:
    store = FolderStore(tmp_path)
    store.put(record_key(MODEL), data)
    with pytest.raises(ArtifactError, match=r"promotion/ado.json: not a promotion record"):
        update_record(store, MODEL, lambda record: record)
    assert store.get(record_key(MODEL)).data == data


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_of_twenty_promotions_at_once_one_wins(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = str(tmp_path / "store") if kind == "folder" else f"s3://{request.getfixturevalue('bucket')}/ado"
    said = promote_at_once(url, 20, stale=True)
    winners = [number for number, word in said.items() if word == "won"]
    assert len(winners) == 1
    assert all(word == "won" or f"by now there is champion {winners[0]}:" in word for word in said.values())
    record = read_record(open_store(url), MODEL)
    assert record.champion == Version(winners[0], winners[0])
    assert (record.sequence, len(record.history)) == (1, 1)


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_promotions_that_do_not_mind_the_champion_form_one_order(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = str(tmp_path / "store") if kind == "folder" else f"s3://{request.getfixturevalue('bucket')}/ado"
    said = promote_at_once(url, 8, stale=False)
    assert set(said.values()) == {"won"}
    history = read_record(open_store(url), MODEL).history
    assert [event.former for event in history] == [None, *(event.version for event in history[:-1])]
    assert sorted(event.version for event in history) == sorted(said)
