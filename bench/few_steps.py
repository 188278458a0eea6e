"""Students of two steps and of one at equal training compute: which way of making them is the best?

A workspace in which prepare, features, train and anchor have run is read; every method starts from its teacher and may
spend `--budget` times the network evaluations that the teacher's own training took (a backward pass counts as two
forward passes, half of a network as half). Each is measured on the selection part and its own noise, never on the
report part:

- KID − KID(teacher) with its interval, the same noise, beside the margin that `anchor` froze;
- FD over that of training images, as a share of the floor (the main job's bar: 0.10), teacher's beside it;
- classes that the judge sees, and copying: median distance to the nearest training image over that of held-out ones.

    python bench/few_steps.py --workspace . --seeds 0 1 2 --jobs 8 --out reports/few_steps
    python bench/few_steps.py --methods sweep.yaml      # other settings: see below; beside the usual, or --only NAME …

Each method and seed is a process of its own; one that is finished is not run again, one that was interrupted goes on
from its checkpoint. `few_steps.json` and `few_steps.png` are of all that are finished.

A file for --methods holds names and, for each, one section as in params.yaml under distill.<family>, or a list of
them, each with the `share` of the budget that it may spend and `start: N` where it begins with the student of N steps
of the section before. Optimiser steps are scaled until the evaluations are the budget's.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from few_steps_methods import STEPS, Methods, Part, cost, methods_of, read_methods, scaled, training_cost
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ado_tasks.config import as_plain, read_params
from ado_tasks.datasets.shards import Dataset, open_dataset
from ado_tasks.diffusion import grids
from ado_tasks.distill import distill
from ado_tasks.errors import AdoError, ConfigError
from ado_tasks.interop.diffusers_folder import read_model
from ado_tasks.metrics.frechet import excess
from ado_tasks.metrics.memorisation import memorisation
from ado_tasks.metrics.noninferiority import kid_difference, non_inferior
from ado_tasks.models.classifier import load_features, load_judge
from ado_tasks.pictures import plain_axes, save_figure
from ado_tasks.sampling import Draw, Images, Sampler, draw
from ado_tasks.storage import load_arrays, read_json, sha256_tree, write_json
from ado_tasks.variants import student_variant

PAIRED, MANY = "selection", "bench/few-steps"  # draws: the anchor's own, and a larger one for FD
BAR = 0.10  # the main job's: FD over training images, as a share of the floor
TEACHER = "teacher"
DRAWS = 200  # random halves behind each FD
RESULT, LOG = "result.json", "log.txt"


# --- one method, one seed


class Bench:
    """A workspace, and what students are measured with: its selection part."""

    def __init__(self, root: Path, samples: int, shards: int) -> None:
        """Read the workspace; `samples` are drawn for FD."""
        self.params = read_params(root / "params.yaml")
        name = str(self.params["dataset"])
        self.dataset, self.features, self.teacher = (
            root / "data" / name, root / "features" / name, root / "models" / "teacher",
        )  # fmt: skip
        self.anchor = read_json(root / "anchor" / "anchor.json", "margin", "n_generated", "seed", "steps")
        self._teacher_features = root / "anchor" / "teacher.safetensors"
        self.samples, self.shards = samples, shards

    def key(self, parts: Sequence[Part], seed: int) -> str:
        """Two runs share it only if their figures would be the same, as long as the code is."""
        told = [[part.section.method, as_plain(part.section), part.start] for part in parts]
        inputs = [sha256_tree(self.teacher), open_dataset(self.dataset).sha256, self.anchor]
        return hashlib.sha256(json.dumps([told, seed, self.samples, inputs], sort_keys=True).encode()).hexdigest()[:16]

    def make(self, parts: Sequence[Part], seed: int, folder: Path) -> Path:
        """Distil each part after the one before it; the folder of the last one's students."""
        family = self.teacher
        for number, part in enumerate(parts):
            start = None if part.start is None else family / str(part.start)
            family = folder / f"{number}-{part.section.method}"
            if not family.exists():
                distill(
                    part.section, teacher=self.teacher, dataset=self.dataset, out=family, scratch=folder / "scratch",
                    seed=seed, start=start,
                )  # fmt: skip
        return family

    def measure(self, family: Path) -> dict[str, Any]:
        """Figures of the students of two steps and of one, by their number of steps."""
        yard, found = self.yard(), {}
        for steps in STEPS:
            if (family / str(steps)).exists():
                variant = student_variant(family / str(steps))
                sampler = Sampler(variant.model, 256, self.shards)
                found[str(steps)] = yard(lambda start, v=variant, s=sampler: s(start, v.method, v.times))
        return found

    def measure_teacher(self) -> dict[str, Any]:
        """Figures of the teacher, its own noise in both places of the difference."""
        sampler = Sampler(read_model(self.teacher), 256, self.shards)
        return self.yard()(lambda start: sampler(start, "ddim", grids.uniform_time(self.anchor["steps"])))

    def yard(self) -> "Yard":
        """What is measured with."""
        teacher = np.array(load_arrays(self._teacher_features)["features"])
        return Yard(open_dataset(self.dataset), self.features, self.anchor, teacher, self.samples)


class Yard:
    """The selection part, its features, and the draws that samples are made from."""

    def __init__(
        self, data: Dataset, features: Path, anchor: Mapping[str, Any], teacher: np.ndarray, samples: int
    ) -> None:
        """`teacher`: whitened features of its samples from the anchor's own draw."""
        self._part, train = data.split("selection"), data.split("train")
        self._extractor = load_features(features)
        self._judge = load_judge(features) if data.num_classes > 1 else None
        self._images, self._train_images = (each.batch(np.arange(len(each))) for each in (self._part, train))
        self._real, self._train = (self._extractor.features(each) for each in (self._images, self._train_images))
        self._teacher, self._anchor, self._samples = teacher, anchor, samples

    def __call__(self, sample: Callable[[Draw], Images]) -> dict[str, Any]:
        """Figures of one way to sample."""
        seed, margin = self._anchor["seed"], self._anchor["margin"]
        paired = sample(draw(seed, PAIRED, self._anchor["n_generated"], self._part))
        start = draw(seed, MANY, self._samples, self._part)
        images = sample(start)
        white = self._extractor.whitened
        difference = kid_difference(white(self._extractor.features(paired)), self._teacher, white(self._real))
        halves, resampled = np.random.default_rng(seed), np.random.default_rng(seed)
        beyond = excess(self._extractor.features(images), self._train, self._real, draws=DRAWS, rng=halves)
        copied = memorisation(images[: len(self._images)], self._images, self._train_images, rng=resampled)
        right = None
        if self._judge is not None and start.labels is not None:
            right = float((self._judge.predict(images) == start.labels).mean())
        return {
            "kid_minus_teacher": {"value": difference.value, "ci": [difference.low, difference.high]},
            "margin": margin, "non_inferior": non_inferior(difference, margin),
            "fd_over_train": beyond.ratio, "fd": beyond.model, "floor": beyond.floor.mean,
            "class_accuracy": right,
            "copying": {"value": copied.value, "low": copied.low, "high": copied.high, "close": copied.close},
        }  # fmt: skip


def run_one(bench: Bench, name: str, parts: Sequence[Part], seed: int, folder: Path) -> None:
    """Make and measure one method at one seed, and write its result."""
    begun = time.monotonic()
    if name == TEACHER:
        figures = {"teacher": bench.measure_teacher()}
    else:
        figures = bench.measure(bench.make(parts, seed, folder))
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    write_json(
        folder / RESULT,
        {
            "name": name, "seed": seed, "evaluations": sum(cost(p.section) for p in parts), "students": figures,
            "seconds": time.monotonic() - begun,
            "sections": [{"method": p.section.method, "start": p.start, **as_plain(p.section)} for p in parts],
        },
    )  # fmt: skip


# --- all of them


def run_all(bench: Bench, methods: Methods, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every method and seed that is not finished, `--jobs` at a time; the results of all that are."""
    wanted: list[tuple[str, int]] = [(TEACHER, 0), *((name, seed) for seed in options.seeds for name in methods)]
    folders = {each: folder_of(options.out, *each, bench.key(methods.get(each[0], ()), each[1])) for each in wanted}
    waiting = [each for each in wanted if not (folders[each] / RESULT).exists()]
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    while waiting or running:
        while waiting and len(running) < options.jobs:
            each = waiting.pop(0)
            running[each] = _begin(options, *each, folders[each])
        time.sleep(0.2)
        for each in [each for each, process in running.items() if process.poll() is not None]:
            code = running.pop(each).returncode
            print(f"{each[0]}, seed {each[1]}: {'done' if code == 0 else f'FAILED: {folders[each] / LOG}'}", flush=True)
    results = [folder / RESULT for folder in folders.values()]
    return [read_json(result, "name", "seed", "students") for result in results if result.exists()]


def _begin(options: argparse.Namespace, name: str, seed: int, folder: Path) -> "subprocess.Popen[bytes]":
    """A process for one method and seed, with the same arguments; its output goes into a file."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, *options.arguments, "--one", name, str(seed)]
    with (folder / LOG).open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def folder_of(out: Path, name: str, seed: int, key: str) -> Path:
    """Where one method's students and figures are: those of other settings lie beside it."""
    plain = "".join(letter if letter.isalnum() else "-" for letter in name.replace("+ ", "plus ")).strip("-")
    return out / plain / f"{seed}-{key}"


# --- what is told


def summary(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a method and number of steps: means over seeds, and how many of them are non-inferior."""
    rows = []
    for name in dict.fromkeys(found["name"] for found in results):
        of_name = [found for found in results if found["name"] == name]
        for steps in of_name[0]["students"]:
            each = [found["students"][steps] for found in of_name]
            accuracy = [one["class_accuracy"] for one in each if one["class_accuracy"] is not None]
            rows.append(
                {
                    "name": name, "steps": steps, "seeds": [found["seed"] for found in of_name],
                    "kid_minus_teacher": [one["kid_minus_teacher"] for one in each],
                    "non_inferior": sum(one["non_inferior"] for one in each),
                    "fd_over_train": [one["fd_over_train"] for one in each],
                    "copying_low": min(one["copying"]["low"] for one in each),
                    "class_accuracy": float(np.mean(accuracy)) if accuracy else None,
                    "evaluations": of_name[0]["evaluations"],
                }
            )  # fmt: skip
    return sorted(rows, key=lambda row: (row["steps"], np.mean(row["fd_over_train"])))


def show(rows: Sequence[Mapping[str, Any]], margin: float, training: float) -> None:
    """The table."""
    table = Table(title=f"selection part; margin {margin:.4f}; bar of FD over training images {BAR} of the floor")
    for column in (
        "method",
        "steps",
        "cost",
        "KID − teacher [95 %]",
        "non-inf.",
        "FD over train",
        "classes",
        "copying",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        differences, shares = row["kid_minus_teacher"], row["fd_over_train"]
        low, high = (np.mean([one["ci"][end] for one in differences]) for end in (0, 1))
        spread = f" [{min(shares):.3f}, {max(shares):.3f}]" if len(shares) > 1 else ""
        table.add_row(
            row["name"], row["steps"], f"{row['evaluations'] / training:.2f}",
            f"{np.mean([one['value'] for one in differences]):+.4f} [{low:+.4f}, {high:+.4f}]",
            f"{row['non_inferior']}/{len(shares)}", f"{np.mean(shares):.3f}{spread}",
            "" if row["class_accuracy"] is None else f"{100 * row['class_accuracy']:.1f} %",
            f"{row['copying_low']:.2f}",
        )  # fmt: skip
    Console(width=150).print(table)


def save_picture(path: Path, rows: Sequence[Mapping[str, Any]], margin: float) -> None:
    """Left KID − teacher with the margin, right FD over training images with its bar; a point a seed."""
    figure = Figure(figsize=(11.5, 0.9 + 0.42 * max(4, len(rows))))
    students = [row for row in rows if row["steps"] != TEACHER]
    of_teacher = [share for row in rows if row["steps"] == TEACHER for share in row["fd_over_train"]]
    left, right = plain_axes(figure, (1, 2, 1)), plain_axes(figure, (1, 2, 2))
    for place, row in enumerate(reversed(students)):
        colour = "#c8452f" if row["steps"] == "1" else "#3274b5"
        count = len(row["seeds"])
        for number, (one, share) in enumerate(zip(row["kid_minus_teacher"], row["fd_over_train"], strict=True)):
            y = place + 0.5 * (number - (count - 1) / 2) / max(count, 2)
            left.plot(one["ci"], [y, y], color=colour, linewidth=1)
            left.plot(one["value"], y, marker="o", markersize=4, color=colour)
            right.plot(share, y, marker="o", markersize=4, color=colour)
    left.axvspan(-margin, margin, color="#3a9d5d", alpha=0.15, linewidth=0)
    left.set_xscale("symlog", linthresh=2 * margin)
    left.set_xlabel("KID − KID(teacher)\n(band: margin)")
    right.axvline(BAR, color="#3a9d5d", linewidth=1, linestyle="--")
    for share in of_teacher:
        right.axvline(share, color="#8a8f98", linewidth=1)
    right.set_xscale("symlog", linthresh=0.2)
    for axes, ticks in ((left, (0, 0.01, 0.02, 0.05, 0.1, 0.2)), (right, (0.1, 0.2, 0.5, 1.0, 2.0))):
        low, high = axes.get_xlim()
        shown = [tick for tick in ticks if low <= tick <= high]
        axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
    right.set_xlabel("FD over training images / floor\n(dashed: bar; grey: teacher)")
    names = [f"{row['name']}, {row['steps']} step{'s' * (row['steps'] != '1')}" for row in reversed(students)]
    left.set_yticks(range(len(names)), names, fontsize=8)
    right.set_yticks(range(len(names)), [""] * len(names))
    save_figure(path, figure)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, default=Path(), help="folder with the outputs of the stages")
    parser.add_argument("--out", type=Path, default=Path("reports/few_steps"), help="folder of everything")
    parser.add_argument("--budget", type=float, default=1.0, help="times the evaluations of the teacher's training")
    parser.add_argument("--unscaled", action="store_true", help="take the sections' own steps instead of the budget's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the students")
    parser.add_argument("--samples", type=int, default=4000, help="of each student, for FD")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; each uses two cores")
    parser.add_argument("--methods", type=Path, help="YAML file with further methods")
    parser.add_argument("--only", nargs="+", default=None, help="names of methods, instead of all")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the budget, one seed, few samples")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    if options.quick:
        options.budget, options.seeds, options.samples = options.budget / 100, options.seeds[:1], 500
    return options


def wanted_methods(bench: Bench, options: argparse.Namespace) -> Methods:
    """What is compared, scaled to the budget."""
    found = methods_of(bench.params)
    if options.methods:
        found |= read_methods(read_params(options.methods), str(options.methods))
    if TEACHER in found:
        raise ConfigError(f"{options.methods}: {TEACHER!r} is not allowed as a name: it is the teacher's own row")
    if options.only:
        unknown = [name for name in options.only if name not in found]
        if unknown:
            raise ConfigError(f"--only: {unknown} are not allowed; allowed: {', '.join(found)}")
        found = {name: found[name] for name in options.only}
    if options.unscaled:
        return found
    budget = options.budget * training_cost(bench.teacher)
    return {
        name: tuple(replace(part, section=scaled(part.section, part.share * budget)) for part in parts)
        for name, parts in found.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 where every method was made and measured, 1 where one failed, 2 where the bench cannot run."""
    options = parse_arguments(arguments)
    try:
        bench = Bench(options.workspace, options.samples, shards=2)
        methods = wanted_methods(bench, options)
        if options.one:
            name, seed = options.one[0], int(options.one[1])
            parts = methods.get(name, ())
            run_one(bench, name, parts, seed, folder_of(options.out, name, seed, bench.key(parts, seed)))
            return 0
        results = run_all(bench, methods, options)
    except AdoError as problem:
        print(f"few_steps: {problem}", file=sys.stderr)
        return 2
    rows, training = summary(results), training_cost(bench.teacher)
    report = {"rows": rows, "results": results, "budget": options.budget, "anchor": bench.anchor, "bar": BAR}
    write_json(options.out / "few_steps.json", report | {"teacher_training_evaluations": training})
    save_picture(options.out / "few_steps.png", rows, bench.anchor["margin"])
    show(rows, bench.anchor["margin"], training)
    print(f"report: {options.out / 'few_steps.json'}, picture: {options.out / 'few_steps.png'}")
    return 0 if len(results) == 1 + len(methods) * len(options.seeds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
