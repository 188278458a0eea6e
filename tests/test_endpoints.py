"""Endpoints: defaults need nothing, every variable is on the documented page, and a wrong value is named."""

import os
from pathlib import Path

import pytest

from ado_tasks.endpoints import endpoints, load_env_file, read_env_file
from ado_tasks.errors import ConfigError

EXAMPLE = Path(__file__).parent.parent / "ado.env.example"
# Read by boto3 and by the launcher, not by `endpoints`.
OTHERS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "ADO_AIRFLOW_SECRET", "ADO_WORKER_NAME"}


def test_nothing_set_means_everything_is_in_this_folder(tmp_path):
    found = endpoints({}, tmp_path)
    assert found.store == str(tmp_path / ".ado/store")
    assert found.git_remote == str(tmp_path)
    assert found.mlflow_uri == f"sqlite:///{tmp_path}/.ado/mlflow.db"
    assert (found.dvc_remote, found.s3_endpoint, found.worker_queue, found.notify) == (None, None, None, ())
    assert found.on_loopback
    assert found.airflow_url == "http://127.0.0.1:8080"


def test_an_empty_value_is_the_default(tmp_path):
    assert endpoints(read_env_file(EXAMPLE), tmp_path) == endpoints({}, tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("MLFLOW_TRACKING_URI", "http://mlflow:5000", "mlflow_uri", "http://mlflow:5000"),
        ("ADO_STORE", "s3://b/p/", "store", "s3://b/p"),
        ("ADO_DVC_REMOTE", "s3://b/dvc", "dvc_remote", "s3://b/dvc"),
        ("ADO_GIT_REMOTE", "git@host:ado.git", "git_remote", "git@host:ado.git"),
        ("ADO_GIT_BRANCH", "trunk", "git_branch", "trunk"),
        ("AWS_ENDPOINT_URL", "http://s3:7480", "s3_endpoint", "http://s3:7480"),
        ("ADO_NOTIFY", "http://a, http://b", "notify", ("http://a", "http://b")),
        ("ADO_AIRFLOW_HOST", "0.0.0.0", "airflow_url", "http://127.0.0.1:8080"),
        ("ADO_AIRFLOW_HOST", "0.0.0.0", "on_loopback", False),
        ("ADO_AIRFLOW_PORT", "9000", "airflow_port", 9000),
        ("ADO_AIRFLOW_URL", "https://airflow.example/", "airflow_url", "https://airflow.example"),
        ("ADO_WORKER_QUEUE", "apple-silicon", "worker_queue", "apple-silicon"),
        ("ADO_MLFLOW_PORT", "5001", "mlflow_url", "http://127.0.0.1:5001"),
        ("MLFLOW_TRACKING_URI", "http://mlflow:5000/", "mlflow_url", "http://mlflow:5000"),
        ("MLFLOW_TRACKING_URI", "http://mlflow:5000", "serves_mlflow", False),
        ("ADO_MODEL", "faces", "registered_model", "faces"),
    ],
)
def test_each_variable_reaches_its_field_and_is_documented(name, value, field, expected, tmp_path):
    assert getattr(endpoints({name: value}, tmp_path), field) == expected
    assert name in read_env_file(EXAMPLE)


def test_the_documented_page_lists_nothing_that_has_no_effect(tmp_path):
    plain = endpoints({}, tmp_path)
    special = {
        "ADO_AIRFLOW_PORT": "81",
        "ADO_MLFLOW_PORT": "81",
        "AWS_ENDPOINT_URL": "http://x",
        "ADO_AIRFLOW_URL": "http://x",
    }
    for name in set(read_env_file(EXAMPLE)) - OTHERS:
        assert endpoints({name: special.get(name, "x")}, tmp_path) != plain, name


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("ADO_AIRFLOW_PORT", "http", "from 1 to 65535"),
        ("ADO_AIRFLOW_PORT", "70000", "from 1 to 65535"),
        ("ADO_STORE", "gs://bucket/x", "s3://bucket/prefix"),
        ("ADO_STORE", "s3://", "s3://bucket/prefix"),
        ("AWS_ENDPOINT_URL", "localhost:7480", "http://"),
        ("ADO_AIRFLOW_URL", "airflow", "http://"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(name, value, allowed, tmp_path):
    with pytest.raises(ConfigError, match=name) as caught:
        endpoints({name: value}, tmp_path)
    assert allowed in str(caught.value)


def test_an_env_file_names_the_line_that_is_wrong(tmp_path):
    file = tmp_path / "ado.env"
    file.write_text("# a comment\n\nADO_MODEL = faces \nexport X\n")
    with pytest.raises(ConfigError, match=r"ado\.env:4: 'export X'"):
        read_env_file(file)
    file.write_text("# a comment\n\nADO_MODEL = faces \n")
    assert read_env_file(file) == {"ADO_MODEL": "faces"}
    assert read_env_file(tmp_path / "none") == {}


def test_a_loaded_env_file_yields_to_the_environment_and_leaves_empty_values_out(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {"ADO_MODEL": "set", "ADO_GIT_BRANCH": ""})
    monkeypatch.chdir(tmp_path)
    load_env_file()  # there is none
    assert os.environ == {"ADO_MODEL": "set", "ADO_GIT_BRANCH": ""}
    Path("ado.env").write_text("ADO_MODEL=file\nADO_GIT_BRANCH=file\nAWS_ENDPOINT_URL=\nADO_STORE=s3://b/p\n")
    load_env_file()
    assert os.environ == {"ADO_MODEL": "set", "ADO_GIT_BRANCH": "", "ADO_STORE": "s3://b/p"}
    assert (endpoints().registered_model, endpoints().git_branch) == ("set", "main")
    assert endpoints().store == "s3://b/p"


def test_a_wrong_line_sets_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    (tmp_path / "ado.env").write_text("ADO_MODEL=faces\nexport X\n")
    with pytest.raises(ConfigError, match=r"ado\.env:2"):
        load_env_file(tmp_path / "ado.env")
    assert os.environ == {}
