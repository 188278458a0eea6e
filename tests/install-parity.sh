#!/usr/bin/env bash
# PyTorch (a CPU build) and Diffusers beside the project's own packages, for the parity tests that run live against them.
# pip, not uv: where a CPU build of PyTorch is at hand locally (pip's find-links), only pip finds it. Without one, PyPI's own
# build would bring gigabytes of CUDA on Linux, so there the tests fall back on the golden files.
set -eu
python=.venv/bin/python
"$python" -c 'import torch, diffusers' 2>/dev/null && exit 0
python3 -m pip --version >/dev/null
if [ "$(uname -s)" = Linux ]; then
  python3 -m pip --python "$python" install --quiet --no-deps --only-binary :all: "torch==2.13.0+cpu" 2>/dev/null || {
    echo "no CPU build of PyTorch is at hand: parity is checked against tests/golden instead"; exit 0; }
fi
python3 -m pip --python "$python" install --quiet "torch==2.13.0" "diffusers==0.37.1"
