"""Every task of the graph is pure: done again elsewhere it gives the same bytes, and moves nothing but its outputs.

The graph is that of dvc.yaml, every method of distillation and a search added, with tiny settings. One process runs it
from end to end; this one repeats each task by itself, with another hash seed, in another folder, from other random
states, given nothing but its declared data.
"""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from graphlib import TopologicalSorter
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ado_tasks import config, graph
from ado_tasks.__main__ import MEASURED, TASKS, task_parser
from ado_tasks.backend import mx
from ado_tasks.storage import sha256_file

ROOT = Path(__file__).resolve().parents[2]
SEED = 3
PARAMS = yaml.safe_load("""\
hardware: {}
prepare: {train: 200, selection: 120, report: 120}
features: {dimensions: 8, filters: 4, steps: 20, batch: 16}
train:
  model: {block_out_channels: [8], down_block_types: [DownBlock2D], up_block_types: [UpBlock2D], layers_per_block: 1,
          norm_num_groups: 4, dropout: 0.1}
  steps: 20
  batch_size: 16
  warmup_steps: 2
  ema_decay: 0.9
  validate_every: 10
  checkpoint_every: 10
anchor: {n_generated: 100, steps: 6, coarse_steps: 1, batch_size: 50}
distill:
  progressive: {teacher_steps: 4, student_steps: [2, 1], stage_steps: 10, batch_size: 16, checkpoint_every: 5,
                stop: inferior}
  consistency: {method: consistency, steps: 10, batch_size: 16, warmup_steps: 2, checkpoint_every: 5,
                search_samples: 50, search_levels: 2}
calibrate:
  teacher: {nfe: [2], samples: 8, validation_samples: 8, points: 12, max_solves: 3}
measure: {batch_size: 2, rounds: 3, shards: 1}
evaluate: {n_generated: 100, n_paired: 30, draws: 50, batch_size: 50, shards: 1}
probe:
  space: {middle: [none, plain], channels: [[4, 8]]}
  race: {sizes: [3, 1], steps: [4, 4], unguided: 2}
  tune: {batch_size: 16, checkpoint_every: 2, validation_images: 32}
  importance_batches: 2
weigh: {batch_size: 2, rounds: 3, evaluations: 1, shards: 1}
search: {policy: {max_quality_loss: 100.0}}
sensitivity: {images: 16, batch_size: 2, rounds: 3}
distill_searched: {teacher_steps: 2, student_steps: [1], stage_steps: 10, batch_size: 16, checkpoint_every: 5}
calibrate_searched: {nfe: [2], solvers: [ddim], samples: 8, validation_samples: 8, points: 12, max_solves: 3}
""")
# What differs between runs of what is measured.
TIMED = {"latency_ms_per_image", "images_per_s", "peak_memory_mb", "speedup_vs_teacher"}
TIMED |= {"share_of_latency", "loss_per_share"}


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml, for one item of its matrix."""

    task: str
    options: list[str]
    data: list[str]  # what it depends on besides code
    outs: list[str]

    def run(self, inputs: Path, made: Path, scratch: Path) -> None:
        """Call the task's function as the command line would, reading under one folder and writing under another."""
        function = getattr(import_module(f"ado_tasks.{self.task}"), self.task)
        options = task_parser(self.task, function).parse_args(self.options)
        config_type = next(iter(signature(function).parameters.values())).annotation
        settings = config.parse(config_type, config.section(PARAMS, options.section), options.section)
        given: dict[str, Any] = {
            name: (made if name == "out" else inputs) / path
            for name, path in vars(options).items()
            if isinstance(path, Path) and name != "params"
        }
        given |= {
            name: tuple(inputs / path for path in paths)
            for name, paths in vars(options).items()
            if isinstance(paths, list)
        }
        wanted = signature(function).parameters
        given |= {name: value for name, value in {"seed": SEED, "scratch": scratch}.items() if name in wanted}
        function(settings, **given)


def stages() -> dict[str, Stage]:
    """Every stage of dvc.yaml, each behind what it reads, as "train" or "distill@progressive"."""
    found, whole = {}, graph.read_graph(ROOT / "dvc.yaml")
    graph.set_methods(whole, list(PARAMS["distill"]))
    graph.set_search(whole, PARAMS)
    graph.renew_code_deps(whole)
    for name, stage in whole["stages"].items():
        ((variable, items),) = stage.get("matrix", {"": [""]}).items()
        for item in items:
            values = {"dataset": "digits", f"item.{variable}": item}

            def filled(text: str, values: dict[str, str] = values) -> str:
                return re.sub(r"\$\{(.*?)\}", lambda match: values[match[1]], text)

            code = set(graph.code_deps(graph.task_of(stage["cmd"])))
            words = shlex.split(filled(stage["cmd"]))[3:]
            found[f"{name}@{item}" if item else name] = Stage(
                words[0], words[1:],
                [filled(dep) for dep in stage["deps"] if dep not in code], [filled(out) for out in stage["outs"]],
            )  # fmt: skip
    makes = {out: name for name, stage in found.items() for out in stage.outs}
    before = {name: {makes[path] for path in stage.data if path in makes} for name, stage in found.items()}
    return {name: found[name] for name in TopologicalSorter(before).static_order()}


STAGES = stages()


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the whole graph leaves behind, made by a process of its own."""
    folder = tmp_path_factory.mktemp("chain")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, __file__, str(folder)], check=True, env=environment)
    return folder


def global_state() -> tuple[Any, ...]:
    """What no task may move."""
    return (
        random.getstate(),
        repr(np.random.get_state()),  # noqa: NPY002
        [np.array(part).tolist() for part in mx.random.state],  # pyright: ignore[reportGeneralTypeIssues]
        np.geterr(),
        dict(os.environ),
        Path.cwd(),
    )


def turn_the_generators() -> None:
    """Each global generator goes on by a draw: a task that seeds one anew is seen even where it always does so."""
    random.random()
    np.random.random()  # noqa: NPY002
    mx.eval(mx.random.uniform())


def tree(folder: Path) -> dict[str, str]:
    """Everything under a folder: files with their sums."""
    return {
        path.relative_to(folder).as_posix(): sha256_file(path) if path.is_file() else "a folder"
        for path in sorted(folder.rglob("*"))
    }


@dataclass(frozen=True)
class Again:
    """One task repeated: the folders it ran in, and what was there before and after."""

    stage: Stage
    folder: Path
    states: tuple[tuple[Any, ...], tuple[Any, ...]]
    trees: tuple[dict[str, str], dict[str, str]]


@pytest.fixture(scope="module", params=STAGES)
def again(request: pytest.FixtureRequest, chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Again:
    stage, folder = STAGES[request.param], tmp_path_factory.mktemp(STAGES[request.param].task)
    for name in ("inputs", "made", "scratch", "cwd", "tmp"):
        (folder / name).mkdir()
    for path in stage.data:
        copy: Callable[..., Any] = shutil.copytree if (chain / path).is_dir() else shutil.copyfile
        (folder / "inputs" / path).parent.mkdir(parents=True, exist_ok=True)
        copy(chain / path, folder / "inputs" / path)
    import_module(f"ado_tasks.{stage.task}")  # what importing it changes (threads of BLAS) is not the task's doing
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "cwd")
        patch.setattr(tempfile, "tempdir", str(folder / "tmp"))
        turn_the_generators()
        states, trees = [global_state()], [tree(folder)]
        stage.run(folder / "inputs", folder / "made", folder / "scratch")
        states.append(global_state())
        trees.append(tree(folder))
    return Again(stage, folder, (states[0], states[1]), (trees[0], trees[1]))


def test_the_graph_has_a_stage_of_every_task() -> None:
    assert {stage.task for stage in STAGES.values()} == set(TASKS)


def test_the_same_bytes_elsewhere_and_again(again: Again, chain: Path) -> None:
    for out in again.stage.outs:
        first, second = (Path(made, out) for made in (chain, again.folder / "made"))
        if again.stage.task in MEASURED and second.suffix == ".png":
            assert second.stat().st_size > 0  # a picture of timings
        elif again.stage.task in MEASURED:
            assert without_timings(first) == without_timings(second)
        elif first.is_dir():
            assert tree(first) == tree(second) != {}
        else:
            assert sha256_file(first) == sha256_file(second), out


def test_nothing_global_moves(again: Again) -> None:
    before, after = again.states
    assert after == before


def test_only_what_the_graph_declares_is_written(again: Again) -> None:
    before, after = again.trees
    assert before.items() <= after.items(), "an input, or what lay elsewhere, was changed"
    outs = [f"made/{out}" for out in again.stage.outs]
    written = [path for path in after.keys() - before.keys() if not path.startswith("scratch/")]
    assert {declared_by(outs, path) for path in written} == set(outs)


def declared_by(outs: list[str], path: str) -> str:
    """The output that a path lies in, or leads to; the path itself where it has to do with none."""
    return next((out for out in outs if f"{path}/".startswith(f"{out}/") or out.startswith(f"{path}/")), path)


def without_timings(path: Path) -> Any:
    """A measured report without what depends on the moment; the machine, the variants and their order remain."""

    def drop(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in pairs if name not in TIMED}

    return json.loads(path.read_text(), object_pairs_hook=drop)


if __name__ == "__main__":
    (workspace,) = map(Path, sys.argv[1:])
    for each in STAGES.values():
        each.run(workspace, workspace, workspace / "scratch")
