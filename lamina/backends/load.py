"""How busy the machine is: a timing made beside other work is worth less, and says so."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from lamina.backends.backend import usable_cores


@dataclass(frozen=True)
class MachineLoad:
    """What else the machine does.

    Attributes:
        cores: Cores this process may use.
        average: One-minute load average, or None where the system has none.
        busy: Share of all cores' time that others used during the sample (a hypervisor's other guests
            included, this process and idle time not), or None where it cannot be read.
    """

    cores: int
    average: float | None
    busy: float | None

    @property
    def quiet(self) -> bool:
        """Whether timings can be trusted: less than a fifth of the machine is used by others."""
        return self.busy is None or self.busy < 0.2

    def __str__(self) -> str:
        busy = "unknown" if self.busy is None else f"{self.busy:.0%}"
        average = "unknown" if self.average is None else f"{self.average:.1f}"
        return f"{self.cores} cores, load average {average}, {busy} busy with other work"


def machine_load(seconds: float = 0.1) -> MachineLoad:
    """Sample how busy the machine is with other work; sleeps for ``seconds``."""
    average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    before, own_before = _busy_and_total(), time.process_time()
    time.sleep(seconds)
    after, own = _busy_and_total(), time.process_time() - own_before
    busy = None
    if before is not None and after is not None and after[1] > before[1]:
        ticks = os.sysconf("SC_CLK_TCK")
        others = (after[0] - before[0]) - own * ticks
        busy = min(1.0, max(0.0, others / (after[1] - before[1])))
    return MachineLoad(usable_cores(), average, busy)


def _busy_and_total() -> tuple[float, float] | None:
    try:
        fields = [float(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    total = sum(fields)
    idle = fields[3] + fields[4]
    return total - idle, total
