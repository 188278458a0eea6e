"""Airflow's settings: loopback needs no account, anything else asks for a password; secrets are private and long."""

import stat

import pytest

from ado_tasks.endpoints import endpoints
from ado_tasks.errors import ConfigError
from ado_tasks.orchestration.airflow_settings import control_plane, own_secret, worker

SECRET = "s" * 64


def test_on_loopback_nobody_is_asked_who_they_are(tmp_path):
    found = control_plane(endpoints({}, tmp_path), tmp_path, {})
    assert found["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS"] == "True"
    assert found["AIRFLOW__CORE__EXECUTOR"] == "LocalExecutor"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "airflow.example"])
def test_beyond_loopback_a_password_is_asked_for(host, tmp_path):
    found = control_plane(endpoints({"ADO_AIRFLOW_HOST": host}, tmp_path), tmp_path, {})
    assert found["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS"] == "False"
    assert found["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE"].startswith(str(tmp_path))


def test_a_queue_brings_the_executor_of_workers(tmp_path):
    found = control_plane(endpoints({"ADO_WORKER_QUEUE": "gpu"}, tmp_path), tmp_path, {})
    assert "EdgeExecutor" in found["AIRFLOW__CORE__EXECUTOR"]


def test_a_secret_is_made_once_and_readable_by_its_owner_only(tmp_path):
    file = tmp_path / "a" / "secret"
    made = own_secret(file, {})
    assert len(made) >= 64
    assert own_secret(file, {}) == made
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert own_secret(file, {"ADO_AIRFLOW_SECRET": SECRET}) == SECRET


def test_a_short_secret_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="ADO_AIRFLOW_SECRET: 5 characters are not allowed: 64"):
        own_secret(tmp_path / "secret", {"ADO_AIRFLOW_SECRET": "short"})


def test_a_worker_needs_a_queue_and_a_secret(tmp_path):
    with pytest.raises(ConfigError, match="ADO_WORKER_QUEUE"):
        worker(endpoints({}, tmp_path), tmp_path, {"ADO_AIRFLOW_SECRET": SECRET})
    places = endpoints({"ADO_WORKER_QUEUE": "gpu", "ADO_AIRFLOW_URL": "http://control:8080"}, tmp_path)
    with pytest.raises(ConfigError, match="ADO_AIRFLOW_SECRET"):
        worker(places, tmp_path, {})
    found = worker(places, tmp_path, {"ADO_AIRFLOW_SECRET": SECRET})
    assert found["AIRFLOW__EDGE__API_URL"] == "http://control:8080/edge_worker/v1/rpcapi"
    assert found["AIRFLOW__API_AUTH__JWT_SECRET"] == SECRET
