"""`ado rollback`: the former champion is back, and the record says why."""

import argparse
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ado_tasks.endpoints import endpoints
from ado_tasks.errors import PromotionError
from ado_tasks.promote import now, summary, whoever_asks
from ado_tasks.registry.aliases import reconcile
from ado_tasks.registry.client import connect, named_registry_errors
from ado_tasks.registry.record import Event, Record, Withdrawn, update_record
from ado_tasks.stores import open_store

ACTION = "rollback"
REASON_TAG = "ado.rolled_back"


def rollback(reason: str, *, key: str, by: str, mlflow_uri: str, store_url: str, model: str) -> dict[str, Any]:
    """Return to the champion before the present one. The gate refuses the withdrawn model from then on.

    Args:
        reason: why; kept in the record and on the version.
        key: of the run that asks. A key that has rolled back once never does again: a retry only finishes.
        by: who asks.
        mlflow_uri: MLflow.
        store_url: the store, where the promotion record is.
        model: name of the registered model.

    Returns:
        The promotion record after it.

    Raises:
        PromotionError: there is no former champion, or no reason was given.
        RegistryError, StorageError: MLflow or the store cannot be reached; repeat.
    """
    if not reason.strip():
        raise PromotionError("a rollback needs a reason: whoever reads the record later will ask")
    store = open_store(store_url)
    record = update_record(store, model, lambda present: rolled_back(present, reason.strip(), key, by, model))
    with named_registry_errors(mlflow_uri):
        client = connect(mlflow_uri)
        reconciled = reconcile(client, store, model)
        for withdrawn in record.withdrawn[-1:]:
            client.set_model_version_tag(model, withdrawn.version, REASON_TAG, withdrawn.reason)
    return reconciled.as_plain()


def rolled_back(record: Record, reason: str, key: str, by: str, model: str) -> Record | None:
    """The record with the former champion back; None where this key did it before. Raises PromotionError."""
    if any(event.action == ACTION and event.key == key for event in record.history):
        return None
    if record.champion is None or record.previous is None:
        state = "no champion" if record.champion is None else f"only the champion {record.champion.version}"
        raise PromotionError(f"{model}: there is nothing to roll back to: the record knows {state}")
    bad, back = record.champion, record.previous
    event = Event(ACTION, key, back.version, bad.version, by, reason, now())
    return replace(
        record,
        champion=back,
        former=record.former[:-1],
        withdrawn=(*record.withdrawn, Withdrawn(bad.version, bad.model_sha256, reason)),
        history=(*record.history, event),
    )


def main(arguments: Sequence[str]) -> int:
    """Roll back, and print what the aliases point to."""
    parser = argparse.ArgumentParser(prog="ado rollback", description=__doc__)
    parser.add_argument("reason", help="why; it is kept")
    parser.add_argument("--key", help="of the run that asks; a key rolls back once (default: a new one)")
    parser.add_argument("--by", help="who asks (default: who is logged in)")
    options = parser.parse_args(arguments)
    known = endpoints()
    record = rollback(
        options.reason, key=options.key or f"manual-{uuid.uuid4().hex}", by=options.by or whoever_asks(),
        mlflow_uri=known.mlflow_uri, store_url=known.store, model=known.registered_model,
    )  # fmt: skip
    print(summary(known.registered_model, record))
    return 0
