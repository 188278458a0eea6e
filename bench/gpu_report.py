"""What came of `bench/gpu_step.py`: ratios within rounds with their quartiles, the printed table, the picture."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mac_processes import Turns
from mac_report import difference, ratios, spread

OURS, THEIRS = "mlx", "pytorch"
# Relative difference (root mean square) from the reference up to which two forms compute the same. Halves are further
# apart: 50 steps through a network of random weights leave a few percent.
AGREEMENT, HALF_AGREEMENT = 0.05, 0.15


def name(part: str, form: str, precision: str) -> str:
    """Of a job: "training, mlx compiled, bfloat16"."""
    return f"{part}, {form}, {precision}"


def compared(turns: Turns, count: int) -> dict[str, Any]:
    """Each part's forms, and how many times quicker MLX's best is than each of PyTorch's, within rounds."""
    rounds = min((len(each) for each in turns.seconds.values()), default=0)
    parts: dict[str, dict[str, Any]] = {}
    for job, reason in turns.skipped.items():
        part, form = job.split(", ", 1)
        parts.setdefault(part, {})[form] = {"skipped": reason}
    for job, ready in turns.ready.items():
        part, form = job.split(", ", 1)
        action = ready["actions"][0]
        times = turns.seconds.get((job, action), [])[:rounds]
        entry: dict[str, Any] = {"device": ready["device"], "memory": turns.memory[job, action]}
        if times:
            flat = [value for each in times for value in each]
            entry |= {"ms": spread([1e3 * each for each in flat]), "images_per_s": spread([count / t for t in flat])}
        parts.setdefault(part, {})[form] = entry
    for part, entries in parts.items():
        _judge(part, entries, turns, rounds)
    return {"rounds": rounds, "parts": parts, "best": {part: _best(part, parts[part], turns, rounds) for part in parts}}


def _judge(part: str, entries: dict[str, Any], turns: Turns, rounds: int) -> None:
    """Note how far each form's results are from a reference: MLX's in float32, or else what is there first."""
    ready = {job.split(", ", 1)[1]: each for job, each in turns.ready.items() if job.startswith(f"{part}, ")}
    reference = next((form for form in ("mlx compiled, float32", *ready) if form in ready), None)
    for form, each in ready.items():
        apart = difference(each["check"], ready[str(reference)]["check"])
        entries[form]["difference"] = float(f"{apart:.3g}") if apart < float("inf") else None
        entries[form]["agrees"] = apart <= (AGREEMENT if form.endswith("float32") else HALF_AGREEMENT)


def _best(part: str, entries: dict[str, Any], turns: Turns, rounds: int) -> dict[str, Any]:
    """MLX's quickest form against PyTorch's quickest of each kind (eager, compiled), of those that agree."""
    times = {
        job.split(", ", 1)[1]: turns.seconds[job, ready["actions"][0]][:rounds]
        for job, ready in turns.ready.items()
        if job.startswith(f"{part}, ") and (job, ready["actions"][0]) in turns.seconds
        if entries[job.split(", ", 1)[1]]["agrees"]
    }

    def quickest(kind: str) -> str | None:
        forms = [form for form in times if form.startswith(kind)]
        return min(forms, key=lambda form: statistics.median(t for each in times[form] for t in each), default=None)

    ours = quickest(OURS)
    if ours is None or not rounds:
        return {}
    found: dict[str, Any] = {"mlx": ours}
    for kind in ("pytorch eager", "pytorch compiled"):
        theirs = quickest(kind)
        if theirs:
            found[kind] = {"form": theirs, "mlx_is_quicker": spread(ratios(times[theirs], times[ours]))}
    return found


def lines(report: Mapping[str, Any]) -> list[str]:
    """The report as a person reads it."""
    machine = report["machine"]
    said = [
        f"{machine['device']}, {report['parameters']:,} parameters, batch {report['batch']}, {report['rounds']} rounds"
    ]
    for part, entries in report["parts"].items():
        said.append(f"{part}" + (f", {report['steps']} steps of DDIM" if part == "sampling" else ""))
        said += [f"  {form:28} {_line(entry)}" for form, entry in entries.items()]
        best = report["best"].get(part, {})
        for kind in ("pytorch eager", "pytorch compiled"):
            if kind in best:
                gain = best[kind]["mlx_is_quicker"]
                low, high = gain["quartiles"]
                said.append(f"  {best['mlx']} is {gain['median']:.3g}× [{low:.3g}, {high:.3g}] {best[kind]['form']}")
    for form, each in report["profiles"].items():
        middle = {key: statistics.median(values) for key, values in each.items() if key.endswith("_ms")}
        said.append(
            f"{form}: loop {middle['loop_ms']:.2f} ms a step, MLX's evaluation {middle['evaluation_ms']:.2f}, "
            f"ours {100 * each['overhead_median']:.1f} % [{100 * min(each['overhead']):.1f}, "
            f"{100 * max(each['overhead']):.1f}]; to build one {middle['build_ms']:.2f}, to call one "
            f"{middle['call_ms']:.2f}"
        )
    return said


def _line(entry: Mapping[str, Any]) -> str:
    if "skipped" in entry:
        return f"skipped: {entry['skipped']}"
    if "ms" not in entry:
        return "ready, but there was no time for a round"
    counted = entry["memory"]["framework_mib"]
    text = f"{entry['images_per_s']['median']:8.4g} images/s  {entry['ms']['median']:8.4g} ms"
    text += "" if counted is None else f"  {counted / 1024:6.2f} GiB"
    return text if entry["agrees"] else f"{text}  its results differ ({entry['difference']})"


def draw(path: Path, report: Mapping[str, Any]) -> None:
    """Images a second of every form, with quartiles. Raises ImportError where Matplotlib is missing."""
    from matplotlib.figure import Figure

    from ado_tasks.pictures import plain_axes, save_figure

    figure = Figure(figsize=(11, 3.4))
    for number, (part, entries) in enumerate(report["parts"].items(), 1):
        axes = plain_axes(figure, (1, len(report["parts"]), number))
        timed = {form: entry["images_per_s"] for form, entry in entries.items() if "ms" in entry}
        medians = [each["median"] for each in timed.values()]
        ends = [
            [each["median"] - each["quartiles"][0] for each in timed.values()],
            [each["quartiles"][1] - each["median"] for each in timed.values()],
        ]
        colours = ["tab:blue" if form.startswith(OURS) else "0.6" for form in timed]
        axes.barh(range(len(timed)), medians, xerr=ends if timed else None, height=0.6, color=colours, ecolor="0.3")
        axes.set_yticks(range(len(timed)), list(timed), fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("images/s")
        axes.set_title(f"{part}, batch {report['batch']}", fontsize=9)
    figure.suptitle(f"{report['machine']['device']}, {report['parameters'] / 1e6:.0f} million parameters", fontsize=10)
    save_figure(path, figure)
