"""MLflow's aliases `champion`, `previous` and `challenger`, set to what the promotion record says."""

from typing import TYPE_CHECKING

from ado_tasks.errors import RegistryError
from ado_tasks.registry.record import Record, read_record
from ado_tasks.stores import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient

_ROUNDS = 50


def wanted_aliases(record: Record) -> dict[str, str | None]:
    """What each alias should point to; None: it should not exist."""
    entries = {"champion": record.champion, "previous": record.previous, "challenger": record.challenger}
    return {alias: None if entry is None else entry.version for alias, entry in entries.items()}


def reconcile(client: "MlflowClient", store: Store, model: str) -> Record:
    """Make the aliases say what the record says; safe to call at any time, by any number of processes.

    Whoever sets an alias looks at the record again afterwards, and goes round once more where it has changed: so the
    last one to set an alias has seen the newest record.
    """
    record = read_record(store, model)
    for _ in range(_ROUNDS):
        present: dict[str, str] = dict(client.get_registered_model(model).aliases)
        for alias, version in wanted_aliases(record).items():
            if version is None and alias in present:
                client.delete_registered_model_alias(model, alias)
            elif version is not None and str(present.get(alias)) != version:
                client.set_registered_model_alias(model, alias, version)
        newest = read_record(store, model)
        if newest.sequence == record.sequence and _agrees(client, model, newest):
            return newest
        record = newest
    raise RegistryError(f"aliases of {model}: others changed them {_ROUNDS} times while this process set them")


def _agrees(client: "MlflowClient", model: str, record: Record) -> bool:
    present = dict(client.get_registered_model(model).aliases)
    return all(
        (None if alias not in present else str(present[alias])) == version
        for alias, version in wanted_aliases(record).items()
    )
