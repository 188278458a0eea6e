"""Tables and lists that people read in a log or beside a question."""

from ado_tasks.orchestration import tables


def result(stage, joules=None, pictures=()):
    return {"stage": stage, "cached": False, "seconds": 1.5, "joules": joules, "pictures": list(pictures)}


def test_energy_has_a_column_only_where_a_machine_tells_it():
    told = tables.stages([result("train", 20.0), result("anchor")])
    assert [line.split()[-2] for line in told.splitlines() if not line.startswith("|-")] == [
        "joules",
        "20",
        "told",
        "20",
    ]
    silent = tables.stages([result("train"), result("anchor")])
    assert "joules" not in silent
    assert "told" not in silent
    assert silent.splitlines()[0].split() == ["|", "stage", "|", "|", "machine-seconds", "|"]
    assert silent.splitlines()[-1].split() == ["|", "all", "|", "|", "3.0", "|"]


def test_pictures_of_one_name_are_told_apart_by_their_stage():
    address = "http://m/get-artifact?path=pictures/samples.png&run_uuid="
    found = tables.pictures([result("train", pictures=[address + "1"]), result("x"), {"stage": "prepare"},
                             result("evaluate", pictures=[address + "2", "http://m/other"])])  # fmt: skip
    assert found.splitlines() == [
        f"- [train: samples.png]({address}1)",
        f"- [evaluate: samples.png]({address}2)",
        "- [evaluate: http://m/other](http://m/other)",
    ]
