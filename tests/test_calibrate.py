"""The machine's profile: what psutil and cgroups say, and devices that are not there."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from moepic_core import calibrate
from moepic_core.calibrate import probe
from moepic_core.errors import BadSettings


def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(calibrate, "_cgroup_left", lambda: None)
    memory = psutil.virtual_memory()
    for device in ("auto", "cpu"):
        found = probe(device)
        assert (found.device, found.device_name) == ("cpu", "CPU")
        assert found.device_total_bytes == found.host_total_bytes == memory.total
        assert found.device_free_bytes == found.host_free_bytes == pytest.approx(memory.available, rel=0.2)
        assert found.cpu_cores >= 1
        assert found.link_bytes_per_s is None
    with pytest.raises(BadSettings, match="device 'cuda' is not available on this machine; use device 'cpu' or 'auto'"):
        probe("cuda")


def test_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7_000_000_000, 8_000_000_000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(calibrate, "_cgroup_left", lambda: 1234)
    for device in ("auto", "cuda"):
        found = probe(device)
        assert (found.device, found.device_name) == ("cuda", "A GPU")
        assert (found.device_free_bytes, found.device_total_bytes) == (7_000_000_000, 8_000_000_000)
        assert found.host_free_bytes == 1234
    assert probe("cpu").device == "cpu"


@pytest.mark.parametrize("left", [0, 5_000])
def test_a_container_has_what_its_cgroup_leaves(left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_cgroup_left", lambda: left)
    assert probe("cpu").device_free_bytes == probe("cpu").host_free_bytes == left


def cgroup(folder: Path, limit: str, used: int, cached: int, version: int) -> None:
    """Files as the kernel shows them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    key = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 1\n{key} {cached}\n")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return tmp_path / "own"


def test_version_2_of_a_container(tmp_path: Path, own: Path) -> None:
    own.write_text("0::/\n")
    cgroup(tmp_path, "1000", used=800, cached=300, version=2)
    assert calibrate._cgroup_left(own, tmp_path) == 500  # files in the page cache yield


def test_version_1_counts_the_tightest_of_the_own_and_the_top(tmp_path: Path, own: Path) -> None:
    own.write_text("5:cpu,cpuacct:/\n4:memory:/box/inner\n0::/\n")
    cgroup(tmp_path / "memory", "9223372036854771712", used=800, cached=0, version=1)
    cgroup(tmp_path / "memory" / "box" / "inner", "1000", used=300, cached=100, version=1)
    assert calibrate._cgroup_left(own, tmp_path) == 800


def test_a_full_cgroup_leaves_nothing(tmp_path: Path, own: Path) -> None:
    own.write_text("0::/\n")
    cgroup(tmp_path, "1000", used=1200, cached=0, version=2)
    assert calibrate._cgroup_left(own, tmp_path) == 0


@pytest.mark.parametrize("lines", ["", "0::/not/mounted\n", "3:cpu:/\n"])
def test_without_a_limit(lines: str, tmp_path: Path, own: Path) -> None:
    own.write_text(lines)
    assert calibrate._cgroup_left(own, tmp_path) is None
    cgroup(tmp_path, "max", used=1200, cached=0, version=2)
    assert calibrate._cgroup_left(own, tmp_path) is None
    assert calibrate._cgroup_left(tmp_path / "no-such-file", tmp_path) is None
