"""Energy of the processors, from the RAPL counters of the Linux kernel, where they can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from peftree.evaluate.subject import Result, not_measured

_COUNTERS = Path("/sys/class/powercap")


class Meter:
    """Counts joules inside a `with` block: `with Meter() as m: ...` and then `m.joules`.

    The figure is that of whole processor packages: other processes on the machine count too, memory and graphics
    cards do not. A counter starts anew after some hours of work or less (its range); one such start is seen, a
    second one within the block is not, so measure blocks shorter than that.

    Args:
        counters: the folder of the kernel's counters.

    Attributes:
        joules: of the block just left; None where there is no counter, and before.
        reason: why it is None, one sentence; else empty.
    """

    def __init__(self, counters: Path = _COUNTERS) -> None:
        self.counters = counters
        self.joules: float | None = None
        self.reason = "The block has not ended."
        self._before: dict[Path, int] = {}

    def __enter__(self) -> Self:
        self._before = self._read()
        return self

    def __exit__(self, *error: object) -> None:
        after = self._read()
        shared = [zone for zone in self._before if zone in after]
        if not shared:
            self.reason = f"No energy counter can be read below {self.counters}."
            return
        try:
            used = [(after[z] - self._before[z]) % (_number(z / "max_energy_range_uj") + 1) for z in shared]
        except (OSError, ValueError):
            self.reason = f"The range of the counters below {self.counters} cannot be read."
            return
        self.joules, self.reason = sum(used) / 1e6, ""

    def result(self) -> Result:
        """Return `{"joules": x}`, or why it was not measured."""
        return not_measured(self.reason) if self.joules is None else {"joules": self.joules}

    def _read(self) -> dict[Path, int]:
        """Return microjoules by package; the parts of a package, `intel-rapl:0:1`, are in its sum already."""
        found: dict[Path, int] = {}
        for zone in sorted(self.counters.glob("intel-rapl:*")):
            if zone.name.count(":") == 1:
                try:
                    found[zone] = _number(zone / "energy_uj")
                except (OSError, ValueError):
                    return {}  # a sum that lacks a package is no measurement
        return found


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
