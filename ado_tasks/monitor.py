"""`ado monitor`: does the champion still do what it was promoted for? Sampled anew, from noise that no report used.

It finds what a report cannot: a package that was damaged, a library or machine that computes differently, a champion
whose figures were luck. It is held against the teacher that it came from, from the same noise, by the interval and the
margin that the champion was judged by.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ado_tasks.errors import ArtifactError

if TYPE_CHECKING:
    from mlflow import MlflowClient

REFERENCE = "teacher-50"
REVISION_TAG = "git.revision"  # of a registered version, as `ado register` sets it


def champion(*, mlflow_uri: str, store_url: str, model: str) -> dict[str, str] | None:
    """The champion's version and the git revision that holds its data and its teacher; None where there is none.

    Raises:
        ArtifactError: the version says no revision.
        RegistryError, StorageError: MLflow or the store cannot be reached.
    """
    from ado_tasks.registry.client import connect, named_registry_errors  # noqa: PLC0415
    from ado_tasks.registry.record import read_record  # noqa: PLC0415
    from ado_tasks.registry.versions import get_version  # noqa: PLC0415
    from ado_tasks.stores import open_store  # noqa: PLC0415

    found = read_record(open_store(store_url), model).champion
    if found is None:
        return None
    with named_registry_errors(mlflow_uri):
        tags = get_version(connect(mlflow_uri), model, found.version).tags
    if REVISION_TAG not in tags:
        raise ArtifactError(f"models:/{model}/{found.version}: has no tag {REVISION_TAG}; made by another tool")
    return {"version": found.version, "revision": tags[REVISION_TAG]}


def monitor(workspace: Path, version: str, *, seed: int, mlflow_uri: str, model: str) -> dict[str, Any]:
    """Sample a version and its teacher from new noise, compare, and log the figures to MLflow.

    Args:
        workspace: a folder at the version's revision, its data, features and models in place.
        version: of the registered model.
        seed: of the noise; another one each time.
        mlflow_uri: MLflow.
        model: name of the registered model.

    Returns:
        `state` ("healthy", "unclear" or "degraded"), `value` and `ci` of KID(version) − KID(teacher), `margin`, and
        `why`, a sentence.

    Raises:
        ArtifactError: the package is missing or is not what its checksum says.
        DivergenceError: its samples are not finite.
        RegistryError: MLflow cannot be reached.
    """
    from ado_tasks.registry.client import connect, named_registry_errors  # noqa: PLC0415

    with named_registry_errors(mlflow_uri):
        client = connect(mlflow_uri)
        found = _compare(workspace, version, seed, client, model)
        _log(client, mlflow_uri, version, seed, found)
    return found


def judged(value: float, interval: tuple[float, float], margin: float) -> dict[str, Any]:
    """What the figures mean: healthy where the whole interval is under the margin, degraded where it is all above."""
    low, high = interval
    state = "healthy" if high <= margin else "degraded" if low > margin else "unclear"
    why = f"KID − teacher is {value:+.4f} [{low:+.4f}, {high:+.4f}], the margin is {margin:.4f}"
    advice = {"healthy": "", "unclear": "; look again", "degraded": "; re-optimise, or roll back"}[state]
    return {"state": state, "value": value, "ci": [low, high], "margin": margin, "why": why + advice}


def _compare(workspace: Path, version: str, seed: int, client: "MlflowClient", model: str) -> dict[str, Any]:
    from ado_tasks.interop.package import read_package  # noqa: PLC0415
    from ado_tasks.metrics.noninferiority import kid_difference  # noqa: PLC0415
    from ado_tasks.registry.contest import FeaturesOf  # noqa: PLC0415
    from ado_tasks.registry.versions import fetch_package  # noqa: PLC0415
    from ado_tasks.registry.workspace import Workspace  # noqa: PLC0415

    place = Workspace(workspace)
    features = FeaturesOf(place, purpose="monitor", seed=seed)
    with tempfile.TemporaryDirectory(prefix="ado-monitor-") as folder:
        package = read_package(fetch_package(client, model, version, Path(folder)))
        teacher = features(place.package(REFERENCE))
        interval = kid_difference(features(package), teacher, features.real, groups=features.groups)
    margins = [
        variant["kid_minus_teacher"]["margin"]
        for variant in place.quality()["variants"]
        if variant.get("kid_minus_teacher")
    ]
    return judged(interval.value, (interval.low, interval.high), margins[0])


def _log(client: "MlflowClient", mlflow_uri: str, version: str, seed: int, found: Mapping[str, Any]) -> None:
    from ado_tasks.registry.client import experiment_id  # noqa: PLC0415

    tags = {"task": "monitor", "ado.version": version, "ado.state": found["state"], "ado.seed": str(seed)}
    run = client.create_run(experiment_id(client, mlflow_uri), run_name=f"monitor-{version}", tags=tags)
    low, high = found["ci"]
    figures = {"kid_minus_teacher": found["value"], "kid_low": low, "kid_high": high, "margin": found["margin"]}
    for name, value in figures.items():
        client.log_metric(run.info.run_id, name, value)
    client.set_terminated(run.info.run_id)


def main(arguments: Sequence[str]) -> int:
    """Look at the champion, from a folder at its revision with its outputs in place; print what was found."""
    from ado_tasks.endpoints import endpoints  # noqa: PLC0415

    parser = argparse.ArgumentParser(prog="ado monitor", description=__doc__)
    parser.add_argument("--workspace", type=Path, default=Path(), help="that folder (default: this one)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the noise (default: the time)")
    options = parser.parse_args(arguments)
    known = endpoints()
    found = champion(mlflow_uri=known.mlflow_uri, store_url=known.store, model=known.registered_model)
    if found is None:
        print(f"{known.registered_model}: there is no champion yet")
        return 0
    result = monitor(
        options.workspace,
        found["version"],
        seed=options.seed,
        mlflow_uri=known.mlflow_uri,
        model=known.registered_model,
    )
    print(json.dumps({**found, **result}, indent=2))
    return 0
