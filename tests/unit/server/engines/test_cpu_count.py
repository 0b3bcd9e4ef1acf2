"""The CPU limit of a container, from simulated trees of control groups of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from rafaga.server.engines.cpu_count import available_cores

CORES = 16


@pytest.fixture(autouse=True)
def affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(CORES)), raising=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "cgroup"
    folder.mkdir()
    return folder


def cores_of(groups: str, tree: Path) -> int:
    """`groups`: the lines of /proc/self/cgroup."""
    file = tree.parent / "groups"
    file.write_text(groups)
    return available_cores(file, tree)


# By folder, in thousandths of a core.
POD = {"kube": 8000, "kube/pod": 4000, "kube/another": 1}


@pytest.mark.parametrize(
    ("group", "quotas", "cores"),
    [
        *(("/", {"": quota}, cores) for quota, cores in ((1500, 2), (500, 1), (1, 1), (99_000, CORES), (0, CORES))),
        *(("/", {"": no_limit}, CORES) for no_limit in ("max", "rubbish")),
        # The tightest limit on the way up holds.
        ("/kube/pod/own", POD | {"kube/pod/own": "max"}, 4),
        ("/kube/pod/own", POD | {"kube/pod/own": 3000}, 3),
        ("/kube/pod/own", POD | {"kube/pod/own": 6000, "kube": 1000}, 1),
        # The path is as the host sees it, and only a part of its tree is mounted.
        *((group, {"": 2000}, 2) for group in ("/docker/1234", "/docker/1234/inner", "/../..", "/elsewhere")),
    ],
)
def test_version_2(tree: Path, group: str, quotas: dict[str, int | str], cores: int) -> None:
    for folder, quota in quotas.items():
        (tree / folder).mkdir(parents=True, exist_ok=True)
        (tree / folder / "cpu.max").write_text(f"{quota if isinstance(quota, str) else 100 * quota} 100000\n")
    assert cores_of(f"0::{group}\n", tree) == cores


@pytest.mark.parametrize(("own", "around", "cores"), [(250_000, -1, 2), (-1, 500_000, 5), (400_000, 300_000, 3)])
def test_version_1(tree: Path, own: int, around: int, cores: int) -> None:
    """With an empty tree of version 2, as systemd mounts both."""
    cpu = tree / "cpu,cpuacct"
    for folder, quota in (("docker/1234", own), ("docker", around), ("memory only", 100_000)):
        (cpu / folder).mkdir(parents=True, exist_ok=True)
        (cpu / folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (cpu / folder / "cpu.cfs_period_us").write_text("100000\n")
    (tree / "cpu").symlink_to(cpu)
    (tree / "unified").mkdir()
    groups = "9:memory:/memory only\n5:cpu,cpuacct:/docker/1234\n1:name=systemd:/memory only\n0::/docker/1234\n"
    assert cores_of(groups, tree) == cores


def test_what_cannot_be_read_limits_nothing(tree: Path) -> None:
    assert available_cores(tree / "missing", tree) == CORES
    (tree / "cpu.max").mkdir()
    assert cores_of("0::/\nnonsense\n", tree) == CORES
