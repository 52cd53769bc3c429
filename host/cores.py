"""How many cores of the CPU and how much memory this process may use."""

import contextlib
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # limits of the container, on Linux


def num_cores() -> int:
    """-> the cores of this process's affinity, or those of its container's quota if fewer."""
    ask = getattr(os, "sched_getaffinity", None)  # not on macOS
    num = len(ask(0)) if ask else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no quota
        quota, period = map(int, (CGROUP / "cpu.max").read_text().split())
        num = min(num, max(1, quota // period))
    return num


def memory_limit() -> int:
    """-> bytes of this machine's memory, or of its container's limit if fewer."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
        memory = min(memory, int((CGROUP / "memory.max").read_text()))
    return memory
