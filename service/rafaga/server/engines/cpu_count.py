"""How many cores this process may use: by its affinity, or by the CPU limit of its container if that is lower.

Control groups are nested, and the lowest limit of all parents applies. A container mounts only a part of the tree, in
one of two versions; the process's entries in /proc say where.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_SELF = Path("/proc/self")


def available_cores(process: Path = _SELF) -> int:
    """At least one. `process`: the folder in /proc."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [limit for folder in _folders(process) if (limit := _limit(folder)) is not None]
    return min(cores, max(1, round(min(limits, default=cores))))


class _Mount(NamedTuple):
    """`root`: the group that is seen at `point`. version: of control groups, 1 or 2."""

    version: int
    root: PurePosixPath
    point: Path


def _folders(process: Path) -> Iterator[Path]:
    """The process's groups that can limit its CPU time, and their visible parents."""
    try:
        groups = (process / "cgroup").read_text().splitlines()
        mounts = [mount for line in (process / "mountinfo").read_text().splitlines() if (mount := _mount(line))]
    except OSError:
        return  # not Linux
    for line in groups:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 2 if number == "0" else 1
        if version == 1 and "cpu" not in controllers.split(","):
            continue
        for mount in mounts:
            if mount.version == version:
                own = _below(mount, PurePosixPath(path))
                yield own
                yield from (folder for folder in own.parents if folder.is_relative_to(mount.point))


def _mount(line: str) -> _Mount | None:
    """Parses a line of mountinfo: ids, device, root, point, options … - kind, source, options. None: no cgroup."""
    place, _, about = (part.split() for part in line.partition(" - "))
    if len(place) < 5 or len(about) < 3:
        return None
    kind, options = about[0], about[2].split(",")
    if kind == "cgroup2" or (kind == "cgroup" and "cpu" in options):
        return _Mount(2 if kind == "cgroup2" else 1, PurePosixPath(place[3]), Path(place[4]))
    return None


def _below(mount: _Mount, group: PurePosixPath) -> Path:
    """The folder of `group`. If it lies outside the mount, as in a container without a cgroup namespace, the mount is
    the container's group."""
    if ".." in group.parts or not group.is_relative_to(mount.root):
        return mount.point
    return mount.point / group.relative_to(mount.root)


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
