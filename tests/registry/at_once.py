"""Many processes that promote at the same moment."""

import multiprocessing
import os
import threading
from typing import Any

from ado_tasks.errors import AdoError
from ado_tasks.promote import promoted
from ado_tasks.registry.record import Record, Version, update_record
from ado_tasks.stores import open_store

PATIENCE_S = 120


def promote_at_once(url: str, count: int, *, stale: bool) -> dict[str, str]:
    """What each of `count` processes says after promoting a version of its own: "won", or why not.

    With `stale` every verdict was held against "no champion"; otherwise against whoever is champion at that moment.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ado_tasks.promote", "boto3"])
    barrier, answers = context.Barrier(count), context.SimpleQueue()
    processes = [
        context.Process(target=_promote, args=(url, str(number), stale, barrier, answers, dict(os.environ)))
        for number in range(count)
    ]
    for process in processes:
        process.start()
    said = dict(answers.get() for _ in processes)
    for process in processes:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in processes] == [0] * count
    return said


def _promote(url: str, number: str, stale: bool, barrier: Any, answers: Any, environment: dict[str, str]) -> None:
    os.environ.update(environment)  # the server that forks was started with an earlier one

    def change(record: Record) -> Record | None:
        known = None if stale or record.champion is None else record.champion.version
        verdict = {"approved": True, "champion": known, "reasons": []}
        return promoted(record, Version(number, number), verdict, f"run-{number}", "test")

    try:
        store = open_store(url)
        store.list()  # connected
        barrier.wait(PATIENCE_S)
        update_record(store, "ado", change)
        answers.put((number, "won"))
    except (AdoError, threading.BrokenBarrierError) as problem:
        answers.put((number, str(problem)))
