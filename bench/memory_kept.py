"""Does it pay that glibc keeps freed memory? A process with it and one without, in turn, sampling from one network.

    python bench/memory_kept.py [--model models/teacher] [--rounds 5]

Prints each ratio of times (without / with) and their median. ADO_KEEP_MEMORY=0 is the switch; see ado_tasks/backend.py.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

SAMPLE = """
import sys, time
from pathlib import Path
import numpy as np
from ado_tasks.diffusion import grids
from ado_tasks.interop.diffusers_folder import read_model
from ado_tasks.sampling import Draw, Sampler
model = read_model(Path(sys.argv[1]))
config = model.unet.config
rng = np.random.default_rng(0)
labels = np.arange(256) % config.num_class_embeds if config.has_classes else None
shape = (256, config.sample_size, config.sample_size, config.in_channels)
start = Draw(rng.standard_normal(shape).astype(np.float32), labels, 0)
sampler = Sampler(model, 256, 2)
sampler(start, "ddim", grids.uniform_time(2))
began = time.perf_counter()
sampler(start, "ddim", grids.uniform_time(25))
print(time.perf_counter() - began)
"""


def seconds(model: Path, kept: bool) -> float:
    """Of 25 DDIM steps of 256 images in a process of its own."""
    environment = {**os.environ, "ADO_KEEP_MEMORY": "1" if kept else "0"}
    done = subprocess.run(
        [sys.executable, "-c", SAMPLE, str(model)], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/teacher"), help="a Diffusers folder")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    ratios = [seconds(options.model, False) / seconds(options.model, True) for _ in range(options.rounds)]
    print("without / with:", " ".join(f"{ratio:.2f}" for ratio in ratios), f" median {median(ratios):.2f}")


if __name__ == "__main__":
    main()
