"""How many threads are permitted, by readings of systems that this one is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hfcompress.utils import processors
from hfcompress.utils.processors import control_groups, cpu_quota, default_threads, thread_counts, throttled_seconds


@pytest.fixture(autouse=True)
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of eight processors that says nothing of threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(processors, "permitted_processors", lambda: list(range(8)))


def system(folder: Path, groups: str, mounts: dict[str, str], **files: str) -> Path:
    """A root with `/proc/self/cgroup`, mounts as `{place: "root kind options"}`, and files below `/sys`."""
    own = folder / "proc" / "self"
    own.mkdir(parents=True)
    (own / "cgroup").write_text(groups)
    lines = ["22 1 0:20 / /proc rw,nosuid - proc proc rw"]
    for place, told in mounts.items():
        root, kind, options = told.split()
        lines.append(f"30 22 0:26 {root} {place} rw,relatime shared:4 - {kind} cgroup {options}")
    (own / "mountinfo").write_text("\n".join(lines) + "\n")
    for name, text in files.items():
        file = folder / "sys" / "fs" / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


V2 = {"/sys/fs/cgroup": "/ cgroup2 rw"}


@pytest.mark.parametrize(
    ("maximum", "quota", "threads"),
    [("max 100000\n", None, 8), ("300000 100000\n", 3.0, 3), ("150000 100000\n", 1.5, 1), ("50000 100000\n", 0.5, 1),
     ("6400000 100000\n", 64.0, 8), ("nonsense\n", None, 8), ("", None, 8)],
)  # fmt: skip
def test_a_containers_quota_is_kept_to(tmp_path: Path, maximum: str, quota: float | None, threads: int) -> None:
    root = system(tmp_path, "0::/\n", V2, **{"cpu.max": maximum})
    assert cpu_quota(root) == quota
    assert default_threads(root) == threads


def test_the_smallest_quota_on_the_way_up_counts(tmp_path: Path) -> None:
    files = {"pod/box/cpu.max": "max 100000", "pod/cpu.max": "200000 100000", "cpu.max": "400000 100000"}
    root = system(tmp_path, "0::/pod/box\n", V2, **files)
    assert cpu_quota(root) == 2.0
    place = tmp_path / "sys" / "fs" / "cgroup"
    assert list(control_groups(root)) == [place / "pod" / "box", place / "pod", place]


def test_a_quota_of_version_1_is_kept_to_in_a_container_that_shows_its_group_as_the_root(tmp_path: Path) -> None:
    groups = "4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n0::/docker/abc\n"
    mounts = {"/sys/fs/cgroup/cpu,cpuacct": "/docker/abc cgroup rw,cpu,cpuacct",
              "/sys/fs/cgroup/cpuset": "/docker/abc cgroup rw,cpuset"}  # fmt: skip
    files = {"cpu,cpuacct/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
             "cpuset/cpu.cfs_quota_us": "100000\n", "cpuset/cpu.cfs_period_us": "100000\n"}  # fmt: skip
    root = system(tmp_path, groups, mounts, **files)
    assert cpu_quota(root) == 2.5
    assert default_threads(root) == 2
    (tmp_path / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_quota(root) is None


@pytest.mark.parametrize("path", ["/elsewhere/box", "/../../other"])
def test_a_group_outside_of_what_the_mount_shows_is_the_mounts_root(tmp_path: Path, path: str) -> None:
    root = system(tmp_path, f"0::{path}\n", {"/sys/fs/cgroup": "/pod/box cgroup2 rw"}, **{"cpu.max": "100000 100000"})
    assert cpu_quota(root) == 1.0


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert default_threads(tmp_path) == 8
    assert throttled_seconds(tmp_path) == 0


def test_what_a_quota_held_back_is_read_of_both_versions(tmp_path: Path) -> None:
    stat = "usage_usec 9\nnr_throttled 3\nthrottled_usec 1500000\n"
    assert throttled_seconds(system(tmp_path / "2", "0::/\n", V2, **{"cpu.stat": stat})) == 1.5
    mounts = {"/sys/fs/cgroup": "/ cgroup rw,cpu"}
    stat = "nr_periods 4\nnr_throttled 2\nthrottled_time 250000000\n"
    assert throttled_seconds(system(tmp_path / "1", "2:cpu:/\n", mounts, **{"cpu.stat": stat})) == 0.25


@pytest.mark.parametrize(
    ("asked", "threads"), [("3", 3), ("3,2", 3), ("64", 8), ("0", 8), ("-1", 8), ("many", 8), ("", 8)]
)
def test_omp_num_threads_is_kept_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, threads: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert default_threads(tmp_path) == threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no CPU affinity")
def test_affinity_is_kept_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {max(before)})
        assert processors.permitted_processors() == [max(before)]
        assert default_threads(tmp_path) == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(("most", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_threads_worth_trying(most: int, counts: list[int]) -> None:
    assert thread_counts(most) == counts
