"""Versions of the registered model in MLflow: found by what they hold, made at most once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ado_tasks.errors import ArtifactError, RegistryError
from ado_tasks.interop.package import package_sha256
from ado_tasks.registry.served import ARTIFACT, log_served

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY_TAG = "ado.registration"  # of runs and versions: one a (run id, model hash)
SHA_TAG = "ado.model_sha256"
VARIANT_TAG = "ado.variant"
COST_TAG = "ado.cost"  # JSON: the measured figures, with the machine's id

Claim = Callable[[str | None], str | None]  # proposes a run for a registration; returns the one that was first


@dataclass(frozen=True)
class Registration:
    """What is to be registered."""

    key: str  # one registration: equal for every retry
    package: Path
    model_sha256: str
    name: str  # of the run
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    pictures: tuple[Path, ...]


def find_version(client: "MlflowClient", model: str, key: str) -> Any | None:
    """The version of this registration, the lowest where there are several; None where there is none."""
    found = client.search_model_versions(f"name = '{model}' and tags.`{KEY_TAG}` = '{key}'")
    return min(found, key=lambda version: int(version.version), default=None)


def make_version(
    client: "MlflowClient", experiment: str, model: str, wanted: Registration, claim: Claim
) -> tuple[Any, bool]:
    """The version of a registration, made where it is missing, and whether it was made here.

    The version comes last: whoever finds it finds everything. An attempt that died earlier left a claimed run, which is
    taken up again. Two attempts at once (a retry beside an orphaned task) may both make a version: each then looks, and
    one that is not the lowest is removed by whoever made it.
    """
    found = find_version(client, model, wanted.key)
    if found is not None:
        return found, False
    run_id = _run(client, experiment, wanted, claim)
    model_id = _logged_model(client, experiment, run_id, wanted)
    _registered_model(client, model)
    tags = {**wanted.tags, KEY_TAG: wanted.key, SHA_TAG: wanted.model_sha256}
    made = client.create_model_version(model, f"models:/{model_id}", run_id=run_id, tags=tags, model_id=model_id)
    first = find_version(client, model, wanted.key)
    if first is not None and first.version != made.version:
        client.delete_model_version(model, made.version)
        return first, False
    return made, True


def get_version(client: "MlflowClient", model: str, version: str) -> Any:
    """A version by its number. Raises RegistryError where it does not exist."""
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    try:
        return client.get_model_version(model, version)
    except MlflowException as problem:
        if problem.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise RegistryError(f"{model}: there is no version {version}") from None


def fetch_package(client: "MlflowClient", model: str, version: str, into: Path) -> Path:
    """Download the package of a version below `into`, and check it. Raises ArtifactError where it is not whole."""
    from mlflow.artifacts import download_artifacts  # noqa: PLC0415

    found = get_version(client, model, version)
    expected = found.tags.get(SHA_TAG)
    if found.status != "READY" or expected is None:
        raise ArtifactError(f"{model} version {version}: not complete (status {found.status}, {SHA_TAG} {expected})")
    folder = Path(download_artifacts(f"models:/{model}/{version}", dst_path=str(into)))
    package = folder / "artifacts" / ARTIFACT
    sha256 = package_sha256(package)
    if sha256 != expected:
        raise ArtifactError(f"{model} version {version}: SHA-256 {sha256}, expected {expected}")
    return package


def _run(client: "MlflowClient", experiment: str, wanted: Registration, claim: Claim) -> str:
    """The run of a registration, with everything logged. Logging the same twice changes nothing."""
    from mlflow.entities import Metric, Param, RunTag  # noqa: PLC0415

    run_id = claim(None)
    if run_id is None:
        mine = client.create_run(experiment, run_name=wanted.name, tags={KEY_TAG: wanted.key}).info.run_id
        run_id = claim(mine)
        if run_id is None or run_id != mine:
            client.delete_run(mine)
    if run_id is None:
        raise RegistryError(f"registration {wanted.key}: its claim vanished from the store")
    run = client.get_run(run_id)
    client.log_batch(
        run_id,
        metrics=[Metric(name, value, run.info.start_time, 0) for name, value in wanted.metrics.items()],
        params=[Param(name, str(value)[:6000]) for name, value in wanted.params.items()],
        tags=[RunTag(name, value) for name, value in {**wanted.tags, SHA_TAG: wanted.model_sha256}.items()],
    )
    for picture in wanted.pictures:
        client.log_artifact(run_id, str(picture), "pictures")
    return run_id


def _logged_model(client: "MlflowClient", experiment: str, run_id: str, wanted: Registration) -> str:
    """The run's logged model: the whole one of an earlier attempt, or a new one."""
    import mlflow  # noqa: PLC0415

    for logged in client.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
        if str(logged.status) == "READY":
            return logged.model_id
    with mlflow.start_run(run_id=run_id):
        return log_served(wanted.package).model_id


def _registered_model(client: "MlflowClient", model: str) -> None:
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    try:
        client.create_registered_model(model, description="Made by the Adaptive Diffusion Optimizer.")
    except MlflowException as problem:
        if problem.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
