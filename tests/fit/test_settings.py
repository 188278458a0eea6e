"""Settings on five recorded machines, and what must hold on any: the plan fits, less memory never means more batch."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ado_tasks import settings as command
from ado_tasks.__main__ import main
from ado_tasks.config import parse, read_params
from ado_tasks.errors import ArtifactError, ConfigError, HardwareError
from ado_tasks.fit.cost import CostModel
from ado_tasks.fit.memory import Plan, needed
from ado_tasks.fit.settings import HEADROOM, MEMORY_SIZES, choose_settings, memory_budget, smallest_memory
from ado_tasks.fit.work import KINDS, unet_work
from ado_tasks.hardware.capability import GIB, RECORDED, Capability, apple_chip, read_capability
from ado_tasks.hardware.fingerprint import this_machine
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.profile import ProfileConfig
from ado_tasks.storage import write_json
from ado_tasks.train import TrainConfig

LARGE = UNet2DConfig.from_dict(
    {
        "sample_size": 64, "block_out_channels": [128, 256, 384], "layers_per_block": 2, "attention_head_dim": 64,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    }
)  # fmt: skip
MACHINES = {path.stem: read_capability(path) for path in sorted(RECORDED.glob("*.json"))}

# precision, batch, accumulation, checkpointing, attention in training and in sampling, wired limit, shards
EXPECTED = {
    "mac-8gb": ("float32", 16, 4, True, "whole", "fused", False, 1),
    "mac-16gb": ("float32", 32, 2, True, "whole", "fused", True, 1),
    "mac-64gb": ("float32", 64, 1, False, "whole", "fused", True, 1),
    "h200": ("bfloat16", 64, 1, False, "fused", "fused", False, 1),
    "cpu": ("float32", 64, 1, True, "whole", "whole", False, 2),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_recorded_machines(name: str) -> None:
    """A U-Net of 43 million parameters at 64×64 with batches of 64, as docs/hardware.md shows it."""
    found = choose_settings(MACHINES[name], LARGE)
    assert EXPECTED[name] == (
        found.precision, found.batch, found.accumulation, found.checkpointing, found.attention_training,
        found.attention_sampling, found.wired_limit_gib is not None, found.shards,
    )  # fmt: skip
    assert found.training_gib <= found.budget_gib and found.batch * found.accumulation >= 64
    assert set(EXPECTED) == set(MACHINES)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_choice_has_a_reason_and_is_printed(name: str) -> None:
    machine = MACHINES[name]
    text = command.table(machine, choose_settings(machine, LARGE))
    for line in text.splitlines()[1:]:
        assert len(line.split()) > 3, line
    assert ("not measured" in text.splitlines()[0]) == machine.predicted


def test_less_memory_never_means_a_larger_batch() -> None:
    machine, batches = MACHINES["mac-64gb"], []
    for memory in MEMORY_SIZES:
        try:
            batches.append(choose_settings(replace(machine, memory_gib=float(memory)), LARGE).batch)
        except HardwareError:
            batches.append(0)
    assert batches == sorted(batches) and batches[0] < batches[-1] == 64


def test_an_impossible_budget_is_refused_with_the_smallest_that_would_do() -> None:
    """And that one does, while the next smaller does not."""
    tiny, size = replace(apple_chip("Apple M1"), memory_gib=1.0), (256, 256)
    with pytest.raises(HardwareError, match=r"batch of 1 needs [\d.]+ GiB, .* would do: (\d+) GiB") as refusal:
        choose_settings(tiny, LARGE, size=size)
    enough = int(str(refusal.value).rsplit(": ", 1)[1].split()[0])
    assert choose_settings(replace(tiny, memory_gib=float(enough)), LARGE, size=size).batch == 1
    smaller = MEMORY_SIZES[MEMORY_SIZES.index(enough) - 1] if enough > MEMORY_SIZES[0] else 2
    with pytest.raises(HardwareError):
        choose_settings(replace(tiny, memory_gib=float(smaller)), LARGE, size=size)
    assert smallest_memory(tiny, 1e18) is None


def test_what_is_asked_for_is_taken_or_refused() -> None:
    machine = MACHINES["mac-64gb"]
    asked = {"precision": "bfloat16", "batch": 8, "checkpointing": True, "compile": False, "cache_limit_gib": 1.5}
    found = choose_settings(machine, LARGE, overrides=asked)
    assert {name: getattr(found, name) for name in asked} == asked
    assert found.accumulation == 8 and found.reasons["precision"] == "as asked for"
    with pytest.raises(HardwareError, match="batch of 4096 needs"):
        choose_settings(machine, LARGE, overrides={"batch": 4096})
    for overrides, said in (
        ({"colour": 1}, "settings.colour: unknown key; allowed here: precision"),
        ({"precision": "int8"}, "settings.precision: 'int8'; allowed: float32"),
        ({"batch": 0}, "settings.batch: 0; allowed: a whole number from 1"),
        ({"compile": "yes"}, "settings.compile: 'yes'; allowed: true or false"),
    ):
        with pytest.raises(ConfigError, match=said):
            choose_settings(machine, LARGE, overrides=overrides)


def test_a_half_is_taken_only_where_it_gains() -> None:
    def with_peaks(**peaks: float) -> str:
        return choose_settings(Capability("x", "cuda", 80, False, peaks, 1000.0), LARGE).precision

    assert with_peaks(float32=100, bfloat16=120, float16=125) == "float32"
    assert with_peaks(float32=100, bfloat16=200, float16=210) == "bfloat16"
    assert with_peaks(float32=100, bfloat16=20, float16=200) == "float16"


def test_budgets() -> None:
    assert memory_budget(MACHINES["mac-16gb"]) == pytest.approx(HEADROOM * 16 * 2 / 3)
    assert memory_budget(MACHINES["mac-64gb"]) == pytest.approx(HEADROOM * 48)
    assert memory_budget(replace(MACHINES["mac-64gb"], usable_gib=40.0)) == pytest.approx(HEADROOM * 40)
    with pytest.raises(HardwareError, match="memory_gib of x: 0"):
        memory_budget(Capability("x", "cuda", 0, False, {}, 1.0))


def test_memory_counts_what_it_should() -> None:
    """Linear in the batch but for the weights; no scores in a fused form; less kept with checkpointing."""
    plan = Plan("metal", "float32", "whole", "fused", checkpointing=False)
    one, two, three = (needed(unet_work(LARGE, batch), plan).training for batch in (8, 9, 10))
    assert three - two == pytest.approx(two - one, rel=1e-6)
    fused = needed(unet_work(LARGE, 8), replace(plan, attention_training="fused")).training
    blocks = needed(unet_work(LARGE, 8, (128, 128)), replace(plan, attention_training="chunked")).training
    scores = 4 * sum(op.scores for op in unet_work(LARGE, 8))
    assert needed(unet_work(LARGE, 8), plan).training - fused > scores
    assert blocks < needed(unet_work(LARGE, 8, (128, 128)), plan).training / 2
    assert needed(unet_work(LARGE, 8), replace(plan, checkpointing=True)).training < 0.6 * fused


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    params = tmp_path / "params.yaml"
    kinds = "down_block_types: [DownBlock2D, DownBlock2D], up_block_types: [UpBlock2D, UpBlock2D]"
    params.write_text(f"train: {{model: {{block_out_channels: [16, 32], norm_num_groups: 8, {kinds}}}}}")
    given = ["--params", str(params), "--chip", "Apple M2", "--memory", "16"]
    assert command.main([*given, "--size", "16", "--set", "batch=8"]) == 0
    said = capsys.readouterr().out
    assert "Apple M2, 16 GiB, metal (published figures, not measured)" in said and "as asked for" in said
    cost = CostModel("float32", dict.fromkeys(KINDS, 2.0), 10.0, 9, 0.1, 0.3, "a" * 16)
    write_json(tmp_path / "cost.json", {"model": cost.as_plain()})
    assert command.main([*given, "--size", "16", "--cost", str(tmp_path / "cost.json"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["pass"]
    assert told["predicted"] and told["error"].startswith("not measured on Apple M2") and told["milliseconds"] > 0
    with pytest.raises(ConfigError, match="--size: none"):
        command.main(given)
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        command.main([*given, "--size", "16", "--set", "batch"])
    with pytest.raises(HardwareError, match=r"not measured yet; allowed: .ado profile"):
        command.main(["--params", str(params), "--size", "16", "--hardware", str(tmp_path / "none.json")])
    assert GIB == 2**30


def test_another_json_file_is_no_machine_and_no_cost_model(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    """A fingerprint by `profile` has a device too; what is said names its keys, not Python's arguments."""
    (tmp_path / "params.yaml").write_text("train: {model: {sample_size: 8}}\n", encoding="utf-8")
    other, cost = tmp_path / "profile.json", tmp_path / "cost.json"
    write_json(other, this_machine().as_plain())
    write_json(cost, {"model": {"precision": "float32", "colour": "red"}})
    given = ["settings", "--params", str(tmp_path / "params.yaml")]
    for options, file, key in (
        (["--hardware", str(other)], f"{other}: not what `ado profile --measured` writes", f"{other}.system"),
        (["--chip", "Apple M2", "--cost", str(cost)], f"{cost}: model: not what `bench/", f"{cost}: model.colour"),
    ):
        assert main([*given, *options]) == ArtifactError.exit_code
        said = capsys.readouterr().err
        assert file in said and f"{key}: unknown key" in said and "__init__" not in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", "0"], "--batch: 0"),
        (["--batch", "-3"], "--batch: -3"),
        (["--size", "0"], "--size: 0"),
        (["--size", "-8"], "--size: -8"),
        (["--size", "7"], "--size: 7 is not allowed: a multiple of 8 for this network"),
        (["--memory", "0"], "--memory: 0"),
        (["--hardware", "there.json"], "two machines"),
        (["--set", "wired_limit_gib=foo"], "settings.wired_limit_gib: 'foo'"),
        (["--set", "cache_limit_gib=-1"], "settings.cache_limit_gib: -1"),
        (["--set", "cache_limit_gib=NaN"], "settings.cache_limit_gib: nan"),
    ],
)
def test_numbers_that_mean_nothing_are_named(tmp_path, arguments: list[str], said: str) -> None:
    (tmp_path / "params.yaml").write_text("train: {model: {sample_size: 8}}\n")
    with pytest.raises(ConfigError, match=said):
        command.main(["--chip", "Apple M2", "--params", str(tmp_path / "params.yaml"), *arguments])


def test_memory_is_of_a_chip_that_is_named() -> None:
    with pytest.raises(ConfigError, match="without --chip"):
        command.main(["--memory", "16"])


def test_what_is_decided_is_written_where_tasks_read_it(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    """And nothing else changes; a second time nothing does."""
    before = (Path(__file__).parents[2] / "params.yaml").read_text()
    params = tmp_path / "params.yaml"
    params.write_text(before)
    mac = ["--chip", "Apple M2", "--memory", "16", "--size", "8", "--write", str(params)]
    assert command.main([*mac, "--set", "batch=24", "--set", "precision=bfloat16"]) == 0
    assert "train.accumulate = 3, train.shards = 1, hardware.wired_limit_gib" in capsys.readouterr().out
    written = read_params(params)
    train = parse(TrainConfig, written["train"], "train")
    assert (train.batch_size, train.accumulate, train.precision, train.checkpointing) == (64, 3, "bfloat16", False)
    limits = parse(ProfileConfig, written["hardware"], "hardware")
    assert limits.wired_limit_gib and limits.cache_limit_gib and limits.target == "auto"
    text = params.read_text()
    assert all(line.strip() in text for line in before.splitlines())
    command.main([*mac, "--set", "batch=24", "--set", "precision=bfloat16"])
    assert params.read_text() == text
    write_json(tmp_path / "cpu.json", MACHINES["cpu"].as_plain())
    command.main(["--hardware", str(tmp_path / "cpu.json"), "--size", "8", "--write", str(params)])
    again = read_params(params)
    assert set(again["hardware"]) == {"target"} and again["train"]["precision"] == "float32"
    assert again["train"]["accumulate"] == 1 and again["train"]["shards"] == 2
