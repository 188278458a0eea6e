"""Do linear layers of 8 and 4 bits pay? Time of one evaluation, size of the weights, and what the output is off by.

Two networks: the teacher of params.search.yaml, and one eight times as wide; weights as initialised, for their values
do not matter to the time. All forms in turn, compiled, on one thread.

    python bench/quantised_linears.py
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ado_tasks import rng
from ado_tasks.backend import mx
from ado_tasks.hardware.latency import Spread, interleaved, speedups
from ado_tasks.models.initialise import initialise
from ado_tasks.models.quantised import packed, quantised
from ado_tasks.models.unet import UNet2D
from ado_tasks.models.unet_config import UNet2DConfig
from ado_tasks.models.weights import flat_parameters

WIDTHS = {"digits": (16, 32), "wide": (128, 256)}
FORMS = {"float32": None, "8 bits": 8, "4 bits": 4}


def network(widths: tuple[int, int]) -> UNet2D:
    fields: dict[str, Any] = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "num_class_embeds": 10, "block_out_channels": widths,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2, "norm_num_groups": 8, "attention_head_dim": widths[0] // 2,
    }  # fmt: skip
    unet = UNet2D(UNet2DConfig(**fields))
    initialise(unet, rng.key(0, "quantised linears"))
    return unet


def given(batch: int) -> list[mx.array]:
    noise = rng.generator(0, "noise").standard_normal((batch, 8, 8, 1)).astype(np.float32)
    return [mx.array(noise), mx.full((batch,), 500.0), mx.arange(batch) % 10]


def action(unet: UNet2D, batch: int) -> Callable[[], None]:
    compiled, arguments = mx.compile(unet), given(batch)
    return lambda: mx.eval(compiled(*arguments))


def processor_ms(actions: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Milliseconds of processor time, median of rounds in turn: what a busy machine says of a CPU."""
    taken: dict[str, list[float]] = {form: [] for form in actions}
    for _ in range(rounds):
        for form, each in actions.items():
            began = time.process_time()
            each()
            taken[form].append(time.process_time() - began)
    return {form: 1e3 * float(np.median(values)) for form, values in taken.items()}


def main() -> int:
    """Print a line for each network, batch and form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of timings; each form once a round")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64], help="images at once")
    options = parser.parse_args()
    for name, widths in WIDTHS.items():
        unet = network(widths)
        forms = {form: quantised(unet, bits) for form, bits in FORMS.items()}
        bytes_of = {form: sum(array.nbytes for array in flat_parameters(each).values()) for form, each in forms.items()}
        answers = {form: each(*given(8)) for form, each in forms.items()}
        exact = answers["float32"]
        off = {form: float(mx.sqrt(mx.mean(mx.square(each - exact))) / mx.std(exact)) for form, each in answers.items()}
        print(f"{name} {widths}: {len(packed(forms['8 bits'])) // 3} layers quantised")
        for form in FORMS:
            print(f"  {form}: weights {bytes_of[form] / 2**20:.3f} MB, output off by {off[form]:.2%} of its spread")
        for batch in options.batches:
            actions = {form: action(each, batch) for form, each in forms.items()}
            seconds, cpu_ms = interleaved(actions, options.rounds), processor_ms(actions, options.rounds)
            gains = speedups(seconds, "float32")
            for form, taken in seconds.items():
                ms, gain = Spread.of(taken).scaled(1e3), gains[form]
                print(f"  batch {batch}, {form}: {cpu_ms[form]:.2f} ms of processor, {ms.median:.2f} ms, "
                      f"{gain.median:.2f} times as fast as float32 [{gain.min:.2f}, {gain.max:.2f}]")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
