"""This machine: what it is, and how much memory is free."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine() -> dict[str, str | int | float]:
    """Return what this machine is: processor, cores, memory in GiB, system."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cores = os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "machine": f"{platform.machine()}, {cores} cores",
        "processor": next(names, platform.processor() or "unknown"),
        "memory GiB": round(memory, 1),
        "system": platform.system(),
    }


def free_memory() -> float:
    """Return the bytes of memory that new processes can take, a container's limit included."""
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = float(_number(Path("/proc/meminfo"), "MemAvailable:") * 1024 or pages)
    limit = _number(Path("/sys/fs/cgroup/memory.max"))
    used = _number(Path("/sys/fs/cgroup/memory.current"))
    return min(free, limit - used) if limit else free


def _number(path: Path, key: str = "") -> int:
    """Return the first number of the line of `path` that starts with `key`; 0 if there is none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    words = next((line.removeprefix(key).split() for line in lines if line.startswith(key)), [])
    return int(words[0]) if words and words[0].isdecimal() else 0
