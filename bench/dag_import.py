"""Seconds that Airflow's DAG processor spends in each DAG file, beyond Airflow itself. Bar: at most 0.5.

    python bench/dag_import.py [--rounds 7]      (in a clone in which `make install-all` ran)

Each import is a process of its own that has Airflow's libraries already, as the DAG processor's children have. The
first one after `dvc.yaml` changed resolves the graph with DVC and is shown apart; its result is cached by file hashes.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BAR_S = 0.5
PROBE = """
import importlib.util, sys, time
import airflow.sdk, airflow.providers.standard.operators.hitl
spec = importlib.util.spec_from_file_location("dag_file", sys.argv[1])
start = time.perf_counter()
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print("seconds", time.perf_counter() - start)
"""


def seconds(file: Path, home: str) -> float:
    """Of one import, in a new process."""
    variables = {**os.environ, "AIRFLOW_HOME": home, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(file)], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{file}: {done.stderr[-2000:]}")
    return float(next(line for line in done.stdout.splitlines() if line.startswith("seconds ")).split()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="imports of each file")
    rounds = parser.parse_args().rounds
    files = sorted((ROOT / "dags").glob("*.py"))
    with tempfile.TemporaryDirectory() as home:
        first = {file: seconds(file, home) for file in files}
        times = {file: [seconds(file, home) for _ in range(rounds)] for file in files}
    for file, each in times.items():
        median, most = statistics.median(each), max(each)
        print(f"{file.name:14} median {median:.3f} s, most {most:.3f} s; first {first[file]:.3f} s")
    return int(any(statistics.median(each) > BAR_S for each in times.values()))


if __name__ == "__main__":
    raise SystemExit(main())
