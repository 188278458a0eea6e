"""How often the gate errs: simulated trials with fresh draws from mixtures fitted to stored features.

    python bench/gate_power.py [--trials 2000] [--json OUT] [--picture docs/images/gate_power.png]
    python bench/gate_power.py --recorded OUT --picture PNG      (draws what --json wrote; asks nothing anew)
    python bench/gate_power.py --store WORKSPACE      (renews bench/gate_features.npz from the outputs of a `make demo`)

The features are whitened ones of the digits demo: of real images, of a champion's samples (progressive-4), of a worse
model's (the teacher at 4 steps, same noise). Gaussian mixtures are fitted to the first two; challengers are the
champion's mixture moved towards the worse model's until their true KID is a given share of the margin worse. Every
trial draws challenger, champion and reference anew, at the demo's sizes, and asks the gate itself. Bars:
upper 95 % Clopper-Pearson bound of approvals at exactly the margin <= 6 %; approvals at no difference >= 80 %.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a process a core: threads inside would only wait for each other

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import root_scalar

from ado_tasks.gate import GatePolicy, gate
from ado_tasks.metrics import simulation
from ado_tasks.metrics.interval import Interval, proportion_interval
from ado_tasks.metrics.noninferiority import kid_difference
from ado_tasks.metrics.simulation import Mixture, Pair, true_kid
from ado_tasks.pictures import plain_axes, save_figure
from ado_tasks.storage import read_json

STORED = Path(__file__).with_name("gate_features.npz")
COMPONENTS = 5  # of a mixture: 48 dimensions and 1,797 images carry no more full covariances
SEED = 31
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)  # of the margin, that a challenger is worse
BARS = (0.0, 1.0)  # shares that have one; the others draw the curve, with a fifth of the trials
BOUND_BAR, POWER_BAR = 0.06, 0.80  # most approvals of one worse by the margin; least of one that is as good
DRIFT, GENERATIONS, CHAINS = 0.5, 12, 100  # each promotion loses half a margin; how long does it go on?
IDENTICAL = "the same noise"  # without a difference the two are then one model, which the gate refuses by its bytes
PAIRS = {IDENTICAL: simulation.same_noise, "independent noise": simulation.independent}


@dataclass(frozen=True)
class World:
    """What the trials draw from."""

    real: Mixture
    champion: Mixture
    worse: np.ndarray  # (d,): the way from the champion's mean to the worse model's
    margin: float
    n: int  # samples a model
    m: int  # of the reference

    @staticmethod
    def stored(path: Path = STORED) -> "World":
        """Fitted to the stored features."""
        with np.load(path) as file:
            real, champion, worse = (file[name].astype(np.float64) for name in ("real", "champion", "worse"))
            margin, m = float(file["margin"]), int(file["m"])
        mixture = Mixture.fitted(champion, COMPONENTS, SEED)
        return World(
            Mixture.fitted(real, COMPONENTS, SEED), mixture, worse.mean(axis=0) - champion.mean(axis=0), margin,
            len(champion), m,
        )  # fmt: skip

    @cached_property
    def _base(self) -> float:
        return true_kid(self.champion, self.real)

    def challenger(self, share: float) -> Mixture:
        """The champion moved until its true KID is `share` margins worse."""
        if share == 0:
            return self.champion

        def missing(scale: float) -> float:
            return true_kid(self.champion.moved(scale * self.worse), self.real) - self._base - share * self.margin

        best = min(np.linspace(-3, 0, 61), key=missing)  # KID is a parabola of the scale
        if missing(best) > 0:
            raise ValueError(f"no challenger on this way is {share} margins worse than the champion")
        return self.champion.moved(root_scalar(missing, bracket=(best, 50)).root * self.worse)


def plain(interval: Interval) -> dict[str, Any]:
    """As a report holds it."""
    return {"value": interval.value, "ci": [interval.low, interval.high]}


def approved(margin: float, champion: Interval, anchor: Interval) -> bool:
    """What the gate says where everything but quality is fine."""
    quality = {"recall": 1.0, "class_accuracy": 1.0, "memorisation": {"low": 1.0}}
    cost = {
        "speedup_vs_teacher": {"min": 10.0, "median": 10.0}, "latency_ms_per_image": {"median": 1.0},
        "peak_memory_mb": 1.0,
    }  # fmt: skip
    challenger = {
        "name": "simulated", "model_sha256": "1", "quality": quality, "teacher": quality, "margin": margin,
        "cost": cost, "hardware": "one", "against": {"champion": plain(champion), "anchor": plain(anchor)},
    }  # fmt: skip
    return gate(challenger, {"version": "1", "model_sha256": "2"}, GatePolicy()).approved


def approvals(world: World, share: float, noise: str, trials: int) -> int:
    """In how many trials a challenger that much worse is approved; the champion is the anchor too."""
    rng = np.random.default_rng([SEED, round(100 * share), len(noise)])
    challenger = world.challenger(share)
    count = 0
    for _ in range(trials):
        drawn: Pair = PAIRS[noise](challenger, world.champion, world.n, rng)
        interval = kid_difference(*drawn, world.real.draw(world.m, rng))
        count += approved(world.margin, interval, interval)
    return count


def drifts(world: World, anchored: bool, chains: int) -> list[float]:
    """Margins lost by chains of promotions of which each loses DRIFT, until the gate refuses (or GENERATIONS)."""
    rng = np.random.default_rng([SEED, int(anchored)])
    models = [world.challenger(DRIFT * generation) for generation in range(GENERATIONS + 1)]
    return [_chain(world, models, anchored, rng) for _ in range(chains)]


def _chain(world: World, models: list[Mixture], anchored: bool, rng: np.random.Generator) -> float:
    for generation in range(1, GENERATIONS + 1):
        noise = models[0].noise(world.n, rng)
        challenger, champion, anchor = (models[index].push(*noise) for index in (generation, generation - 1, 0))
        real = world.real.draw(world.m, rng)
        beside_champion = kid_difference(challenger, champion, real)
        beside_anchor = kid_difference(challenger, anchor, real) if anchored else beside_champion
        if not approved(world.margin, beside_champion, beside_anchor):
            return DRIFT * (generation - 1)
    return DRIFT * GENERATIONS


def store(workspace: Path) -> None:
    """Write gate_features.npz from the outputs of a run."""
    from ado_tasks.registry.contest import FeaturesOf
    from ado_tasks.registry.workspace import Workspace

    place = Workspace(workspace)
    features = FeaturesOf(place)
    everything = np.concatenate([features.of_part(name) for name in ("train", "selection", "report")])
    arrays = {
        "real": everything, "champion": features(place.package("progressive-4")),
        "worse": features(place.package("teacher-4")),
    }  # fmt: skip
    margin = place.quality()["reference"]["anchor"]["margin"]
    rounded: dict[str, Any] = {name: values.astype(np.float16) for name, values in arrays.items()}
    np.savez_compressed(STORED, **rounded, margin=margin, m=len(features.real))


def save_picture(path: Path, lines: list[dict[str, Any]]) -> None:
    """Approvals by true difference, with intervals."""
    figure = Figure(figsize=(6.6, 3.8))
    axes = plain_axes(figure)
    for colour, name in zip(("#c8452f", "#3274b5"), PAIRS, strict=True):
        rows = [line for line in lines if line["pair"] == name]
        rate = [row["approved"]["value"] for row in rows]
        ends = [[row["approved"]["value"] - row["approved"]["low"] for row in rows],
                [row["approved"]["high"] - row["approved"]["value"] for row in rows]]  # fmt: skip
        axes.errorbar([row["share"] for row in rows], rate, yerr=ends, marker="o", markersize=4, capsize=3,
                      linewidth=1.2, color=colour, label=name)  # fmt: skip
    axes.axhline(POWER_BAR, xmax=0.42, color="#8a8f98", linestyle=":", linewidth=1)
    axes.axhline(BOUND_BAR, xmin=0.75, color="#8a8f98", linestyle=":", linewidth=1)
    axes.axvline(1, color="#3a9d5d", alpha=0.5, linewidth=1)
    axes.set_xlabel("true KID(challenger) − KID(champion), in margins")
    axes.set_ylabel("share of challengers approved")
    axes.legend(frameon=False, title="challenger and champion drawn from")
    save_figure(path, figure)


def _summary(lost: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(lost)), "most": max(lost), "chains": len(lost)}


def main() -> int:
    """Run the trials; exit code 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description="Error rates of the gate in simulated trials.")
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--picture", type=Path, help="where to write the curve")
    parser.add_argument("--recorded", type=Path, help="figures that --json wrote: draw them, and stop")
    parser.add_argument("--store", type=Path, help="renew the stored features from this folder, and stop")
    options = parser.parse_args()
    if options.store:
        store(options.store)
        return 0
    if options.recorded:
        if options.picture is None:
            parser.error("--recorded: --picture says where to draw")
        save_picture(options.picture, read_json(options.recorded, "lines")["lines"])
        return 0
    world, lines, good = World.stored(), [], True
    sizes = f"{world.n} samples a model, {world.m} real images, at most {options.trials} trials a line"
    print(f"margin {world.margin:.4f}, {sizes}")
    wanted = [(name, share) for name in PAIRS for share in SHARES if share or name != IDENTICAL]
    start = time.perf_counter()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        chains = max(1, CHAINS * options.trials // 2000)
        lost_by = {how: pool.submit(drifts, world, how == "anchored", chains) for how in ("anchored", "without anchor")}
        counts = [options.trials if share in BARS else max(1, options.trials // 5) for _, share in wanted]
        lines_wanted = list(zip(wanted, counts, strict=True))
        running = [pool.submit(approvals, world, share, name, trials) for (name, share), trials in lines_wanted]
        for (name, share), trials, job in zip(wanted, counts, running, strict=True):
            rate = proportion_interval(job.result(), trials)
            lines.append({"pair": name, "share": share, "trials": trials, "approved": asdict(rate)})
            good &= (share != 1.0 or rate.high <= BOUND_BAR) and (share != 0.0 or rate.value >= POWER_BAR)
            text = f"{name:17s} {share:.2f} margins worse: approved {rate.value:.4f} [{rate.low:.4f}, {rate.high:.4f}]"
            print(f"{text}  {trials} trials", flush=True)
        lost = {how: _summary(job.result()) for how, job in lost_by.items()}
    print(f"each promotion {DRIFT} margins worse, at most {GENERATIONS}: margins lost until refused: {lost}")
    print(f"{time.perf_counter() - start:.0f} s")
    if options.json:
        options.json.write_text(json.dumps({"lines": lines, "drift": lost}, indent=1) + "\n", encoding="utf-8")
    if options.picture:
        save_picture(options.picture, lines)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
