"""Does the search find what enumeration finds, in at most 40 % of its evaluations?

The space is small enough to be tuned whole: 30 networks around a teacher of the digits, each inherited, tuned by the
race's rungs and timed. `--table` makes that table (minutes; goes on where it stopped) and keeps it in
bench/reports/search_small_space.json. Without it the search is played on the table, with several seeds, in seconds.

    python bench/search_small_space.py --table --dataset data/digits --jobs 2
    python bench/search_small_space.py
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from ado_tasks import rng
from ado_tasks.architecture.choice import Measured, Policy, choose
from ado_tasks.architecture.cost import multiply_adds
from ado_tasks.architecture.importance import Importance, measure_importance
from ado_tasks.architecture.inherit import inherit
from ado_tasks.architecture.propose import Tried, can_win, propose
from ado_tasks.architecture.race import survivors
from ado_tasks.architecture.space import Point, Space, SpaceConfig
from ado_tasks.architecture.tuning import Lesson, TuneConfig, denoising_loss, gradient_batches, tune
from ado_tasks.backend import mx
from ado_tasks.datasets.shards import Dataset, open_dataset
from ado_tasks.diffusion.schedules import schedule_from_diffusers
from ado_tasks.hardware.latency import interleaved
from ado_tasks.interop.diffusers_folder import StoredModel, read_model
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.optimise.checkpoints import Checkpoints
from ado_tasks.report import SILENT
from ado_tasks.storage import read_json, write_json
from ado_tasks.train import TrainConfig, train

TABLE = Path("bench/reports/search_small_space.json")
TEACHER: dict[str, Any] = {
    "block_out_channels": [16, 32], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "layers_per_block": 2, "norm_num_groups": 8,
    "attention_head_dim": 8,
}  # fmt: skip
SPACE = SpaceConfig(
    channels=((8, 16), (16, 24, 32)), layers_per_block=(1, 2), middle=("none", "plain", "attention"),
)  # fmt: skip
RUNGS = (25, 50, 150)  # steps in each
TUNE = TuneConfig(batch_size=32, shards=1)  # several candidates are tuned at a time
TRAIN_STEPS, BATCH, ROUNDS = 800, 64, 15
LIMITS = (0.2, 0.35, 0.5, 0.75, 1.0)  # quality losses: the search is played for each, where one candidate is within it
SEEDS, SHARE = 10, 0.4


def make_table(dataset: Path, work: Path, seconds: float, jobs: int) -> bool:
    """Train the teacher, tune every candidate, and time them all in turn. False where the time was over before."""
    deadline_s = time.time() + seconds
    if not (work / "teacher").exists():
        settings = TrainConfig(model=TEACHER, steps=TRAIN_STEPS, learning_rate=5e-3, warmup_steps=50, ema_decay=0.99)
        train(settings, dataset=dataset, out=work / "teacher", scratch=work / "scratch", seed=0)
    space = Space.around(read_model(work / "teacher").unet.config, SPACE)
    points = list(space.points())
    absent = [number for number in range(len(points)) if not (work / f"{number}.json").exists()]
    # Processes of their own, started anew: MLX's threads do not outlive a fork.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        done = list(pool.map(tune_one, absent, repeat(dataset), repeat(work), repeat(deadline_s)))
    if not all(done):
        return False
    rows = [read_json(work / f"{number}.json") for number in range(len(points))]
    latency_ms = time_all(space, open_dataset(dataset).shape)
    rows = [row | {"latency_ms": latency_ms[tuple(row["point"])]} for row in rows]
    write_json(TABLE, {"teacher": space.teacher.to_dict(), "rungs": list(RUNGS), "rows": rows})
    return True


def tune_one(number: int, dataset: Path, work: Path, deadline_s: float) -> bool:
    """Tune the candidate of this number through all rungs, on one thread. False where the time is over already."""
    if time.time() > deadline_s:
        return False
    began = time.perf_counter()
    data, stored, found = ground(dataset, work)
    space = Space.around(stored.unet.config, SPACE)
    point = list(space.points())[number]
    got = inherit(stored.unet, space.candidate(point), found)
    lesson = lesson_of(stored, got.kept)
    quality = [lesson.quality_loss(got.unet, data.split("selection"))]
    for rung, steps in enumerate(RUNGS):
        checkpoints = Checkpoints.under(work / "scratch", f"{number}-{rung}")
        tune(lesson, got.unet, data.split("train"), sum(RUNGS[:rung]), steps, checkpoints, SILENT)
        quality.append(lesson.quality_loss(got.unet, data.split("selection")))
    write_json(work / f"{number}.json", {"point": list(point), "quality_loss": quality})
    print(f"{number}: {point} {quality} {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return True


@cache
def ground(dataset: Path, work: Path) -> tuple[Dataset, StoredModel, Importance]:
    """What all candidates share, once a process: data, teacher, and what matters in it."""
    data, stored = open_dataset(dataset), read_model(work / "teacher")
    lesson = lesson_of(stored, {})
    batches = gradient_batches(lesson, data.split("train"), 16, 16)
    return data, stored, measure_importance(stored.unet, denoising_loss(lesson), batches)


def lesson_of(stored: StoredModel, kept: Any) -> Lesson:
    return Lesson(TUNE, stored.unet, kept, schedule_from_diffusers(stored.scheduler_config), "v_prediction", 0)


def time_all(space: Space, shape: tuple[int, int, int]) -> dict[Point, float]:
    """Milliseconds an image of one evaluation of each network, median of rounds in turn. Weights do not matter."""
    given = [mx.zeros((BATCH, *shape)), mx.full((BATCH,), 500.0), mx.zeros(BATCH, mx.int32)]

    def action(point: Point) -> Callable[[], None]:
        compiled = mx.compile(UNet2D(space.candidate(point)))
        return lambda: mx.eval(compiled(*given))

    points = {str(point): point for point in space.points()}
    seconds = interleaved({name: action(point) for name, point in points.items()}, ROUNDS)
    return {points[name]: float(np.median(taken)) * 1e3 / BATCH for name, taken in seconds.items()}


def synthetic_table() -> dict[str, Any]:
    """A table with the structure of a tuned one, for where none was made: a loss a cut, with noise, and its cost.

    Each cut multiplies what the network lacks, so that loss falls with size by and large, not pair by pair: noise of
    25 % turns some pairs round. Cost is multiply-adds.
    """
    defaults: dict[str, Any] = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "num_class_embeds": 10}
    network = UNet2DConfig.from_dict(defaults | TEACHER)
    space = Space.around(network, SPACE)
    rows = []
    for point in space.points():
        value = space.values(point)
        narrow = (16 / value["channels.0"]) ** 1.2 * (32 / value["channels.1"])
        lacks = narrow * (2 / value["layers_per_block"]) ** 0.8
        lacks *= {"none": 1.6, "plain": 1.25, "attention": 1.0}[value["middle"]]
        noise = rng.generator(0, "synthetic", *point).standard_normal()
        loss = 0.12 * lacks * float(np.exp(0.25 * noise))
        cost = multiply_adds(space.candidate(point), 8, 8) / 1e6
        rows.append({"point": list(point), "quality_loss": [9 * loss, 4 * loss, 2 * loss, loss], "latency_ms": cost})
    return {"teacher": network.to_dict(), "rungs": list(RUNGS), "rows": rows}


def play(limit: float, table: dict[str, Any]) -> dict[str, Any] | None:
    """The search on the table under one limit: how often the optimum is found, and for how much."""
    space = Space.around(UNet2DConfig.from_dict(table["teacher"]), SPACE)
    rows = {tuple(row["point"]): row for row in table["rows"]}
    cost = {point: row["latency_ms"] for point, row in rows.items()}
    policy = Policy(max_quality_loss=limit)

    def at(point: Point, rung: int = -1) -> Measured:
        return Measured(str(point), rows[point]["quality_loss"][rung], cost[point])

    best = choose([at(point) for point in rows], policy)
    if best is None:
        return None
    budget = int(SHARE * len(rows))
    figures: dict[str, Any] = {"limit": limit, "optimum": best.name, "within": sum(
        choose([at(point)], policy) is not None for point in rows)}  # fmt: skip
    for name, player in (("optuna", proposed), ("random", at_random), ("bounds", bounded)):
        spent = [player(space, list(rows), cost, at, policy, best.name, seed) for seed in range(SEEDS)]
        figures[name] = {"found": sum(each <= budget for each in spent), "evaluations": spent}
    figures["race"] = raced(list(rows), at, best.name, table["rungs"], policy)
    return figures


def proposed(space: Space, points: Any, cost: Any, at: Any, policy: Policy, best: str, seed: int) -> int:
    """Evaluations until the search has the optimum, one proposal at a time; all, where that is beyond the bar."""
    tried: list[Tried] = []
    while not any(each.measured.name == best for each in tried):
        (point,) = propose(space, points, cost, tried, policy, 1, seed) or [None]
        if point is None or len(tried) >= SHARE * len(points):  # not found in time
            return len(points)
        tried.append(Tried(point, at(point)))
    return len(tried)


def at_random(space: Space, points: Any, cost: Any, at: Any, policy: Policy, best: str, seed: int) -> int:
    """The same for points in a random order."""
    order = rng.generator(seed, "random").permutation(len(points))
    return 1 + [str(points[place]) for place in order].index(best)


def bounded(space: Space, points: Any, cost: Any, at: Any, policy: Policy, best: str, seed: int) -> int:
    """The same for a random order that leaves out what cannot win."""
    tried: list[Tried] = []
    for place in rng.generator(seed, "random").permutation(len(points)):
        if can_win(points[place], cost, tried, policy):
            tried.append(Tried(points[place], at(points[place])))
            if tried[-1].measured.name == best:
                return len(tried)
    return len(points)


def raced(points: Any, at: Any, best: str, rungs: list[int], policy: Policy) -> dict[str, Any]:
    """All of the space in the lowest rung, the survivors of half and of a quarter above: its cost, and its choice."""
    going = [at(point, 1) for point in points]
    spent = len(going) * rungs[0]
    for rung, share in ((2, 3), (3, 6)):
        names = {each.name for each in survivors(going, len(points) // share)}
        going = [at(point, rung) for point in points if str(point) in names]
        spent += len(going) * rungs[rung - 1]
    chosen = choose(going, policy)
    return {"found": chosen is not None and chosen.name == best, "share_of_steps": spent / (len(points) * sum(rungs))}


def main() -> int:
    """Make the table, or play on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="tune every candidate of the space anew")
    parser.add_argument("--synthetic", action="store_true", help="play on a synthetic table")
    parser.add_argument("--dataset", type=Path, default=Path("data/digits"), help="folder made by `prepare`")
    parser.add_argument("--work", type=Path, default=Path(".ado/search_small_space"), help="where the table grows")
    parser.add_argument("--seconds", type=float, default=1e9, help="tune no further candidate after this long")
    parser.add_argument("--jobs", type=int, default=1, help="candidates tuned at a time, each on one thread")
    options = parser.parse_args()
    if options.table and not make_table(options.dataset, options.work, options.seconds, options.jobs):
        print("the time is over; the same command goes on", file=sys.stderr)
        return 2
    if options.synthetic or not TABLE.exists():
        print("a synthetic table: no candidate of it was tuned")
    made = synthetic_table() if options.synthetic or not TABLE.exists() else None
    table = made or read_json(TABLE, "teacher", "rows", "rungs")
    met = True
    for figures in filter(None, (play(limit, table) for limit in LIMITS)):
        count, optuna = len(table["rows"]), figures["optuna"]
        met &= optuna["found"] >= 9
        print(
            f"limit {figures['limit']}: {figures['within']} of {count} within, optimum {figures['optimum']}\n"
            f"  found in <= {SHARE:.0%} of {count} evaluations: optuna {optuna['found']}/10, "
            f"bounds alone {figures['bounds']['found']}/10, random {figures['random']['found']}/10\n"
            f"  evaluations of optuna: {optuna['evaluations']}; race: {figures['race']}"
        )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
