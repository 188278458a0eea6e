"""The only command line: `python -m ado_tasks <task> …` (or `ado <task> …`).

A task's options follow from its signature: every keyword-only `Path` (or tuple of them) is an option of that name, its
config is one section of the params file, its seed the file's `seed`. Both drivers, DVC and Airflow, run these same
commands.
"""

import argparse
import importlib
import importlib.metadata
import inspect
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ado_tasks.endpoints import load_env_file
from ado_tasks.errors import AdoError, ConfigError, StorageError
from ado_tasks.report import Reporter, StopWhen, Tee

# What each task is for; `ado --help` shows it. Tasks are imported only when they are run: --help stays quick.
TASKS = {
    "prepare": "images → a checked, versioned dataset with train, selection and report parts",
    "features": "train the networks that measure quality: features, and a judge of classes",
    "profile": "which machine this is and what it can do",
    "train": "train the teacher",
    "anchor": "freeze the margin of non-inferiority from the teacher alone, before any student exists",
    "distill": "teach a student to need fewer steps",
    "calibrate": "learn where a frozen model's sampler should step",
    "measure": "time and weigh every variant, in turn, on this machine",
    "probe": "one candidate architecture: its teacher's weights, cut and tuned",
    "weigh": "time every probe, in turn, on this machine",
    "search": "choose an architecture among the probes",
    "sensitivity": "what each block of the teacher is worth, and costs on this machine",
    "evaluate": "quality of every variant on the report part, with intervals",
}
TOP_OPTIONS = ("-h", "--help", "--version")
MEASURED = {"profile", "measure", "weigh", "sensitivity"}
UNRECORDED = {"profile"}  # it runs every time, to see whether the machine is another one; nothing is learned from that
EDGE_COMMANDS = {
    "compare": "print what the reports say: every variant, its quality, cost and speed-up; across runs with --runs",
    "choose": "say which variant, solver, evaluations and batch keep a budget on this machine, by the reports",
    "gate": "judge the chosen variant: beside the champion, or beside the teacher where there is none yet",
    "register": "make an approved model a version of the registered model in MLflow",
    "promote": "make a registered version the champion",
    "rollback": "return to the former champion, with a reason",
    "monitor": "sample the champion anew and say whether it still does what it was promoted for",
    "settings": "what to run a network with on a machine, and why",
    "sync": "upload recorded runs to MLflow",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, or the code of the named error."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = build_parser(given)
    if given and given[0].startswith("-") and given[0] not in TOP_OPTIONS:
        parser.error(f"unknown option: {given[0]}; allowed: {', '.join(TOP_OPTIONS)}, or a command and its options")
    known, rest = parser.parse_known_args(given)
    if known.command is None:
        parser.print_help()
        return 2
    try:
        if known.command in EDGE_COMMANDS:
            load_env_file()
            status = importlib.import_module(f"ado_tasks.{known.command}").main(rest)
            sys.stdout.flush()
            return status
        return run_task(known.command, rest)
    except AdoError as problem:
        print(f"ado {known.command}: {type(problem).__name__}: {problem}", file=sys.stderr)
        return problem.exit_code
    except BrokenPipeError:  # whoever read the output wanted no more of it: `ado compare | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from the last checkpoint" if keeps_checkpoints(known.command) else ""
        print(f"ado {known.command}: interrupted{goes_on}", file=sys.stderr)
        return 130


def keeps_checkpoints(command: str) -> bool:
    """Whether a task has a place for checkpoints. False before it is loaded: then nothing has been done yet."""
    function = getattr(sys.modules.get(f"ado_tasks.{command}"), command, None)
    return callable(function) and "scratch" in inspect.signature(function).parameters


def build_parser(given: Sequence[str]) -> argparse.ArgumentParser:
    """The top-level parser of what is `given`. A task's own options are added when it is chosen (see `task_parser`)."""
    parser = argparse.ArgumentParser(
        prog="ado", description="Adaptive Diffusion Optimizer.", formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(
            ["tasks (stages of dvc.yaml):", *(f"  {name:<11} {text}" for name, text in TASKS.items()), "",
             "others:", *(f"  {name:<11} {text}" for name, text in EDGE_COMMANDS.items()), "",
             "ado <command> --help says what a command reads, writes and is configured by."]
        ),
        add_help=False,
    )  # fmt: skip
    parser.add_argument("command", nargs="?", choices=[*TASKS, *EDGE_COMMANDS], metavar="command")
    if not given or given[0] in TOP_OPTIONS:  # behind a command they are the command's
        parser.add_argument("-h", "--help", action="help", help="show this")
        version = importlib.metadata.version("adaptive-diffusion-optimizer")
        parser.add_argument("--version", action="version", version=f"ado {version}", help="print the version")
    return parser


def task_parser(name: str, function: Callable[..., Any]) -> argparse.ArgumentParser:
    """A parser made from a task's signature, its docstring, and the source of its config."""
    from ado_tasks import usage  # noqa: PLC0415
    from ado_tasks.config import methods  # noqa: PLC0415

    said = usage.arguments(function)
    parser = argparse.ArgumentParser(
        prog=f"ado {name}", description=usage.description(function),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="params file (default: %(default)s)")
    parser.add_argument("--section", default=name, help="dotted name of its section (default: %(default)s)")
    for parameter in _path_parameters(function):
        optional, several = parameter.default is not parameter.empty, parameter.annotation == tuple[Path, ...]
        text = said.get(parameter.name, "").replace("%", "%%")
        if parameter.name == "scratch":
            parser.add_argument(
                "--scratch", type=Path, default=None, help=f"{text} (default: .ado/scratch/SECTION)".strip()
            )
        else:
            parser.add_argument(
                _option(parameter), type=Path, required=not optional, nargs="+" if several else None, help=text,
                default=parameter.default if optional else None,
            )  # fmt: skip

    width = shutil.get_terminal_size().columns - 2  # argparse leaves 2 as well
    lines = ["keys of its section in the params file:"]
    for number, (method, each) in enumerate(methods(_config_type(function)).items()):
        lines += [f"  method: {method}{'' if number else ' (the default)'}"] if method else []
        lines += usage.describe_keys(each, width, 4 if method else 2)
    if "seed" in said:
        lines += ["", *textwrap.wrap(f"seed, at the top of the params file: {said['seed']}", width)]
    parser.epilog = "\n".join(lines)
    return parser


def _config_type(function: Callable[..., Any]) -> Any:
    return next(iter(inspect.signature(function).parameters.values())).annotation


def _option(parameter: inspect.Parameter) -> str:
    return f"--{parameter.name.replace('_', '-')}"


def check_options(parser: argparse.ArgumentParser, function: Callable[..., Any], arguments: Sequence[str]) -> None:
    """End with an error that names unknown options: argparse names what is missing before what is too much."""
    known = ["--help", "--params", "--section", *map(_option, _path_parameters(function))]
    options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    unknown = [option for option in options if not any(name.startswith(option) for name in known)]
    if unknown:
        parser.error(f"unknown option: {' '.join(unknown)}; allowed: {', '.join(known)}")


def run_task(name: str, arguments: Sequence[str]) -> int:
    """Parse a task's options, run it, record what it said, and hand the record to the tracker."""
    from ado_tasks import config, storage, tracking  # noqa: PLC0415

    function = getattr(importlib.import_module(f"ado_tasks.{name}"), name)
    parser = task_parser(name, function)
    check_options(parser, function, arguments)
    options = parser.parse_args(arguments)
    params = config.read_params(options.params)
    seed = params.get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ConfigError(
            f"seed: {seed!r} is not allowed: a whole number from 0 is required at the top of {options.params}"
        )
    config_type = _config_type(function)
    settings = config.parse(config_type, config.section(params, options.section, str(options.params)), options.section)
    paths = {p.name: getattr(options, p.name) for p in _path_parameters(function)}
    paths = {name: tuple(path) if isinstance(path, list) else path for name, path in paths.items()}
    if "scratch" in paths and paths["scratch"] is None:
        paths["scratch"] = Path(".ado/scratch") / options.section
    check_out(paths["out"], is_file=name in MEASURED)
    limit_memory(params)
    extra = {"seed": seed} if "seed" in inspect.signature(function).parameters else {}
    if name in UNRECORDED:
        result = function(settings, **paths, **extra)
    else:
        told = {**paths, **extra}
        with (
            storage.named_storage_errors(tracking.HOME),  # the record is written too, and the disk may be full
            tracking.recorded(options.section, name, settings, told, measured=name in MEASURED) as recorder,
            stopped_between_steps() as stopper,
        ):
            result = function(settings, **paths, **extra, report=Tee((recorder, stopper)))
    print(f"{options.section}: {result}", file=sys.stderr)
    return 0


def limit_memory(params: dict[str, Any]) -> None:
    """Hold this process to the memory limits of the params file's section `hardware`, where that means something."""
    from ado_tasks import config  # noqa: PLC0415
    from ado_tasks.fit.limits import set_limits  # noqa: PLC0415
    from ado_tasks.profile import ProfileConfig  # noqa: PLC0415

    if params.get("hardware"):
        limits = config.parse(ProfileConfig, params["hardware"], "hardware")
        set_limits(limits.wired_limit_gib, limits.cache_limit_gib)


def check_out(out: Path, *, is_file: bool) -> None:
    """Whether a result may appear at `out`: asked before hours of work are done for it.

    A folder of results replaces a former one as a whole, so it may not be, or hold, the folder that one works in.

    Raises:
        ConfigError: it would replace something that no task has made.
        StorageError: nothing can be written there.
    """
    allowed = "a file, which may be there already" if is_file else "a folder, which may be there already"
    with storage_errors(out):
        if not is_file and Path.cwd().is_relative_to(out.resolve()):
            raise ConfigError(f"--out {out}: the folder that this runs in would be replaced; allowed: {allowed}")
        if out.is_symlink() and not out.exists():
            raise ConfigError(f"--out {out}: a link that leads nowhere; allowed: {allowed}")
        if out.exists() and out.is_file() != is_file:
            raise ConfigError(f"--out {out}: is a {'folder' if is_file else 'file'}; allowed: {allowed}")
        above = next(folder for folder in out.absolute().parents if folder.exists())
        if not above.is_dir():
            raise StorageError(f"{out}: {above} is not a folder, so nothing can be written there")
        if not os.access(above, os.W_OK | os.X_OK):
            raise StorageError(f"{out}: {above} cannot be written: permission denied, or read-only")


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Paths that cannot even be looked at: a name that is too long, links in a circle."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as problem:
        raise StorageError(f"{str(path)[:300]}: {getattr(problem, 'strerror', None) or problem}") from None


@contextmanager
def stopped_between_steps() -> Iterator[Reporter]:
    """Yield a reporter that ends the work at its next report of progress after a SIGTERM, or at once after a second.

    So a task that keeps checkpoints keeps one of the step that it has reached.
    """
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, ask)
    try:
        yield StopWhen(lambda: bool(asked))
    finally:
        signal.signal(signal.SIGTERM, former)


def _path_parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.annotation in (Path, Path | None, tuple[Path, ...])
    ]


if __name__ == "__main__":
    sys.exit(main())
