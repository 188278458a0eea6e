"""bench/mac.py: ratios, turns, what is left out and why, and all of it on a tiny network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ado_tasks.diffusion.schedules import Cosine
from ado_tasks.interop.diffusers_folder import write_model
from ado_tasks.models.initialise import initialise
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.rng import key

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import mac
import mac_contender
import mac_processes
import mac_report
from mac_processes import Gone, Process, Turns, take_turns

BENCH = Path(mac.__file__).parent
UNET = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1, "norm_num_groups": 4, "num_class_embeds": 10, "add_attention": False,
    "dropout": 0.2,  # which no form may draw: their losses are compared
}  # fmt: skip

# Stands in for a contender: writes its name to a log whenever it is run, and ends as its job says.
FAKE = """
import json, sys, time
job = json.loads(sys.stdin.readline())
def answer(value): print(json.dumps(value), flush=True)
if job.get("skip"):
    answer({"skipped": job["skip"]}); sys.exit()
if job.get("silent"):
    time.sleep(60)
answer({"actions": ["step"], "device": "cpu", "versions": {}, "check": [1.0]})
runs = 0
for line in sys.stdin:
    order = json.loads(line)
    if "run" in order:
        runs += 1
        open(job["log"], "a").write(job["form"])
        if runs == job.get("dies"):
            print("out of memory", file=sys.stderr); sys.exit(9)
        answer({"seconds": job["seconds"]})
    else:
        answer({"framework_mib": 1.0} if "memory" in order else {})
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Fake contenders by form; returns (a maker of jobs, the log of runs)."""
    script, log = tmp_path / "fake.py", tmp_path / "log"
    script.write_text(FAKE)
    monkeypatch.setattr(mac_processes, "SCRIPT", script)
    return lambda form, **more: {"form": form, "seconds": 1.0, "log": str(log), **more}, log


def turns_of(seconds, checks, skipped=()):
    ready = {form: {"device": "cpu", "versions": {}, "check": check} for form, check in checks.items()}
    return Turns(
        {(form, "step"): times for form, times in seconds.items()},
        {(form, "step"): {"framework_mib": 1.0, "process_mib": 2.0} for form in seconds}, ready, dict(skipped),
    )  # fmt: skip


def test_a_machine_that_slows_down_in_a_round_slows_both_sides():
    ours, theirs = [[1.0, 1.2, 0.8], [5.0], [1.0]], [[2.0], [10.0], [2.0]]
    assert mac_report.ratios(theirs, ours) == pytest.approx([2.0, 2.0, 2.0])
    assert mac_report.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "quartiles": [2.0, 4.0]}
    assert mac_report.spread([2.0]) == {"median": 2.0, "quartiles": [2.0, 2.0]}


def test_only_forms_that_compute_the_same_are_compared():
    seconds = {"mlx compiled": [[1.0], [1.0]], "pytorch eager": [[3.0], [3.0]], "pytorch compiled": [[0.1], [0.1]]}
    checks = {"mlx compiled": [1.0, 2.0], "pytorch eager": [1.0, 2.01], "pytorch compiled": [1.0, float("nan")]}
    forms = mac_report.compared(turns_of(seconds, checks, {"mlx uncompiled": "why"}), "step", count=6)
    assert forms["pytorch eager"]["mlx_compiled_is_quicker"]["median"] == pytest.approx(3.0)
    assert forms["pytorch eager"]["images_per_s"]["median"] == pytest.approx(2.0)
    assert not forms["pytorch compiled"]["agrees"] and "mlx_compiled_is_quicker" not in forms["pytorch compiled"]
    assert forms["mlx uncompiled"] == {"skipped": "why"}
    json.dumps(forms, allow_nan=False)
    assert mac_report.difference([1.0, 2.0], [1.0, 2.0]) == 0
    assert mac_report.difference([1.1, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    assert mac_report.difference([1.0], [1.0, 2.0]) == float("inf")


def test_the_chain_is_measured_against_the_teacher_in_the_same_round():
    turns = turns_of({}, {"mlx compiled": [1.0], "pytorch eager": [1.0], "pytorch compiled": [9.0]})
    turns.seconds = {
        ("mlx compiled", "teacher-50"): [[8.0], [16.0]], ("mlx compiled", "student-1"): [[0.1], [0.2]],
        ("pytorch eager", "teacher-50"): [[4.0], [8.0]], ("pytorch compiled", "teacher-50"): [[1.0], [1.0]],
    }  # fmt: skip
    turns.memory = {("mlx compiled", name): {} for name in ("teacher-50", "student-1")}
    samplings = [{"name": name, "solver": "ddim", "nfe": n} for name, n in (("teacher-50", 50), ("student-1", 1))]
    teacher, student = mac_report.chain(turns, samplings, count=4)
    assert teacher["quicker_than_teacher_in"]["mlx compiled"]["median"] == 1
    gains = {form: value["median"] for form, value in student["quicker_than_teacher_in"].items()}
    assert gains == pytest.approx({"mlx compiled": 80.0, "pytorch eager": 40.0})
    assert student["ms_per_image"]["median"] == pytest.approx(1e3 * 0.15 / 4)


def test_a_report_is_told_and_drawn_with_what_was_skipped_or_differs(tmp_path):
    turns = turns_of(
        {"mlx compiled": [[1.0]], "pytorch eager": [[2.0]], "pytorch compiled": [[1.0]]},
        {"mlx compiled": [1.0], "pytorch eager": [1.0], "pytorch compiled": [2.0]}, {"mlx uncompiled": "the reason"},
    )  # fmt: skip
    part = {"batch": 4, "one": "one step", "forms": mac_report.compared(turns, "step", 4)}
    links = mac_report.chain(turns, [{"name": "step", "solver": "ddim", "nfe": 50}], 4)
    network = {"parameters": 1000, "weights": "random", "training": part, "sampling": part, "chain": links}
    nothing = {**network, "chain": []}  # MLX compiled was skipped
    machine = {"chip": "a chip", "memory_gib": 8, "device": "cpu"}
    report = {"machine": machine, "networks": {"digits": network, "shapes32": nothing}}
    said = "\n".join(mac_report.lines(report))
    assert "skipped: the reason" in said and "results differ (1.0): not compared" in said
    assert "mlx compiled is 2× [2, 2] as fast" in said
    mac_report.draw(tmp_path / "bars.png", report)
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_forms_take_turns_and_the_order_turns(fake):
    job, log = fake
    steps = []
    turns = take_turns({"a": job("a"), "b": job("b")}, 3, lambda done, total, _: steps.append((done, total)))
    assert log.read_text() == "abbaab"
    assert {key: len(rounds) for key, rounds in turns.seconds.items()} == {("a", "step"): 3, ("b", "step"): 3}
    assert steps[0] == (0, 8) and steps[-1] == (8, 8)


def test_quick_actions_are_repeated_after_one_that_does_not_count(fake):
    job, log = fake
    turns = take_turns({"a": job("a", seconds=0.01)}, 1, lambda *_: None)
    assert log.read_text() == "aaaa" and turns.seconds["a", "step"] == [[0.01] * 3]


def test_who_cannot_go_on_is_left_out_with_the_reason_and_the_rest_go_on(fake):
    job, _ = fake
    jobs = {"a": job("a"), "b": job("b", dies=2), "c": job("c", skip="no backend")}
    turns = take_turns(jobs, 3, lambda *_: None)
    assert turns.skipped["c"] == "no backend"
    assert turns.skipped["b"] == "its process ended with 9: out of memory"
    assert set(turns.ready) == {"a"} and set(turns.seconds) == {("a", "step")}
    assert len(turns.seconds["a", "step"]) == 3


def test_a_contender_that_says_nothing_is_given_up(fake):
    job, _ = fake
    with pytest.raises(Gone, match=r"no answer in 0 s"):
        Process(job("a", silent=True), wait_s=0.2)


def test_without_pytorch_its_forms_are_skipped_with_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(mac_contender.Unsupported, match="make parity"):
        mac_contender.build({"form": "pytorch eager"})


def test_mlx_that_cannot_be_timed_at_all_is_a_failure_and_a_skipped_pytorch_is_not():
    def report(**forms):
        return {
            "settings": {"forms": list(forms)},
            "networks": {"digits": {part: {"forms": forms} for part in ("training", "sampling")}},
        }

    why, fine = {"skipped": "why"}, {"ms": {}}
    assert not mac.failed(report(**{"mlx compiled": fine, "pytorch eager": why}))
    assert not mac.failed(report(**{"mlx compiled": why, "mlx uncompiled": fine}))
    assert mac.failed(report(**{"mlx compiled": why, "mlx uncompiled": why}))


@pytest.mark.parametrize("option", [["--rounds", "0"], ["--steps", "0"], ["--batch", "-1"], ["--quick", "--full"]])
def test_options_that_make_no_sense_are_refused(option, capsys):
    with pytest.raises(SystemExit) as ended:
        mac.parse(option)
    assert ended.value.code == 2
    assert option[0] in capsys.readouterr().err


def test_without_a_workspace_the_network_is_the_presets(tmp_path):
    chain = mac.random_chain("digits", tmp_path / "model", steps=50)
    config = json.loads((tmp_path / "model" / "unet" / "config.json").read_text())
    assert (config["block_out_channels"], config["sample_size"], config["num_class_embeds"]) == ([16, 32], 8, 10)
    assert [entry["nfe"] for entry in chain.samplings] == [50, 8, 4, 2, 1]
    assert "random" in chain.weights
    assert mac.stored_chain(tmp_path, 50) is None


@pytest.fixture
def workspace(tmp_path):
    """A tiny teacher with a student of one step."""
    unet = UNet2D(UNet2DConfig.from_dict(UNET))
    for number, name in enumerate(("teacher", "progressive/1")):
        initialise(unet, key(number, "test"))
        write_model(tmp_path / "models" / name, unet, Cosine().to_diffusers("v_prediction"), {})
    return tmp_path


def test_all_of_it_on_a_tiny_network(workspace):
    out, picture = workspace / "reports" / "bench-mac.json", workspace / "reports" / "bench-mac.png"
    command = [
        sys.executable, str(BENCH / "mac.py"), "--quick", "--rounds", "1", "--steps", "3", "--batch", "2",
        "--forms", "mlx compiled", "mlx uncompiled", "pytorch eager",
        "--workspace", str(workspace), "--out", str(out), "--picture", str(picture),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCH.parent, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    network = report["networks"]["digits"]
    for part in ("training", "sampling"):
        forms = network[part]["forms"]
        assert forms["mlx uncompiled"]["agrees"] and forms["mlx uncompiled"]["difference"] < 1e-4
        theirs = forms["pytorch eager"]
        assert "make parity" in theirs["skipped"] if "skipped" in theirs else theirs["difference"] < 1e-4
        memory = forms["mlx compiled"]["memory"]
        assert memory["framework_mib"] > 0 and memory["process_mib"] > 0
    assert [entry["name"] for entry in network["chain"]] == ["teacher-3", "progressive-1"]
    assert network["chain"][0]["quicker_than_teacher_in"]["mlx compiled"]["median"] == 1
    assert network["chain"][1]["quicker_than_teacher_in"]["mlx compiled"]["median"] > 1
    assert str(Path.home()) not in out.read_text() and str(workspace) not in out.read_text()
    assert report["versions"]["mlx"] and report["machine"]["chip"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "mlx compiled" in done.stdout and "progressive-1" in done.stdout


def test_a_form_that_was_ready_and_had_no_turn_in_time_is_skipped_with_the_reason():
    turns = turns_of({"mlx compiled": [[1.0]]}, {"mlx compiled": [1.0], "pytorch eager": [1.0]})
    assert mac_report.compared(turns, "step", 4)["pytorch eager"] == {"skipped": mac_report.LATE}
    late = turns_of({}, {"mlx compiled": [1.0]})
    assert mac_report.compared(late, "step", 4) == {"mlx compiled": {"skipped": mac_report.LATE}}
    assert mac_report.chain(late, [{"name": "step", "solver": "ddim", "nfe": 50}], 4) == []


def test_parts_share_the_minutes_that_are_left(monkeypatch):
    now = iter([0.0, 0.0, 10.0, 60.0, 150.0])
    monkeypatch.setattr(mac.time, "monotonic", lambda: next(now))
    assert list(mac.shares(2.0, 4)) == pytest.approx([30.0, 10 + 110 / 3, 90.0, 150.0])
    monkeypatch.undo()
    assert list(mac.shares(None, 2)) == [None, None]


def test_forms_that_warm_up_at_once_compile_into_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.delenv("MLX_PTX_CACHE_DIR", raising=False)
    jobs = {"a": {}, "b": {"env": {"MORE": "1"}}}
    mac.own_kernels(jobs, tmp_path, "bench")
    folders = [job["env"]["MLX_PTX_CACHE_DIR"] for job in jobs.values()]
    assert folders == [str(tmp_path / "bench-0"), str(tmp_path / "bench-1")] and all(
        map(Path.exists, map(Path, folders))
    )
    assert jobs["b"]["env"]["MORE"] == "1"
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "kept"))
    mac.own_kernels(jobs, tmp_path, "bench")
    assert jobs["a"]["env"]["MLX_PTX_CACHE_DIR"] == str(tmp_path / "kept" / "bench-0")


def test_a_reason_names_no_folder_of_the_owner():
    text = "ImportError: libx.so, from '/Users/ada/.venv/lib/x.py' (https://pytorch.org/docs/stable)"
    assert mac_contender.without_folders(text) == (
        "ImportError: libx.so, from 'x.py' (https://pytorch.org/docs/stable)"
    )
    assert mac_contender.without_folders("0.5 images/s, 3/4 of /tmp") == "0.5 images/s, 3/4 of /tmp"
    assert mac_contender.said(OSError("no /home/ada/lib/a.so")) == "OSError: no a.so"
