"""Energy that this machine's processors took, where the platform tells: Linux's powercap counters (Intel and AMD RAPL).

They count the whole machine, so with other work beside a stage its figure is an upper bound. macOS tells root only.
"""

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")  # one folder a package: energy_uj counts microjoules and wraps around


class Meter:
    """Started when it is made."""

    def __init__(self, counters: Path = POWERCAP) -> None:
        """Read the counters; where there are none, or they are not readable, nothing is told."""
        self._packages = [path for path in sorted(counters.glob("*-rapl:*")) if path.name.count(":") == 1]
        self._begun = self._read()

    def joules(self) -> float | None:
        """Since the start; None where the platform does not tell."""
        now = self._read()
        if not self._begun or len(now) != len(self._begun):
            return None
        spent = [(end - begin) % (limit + 1) for (begin, limit), (end, _) in zip(self._begun, now, strict=True)]
        return round(sum(spent) / 1e6, 1)

    def _read(self) -> list[tuple[int, int]]:
        """Microjoules and the largest value of each counter."""
        try:
            names = ("energy_uj", "max_energy_range_uj")
            return [tuple(int((path / name).read_text(encoding="utf-8")) for name in names) for path in self._packages]  # pyright: ignore[reportReturnType]
        except (OSError, ValueError):
            return []
