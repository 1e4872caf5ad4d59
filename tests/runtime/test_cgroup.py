"""The limits of containers, as the kernel's documentation describes the files of control groups v1 and v2."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from llmc.runtime import cgroup, cpus, memory
from llmc.runtime.backends import kv_cache
from llmc.runtime.cgroup import Limits, limits

GIB = 1 << 30
V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:30 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
NO_LIMIT_V1 = "9223372036854771712\n"


def files(root: Path, contents: Mapping[str, str]) -> Path:
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_version_2_in_a_container(tmp_path: Path) -> None:
    """With a namespace of its own, the container's group is the root of the mount."""
    files(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2.format(root="/"),
            "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory.high": "max\n",
            "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7\n",
            "sys/fs/cgroup/cpu.max": "150000 100000\n",
        },
    )
    assert limits(tmp_path) == Limits(4 * GIB, 2 * GIB, 2)


def test_version_1_in_a_container_without_a_namespace(tmp_path: Path) -> None:
    """/proc names the host's path, which is mounted as the root."""
    files(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n1:name=systemd:/docker/ab\n",
            "proc/self/mountinfo": V1.format(root="/docker/ab"),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 9\ntotal_inactive_file {GIB // 2}\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    )
    assert limits(tmp_path) == Limits(2 * GIB, 3 * GIB // 2, 1)


@pytest.mark.parametrize("where", ["job.slice", "job.slice/step.scope", ""])
def test_the_limit_of_a_group_above_counts(where: str, tmp_path: Path) -> None:
    group = f"sys/fs/cgroup/{where}/" if where else "sys/fs/cgroup/"
    files(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job.slice/step.scope\n",
            "proc/self/mountinfo": V2.format(root="/"),
            "sys/fs/cgroup/job.slice/step.scope/memory.max": "max\n",
            "sys/fs/cgroup/job.slice/step.scope/cpu.max": "max 100000\n",
            f"{group}memory.max": f"{GIB}\n",
            f"{group}memory.current": f"{3 * GIB}\n",  # a limit that was lowered
            f"{group}cpu.max": "10000 100000\n",
        },
    )
    assert limits(tmp_path) == Limits(GIB, 0, 1)


def test_memory_high_is_a_limit(tmp_path: Path) -> None:
    """Above it the kernel slows a process down until it does nothing else."""
    files(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2.format(root="/"),
            "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory.high": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{GIB}\n",
        },
    )
    assert limits(tmp_path) == Limits(3 * GIB, 2 * GIB, None)


@pytest.mark.parametrize(
    "contents",
    [
        {},
        {"proc/self/cgroup": "0::/x\n", "proc/self/mountinfo": V2.format(root="/")},
        {
            "proc/self/cgroup": "5:memory:/\n4:cpu,cpuacct:/\n0::/\n",
            "proc/self/mountinfo": V1.format(root="/"),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT_V1,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        {
            "proc/self/cgroup": "nonsense\n\n0::/../../etc\n",
            "proc/self/mountinfo": "x - cgroup2\n1 2 3 4 5 - cgroup2 c rw\n" + V2.format(root="/"),
            "sys/fs/cgroup/memory.max": "many\n",
            "sys/fs/cgroup/cpu.max": "1 2 3\n",
        },
    ],
)
def test_no_limit(contents: Mapping[str, str], tmp_path: Path) -> None:
    assert limits(files(tmp_path, contents)) == Limits()


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "limits", lambda: Limits(3 * GIB, GIB, 1))
    monkeypatch.setattr(memory, "_meminfo", lambda field: 64 * GIB)
    monkeypatch.setattr(cpus, "_affinity", lambda: set(range(8)))


@pytest.mark.usefixtures("container")
def test_what_follows_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (memory.total_memory(), memory.available_memory()) == (3 * GIB, GIB)
    assert kv_cache._default_memory() == GIB // 4
    assert (cpus.available_cpus(), cpus.default_threads(), cpus.default_threads(6)) == (1, 1, 6)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    cpus.limit_library_threads()
    assert cpus.os.environ["OMP_NUM_THREADS"] == "1"


def test_numpy_gets_half_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "_affinity", lambda: set(range(8)))
    monkeypatch.setattr(cgroup, "limits", Limits)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    cpus.limit_library_threads()
    assert cpus.os.environ["OPENBLAS_NUM_THREADS"] == "4"
    assert "OMP_NUM_THREADS" not in cpus.os.environ
    cpus.os.environ.pop("OPENBLAS_NUM_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    cpus.limit_library_threads()
    assert "OPENBLAS_NUM_THREADS" not in cpus.os.environ


@pytest.mark.usefixtures("container")
def test_doctor_shows_the_limits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.cli import doctor

    monkeypatch.setattr(doctor, "libraries", lambda: [])
    monkeypatch.setattr(doctor, "attention_fault", lambda: None)
    doctor.doctor()
    shown = capsys.readouterr().out
    assert "1 logical CPU for this process (the container's CPU quota)" in shown
    assert "3 GiB (the container's limit), 1 GiB of it available" in shown


def test_a_quota_above_the_cores_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "limits", lambda: Limits(cpus=64))
    assert cpus.default_threads() is None
    assert cpus.available_cpus() == len(cpus._affinity())
