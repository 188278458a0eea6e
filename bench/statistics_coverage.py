"""How often the intervals of `ado_tasks.metrics.noninferiority` cover the truth, in simulated trials with fresh draws.

    python bench/statistics_coverage.py [--trials 1000] [--only NAME ...] [--json OUT]

Mixtures of 10 Gaussians fitted to standardised random-convolution features (d = 64) of scikit-learn's digits. A line a
scenario: the truth, coverage with its exact 95 % interval, the spread of the figure over trials beside the mean half
width / 1.96 (equal when the interval is exact), and the share of trials judged non-inferior. Bars: coverage >= 0.93,
A/A non-inferior >= 0.80.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits

from ado_tasks.metrics import simulation
from ado_tasks.metrics.interval import Interval, proportion_interval
from ado_tasks.metrics.kernel import kernel_sums, real_sums
from ado_tasks.metrics.noninferiority import MARGIN_SHARE, kid_difference, kid_interval
from ado_tasks.metrics.random_features import random_features, standardisation, standardise
from ado_tasks.metrics.simulation import Mixture, Trials, true_kid

GENERATED, REAL = 2000, 400  # thousands of generated samples; the report part of the digits has 399 images
SEED = 20
FOUR_STEPS = 0.0124  # paired pixel distance of an early digits teacher at 4 DDIM steps (the README's: 0.016)
COVERAGE_BAR, POWER_BAR = 0.93, 0.80  # least coverage of a 95 % interval; least share of A/A pairs that pass


@dataclass(frozen=True)
class World:
    """What the scenarios draw from."""

    real: Mixture
    near: Mixture  # a good teacher: the same components, a tenth narrower
    far: Mixture  # a teacher whose pictures are a little soft
    four: Mixture  # what a teacher's 4 DDIM steps make: soft by the anchor's paired distance


def build_world() -> World:
    """Mixtures fitted to the features of digits, and of digits blurred to given mean squared pixel distances."""
    digits: Any = load_digits()
    pictures = (digits.images / 8 - 1).astype(np.float32)[..., None]
    raw = random_features(pictures)
    mean, std = standardisation(raw)
    blurred = gaussian_filter(pictures, (0, 0.7, 0.7, 0))

    def soft(distance: float) -> Mixture:
        share = np.sqrt(distance / np.mean((pictures - blurred) ** 2))
        softened = random_features(pictures + share * (blurred - pictures))
        return Mixture.fitted(standardise(softened, mean, std), 10, SEED)

    real = Mixture.fitted(standardise(raw, mean, std), 10, SEED)
    return World(real, near=real.narrowed(0.9), far=soft(FOUR_STEPS / 8), four=soft(FOUR_STEPS))


@dataclass(frozen=True)
class Scenario:
    """One line of the table."""

    student: Mixture
    teacher: Mixture
    pair: Callable[..., simulation.Pair] = simulation.independent
    method: simulation.Method = kid_difference
    single: bool = False  # the truth is KID(student), not a difference
    blocks: int = 0  # samples a block of the reference; 0: independent samples
    bar: bool = True  # False: a control that is expected to fail


def single_kid(student: np.ndarray, _: np.ndarray, real: np.ndarray) -> Interval:
    """The interval of one model's KID."""
    return kid_interval(kernel_sums(student, real), real_sums(real))


def scenarios(world: World, rng: np.random.Generator) -> dict[str, Scenario]:
    """Every case the bar names, those a report meets besides, and the controls."""
    real, near, far = world.real, world.near, world.far
    soft = 0.3 * (far.mean() - real.mean())

    def naive(student: np.ndarray, _: np.ndarray, reference: np.ndarray) -> Interval:
        return simulation.naive_bootstrap(student, None, reference, draws=200, rng=rng)

    by_block = partial(kid_difference, groups=np.arange(REAL) // 10)
    return {
        "A/A, teacher = real": Scenario(real, real),
        "A/A, teacher near real": Scenario(near, near),
        "A/A, teacher far from real": Scenario(far, far),
        "student != teacher = real, same noise": Scenario(real.narrowed(0.95).moved(soft), real, simulation.same_noise),
        "student != teacher != real, same noise": Scenario(far.moved(soft), far, simulation.same_noise),
        "student != teacher != real, independent": Scenario(far.moved(soft), far),
        "student narrower by half, same noise": Scenario(real.narrowed(0.5), real, simulation.same_noise),
        "reference in blocks of 10, by block": Scenario(far, real, method=by_block, blocks=10),
        "one KID, model = real": Scenario(real, real, method=single_kid, single=True),
        "one KID, model far from real": Scenario(far, far, method=single_kid, single=True),
        "control: blocks ignored": Scenario(far, real, blocks=10, bar=False),
        "control: naive bootstrap, one KID": Scenario(real, real, method=naive, single=True, bar=False),
    }


def run(scenario: Scenario, world: World, trials: int, rng: np.random.Generator) -> Trials:
    """All trials of one scenario."""
    truth = true_kid(scenario.student, world.real)
    if not scenario.single:
        truth -= true_kid(scenario.teacher, world.real)

    def reference() -> np.ndarray:
        if scenario.blocks:
            return world.real.draw_blocks(REAL // scenario.blocks, scenario.blocks, 0.5, rng)
        return world.real.draw(REAL, rng)

    pair = partial(scenario.pair, scenario.student, scenario.teacher, GENERATED, rng)
    return simulation.run_trials(truth, trials, pair, reference, scenario.method)


def line(name: str, scenario: Scenario, world: World, trials: Trials) -> dict[str, Any]:
    """The figures of one scenario."""
    count = len(trials.intervals)
    figures: dict[str, Any] = {
        "scenario": name,
        "trials": count,
        "truth": trials.truth,
        "coverage": asdict(proportion_interval(trials.covered(), count)),
        "spread": trials.spread(),
        "half_width_over_1.96": float(np.mean([one.high - one.low for one in trials.intervals])) / 2 / 1.96,
        "is_bar": scenario.bar,
    }
    if scenario.student is scenario.teacher and not scenario.single and scenario.bar:
        frozen = MARGIN_SHARE * (true_kid(world.four, world.real) - true_kid(scenario.teacher, world.real))
        figures["margin"] = frozen
        figures["non_inferior"] = asdict(proportion_interval(trials.passed(frozen), count))
        figures["margin_for_80_percent"] = float(np.quantile([one.high for one in trials.intervals], POWER_BAR))
    return figures


def show(figures: dict[str, Any], seconds: float) -> bool:
    """Print one line; whether it meets its bars."""
    cover, power = figures["coverage"], figures.get("non_inferior")
    text = f"{figures['scenario']:44s} truth {figures['truth']:+.4f}  coverage {cover['value']:.3f}"
    text += f" [{cover['low']:.3f}, {cover['high']:.3f}]  spread {figures['spread']:.5f}"
    text += f"  half/1.96 {figures['half_width_over_1.96']:.5f}"
    if power:
        text += f"  non-inferior {power['value']:.3f} [{power['low']:.3f}, {power['high']:.3f}]"
        text += f" at margin {figures['margin']:.4f} (80 % at {figures['margin_for_80_percent']:.4f})"
    print(f"{text}  {seconds:.0f} s", flush=True)
    return cover["value"] >= COVERAGE_BAR and (not power or power["value"] >= POWER_BAR)


def main() -> int:
    """Run the scenarios; exit code 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description="Coverage of the KID intervals in simulated trials.")
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--only", nargs="*", help="scenarios whose name contains one of these")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    world, lines, good = build_world(), [], True
    names = scenarios(world, np.random.default_rng(SEED))
    for index, name in enumerate(names):
        if options.only and not any(part in name for part in options.only):
            continue
        rng, start = np.random.default_rng([SEED, index]), time.perf_counter()
        scenario = scenarios(world, rng)[name]
        figures = line(name, scenario, world, run(scenario, world, options.trials, rng))
        lines.append(figures)
        good &= show(figures, time.perf_counter() - start) or not scenario.bar
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
