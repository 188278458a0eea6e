"""`ado promote`: a registered, approved version becomes the champion: of many at once, one."""

import argparse
import getpass
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ado_tasks.endpoints import endpoints
from ado_tasks.errors import PromotionError
from ado_tasks.interop.package import package_sha256
from ado_tasks.registry.aliases import reconcile
from ado_tasks.registry.client import connect, named_registry_errors
from ado_tasks.registry.record import Event, Record, Version, update_record
from ado_tasks.registry.versions import fetch_package
from ado_tasks.storage import read_json
from ado_tasks.stores import open_store
from ado_tasks.verdict import VERDICT, checked_verdict

ACTION = "promote"


def promote(
    version: str, verdict: Mapping[str, Any], *, key: str, approver: str, mlflow_uri: str, store_url: str, model: str
) -> dict[str, Any]:
    """Make a version the champion, if the champion is still the one it was judged against.

    The version is downloaded and checked first, so `champion` never points to something unfinished. Then the promotion
    record is replaced, which one of many wins; then MLflow's aliases follow. Whatever dies in between, the same call
    again finishes it.

    Args:
        version: its number in MLflow.
        verdict: what the gate wrote about this very model.
        key: of the run that asks. A key that has promoted once never promotes again: a retry only finishes.
        approver: who said yes; kept in the record.
        mlflow_uri: MLflow.
        store_url: the store, where the promotion record is.
        model: name of the registered model.

    Returns:
        The promotion record after it.

    Raises:
        PromotionError: refused by the gate, another model than the judged one, or another was promoted meanwhile.
        ArtifactError: the version is not whole.
        RegistryError, StorageError: MLflow or the store cannot be reached; repeat.
    """
    if not verdict["approved"]:
        raise PromotionError(f"the gate refused version {version}, so it is not promoted: {verdict['reasons'][0]}")
    store = open_store(store_url)
    with named_registry_errors(mlflow_uri):
        client = connect(mlflow_uri)
        with tempfile.TemporaryDirectory(prefix="ado-promote-") as name:
            sha256 = package_sha256(fetch_package(client, model, version, Path(name)))
        if sha256 != verdict["model_sha256"]:
            raise PromotionError(
                f"version {version} has SHA-256 {sha256}; the verdict is about {verdict['model_sha256']}: not promoted"
            )
        wanted = Version(version, sha256)
        update_record(store, model, lambda record: promoted(record, wanted, verdict, key, approver))
        return reconcile(client, store, model).as_plain()


def promoted(record: Record, version: Version, verdict: Mapping[str, Any], key: str, by: str) -> Record | None:
    """The record with `version` as champion; None where this key did it before.

    Raises:
        PromotionError: the champion is another one than the verdict was held against, or this version.
    """
    if any(event.action == ACTION and event.key == key for event in record.history):
        return None
    present = None if record.champion is None else record.champion.version
    if present == version.version:
        raise PromotionError(f"version {version.version} is the champion already, promoted by another run")
    if present != verdict["champion"]:
        raise PromotionError(
            f"version {version.version} was judged against {_name(verdict['champion'])}, and by now there is "
            f"{_name(present)}: another promotion won; judge it again"
        )
    event = Event(ACTION, key, version.version, present, by, "; ".join(verdict["reasons"]), now())
    return replace(
        record,
        champion=version,
        challenger=None if record.challenger in (None, version) else record.challenger,
        former=record.former if record.champion is None else (*record.former, record.champion),
        anchor=record.anchor or version,
        history=(*record.history, event),
    )


def now() -> str:
    """The time in UTC, for people who read the history; nothing is decided by it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def whoever_asks() -> str:
    """Who is logged in; the number of the user where it has no name, as in a container run with a uid of the host's."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError since Python 3.13
        return f"uid {os.getuid()}"


def _name(version: str | None) -> str:
    return "no champion" if version is None else f"champion {version}"


def main(arguments: Sequence[str]) -> int:
    """Promote what reports/verdict.json approved, and print what the aliases point to."""
    parser = argparse.ArgumentParser(prog="ado promote", description=__doc__)
    parser.add_argument("version", help="its number in MLflow, as `ado register` printed it")
    parser.add_argument("--workspace", type=Path, default=Path(), help="folder of reports/verdict.json (default: here)")
    parser.add_argument("--key", help="of the run that asks; a key promotes once (default: manual-VERSION)")
    parser.add_argument("--approver", help="who said yes (default: who is logged in)")
    options = parser.parse_args(arguments)
    known = endpoints()
    verdict = read_json(options.workspace / "reports" / VERDICT, "approved", "champion", "model_sha256", "reasons")
    verdict = checked_verdict(verdict, str(options.workspace / "reports" / VERDICT))
    record = promote(
        options.version, verdict, key=options.key or f"manual-{options.version}",
        approver=options.approver or whoever_asks(), mlflow_uri=known.mlflow_uri, store_url=known.store,
        model=known.registered_model,
    )  # fmt: skip
    print(summary(known.registered_model, record))
    return 0


def summary(model: str, record: Mapping[str, Any]) -> str:
    """A promotion record in one line."""
    former = record["former"][-1]["version"] if record["former"] else "none"
    return f"{model}: champion is version {record['champion']['version']}, previous is {former}"
