"""Peak memory of attention by image size: all scores at once, in blocks, and fused where there is such a kernel.

Values and gradients are compared as well.

    python bench/attention_memory.py                            # 32×32 to 128×128 positions, one head, about 2 minutes
    python bench/attention_memory.py --sides 32 64 --heads 4    # others

One head's softmax(q kᵀ/√d) v with its gradient, compiled, is what a U-Net's attention adds to a training step: in
float32, and on CUDA in bfloat16 too, where cuDNN has a fused kernel with a gradient (then our network takes that).
Peak memory is MLX's count above what q, k, v and the gradient's weights take. The exponent is the slope of log memory
over log positions between the last two sizes: 1 is linear, 2 is a square.

What every form is compared with is all at once in float32. Fails where blocks or the fused kernel differ by more than
1e-4 of the largest value in float32 (5 % in bfloat16, whose numbers have 8 bits), or where an exponent in blocks
exceeds 1.1. Products of float32 are not rounded to TF32 here (MLX on CUDA would): in 11 bits no forms agree to 1e-4.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ado_tasks import rng
from ado_tasks.backend import mx, on_cpu
from ado_tasks.fit.probes import TYPES
from ado_tasks.hardware.fingerprint import this_machine
from ado_tasks.models.attention_choice import cuda_fuses
from ado_tasks.models.chunked_attention import chunked_attention
from ado_tasks.pictures import plain_axes, save_figure

Attention = Callable[[mx.array, mx.array, mx.array, float], mx.array]
BAR, HALF_BAR, LINEAR = 1e-4, 0.05, 1.1
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One form at one size."""

    form: str
    precision: str  # of q, k and v
    side: int  # of the square image
    gradient: bool  # with it, or the value alone
    peak_mib: float  # above the inputs
    seconds: float  # of the second call


def naive(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """All scores at once, as the formula says; of halves too the softmax adds up in float32."""
    return mx.softmax(scale * (q @ k.swapaxes(-1, -2)), axis=-1, precise=True) @ v


def fused(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """MLX's kernel, which makes no scores."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)


ALL, BLOCKS, FUSED = "all at once", "in blocks", "fused"
FORMS: dict[str, Attention] = {ALL: naive, BLOCKS: chunked_attention, FUSED: fused}
COLOURS = {ALL: "tab:red", BLOCKS: "tab:blue", FUSED: "tab:green"}


def forms_of(precision: str, side: int, width: int) -> list[str]:
    """What can be measured here: a fused kernel with a gradient is there on CUDA, in halves, for whole tiles."""
    half = precision != "float32"
    there = not on_cpu() and mx.cuda.is_available() and cuda_fuses(half=half, head_width=width, positions=side**2)
    return [ALL, BLOCKS, *([FUSED] if there else [])]


def measured(form: str, precision: str, side: int, heads: int, width: int) -> tuple[list[Row], list[np.ndarray]]:
    """Memory and time of the value, and of value and gradients; and those numbers, float32."""
    shape, scale, kind = (1, heads, side * side, width), width**-0.5, getattr(mx, precision)
    q, k, v, weights = (mx.random.normal(shape, key=rng.key(0, "attention", name)).astype(kind) for name in "qkvw")
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
        peak = round((mx.get_peak_memory() - before) / MIB, 2)
        rows.append(Row(form, precision, side, gradient, peak, round(seconds, 4)))
        numbers = [np.array(each.astype(mx.float32)) for each in results]
    return rows, numbers


def difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> dict[str, float]:
    """Largest difference of value and gradients, as a share of the largest value of each."""
    names = ("value", "dq", "dk", "dv")
    return {
        n: float(np.abs(a - b).max() / np.abs(b).max()) for n, a, b in zip(names, ours, theirs, strict=True)
    }  # fmt: skip


def exponent(rows: list[Row]) -> float | None:
    """Slope of log memory over log positions between the two largest sizes; None of a single size."""
    points = sorted((row.side**2, row.peak_mib) for row in rows)[-2:]
    if len(points) < 2:
        return None
    (n0, m0), (n1, m1) = points
    return round(math.log(m1 / m0) / math.log(n1 / n0), 3)


def curves(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of one form and precision, with the gradient or without, by what they are called."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(f"{row.form}, {row.precision}, {'gradient' if row.gradient else 'value'}", []).append(row)
    return found


def picture(path: Path, rows: list[Row]) -> None:
    """Where there are several precisions, with the gradient only: more lines could not be told apart."""
    several = len({row.precision for row in rows}) > 1
    figure = Figure(figsize=(6.4, 3.8))
    axes = plain_axes(figure)
    for label, own in curves(rows).items():
        first = own[0]
        if several and not first.gradient:
            continue
        style = ("-" if first.precision == "float32" else "--") if several else ("-" if first.gradient else "--")
        axes.plot(
            [r.side**2 for r in own], [r.peak_mib for r in own], style, marker="o", color=COLOURS[first.form],
            label=label.removesuffix(", gradient") if several else label,
        )  # fmt: skip
    sides = sorted({row.side for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks([side**2 for side in sides], [f"{side}×{side}" for side in sides])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("positions: height × width")
    axes.set_ylabel("peak memory with gradient, MiB" if several else "peak memory, MiB")
    axes.legend(frameon=False)
    save_figure(path, figure)


def compared(options: argparse.Namespace) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """All rows, and how far each form is from all at once in float32, by form, precision and size."""
    rows: list[Row] = []
    differences: dict[str, dict[str, float]] = {}
    for side in sorted(options.sides):
        exact: list[np.ndarray] = []
        for precision in options.precisions:
            for form in forms_of(precision, side, options.width):
                own, numbers = measured(form, precision, side, options.heads, options.width)
                rows += own
                for row in own:
                    what = "value and gradient" if row.gradient else "value"
                    print(
                        f"{side:>4}²  {form:<12} {precision:<9} {what:<19} {row.peak_mib:9.1f} MiB  "
                        f"{1e3 * row.seconds:9.1f} ms", flush=True
                    )  # fmt: skip
                exact = exact or numbers
                if numbers is not exact:
                    differences[f"{form}, {precision}, {side}x{side}"] = apart = difference(numbers, exact)
                    print(f"{side:>4}²  {form:<12} {precision:<9} difference {max(apart.values()):.1e}", flush=True)
    return rows, differences


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 48, 64, 96, 128], help="sides of square images")
    parser.add_argument("--heads", type=int, default=1, help="heads (times images)")
    parser.add_argument("--width", type=int, default=32, help="channels a head")
    parser.add_argument(
        "--precisions", nargs="+", choices=list(TYPES), help="float32 first (default: it; on CUDA bfloat16 too)"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/reports/attention_memory.json"), help="JSON report")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/attention_memory.png"), help="PNG")
    options = parser.parse_args(arguments)
    if options.precisions is None:
        options.precisions = ["float32", "bfloat16"] if not on_cpu() and mx.cuda.is_available() else ["float32"]
    if options.precisions[0] != "float32":
        parser.error(
            f"--precisions: {options.precisions[0]} comes first; allowed: float32 first, all is compared with it"
        )
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    os.environ["MLX_ENABLE_TF32"] = "0"  # read at the first product
    rows, differences = compared(options)
    exponents = {label: exponent(own) for label, own in curves(rows).items()}
    print("exponents:", exponents)
    report = {
        "hardware": this_machine().as_plain(), "heads": options.heads, "width": options.width, "tf32": False,
        "rows": [asdict(row) for row in rows], "largest_difference": differences, "exponents": exponents,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    picture(options.picture, rows)
    return 0 if within_bars(differences, exponents) else 1


def within_bars(differences: dict[str, dict[str, float]], exponents: dict[str, float | None]) -> bool:
    """Whether blocks and the fused kernel are exact enough, and blocks linear. Nobody trains with all at once."""
    agree = all(
        max(each.values()) <= (BAR if ", float32, " in name else HALF_BAR)
        for name, each in differences.items()
        if not name.startswith(ALL)
    )
    slopes = [slope for name, slope in exponents.items() if name.startswith(BLOCKS) and slope is not None]
    return agree and all(slope <= LINEAR for slope in slopes)


if __name__ == "__main__":
    raise SystemExit(main())
