"""The versions of the packages that compute: a file that DVC stages depend on, kept equal to `uv.lock`.

A new release of a logger must not retrain a model; a new release of MLX must. `uv.lock` changes with both, so stages
depend on this extract of it instead.
"""

import argparse
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from ado_tasks.errors import ConfigError
from ado_tasks.storage import read_json, write_json

NUMERIC = ("mlx", "numpy", "scipy", "scikit-learn", "pandas", "pillow", "matplotlib")
FILE = Path("numeric-versions.json")


def locked(lock: Path = Path("uv.lock")) -> dict[str, str]:
    """The locked version of each package that computes. Raises ConfigError where the lock has none, or two, of one."""
    packages = tomllib.loads(lock.read_text(encoding="utf-8"))["package"]
    found: dict[str, str] = {}
    for name in NUMERIC:
        versions = [package["version"] for package in packages if package["name"] == name]
        if len(versions) != 1:
            raise ConfigError(f"{lock}: exactly one version of {name} is required, found {versions}")
        found[name] = versions[0]
    return found


def check_installed(file: Path = FILE) -> None:
    """Raise ConfigError where an installed package is not the version that the stages were locked with."""
    wrong = {name: version(name) for name, wanted in read_json(file).items() if version(name) != wanted}
    if wrong:
        raise ConfigError(f"installed packages differ from {file}: {wrong}; run `make install`")


def main() -> int:
    """Write the extract, or say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {FILE}")
    if parser.parse_args().write:
        write_json(FILE, locked())
    return 0 if read_json(FILE) == locked() else 1


if __name__ == "__main__":
    sys.exit(main())
