"""The promotion record: one small file in the store that says which version is the champion. It is the truth.

MLflow's aliases have no compare-and-swap, so of two promotions at once each could overwrite the other's unseen. The
record is only ever replaced by the one who read its present state; aliases are set from it afterwards
(`ado_tasks.registry.aliases`), by whoever comes, as often as needed.
"""

import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ado_tasks.config import parse
from ado_tasks.errors import ArtifactError, ConfigError, PromotionError
from ado_tasks.stores import Store

_ATTEMPTS = 100  # at one update; each is lost to a writer who came through, so many writers still all come through
_PAUSE_S = 0.05  # at most, times the attempt's number up to 20; drawn anew each time, so that writers fall out of step


@dataclass(frozen=True)
class Version:
    """A registered version."""

    version: str  # its number in MLflow
    model_sha256: str  # of its package


@dataclass(frozen=True)
class Withdrawn:
    """A version that was rolled back."""

    version: str
    model_sha256: str
    reason: str


@dataclass(frozen=True)
class Event:
    """One line of the history."""

    action: str  # "promote" or "rollback"
    key: str  # of the run that asked: what makes a retry do nothing
    version: str  # the champion from then on
    former: str | None  # the champion until then
    by: str
    reason: str
    at: str  # UTC, ISO 8601


@dataclass(frozen=True)
class Record:
    """The state of one registered model."""

    sequence: int = 0  # how many changes there were
    champion: Version | None = None
    challenger: Version | None = None  # the version registered last that was not promoted
    former: tuple[Version, ...] = ()  # champions before this one, oldest first; the last is `previous`
    anchor: Version | None = None  # the first champion: held against as well, so that losses do not add up
    withdrawn: tuple[Withdrawn, ...] = ()
    history: tuple[Event, ...] = ()

    @property
    def previous(self) -> Version | None:
        """What a rollback returns to."""
        return self.former[-1] if self.former else None

    def as_plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def record_key(model: str) -> str:
    """Where the record of a registered model is."""
    return f"promotion/{model}.json"


def read_record(store: Store, model: str) -> Record:
    """The present state; an empty record where nothing was registered. Raises ArtifactError where it is damaged."""
    return _read(store, model)[0]


def update_record(store: Store, model: str, change: Callable[[Record], Record | None]) -> Record:
    """Change the record, once, however many others do at the same time. Returns the state after it.

    Args:
        store: where it is.
        model: which.
        change: from the present state to the wanted one; None where nothing is to be changed. It is asked again
            whenever another writer was faster, and may raise to give up. `sequence` is counted here.

    Raises:
        PromotionError: others were faster a hundred times.
    """
    for attempt in range(_ATTEMPTS):
        present, etag = _read(store, model)
        wanted = change(present)
        if wanted is None:
            return present
        wanted = replace(wanted, sequence=present.sequence + 1)
        data = (json.dumps(wanted.as_plain(), indent=2) + "\n").encode()
        key = record_key(model)
        if store.create(key, data) if etag is None else store.replace(key, data, etag):
            return wanted
        time.sleep(random.uniform(0, _PAUSE_S * min(attempt + 1, 20)))
    raise PromotionError(
        f"{store.url}: {record_key(model)}: others wrote it {_ATTEMPTS} times while this process tried"
    )


def _read(store: Store, model: str) -> tuple[Record, str | None]:
    stored = store.get(record_key(model))
    if stored is None:
        return Record(), None
    where = f"{store.url}: {record_key(model)}"
    try:
        values = json.loads(stored.data)
        return parse(Record, _mapping(values), where), stored.etag
    except (ValueError, ConfigError) as problem:
        raise ArtifactError(f"{where}: not a promotion record: {problem}") from None


def _mapping(values: Any) -> Mapping[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"a mapping is expected, found {type(values).__name__}")
    return values
