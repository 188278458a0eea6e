"""Task `calibrate`: where a frozen model's sampler should step, for each solver and number of evaluations."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from pydantic import Field

from ado_tasks.backend import mx
from ado_tasks.config import as_plain, config
from ado_tasks.datasets.shards import open_dataset
from ado_tasks.diffusion import grids
from ado_tasks.diffusion.schedules import NoiseSchedule
from ado_tasks.errors import DivergenceError
from ado_tasks.interop.diffusers_folder import check_teacher, read_model
from ado_tasks.optimise import cost, gits, ld3
from ado_tasks.optimise.knots import Fit, fit_knots, on_timesteps, resampled
from ado_tasks.pictures import plain_axes, save_figure
from ado_tasks.report import SILENT, Reporter
from ado_tasks.sampling import Draw, Sampler, draw
from ado_tasks.storage import atomic_folder, sha256_tree, write_json
from ado_tasks.variants import BASELINE_GRIDS, baseline_grid

Floats = npt.NDArray[np.float64]

INDEX = "index.json"
PICTURE = "schedules.png"
NEARLY = 1.15  # starts up to this much farther than the nearest are fitted from too: some end nearer (tried on digits)
# Names of draws, none of them ever reported on. KEEP says which of the schedules met in a descent is kept.
FIT, KEEP, VALIDATE = "calibrate/fit", "calibrate/keep", "calibrate/validate"

# How a solver runs in Diffusers at its learned timesteps: `set_timesteps(timesteps=…)` of this scheduler, made with
# `from_config(model's scheduler config, **fields)`. DDIMScheduler itself takes evenly spaced timesteps only, and
# IPNDMScheduler has no noise schedule of a model's own: iPNDM at learned knots runs here alone, and so does angle_ab2,
# which Diffusers does not have. Where the network is told other timesteps (`told_timesteps`), x̂ is made of its output
# there and given to the scheduler, which then has `prediction_type` "sample".
_MULTISTEP: dict[str, Any] = {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
DIFFUSERS: dict[str, dict[str, Any]] = {
    "ddim": {"scheduler": "DPMSolverMultistepScheduler", "fields": {"solver_order": 1, **_MULTISTEP}},
    "dpmpp_2m": {"scheduler": "DPMSolverMultistepScheduler", "fields": {"solver_order": 2, **_MULTISTEP}},
}

FINE_POWER = 1.5  # t = (i/N)^1.5: in uniform t the first-order last step would be nearly all of the error


@config
class CalibrateConfig:
    """How knots are learned."""

    nfe: tuple[Annotated[int, Field(ge=2, le=50)], ...] = (4, 5, 6, 8)  # evaluations an image to learn knots for
    solvers: tuple[Literal["ddim", "ipndm", "dpmpp_2m", "angle_ab2"], ...] = ("ddim", "ipndm")  # one evaluation a step
    learner: Annotated[tuple[Literal["fitted", "ld3"], ...], Field(min_length=1)] = ("fitted",)  # each: a candidate
    samples: Annotated[int, Field(ge=8)] = 48  # trajectories that knots are fitted on
    validation_samples: Annotated[int, Field(ge=8)] = 128  # other trajectories that candidates are compared on
    points: Annotated[int, Field(ge=12)] = gits.TEACHER_POINTS  # of a fine trajectory (Chen et al. 2024, §4.1)
    gamma: Annotated[float, Field(gt=0)] = gits.GAMMA  # discount of GITS (Chen et al. 2024, §3.3)
    max_solves: Annotated[int, Field(ge=1)] = 12  # runs of the solver that one fit may make; each costs nfe evaluations
    free_start: bool = True  # may the first evaluation be at t < 1, taking the noise as it is?
    descent_evaluations: Annotated[int, Field(ge=1)] = 24_000  # of ld3's training, a schedule (backward = 2 forwards)
    descent_batch: Annotated[int, Field(ge=1)] = 16  # samples a step of it
    descent_rate: Annotated[float, Field(gt=0, le=1)] = 0.05  # first learning rate of it
    shards: Annotated[int, Field(ge=1, le=16)] = 2  # parts of a batch computed at the same time on a CPU


@dataclass(frozen=True)
class CalibrateResult:
    """What came out."""

    learned: tuple[str, ...]  # <solver>-<nfe> of each schedule
    evaluations: int  # network evaluations of one image, times images; a backward pass counts as two forward passes
    ratio_to_best: dict[str, float]  # distance to the fine solution over the best usual grid's, validation noise


def calibrate(
    config: CalibrateConfig, *, model: Path, dataset: Path, out: Path, seed: int, report: Reporter = SILENT
) -> CalibrateResult:
    """Learn sampling knots for a frozen model, so that few steps end near its own fine solution at the same noise.

    Knots start from GITS (optimise/gits.py), or from what was learned for fewer steps, and are fitted through the
    solver (`fitted`, optimise/knots.py), or learned with the times that the network is told (`ld3`, optimise/ld3.py),
    on one draw of noise. On a second draw these are compared with GITS and with the usual grids, all of them on the
    model's training timesteps, and the nearest to the fine solution is kept.

    Args:
        config: see CalibrateConfig.
        model: a Diffusers folder.
        dataset: folder made by `prepare`; labels are drawn as often as in its selection part. No image is used.
        out: folder of the schedules: <solver>-<nfe>.json, index.json and schedules.png appear in it together.
        seed: of the noise, which no report is made on.
        report: where progress and distances go.

    Raises:
        ArtifactError: the model or the dataset is damaged.
        ConfigError: the model makes other images than the dataset's, has fewer classes, or is a student of few steps,
            which has no fine solution.
        DivergenceError: a sample is not finite.
    """
    stored, part = read_model(model), open_dataset(dataset).split("selection")
    check_teacher(stored, str(model))
    stored.unet.config.check_data(part.shape, part.num_classes, f"{model}/unet/config.json")
    sizes = {FIT: config.samples, VALIDATE: config.validation_samples}
    sizes |= {KEEP: config.samples} if "ld3" in config.learner else {}
    on = {
        name: _Trajectories(Sampler(stored, count, config.shards), draw(seed, name, count, part), config.points)
        for name, count in sizes.items()
    }
    spent = {"reference": _evaluations(on)}  # network evaluations, by what they were for
    entries: list[dict[str, Any]] = []
    for solver in config.solvers:
        learner, before = _Learner(config, solver, on, seed), None
        for steps in sorted(set(config.nfe)):
            already = sum(spent.values())
            entry, before = learner.learn(steps, before)
            entries.append(entry)
            spent[f"{solver}-{steps}"] = _evaluations(on) - already
            report.metric(f"{solver}-{steps}.distance", entry["distance"])
            report.metric(f"{solver}-{steps}.ratio_to_best", entry["ratio_to_best"])
            report.progress(len(entries), len(config.solvers) * len(set(config.nfe)))

    evaluations, training = _evaluations(on), cost.training_passes(stored.record)
    chosen_on = {
        "seed": seed, "fit": {"draw": FIT, "samples": config.samples},
        "validation": {"draw": VALIDATE, "samples": config.validation_samples}, "model_sha256": sha256_tree(model),
    }  # fmt: skip
    if KEEP in on:
        chosen_on["keep"] = {"draw": KEEP, "samples": config.samples}
    with atomic_folder(out) as folder:
        for entry in entries:
            write_json(folder / f"{entry['solver']}-{entry['nfe']}.json", entry | {"chosen_on": chosen_on})
        write_json(
            folder / INDEX,
            {
                "schedules": entries, "chosen_on": chosen_on, "evaluations": evaluations, "cost": spent,
                "share_of_training": _shares(spent, training), "config": as_plain(config),
            },
        )  # fmt: skip
        _save_picture(folder / PICTURE, entries)
    report.metric("evaluations", evaluations)
    report.picture("schedules", out / PICTURE)
    names = tuple(f"{entry['solver']}-{entry['nfe']}" for entry in entries)
    ratios = {name: entry["ratio_to_best"] for name, entry in zip(names, entries, strict=True)}
    return CalibrateResult(names, evaluations, ratios)


class _Trajectories:
    """One draw of noise with the model's fine solution of it; counts the network evaluations that it costs."""

    def __init__(self, sampler: Sampler, start: Draw, points: int) -> None:
        self.schedule = sampler.schedule
        self.evaluations = len(start) * (points - 1)
        self.sampler, self._start = sampler, start
        labels = None if start.labels is None else mx.array(start.labels)
        fine_grid = grids.uniform_time(points - 1) ** FINE_POWER
        self.path = gits.teacher_path(sampler.denoiser(labels), mx.array(start.noise), fine_grid, self.schedule)
        if not np.isfinite(self.path.sample).all():
            raise DivergenceError(f"the fine solution ({points - 1} steps of iPNDM) is not finite")

    def solve(self, solver: str, times: Floats, told: Floats | None = None) -> npt.NDArray[np.float32]:
        """What the solver reaches from the same noise at these times, with the network told others if any are given."""
        self.evaluations += len(self._start) * (len(times) - 1)
        return self.sampler(self._start, solver, times, told=told)

    def squared(self, solver: str, times: Floats, told: Floats | None = None) -> Floats:
        """Mean squared distance a pixel of each sample to the fine solution, (B,)."""
        difference = self.solve(solver, times, told).astype(np.float64) - self.path.sample
        return np.square(difference).reshape(len(difference), -1).mean(axis=1)

    def examples(self) -> ld3.Examples:
        """Noise, labels and fine solutions, to learn from."""
        return ld3.Examples(self._start.noise, self._start.labels, self.path.sample)


def _evaluations(on: dict[str, _Trajectories]) -> int:
    return sum(each.evaluations for each in on.values())


def _shares(spent: dict[str, int], training: cost.Passes | None) -> dict[str, float] | None:
    """Of the network evaluations of the teacher's training; None where it was not trained here."""
    return None if training is None else {name: count / training.evaluations for name, count in spent.items()}


def _typical(squared: Floats) -> float:
    """Mean, not squared, distance: choices on few samples are not led by those that end in another image."""
    return float(np.sqrt(squared).mean())


class _Learner:
    """Learns the knots of one solver, from few steps to many."""

    def __init__(self, config: CalibrateConfig, solver: str, on: dict[str, _Trajectories], seed: int) -> None:
        self._config, self._solver, self._seed = config, solver, seed
        self._fitted_on, self._validated_on, self._kept_on = on[FIT], on[VALIDATE], on.get(KEEP)
        self._jumps = gits.jump_costs(self._fitted_on.path)
        self._multistep = gits.multistep_costs(self._fitted_on.path) if solver == "ipndm" else None
        self._gradient = ld3.Gradient(self._fitted_on.sampler.differentiable, config.shards)

    def learn(self, steps: int, before: Floats | None) -> tuple[dict[str, Any], Floats]:
        """The entry for this many steps, and its learned times, from which those for more steps start."""
        starts = [self._gits(steps), grids.uniform_time(steps)] + ([] if before is None else [resampled(before, steps)])
        distances = [_typical(self._fitted_on.squared(self._solver, times)) for times in starts]
        nearest = starts[int(np.argmin(distances))]
        learned: dict[str, ld3.Discretisation] = {}
        if "fitted" in self._config.learner:
            fits = [
                self._fit(times)
                for times, distance in zip(starts, distances, strict=True)
                if distance <= NEARLY * min(distances)
            ]
            nearest = min(fits, key=lambda fit: fit.mean_distance).times
            learned["fitted"] = ld3.Discretisation(nearest)
        if self._kept_on is not None:
            learned["ld3"] = self._descend(nearest, self._kept_on)
            nearest = nearest if "fitted" in learned else learned["ld3"].times
        return self._entry(steps, learned | {"gits": ld3.Discretisation(starts[0])}), nearest

    def _fit(self, start: Floats) -> Fit:
        return fit_knots(
            lambda times: self._fitted_on.solve(self._solver, times), self._fitted_on.path.sample, start,
            self._config.max_solves, free_start=self._config.free_start,
        )  # fmt: skip

    def _descend(self, start: Floats, kept_on: _Trajectories) -> ld3.Discretisation:
        def distance(found: ld3.Discretisation) -> float:
            return _typical(kept_on.squared(self._solver, found.times, found.told))

        config, steps = self._config, len(start) - 1
        batch = min(config.descent_batch, config.samples)
        settings = ld3.Settings(
            steps=max(1, config.descent_evaluations // (cost.GRADIENT * batch * steps)), batch=batch,
            rate=config.descent_rate, free_start=config.free_start,
        )  # fmt: skip
        learned = ld3.learn(
            self._gradient, self._solver, self._fitted_on.schedule, self._fitted_on.examples(), start, distance,
            settings, self._seed,
        )  # fmt: skip
        self._fitted_on.evaluations += learned.evaluations
        return learned.found

    def _gits(self, steps: int) -> Floats:
        gamma = self._config.gamma
        if self._multistep is None:
            knots = gits.best_knots(self._jumps, steps, gamma)
        else:
            knots = gits.best_multistep_knots(self._jumps, self._multistep, steps, gamma)
        return self._fitted_on.path.times[knots]

    def _entry(self, steps: int, learned: dict[str, ld3.Discretisation]) -> dict[str, Any]:
        """Compare on the validation draw. A usual grid wins where nothing learned is nearer: no harm is done."""
        schedule, timesteps_of = self._fitted_on.schedule, _Timesteps(self._fitted_on.schedule)
        usual = {name: baseline_grid(name, steps, schedule) for name in BASELINE_GRIDS}
        baselines = {name: self._validated_on.squared(self._solver, times) for name, times in usual.items()}
        best = min(baselines, key=lambda name: _typical(baselines[name]))
        on_grid = {
            name: replace(found, times=timesteps_of.nearest(found.times))
            for name, found in (learned | {best: ld3.Discretisation(usual[best])}).items()
        }
        candidates = {
            name: self._validated_on.squared(self._solver, found.times, found.told) for name, found in on_grid.items()
        }
        chosen = min(candidates, key=lambda name: _typical(candidates[name]))
        times, told = on_grid[chosen].times, on_grid[chosen].told
        return {
            "solver": self._solver,
            "nfe": steps,
            "times": times.tolist(),
            "timesteps": timesteps_of.of(times),
            **({} if told is None else {"told": told.tolist(), "told_timesteps": timesteps_of.real(told)}),
            "diffusers": _diffusers(self._solver, told),
            "method": chosen,
            "distance": float(candidates[chosen].mean()),  # squared, on the validation draw, as all distances here
            "candidates": {name: float(squared.mean()) for name, squared in candidates.items()},
            "baselines": {name: float(squared.mean()) for name, squared in baselines.items()},
            "best_baseline": best,
            "ratio_to_best": float(candidates[chosen].mean() / baselines[best].mean()),
            "chosen_by": {name: _typical(squared) for name, squared in candidates.items()},  # not squared
        }


def _diffusers(solver: str, told: Floats | None) -> dict[str, Any] | None:
    found = DIFFUSERS.get(solver)
    if found is None or told is None:
        return found
    return found | {"fields": {**found["fields"], "prediction_type": "sample"}}


class _Timesteps:
    """Times on the grid that the network was trained on, where the schedule has one."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self._schedule = schedule
        self._steps: int | None = getattr(schedule, "num_train_timesteps", None)

    def nearest(self, times: Floats) -> Floats:
        return times if self._steps is None else on_timesteps(times, self._steps)

    def of(self, times: Floats) -> list[int] | None:
        """Diffusers' timesteps of all knots but the clean end; None for schedules in continuous σ."""
        return None if self._steps is None else [round(float(t)) for t in self._schedule.timestep(times[:-1])]

    def real(self, told: Floats) -> list[float]:
        """What the network is conditioned on at told times: not rounded."""
        return self._schedule.timestep(told).tolist()


def _save_picture(path: Path, entries: list[dict[str, Any]]) -> None:
    """Each learned schedule as a row of knots over t, beside the uniform one."""
    solvers = sorted({entry["solver"] for entry in entries})
    figure = Figure(figsize=(5.2 * len(solvers), 3.2))
    for column, solver in enumerate(solvers):
        axes = plain_axes(figure, (1, len(solvers), column + 1))
        rows = [entry for entry in entries if entry["solver"] == solver]
        for height, entry in enumerate(rows):
            uniform = grids.uniform_time(entry["nfe"])
            axes.plot(uniform, np.full(len(uniform), height), "|", color="#8a8f98", markersize=14)
            axes.plot(entry["times"], np.full(len(entry["times"]), height), "o", color="#3274b5", markersize=5)
            axes.annotate(
                f"× {entry['ratio_to_best']:.2f}",
                (-0.02, height),
                xytext=(6, 6),
                textcoords="offset points",
                fontsize=8,
            )
        axes.set_yticks(range(len(rows)), [str(entry["nfe"]) for entry in rows])
        axes.set_ylim(-0.5, len(rows) - 0.2)
        axes.invert_xaxis()
        axes.set_xlabel("time t: noise at the left, clean at the right")
        axes.set_ylabel("network evaluations an image")
        axes.set_title(
            f"{solver}: learned knots (dots), uniform (bars);\nright: squared distance over the best usual grid's",
            fontsize=9,
        )
    save_figure(path, figure)
