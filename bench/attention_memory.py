"""Peak memory of attention by image size: all scores at once, and in blocks. Values and gradients are compared as well.

    python bench/attention_memory.py                            # 32×32 to 128×128 positions, one head, about 2 minutes
    python bench/attention_memory.py --sides 32 64 --heads 4    # others

One head's softmax(q kᵀ/√d) v with its gradient, float32, compiled, is what a U-Net's attention adds to a training step.
Peak memory is MLX's count above what q, k, v and the gradient's weights take. The exponent is the slope of log memory
over log positions between the last two sizes: 1 is linear, 2 is a square. Fails where the two forms differ by more than
1e-4 of the largest value, or where the exponent in blocks exceeds 1.1.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.hardware.fingerprint import this_machine
from ado_tasks.models.chunked_attention import chunked_attention
from ado_tasks.pictures import plain_axes, save_figure

Attention = Callable[[mx.array, mx.array, mx.array, float], mx.array]
BAR, LINEAR = 1e-4, 1.1
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One form at one size."""

    form: str
    side: int  # of the square image
    gradient: bool  # with it, or the value alone
    peak_mib: float  # above the inputs
    seconds: float  # of the second call


def naive(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """All scores at once, as the formula says."""
    return mx.softmax(scale * (q @ k.swapaxes(-1, -2)), axis=-1) @ v


FORMS: dict[str, Attention] = {"all at once": naive, "in blocks": chunked_attention}


def measured(form: str, side: int, heads: int, width: int) -> tuple[list[Row], list[np.ndarray]]:
    """Memory and time of the value, and of value and gradients; and those numbers."""
    shape, scale = (1, heads, side * side, width), width**-0.5
    q, k, v, weights = (mx.random.normal(shape, key=rng.key(0, "attention", name)) for name in "qkvw")
    mx.eval(q, k, v, weights)

    def value(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        return [FORMS[form](q, k, v, scale)]

    def both(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        def loss(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
            out = FORMS[form](q, k, v, scale)
            return mx.sum(weights * out), out

        (_, out), gradients = mx.value_and_grad(loss, argnums=[0, 1, 2])(q, k, v)
        return [out, *gradients]

    rows, numbers = [], []
    for function, gradient in ((value, False), (both, True)):
        step = mx.compile(function)
        mx.eval(step(q, k, v))
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        began = time.perf_counter()
        results = step(q, k, v)
        mx.eval(results)
        seconds = time.perf_counter() - began
        rows.append(Row(form, side, gradient, round((mx.get_peak_memory() - before) / MIB, 2), round(seconds, 3)))
        numbers = [np.array(each) for each in results]
    return rows, numbers


def difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> dict[str, float]:
    """Largest difference of value and gradients, as a share of the largest value of each."""
    names = ("value", "dq", "dk", "dv")
    return {
        n: float(np.abs(a - b).max() / np.abs(b).max()) for n, a, b in zip(names, ours, theirs, strict=True)
    }  # fmt: skip


def exponent(rows: list[Row], form: str, *, gradient: bool) -> float:
    """Slope of log memory over log positions between the two largest sizes."""
    points = [(row.side**2, row.peak_mib) for row in rows if row.form == form and row.gradient == gradient][-2:]
    (n0, m0), (n1, m1) = points
    return math.log(m1 / m0) / math.log(n1 / n0)


def picture(path: Path, rows: list[Row]) -> None:
    figure = Figure(figsize=(6.4, 3.8))
    axes = plain_axes(figure)
    for form, colour in zip(FORMS, ("tab:red", "tab:blue"), strict=True):
        for gradient, style in ((False, "--"), (True, "-")):
            own = [row for row in rows if row.form == form and row.gradient == gradient]
            label = f"{form}, {'with gradient' if gradient else 'value'}"
            axes.plot([r.side**2 for r in own], [r.peak_mib for r in own], style, marker="o", color=colour, label=label)
    sides = sorted({row.side for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks([side**2 for side in sides], [f"{side}×{side}" for side in sides])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("positions: height × width")
    axes.set_ylabel("peak memory, MiB")
    axes.legend(frameon=False)
    save_figure(path, figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 48, 64, 96, 128], help="sides of square images")
    parser.add_argument("--heads", type=int, default=1, help="heads (times images)")
    parser.add_argument("--width", type=int, default=32, help="channels a head")
    parser.add_argument("--out", type=Path, default=Path("bench/reports/attention_memory.json"), help="JSON report")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/attention_memory.png"), help="PNG")
    arguments = parser.parse_args()
    rows: list[Row] = []
    differences: dict[str, Any] = {}
    for side in sorted(arguments.sides):
        found = {form: measured(form, side, arguments.heads, arguments.width) for form in FORMS}
        for form_rows, _ in found.values():
            rows += form_rows
            for row in form_rows:
                what = "value and gradient" if row.gradient else "value"
                print(
                    f"{side:>4}²  {row.form:<12} {what:<19} {row.peak_mib:9.1f} MiB  {row.seconds:7.2f} s", flush=True
                )
        differences[f"{side}x{side}"] = difference(found["in blocks"][1], found["all at once"][1])
        print(f"{side:>4}²  largest difference {max(differences[f'{side}x{side}'].values()):.1e}", flush=True)
    exponents = {
        f"{form}, {'gradient' if gradient else 'value'}": round(exponent(rows, form, gradient=gradient), 3)
        for form in FORMS
        for gradient in (False, True)
    }
    print("exponents:", exponents)
    report = {
        "hardware": this_machine().as_plain(), "heads": arguments.heads, "width": arguments.width,
        "rows": [asdict(row) for row in rows], "largest_difference": differences, "exponents": exponents,
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    picture(arguments.picture, rows)
    worst = max(value for each in differences.values() for value in each.values())
    steepest = max(value for name, value in exponents.items() if name.startswith("in blocks"))
    return 1 if worst > BAR or steepest > LINEAR else 0


if __name__ == "__main__":
    raise SystemExit(main())
