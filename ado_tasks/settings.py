"""`ado settings`: what to run a network with on a machine, and why."""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from ado_tasks.config import read_params, section
from ado_tasks.errors import ConfigError, HardwareError
from ado_tasks.fit.cost import CostModel, predict
from ado_tasks.fit.settings import OVERRIDES, Settings, choose_settings
from ado_tasks.fit.work import unet_work
from ado_tasks.hardware.capability import Capability, apple_chip, apple_chips, read_capability
from ado_tasks.hardware.fingerprint import this_machine
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.storage import read_json, write_text

WANTED_BATCH = 64
MOST_SHARDS = 16  # as TrainConfig
MEASURED = Path(".ado/hardware")  # where `ado profile --measured` is told to keep machines


def main(arguments: Sequence[str]) -> int:
    """Print the settings, each with its reason; as JSON with --json."""
    options = _parser().parse_args(arguments)
    _check_numbers(options)
    machine = _machine(options)
    options.params = options.write or options.params
    config = _network(options)
    _check_size(options.size, config)
    model = _cost_model(options.cost)
    overrides = dict(_override(text) for text in options.set)
    size = (options.size, options.size) if options.size else None
    batch = options.batch or (wanted_batch(options.write) if options.write else WANTED_BATCH)
    found = choose_settings(machine, config, wanted_batch=batch, size=size, overrides=overrides)
    plain, text = asdict(found), table(machine, found)
    if model is not None:
        of_pass = predict(model, unet_work(config, found.batch, size), machine)
        plain["pass"] = asdict(of_pass)
        text += f"\n  {'pass_ms':<19} {of_pass.milliseconds:<9.1f} predicted for {found.batch} images; {of_pass.error}"
    if options.write:
        text += f"\n{options.write}: {write(options.write, found, batch)}"
    print(json.dumps(plain, indent=2, ensure_ascii=False) if options.json else text)
    return 0


def wanted_batch(params: Path) -> int:
    """The batch size of a params file."""
    return int(section(read_params(params), "train", str(params)).get("batch_size", WANTED_BATCH))


def write(path: Path, found: Settings, batch: int) -> str:
    """Put the settings into a params file, where tasks obey them; its comments stay. Returns what was written.

    A limit that is to be left alone is taken out of the file.
    """
    keys = {
        "train": {
            "batch_size": batch, "precision": found.precision, "checkpointing": found.checkpointing,
            "accumulate": found.accumulation, "shards": min(found.shards, MOST_SHARDS),
        },
        "hardware": {"wired_limit_gib": found.wired_limit_gib, "cache_limit_gib": found.cache_limit_gib},
    }  # fmt: skip
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 4096
    params = yaml.load(path.read_text(encoding="utf-8"))
    said = []
    for name, values in keys.items():
        for key, value in values.items():
            if value is not None:
                params.setdefault(name, {})[key] = value
                said.append(f"{name}.{key} = {json.dumps(value)}")
            elif name in params:
                params[name].pop(key, None)
    text = io.StringIO()
    yaml.dump(params, text)
    write_text(path, text.getvalue())
    return ", ".join(said)


def table(machine: Capability, found: Settings) -> str:
    """One line a setting: name, value, reason."""
    marked = " (published figures, not measured)" if machine.predicted else ""
    lines = [f"{machine.chip}, {machine.memory_gib:g} GiB, {machine.device}{marked}"]
    plain = asdict(found)
    reasons = {"accumulation": "steps that make up the batch asked for", **found.reasons}
    reasons["attention_training"] = reasons["attention_sampling"] = reasons.pop("attention", "")
    reasons |= {"budget_gib": "to plan with", "training_gib": "predicted peak", "sampling_gib": "predicted peak"}
    for name, value in plain.items():
        if name != "reasons":
            shown = "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
            lines.append(f"  {name:<19} {shown:<9} {reasons.get(name, '')}".rstrip())
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ado settings", description=__doc__)
    parser.add_argument(
        "--model", type=Path, help="Diffusers folder of the network (default: the params file's train.model)"
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="params file (default: %(default)s)")
    parser.add_argument("--size", type=int, help="height and width in pixels (default: the network's own)")
    parser.add_argument(
        "--batch",
        type=int,
        help=f"images an optimiser step is to see (default: {WANTED_BATCH}; with --write the file's)",
    )
    parser.add_argument("--hardware", type=Path, help=f"hardware.json (default: this machine's in {MEASURED})")
    parser.add_argument("--chip", help=f"a chip by its published figures instead: {', '.join(apple_chips())}")
    parser.add_argument("--memory", type=int, help="of that chip, in GB (default: the least it is sold with)")
    parser.add_argument("--cost", type=Path, help="report of bench/cost_model.py: predict the time of a pass as well")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help=f"override: {', '.join(OVERRIDES)}"
    )
    parser.add_argument(
        "--write", type=Path, metavar="PARAMS", help="write them into the sections train and hardware of a params file"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _check_numbers(options: argparse.Namespace) -> None:
    """Raises ConfigError: a number under 1, or a machine given twice over."""
    for name in ("size", "batch", "memory"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: {value} is not allowed: a whole number from 1")
    if options.memory is not None and options.chip is None:
        raise ConfigError(f"--memory: {options.memory} without --chip; allowed: the memory of a chip named by --chip")
    if options.chip is not None and options.hardware is not None:
        raise ConfigError(f"--chip {options.chip}, --hardware {options.hardware}: two machines; allowed: one of them")


def _check_size(size: int | None, config: UNet2DConfig) -> None:
    """Raises ConfigError: each level of the network but the last halves the image, and one in between is odd."""
    if size is not None and size % config.size_multiple:
        raise ConfigError(f"--size: {size} is not allowed: a multiple of {config.size_multiple} for this network")


def _cost_model(path: Path | None) -> CostModel | None:
    return None if path is None else CostModel.from_plain(read_json(path, "model")["model"], f"{path}: model")


def _machine(options: argparse.Namespace) -> Capability:
    if options.chip is not None:
        return apple_chip(options.chip, options.memory)
    path = options.hardware or MEASURED / this_machine().identity / "hardware.json"
    if not path.exists():
        raise HardwareError(
            f"{path}: not measured yet; allowed: `ado profile --section hardware --out reports/profile.json "
            f"--measured {MEASURED}` first, or --chip, or --hardware"
        )
    return read_capability(path)


def _network(options: argparse.Namespace) -> UNet2DConfig:
    if options.model:
        return UNet2DConfig.from_dict(read_json(options.model / "unet" / "config.json"), str(options.model))
    values = dict(section(read_params(options.params), "train.model", str(options.params)))
    if options.size is None and "sample_size" not in values:
        raise ConfigError(f"--size: none, and {options.params} train.model has no sample_size; allowed: pixels a side")
    return UNet2DConfig.from_dict(values, f"{options.params}: train.model")


def _override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: allowed: KEY=VALUE with a key of {', '.join(OVERRIDES)}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
