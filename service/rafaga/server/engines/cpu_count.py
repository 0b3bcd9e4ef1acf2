"""How many cores this process may use: by its affinity, or by the CPU limit of its container if that is lower.

Control groups are nested, and the lowest limit of a group and its parents applies. A container may see only the limit
of its own group, at the root of the tree, under a path as the host sees it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_GROUPS, _TREE = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def available_cores(groups: Path = _GROUPS, tree: Path = _TREE) -> int:
    """At least one. `groups` lists the groups of the process; `tree` is where all are mounted."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [limit for folder in _folders(groups, tree) if (limit := _limit(folder)) is not None]
    return min(cores, max(1, round(min(limits, default=cores))))


def _folders(groups: Path, tree: Path) -> Iterator[Path]:
    """The process's groups that can limit its CPU time, and their parents."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            root = tree  # version 2
        elif "cpu" in controllers.split(","):
            root = tree / "cpu"  # version 1
        else:
            continue
        own = PurePosixPath(path.lstrip("/"))
        yield from (root / group for group in (own, *own.parents))


def _limit(folder: Path) -> float | None:
    """The limit in cores. None: no limit, or not readable."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / file).read_text() for file in files).split()
            if quota != "max" and int(quota) > 0 and int(period) > 0:
                return int(quota) / int(period)
        except (OSError, ValueError):
            continue
    return None
