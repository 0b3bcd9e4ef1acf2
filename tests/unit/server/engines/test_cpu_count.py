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
    folder = tmp_path / "sys" / "fs" / "cgroup"
    folder.mkdir(parents=True)
    return folder


def limit(folder: Path, quota: str | int, period: int = 100_000, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (folder / "cpu.max").write_text(f"{quota} {period}\n")
    else:
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / "cpu.cfs_period_us").write_text(f"{period}\n")


def cores_of(groups: str, tree: Path) -> int:
    """`groups`: the lines of /proc/self/cgroup."""
    file = tree.parent / "groups"
    file.write_text(groups)
    return available_cores(file, tree)


def test_without_proc(tree: Path) -> None:
    limit(tree, 200_000)
    assert available_cores(tree / "missing", tree) == CORES


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("150000", 2), ("50000", 1), ("1", 1), ("max", CORES), ("9900000", CORES), ("0", CORES), ("rubbish", CORES)],
)
def test_a_container_s_own_group(tree: Path, quota: str, cores: int) -> None:
    limit(tree, quota)
    assert cores_of("0::/\n", tree) == cores


@pytest.mark.parametrize(
    ("own", "pod", "slices", "cores"), [("max", 400, 800, 4), (300, 400, 800, 3), (600, 800, 2, 1)]
)
def test_the_tightest_limit_on_the_way_up_holds(tree: Path, own: str | int, pod: int, slices: int, cores: int) -> None:
    limit(tree / "kube", slices * 1000)
    limit(tree / "kube" / "pod", pod * 1000)
    limit(tree / "kube" / "pod" / "own", own if isinstance(own, str) else own * 1000)
    limit(tree / "kube" / "another", 1000)
    assert cores_of("0::/kube/pod/own\n", tree) == cores


@pytest.mark.parametrize("group", ["/docker/1234", "/docker/1234/inner", "/../..", "/elsewhere"])
def test_only_a_part_of_the_tree_is_mounted(tree: Path, group: str) -> None:
    """The path is as the host sees it, the files are where the container sees them."""
    limit(tree, 200_000)
    assert cores_of(f"0::{group}\n", tree) == 2


@pytest.mark.parametrize(("own", "around", "cores"), [(250_000, -1, 2), (-1, 500_000, 5), (400_000, 300_000, 3)])
def test_version_1(tree: Path, own: int, around: int, cores: int) -> None:
    """With an empty tree of version 2, as systemd mounts both."""
    cpu = tree / "cpu,cpuacct"
    limit(cpu / "docker" / "1234", own, version=1)
    limit(cpu / "docker", around, version=1)
    limit(cpu / "memory only", 100_000, version=1)
    (tree / "cpu").symlink_to(cpu)
    (tree / "unified").mkdir()
    groups = "9:memory:/memory only\n5:cpu,cpuacct:/docker/1234\n1:name=systemd:/memory only\n0::/docker/1234\n"
    assert cores_of(groups, tree) == cores


def test_what_cannot_be_read_limits_nothing(tree: Path) -> None:
    (tree / "cpu.max").mkdir()
    assert cores_of("0::/\nnonsense\n", tree) == CORES
