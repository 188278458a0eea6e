"""Task `distill`: students that need ever fewer steps, each taught by the one before."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ado_tasks.distillation.consistency import tune
from ado_tasks.distillation.guided import fold
from ado_tasks.distillation.progressive import teach
from ado_tasks.errors import ConfigError
from ado_tasks.optimise.consistency import ConsistencyConfig
from ado_tasks.optimise.distill_config import DistillConfig
from ado_tasks.optimise.guided import GuidedConfig
from ado_tasks.report import SILENT, Reporter


@dataclass(frozen=True)
class DistillResult:
    """What came out."""

    students: tuple[int, ...]  # steps of each
    final_loss: dict[int, float]  # mean of the last steps of each stage
    guided_loss: float | None = None  # with `guided`, whose folders are of weights, not of steps


def distill(
    config: DistillConfig | ConsistencyConfig | GuidedConfig,
    *,
    teacher: Path,
    dataset: Path,
    out: Path,
    scratch: Path,
    seed: int,
    start: Path | None = None,
    features: Path | None = None,
    anchor: Path | None = None,
    report: Reporter = SILENT,
) -> DistillResult:
    """Make students of a teacher that need few steps, one Diffusers folder each. `method` says how.

    `consistency`: tuning to consistency, Geng et al. 2024 (see distillation/consistency.py). `guided`: classifier-free
    guidance folded into one network, Meng et al. 2023: as many steps as before, half the evaluations, one folder for
    each guidance weight, from which few steps are taught next (see distillation/guided.py). Where nothing is said,
    `progressive`: Salimans & Ho 2022, algorithm 2. Where `matching` says so, a student's samples are then brought to
    the first teacher's distribution (Yin et al. 2024), and it is that student which teaches the next. With
    `stop: inferior` the chain ends at the first student that is not as good as the teacher on the selection part;
    `out/index.json` then says where and why (see distillation/stopping.py).

    Args:
        config: see DistillConfig, ConsistencyConfig and GuidedConfig.
        teacher: a Diffusers folder. An `epsilon` network is refused: as α → 0 its x̂ is noise divided by zero; and so
            is a student of few steps, but for `progressive` without matching that goes on from the student's own steps
            (`teacher_steps`).
        dataset: folder made by `prepare`; the train part is used.
        out: folder of the family; `out/<steps>/` is a student. It appears whole or not at all.
        scratch: checkpoints, of the step and of finished stages.
        seed: of the order of images, intervals and noises.
        start: a Diffusers folder to begin with in the teacher's place. With `consistency` such as a student's; with
            `progressive` a network of another architecture, such as what a search chose: the teacher teaches that.
        features: with `stop: inferior`, folder made by `features`; otherwise not read.
        anchor: with `stop: inferior`, folder made by `anchor` of this teacher: the margin; otherwise not read.
        report: where progress and losses go.

    Raises:
        ConfigError: the teacher predicts ε or is a student of few steps, the dataset has other sizes or more classes
            than it, `start` is given to another method, or `features` or `anchor` is missing where the chain is to stop
            itself.
        ArtifactError: the teacher or the dataset is damaged.
        DivergenceError: a loss is not finite.
    """
    given: dict[str, Any] = {
        "teacher": teacher, "dataset": dataset, "out": out, "scratch": scratch, "seed": seed, "report": report
    }  # fmt: skip
    if isinstance(config, ConsistencyConfig):
        curve = tune(config, start=start, **given)
        return DistillResult(config.student_steps, dict.fromkeys(config.student_steps, curve[-1][1]))
    if isinstance(config, GuidedConfig):
        if start is not None:
            raise ConfigError(f"--start {start}: a guided student begins as its teacher; allowed: the other methods")
        return DistillResult((), {}, fold(config, **given)[-1][1])
    losses = teach(config, start=start, features=features, anchor=anchor, **given)
    return DistillResult(tuple(losses), losses)
