"""How many cores a control group leaves a process: what is read below /proc and /sys/fs/cgroup."""

import pytest

from cubn.backends.cores import cores, quotas

V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu"


def quotas_of(root, groups, files):
    """Of a system on which this process's groups and some files are as given."""
    if groups is not None:
        files = {"proc/self/cgroup": groups} | files
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return [*quotas(root)]


def v1(group, quota, period="100000\n"):
    return {f"{V1}/{group}cpu.cfs_quota_us": quota, f"{V1}/{group}cpu.cfs_period_us": period}


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {f"{V2}/cpu.max": "150000 100000\n"}, [1.5]),
        ("0::/a/b\n", {f"{V2}/a/b/cpu.max": "300000 100000\n", f"{V2}/a/cpu.max": "50000 100000\n"}, [3.0, 0.5]),
        ("0::/a/b\n", {f"{V2}/a/b/cpu.max": "max 100000\n", f"{V2}/cpu.max": "200000 100000\n"}, [2.0]),
        ("0::/of/the/host\n", {f"{V2}/cpu.max": "200000 100000\n"}, [2.0]),
        ("0::/../other\n", {f"{V2}/cpu.max": "200000 100000\n"}, [2.0]),
        ("0::/a:b\n", {f"{V2}/a:b/cpu.max": "200000 100000\n"}, [2.0]),
        (b"0::/\xff\n", {f"{V2}/cpu.max": "200000 100000\n"}, [2.0]),
        ("4:cpu,cpuacct:/docker/1\n", v1("", "250000\n"), [2.5]),
        ("4:cpuacct,cpu:/a\n0::/\n", v1("a/", "250000\n") | v1("", "-1\n"), [2.5]),
        ("4:memory:/a\n3:cpuset:/a\n", v1("a/", "250000\n"), []),
        ("0::/\n", {f"{V2}/cpu.max": "max 100000\n"}, []),
        ("4:cpu:/\n", v1("", "-1\n"), []),
        ("0::/\n", {}, []),
        (None, {f"{V2}/cpu.max": "200000 100000\n"}, []),
        ("", {f"{V2}/cpu.max": "200000 100000\n"}, []),
        ("garbage\n::\n\n", {}, []),
        *[
            ("0::/\n", {f"{V2}/cpu.max": text}, [])
            for text in ("", "two", "200000", "1 2 3", "inf 1", "nan 1", "1 nan", "1 0", "1 -1", "0 1", b"\xff 1")
        ],
        ("4:cpu:/\n", {f"{V1}/cpu.cfs_quota_us": "250000\n"}, []),
    ],
)
def test_quotas_of_all_groups_around_the_process(tmp_path, groups, files, expected):
    assert quotas_of(tmp_path, groups, files) == expected


@pytest.mark.parametrize(
    ("found", "expected"), [([], 8), ([1.5], 2), ([2.0], 2), ([0.5, 3.0], 1), ([0.001], 1), ([64.0], 8)]
)
def test_the_least_of_affinity_and_quotas_rounded_up(monkeypatch, found, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {*range(8)}, raising=False)
    monkeypatch.setattr("cubn.backends.cores.quotas", lambda _: iter(found))
    assert cores() == expected
