"""What came of `bench/mac.py`: ratios within rounds with their quartiles, the printed lines, the picture."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mac_processes import Turns

FORMAT = 1  # of a report; another one when its keys change
OURS = "mlx compiled"
LATE = "it was ready, but no round was over in time"
AGREEMENT = 0.05  # relative difference (root mean square) up to which two forms compute the same; TF32 leaves 1e-2


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles; one value is its own quartiles."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": _digits(statistics.median(values)), "quartiles": [_digits(low), _digits(high)]}


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def ratios(over: Sequence[Sequence[float]], under: Sequence[Sequence[float]]) -> list[float]:
    """In each round, the median time of one over that of the other."""
    return [statistics.median(a) / statistics.median(b) for a, b in zip(over, under, strict=True)]


def difference(found: Sequence[float], expected: Sequence[float]) -> float:
    """Root mean square of the difference over that of what is expected; infinite where anything is not finite."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.sqrt(np.mean((a - b) ** 2) / max(np.mean(b**2), 1e-30)))


def compared(turns: Turns, action: str, count: int) -> dict[str, Any]:
    """Every form at one action against MLX compiled: how many times quicker MLX compiled is.

    A form whose results are not MLX's gets no ratio: it does other work. Where MLX compiled was skipped nobody has one.
    """
    entries: dict[str, Any] = {form: {"skipped": reason} for form, reason in turns.skipped.items()}
    for form, ready in turns.ready.items():
        if (form, action) not in turns.seconds:
            entries[form] = {"skipped": LATE}
            continue
        times = turns.seconds[form, action]
        flat = [value for each in times for value in each]
        entry: dict[str, Any] = {
            "device": ready["device"], "ms": spread([1e3 * value for value in flat]),
            "images_per_s": spread([count / value for value in flat]), "memory": turns.memory[form, action],
        }  # fmt: skip
        if OURS in turns.ready:  # and then it had as many turns
            apart = difference(ready["check"], turns.ready[OURS]["check"])
            entry |= {"difference": _digits(apart) if np.isfinite(apart) else None, "agrees": apart <= AGREEMENT}
            if entry["agrees"]:
                entry["mlx_compiled_is_quicker"] = spread(ratios(times, turns.seconds[OURS, action]))
        entries[form] = entry
    return entries


def chain(turns: Turns, samplings: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
    """Every variant in MLX compiled: how many times quicker it is than the teacher, in each form that sampled it."""
    teacher, found = samplings[0]["name"], []
    if OURS not in turns.ready or (OURS, teacher) not in turns.seconds:
        return []
    for entry in samplings:
        times = turns.seconds[OURS, entry["name"]]
        flat = [value for each in times for value in each]
        quicker = {
            form: spread(ratios(turns.seconds[form, teacher], times))
            for form, ready in turns.ready.items()
            if difference(ready["check"], turns.ready[OURS]["check"]) <= AGREEMENT
        }
        found.append(
            {
                "name": entry["name"], "solver": entry["solver"], "nfe": entry["nfe"],
                "ms_per_image": spread([1e3 * value / count for value in flat]),
                "images_per_s": spread([count / value for value in flat]),
                "memory": turns.memory[OURS, entry["name"]],
                "quicker_than_teacher_in": quicker,
            }
        )  # fmt: skip
    return found


def lines(report: Mapping[str, Any]) -> list[str]:
    """The report as a person reads it."""
    said = []
    for name, network in report["networks"].items():
        said.append(f"{name}: {network['parameters']:,} parameters, {network['weights']}")
        for part in ("training", "sampling"):
            said.append(f"  {part}, batch {network[part]['batch']}, {network[part]['one']}")
            said += [f"    {form:17} {_form_line(entry)}" for form, entry in network[part]["forms"].items()]
        if network["chain"]:
            said.append(f"  the chain: mlx compiled, against {network['chain'][0]['name']}")
        for entry in network["chain"]:
            gains = ", ".join(f"{_times(v)} {form}" for form, v in entry["quicker_than_teacher_in"].items())
            said.append(f"    {entry['name']:17} {entry['ms_per_image']['median']:9.3g} ms/image  {gains}")
    return said


def _form_line(entry: Mapping[str, Any]) -> str:
    if "skipped" in entry:
        return f"skipped: {entry['skipped']}"
    counted, grown = (entry["memory"][count] for count in ("framework_mib", "process_mib"))
    text = f"{entry['ms']['median']:9.4g} ms  process +{grown:.0f} MiB"
    text += "" if counted is None else f" ({counted:.0f} counted)"
    if "mlx_compiled_is_quicker" in entry:
        return f"{text}  mlx compiled is {_times(entry['mlx_compiled_is_quicker'])} as fast"
    return text if "agrees" not in entry else f"{text}  its results differ ({entry['difference']}): not compared"


def _times(value: Mapping[str, Any]) -> str:
    low, high = value["quartiles"]
    return f"{value['median']:.3g}× [{low:.3g}, {high:.3g}]"


def draw(path: Path, report: Mapping[str, Any]) -> None:
    """Training, sampling and the chain of each network: bars with quartiles, what was skipped named."""
    from matplotlib.figure import Figure  # not at the top: a machine that only measures may lack it
    from matplotlib.ticker import LogLocator, NullLocator

    from ado_tasks.pictures import plain_axes, save_figure

    networks = report["networks"]
    figure = Figure(figsize=(11, 0.6 + 2.9 * len(networks)))
    for row, (name, network) in enumerate(networks.items()):
        for column, part in enumerate(("training", "sampling")):
            axes = plain_axes(figure, (len(networks), 3, 3 * row + column + 1))
            forms = network[part]["forms"]
            bars = {form: entry["images_per_s"] for form, entry in forms.items() if "ms" in entry}
            _bars(axes, bars, [f"{form} (skipped)" for form in forms if form not in bars])
            axes.set_xlabel("images/s")
            axes.set_title(f"{name}, {part}, batch {network[part]['batch']}", fontsize=9)
        axes = plain_axes(figure, (len(networks), 3, 3 * row + 3))
        gains = {entry["name"]: entry["quicker_than_teacher_in"][OURS] for entry in network["chain"]}
        _bars(axes, gains, [])
        if gains:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(f"times quicker than {network['chain'][0]['name']}")
        axes.set_title(f"{name}, whole chain in MLX", fontsize=9)
    machine = report["machine"]
    products = ", TF32" if report.get("tf32") else ""
    title = f"{machine['chip']}, {machine['memory_gib']} GiB, MLX on {machine['device']}, float32{products}"
    figure.suptitle(title, fontsize=10)
    save_figure(path, figure)


def _bars(axes: Any, bars: Mapping[str, Mapping[str, Any]], absent: Sequence[str]) -> None:
    names = [*bars, *absent]
    medians = [value["median"] for value in bars.values()]
    ends = [
        [value["median"] - value["quartiles"][0] for value in bars.values()],
        [value["quartiles"][1] - value["median"] for value in bars.values()],
    ]
    axes.barh(range(len(bars)), medians, xerr=ends if bars else None, height=0.6, color="tab:blue", ecolor="0.3")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
