"""A cost model fitted on one machine, asked about another where the same networks were measured: is the order kept?

    python bench/cost_transfer.py

Takes what was measured before and times nothing. Of two reports of bench/cost_model.py (the same 30 networks, on a CPU
and on a GPU, at another batch, size and precision) each machine's model predicts the other, as `weigh.target` would;
the CPU's also predicts the networks of a search that was weighed on the GPU. Beside each ρ stand those of what one
would do without a model: the times of the first machine as they are, operations, and the number of layers. No bar: the
report says what a prediction for a chip that nobody has measured is worth.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ado_tasks.architecture.space import Space, SpaceConfig
from ado_tasks.config import parse
from ado_tasks.fit.cost import CostModel
from ado_tasks.fit.work import Op, unet_work
from ado_tasks.hardware.capability import Capability, Precision
from ado_tasks.metrics.rank_correlation import rank_correlation
from ado_tasks.models.unet_config import UNet2DConfig

REPORTS = Path(__file__).parent / "reports"
SHAPES = {"sample_size": 32, "in_channels": 3, "out_channels": 3, "num_class_embeds": 18}  # as the dataset decides


@dataclass(frozen=True)
class Machine:
    """What a report of bench/cost_model.py holds."""

    capability: Capability
    model: CostModel
    works: list[list[Op]]
    milliseconds: list[float]  # measured, of each
    precision: Precision
    configs: list[dict[str, Any]]  # without their size

    @staticmethod
    def read(path: Path) -> "Machine":
        """Raises ArtifactError where the file holds something else."""
        plain = json.loads(path.read_text(encoding="utf-8"))
        configs = [each["config"] for each in plain["unseen"]]
        works = [unet_work(UNet2DConfig.from_dict(each), plain["settings"]["batch"]) for each in configs]
        return Machine(
            Capability.from_plain(plain["hardware"], str(path)), CostModel.from_plain(plain["model"], str(path)),
            works, [each["measured_ms"] for each in plain["unseen"]], plain["settings"]["precision"],
            [{**each, "sample_size": None} for each in configs],
        )  # fmt: skip


def judged(
    fit: Machine, there: Capability, precision: Precision, works: Sequence[list[Op]], measured: Sequence[float],
    as_they_are: Sequence[float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """How well the model of `fit` orders networks on a machine it has not seen, and how far off its figures are."""
    model = replace(fit.model, precision=precision)  # the factors are carried, whatever they were fitted in
    seconds = [model.seconds(work, there) for work in works]
    roofs = [replace(model, layer_us=0.0).seconds(work, there) for work in works]
    rivals = {"operations": [sum(op.flops for op in work) for work in works], "layers": [len(work) for work in works]}
    if as_they_are is not None:
        rivals["measured_on_the_first"] = list(as_they_are)
    ratio = 1e3 * np.array(seconds) / np.array(measured)
    found = rank_correlation(np.array(seconds), np.array(measured))
    return {
        "fitted_on": fit.capability.chip, "predicted": there.chip, "precision": precision, "n": len(works),
        "spearman": {"value": found.value, "ci": [found.low, found.high]},
        "spearman_without_a_model": {
            name: rank_correlation(np.array(each, float), np.array(measured)).value for name, each in rivals.items()
        },
        "predicted_over_measured": [float(each) for each in np.quantile(ratio, [0, 0.5, 1])],
        "share_of_layers": float(np.median(1 - np.array(roofs) / np.array(seconds))),
    }  # fmt: skip


def of_search(params: Path, report: Path) -> tuple[list[list[Op]], list[float]]:
    """The different networks of a search, and what `weigh` measured of them: milliseconds a batch, medians."""
    told = yaml.safe_load(params.read_text(encoding="utf-8"))
    batch = told["weigh"].get("batch_size", 64)
    teacher = UNet2DConfig.from_dict({**SHAPES, **told["train"]["model"]})
    space = Space.around(teacher, parse(SpaceConfig, told["probe"]["space"], "probe.space"))
    pooled: dict[tuple[Op, ...], list[float]] = {}
    for each in json.loads(report.read_text(encoding="utf-8"))["probes"]:
        config = teacher if each["name"] == "teacher" else space.candidate(tuple(each["point"]))
        work = tuple(unet_work(config, batch))
        pooled.setdefault(work, []).append(batch * each["latency_ms_per_image"]["median"])
    return [list(work) for work in pooled], [float(np.median(taken)) for taken in pooled.values()]


def said(row: dict[str, Any]) -> str:
    (low, high), (least, median, most) = row["spearman"]["ci"], row["predicted_over_measured"]
    rivals = ", ".join(f"{rival} {value:.3f}" for rival, value in row["spearman_without_a_model"].items())
    return (
        f"{row['fitted_on']} → {row['predicted']}, {row['precision']}, n = {row['n']}\n"
        f"  ρ = {row['spearman']['value']:.3f} [{low:.3f}, {high:.3f}]; without a model: {rivals}\n"
        f"  predicted/measured: median {median:.2f}, {least:.2f} to {most:.2f}; of the predicted time "
        f"{row['share_of_layers']:.0%} is c · layers"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=Path, default=REPORTS / "cost_model.json", help="report of a CPU")
    parser.add_argument("--other", type=Path, default=REPORTS / "cost_model_h200.json", help="report of a GPU")
    parser.add_argument("--params", type=Path, default=Path("params.search32.yaml"), help="of the search")
    parser.add_argument("--search", type=Path, default=REPORTS / "search_shapes32.json", help="weighed on the GPU")
    parser.add_argument("--out", type=Path, default=REPORTS / "cost_transfer.json", help="JSON report")
    arguments = parser.parse_args()
    one, other = Machine.read(arguments.one), Machine.read(arguments.other)
    if one.configs != other.configs:
        print(f"{arguments.one}, {arguments.other}: other networks; allowed: reports of one --seed and --unseen")
        return 1
    works, measured = of_search(arguments.params, arguments.search)
    rows = {
        "networks, one to other": judged(one, other.capability, other.precision, other.works, other.milliseconds,
                                         one.milliseconds),
        "networks, other to one": judged(other, one.capability, one.precision, one.works, one.milliseconds,
                                         other.milliseconds),
        "search, one to other": judged(one, other.capability, "float32", works, measured),
    }  # fmt: skip
    arguments.out.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, row in rows.items():
        print(f"{name}: {said(row)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
