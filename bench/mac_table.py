"""Contributed reports of `bench/mac.py`: bench/reports/mac_CHIP.json, and the table of them in docs/hardware.md.

python bench/mac_table.py                                  # print the table of all reports
python bench/mac_table.py --write                          # into docs/hardware.md
python bench/mac_table.py --add reports/bench-mac.json     # check a report, copy it in under its name, and write
"""

import argparse
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mac_report import FORMAT, OURS

from ado_tasks.errors import AdoError, ArtifactError
from ado_tasks.storage import atomic_file, read_json

ROOT = Path(__file__).parents[1]
REPORTS, PAGE = ROOT / "bench" / "reports", ROOT / "docs" / "hardware.md"
BEGIN, END = "<!-- python bench/mac_table.py --write -->", "<!-- end of the table -->"
PARTS = ("training", "sampling")
STEPS = 50  # of the teacher: what whole chains are quicker than
HEAD = (
    "| machine | network | batch | training, images/s | of PyTorch's best | sampling, images/s | of PyTorch's best "
    "| whole chain, over the teacher |",
    "|---|---|---|---|---|---|---|---|",
)
PRIVATE = re.compile(r"/(?:home|Users|root|tmp|private)/")  # a path would name a user


def read_report(path: Path) -> dict[str, Any]:
    """A report of `mac.py`, complete and of this format.

    Raises:
        ArtifactError: it is none, another format's, lacks a part, is of other steps, names no chip, holds a path of the
            machine, or figures of another kind than the table is made of.
    """
    report = read_json(path, "kind", "format", "machine", "precision", "versions", "settings", "networks")
    try:
        _check(path, report)
        table([report])  # a report that is kept and cannot be tabled would stop every later one
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        found = f"{type(problem).__name__}: {problem}"
        raise ArtifactError(f"{path}: not what bench/mac.py writes, damaged or edited ({found})") from None
    return report


def _check(path: Path, report: Mapping[str, Any]) -> None:
    if (report["kind"], report["format"]) != ("bench-mac", FORMAT):
        found = f"{report['kind']!r}, format {report['format']!r}"
        raise ArtifactError(f"{path}: {found}; allowed: 'bench-mac', format {FORMAT}")
    for where, part, keys in (
        ("machine", report["machine"], ("chip", "device", "memory_gib", "cores", "os")),
        *((f"networks.{name}", network, (*PARTS, "chain")) for name, network in report["networks"].items()),
        *(
            (f"networks.{name}.{part}", network.get(part, {}), ("batch", "forms"))
            for name, network in report["networks"].items()
            for part in PARTS
        ),
    ):
        missing = [key for key in keys if key not in part]
        if missing:
            raise ArtifactError(f"{path}: {where} has no {', '.join(missing)}; made by another version, or damaged")
    if report["settings"].get("steps") != STEPS:
        raise ArtifactError(
            f"{path}: settings.steps is {report['settings'].get('steps')}; allowed: {STEPS}, as all have"
        )
    private = PRIVATE.search(path.read_text(encoding="utf-8"))
    if private:
        raise ArtifactError(f"{path}: holds a path ({private.group()}…); allowed: none, it would name a user")
    if file_name(report) == "mac_.json" or not re.fullmatch(r"[^|\r\n]+", chip(report)):
        raise ArtifactError(f"{path}: machine: chip {chip(report)!r}; allowed: one line with a letter a-z or a digit")


def chip(report: Mapping[str, Any]) -> str:
    """What MLX computed on: the GPU, or the processor."""
    machine = report["machine"]
    return str(machine["chip"] if machine["device"] == "cpu" else machine["device"])


def file_name(report: Mapping[str, Any]) -> str:
    """Under which a report is kept: mac_apple-m2-pro.json. A second one of the same chip adds a word of its own."""
    return f"mac_{re.sub(r'[^a-z0-9]+', '-', chip(report).lower()).strip('-')}.json"


def all_reports(folder: Path = REPORTS) -> list[dict[str, Any]]:
    """Every contributed report, by name. Raises ArtifactError where one cannot be read, or has another chip's name."""
    found = []
    for path in sorted(folder.glob("mac_*.json")):
        report = read_report(path)
        if not path.stem.startswith(Path(file_name(report)).stem):
            raise ArtifactError(
                f"{path}: is of {chip(report)}; allowed: {file_name(report)}, or that with a word added"
            )
        found.append(report)
    return found


def table(reports: Sequence[Mapping[str, Any]]) -> str:
    """A row a network: images a second of MLX compiled, beside PyTorch's quickest form, and the quickest variant."""
    if not reports:
        return "No report is recorded yet."
    rows: list[str] = [*HEAD]
    for report in reports:
        machine = report["machine"]
        named = f"{chip(report)}, {machine['memory_gib']} GiB, {machine['os']}"
        for name, network in report["networks"].items():
            cells = [named, name, " / ".join(dict.fromkeys(str(network[part]["batch"]) for part in PARTS))]
            for part in PARTS:
                cells += [_speed(network[part]["forms"]), _against_pytorch(network[part]["forms"])]
            rows.append(f"| {' | '.join([*cells, _chain(network['chain'])])} |")
    return "\n".join(rows)


def _speed(forms: Mapping[str, Any]) -> str:
    return f"{forms[OURS]['images_per_s']['median']:.4g}" if "ms" in forms.get(OURS, {}) else "–"


def _against_pytorch(forms: Mapping[str, Any]) -> str:
    """How many times quicker MLX compiled is than the form of PyTorch that is quickest."""
    gains = {
        form.removeprefix("pytorch "): entry["mlx_compiled_is_quicker"]
        for form, entry in forms.items()
        if form.startswith("pytorch") and "mlx_compiled_is_quicker" in entry
    }
    if not gains:
        return "–"
    form = min(gains, key=lambda each: gains[each]["median"])
    return f"{_times(gains[form])} ({form})"


def _chain(chain: Sequence[Mapping[str, Any]]) -> str:
    if not chain:
        return "–"
    best = max(chain, key=lambda entry: entry["quicker_than_teacher_in"][OURS]["median"])
    return f"{best['name']}: {_times(best['quicker_than_teacher_in'][OURS])}"


def _times(value: Mapping[str, Any]) -> str:
    low, high = value["quartiles"]
    return f"{value['median']:.3g}× [{low:.3g}, {high:.3g}]"


def with_table(page: str, reports: Sequence[Mapping[str, Any]]) -> str:
    """A page with the table between its marks renewed. Raises ArtifactError where it has no such marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ArtifactError(f"the page has no {BEGIN} … {END}: the table stands between them")
    return f"{before}{BEGIN}\n{table(reports)}\n{END}{after}"


def add(path: Path, folder: Path = REPORTS) -> Path:
    """Copy a report to where they are kept. Raises ArtifactError where it is none, or its name is taken."""
    kept = folder / file_name(read_report(path))
    if kept.exists():
        if kept.read_bytes() == path.read_bytes():
            return kept
        raise ArtifactError(f"{kept}: is there already; remove it first, or copy {path} beside it with a word added")
    with atomic_file(kept) as partial:
        shutil.copyfile(path, partial)
    return kept


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"renew the table of {PAGE.relative_to(ROOT)}")
    parser.add_argument("--add", type=Path, help="a report to contribute; renews the table too")
    options = parser.parse_args(arguments)
    try:
        if options.add:
            print(f"kept as {add(options.add).relative_to(ROOT)}")
        reports = all_reports()
        if options.write or options.add:
            page = with_table(PAGE.read_text(encoding="utf-8"), reports)
            with atomic_file(PAGE) as partial:
                partial.write_text(page, encoding="utf-8")
        print(table(reports))
    except AdoError as problem:
        print(f"mac_table: {type(problem).__name__}: {problem}", file=sys.stderr)
        return problem.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
