"""What the sensors say, and that a reading which a machine refuses costs that reading alone. Needs no GPU."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest

from app.sensors import MachineSource, RecordedSource, Sample, Sampler, open_gpu

GB = 10**9
NVML: dict[str, Any] = {
    "nvmlInit": None,
    "nvmlShutdown": None,
    "nvmlDeviceGetHandleByIndex": "first",
    "nvmlDeviceGetName": "Card 12",
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=9 * GB, total=12 * GB),
    "nvmlDeviceGetComputeRunningProcesses": [
        SimpleNamespace(pid=1, usedGpuMemory=2 * GB),
        SimpleNamespace(pid=os.getpid(), usedGpuMemory=6 * GB),
    ],
    "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=45),
    "nvmlDeviceGetPcieThroughput": 8_700_000,
    "nvmlDeviceGetCurrPcieLinkGeneration": 4,
    "nvmlDeviceGetCurrPcieLinkWidth": 16,
    "nvmlDeviceGetPowerUsage": 181_000,
    "nvmlDeviceGetEnforcedPowerLimit": 350_000,
    "nvmlDeviceGetTemperature": 61,
    "nvmlDeviceGetTemperatureThreshold": 87,
}
READINGS = {
    "gpu_name": "Card 12",
    "vram_used_bytes": 9 * GB,
    "vram_total_bytes": 12 * GB,
    "vram_own_bytes": 6 * GB,
    "gpu_use": 0.45,
    "pcie_in_bytes_per_s": 8.7e9,
    "pcie_out_bytes_per_s": 8.7e9,
    "pcie_limit_bytes_per_s": 16 * 1969e6,
    "power_w": 181.0,
    "power_limit_w": 350.0,
    "temperature_c": 61,
    "temperature_limit_c": 87,
}
# What is lost when one call is refused; the first two fields come from the same call each.
LOST = {
    "nvmlDeviceGetName": {"gpu_name"},
    "nvmlDeviceGetMemoryInfo": {"vram_used_bytes", "vram_total_bytes"},
    "nvmlDeviceGetComputeRunningProcesses": {"vram_own_bytes"},
    "nvmlDeviceGetUtilizationRates": {"gpu_use"},
    "nvmlDeviceGetPcieThroughput": {"pcie_in_bytes_per_s", "pcie_out_bytes_per_s"},
    "nvmlDeviceGetCurrPcieLinkGeneration": {"pcie_limit_bytes_per_s"},
    "nvmlDeviceGetCurrPcieLinkWidth": {"pcie_limit_bytes_per_s"},
    "nvmlDeviceGetPowerUsage": {"power_w"},
    "nvmlDeviceGetEnforcedPowerLimit": {"power_limit_w"},
    "nvmlDeviceGetTemperature": {"temperature_c"},
    "nvmlDeviceGetTemperatureThreshold": {"temperature_limit_c"},
}


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    """A GPU; and a way to change what one function answers or raises."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def answers(name: str, answer: Any) -> None:
        def function(*_: Any) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(pynvml, name, function)

    for name, answer in NVML.items():
        answers(name, answer)
    return answers


def test_all_readings_of_a_gpu(nvml: Any) -> None:
    source = MachineSource()
    sample = source.read()
    source.close()
    assert {name: getattr(sample, name) for name in READINGS} == READINGS
    assert (sample.source, sample.reason) == ("this machine", None)


@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_GPU_IS_LOST])
def test_a_refused_call_costs_its_own_reading(nvml: Any, name: str, error: int) -> None:
    nvml(name, pynvml.NVMLError(error))
    gpu, _ = open_gpu()
    assert gpu is not None
    assert gpu.read() == {**READINGS, **dict.fromkeys(LOST[name])}


def test_our_process_may_be_hidden_or_uncounted(nvml: Any) -> None:
    gpu, _ = open_gpu()
    assert gpu is not None
    for processes in ([], [SimpleNamespace(pid=1, usedGpuMemory=GB)],
                      [SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)]):  # fmt: skip
        nvml("nvmlDeviceGetComputeRunningProcesses", processes)
        assert gpu.read()["vram_own_bytes"] is None


@pytest.mark.parametrize("name", ["nvmlInit", "nvmlDeviceGetHandleByIndex"])
def test_without_a_gpu_the_machine_still_reads(nvml: Any, name: str) -> None:
    nvml(name, pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    source = MachineSource()
    sample = source.read()
    source.close()
    assert sample.reason == "no NVIDIA driver found"
    assert all(getattr(sample, name) is None for name in READINGS)
    assert sample.ram_used_bytes is not None
    assert 0 < sample.ram_used_bytes < (sample.ram_total_bytes or 0)
    assert sample.cpu_use is not None


@pytest.mark.parametrize(
    ("visible", "wanted"), [(None, 0), ("", 0), ("3", 3), ("2,0", 2), ("GPU-abc", "GPU-abc"), ("MIG-x,1", "MIG-x")]
)
def test_the_gpu_is_the_one_that_cuda_calls_the_first(
    nvml: Any, monkeypatch: pytest.MonkeyPatch, visible: str | None, wanted: int | str
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda name: name)
    gpu, _ = open_gpu()
    assert gpu is not None
    assert gpu.handle == wanted


def test_disk_rates_are_between_two_readings(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 12.5])
    totals = iter([1000, 1000 + 500_000_000, 1000 + 500_000_000])
    monkeypatch.setattr("app.sensors.time.monotonic", lambda: next(clock))
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: SimpleNamespace(read_bytes=next(totals)))
    source = MachineSource()
    assert [source.read().disk_read_bytes_per_s for _ in range(3)] == [None, 250e6, 0.0]
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: None)
    last = source.read()
    assert (last.disk_read_bytes_per_s, last.disk_limit_bytes_per_s) == (None, None)
    assert source._disk_limit == 250e6
    source.close()


def test_a_recording_says_that_it_is_one(tmp_path: Path) -> None:
    path = tmp_path / "card.jsonl"
    path.write_text("".join(json.dumps({"gpu_use": use, "source": "this machine"}) + "\n" for use in (0.1, 0.2)))
    source = RecordedSource(path)
    assert [source.read() for _ in range(3)] == [Sample("recorded: card.jsonl", gpu_use=use) for use in (0.1, 0.2, 0.1)]


@pytest.mark.parametrize("text", ["", '{"gpu_use": 0.1}\n{"gpu": 1}\n', "[1]\n"])
def test_a_recording_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "card.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"card\.jsonl"):
        RecordedSource(tmp_path / "card.jsonl")


def test_the_sampler_keeps_the_newest_sample_and_ends() -> None:
    reads, closed, enough = [], [], threading.Event()

    class Source:
        def read(self) -> Sample:
            reads.append(threading.current_thread().name)
            if len(reads) == 3:
                enough.set()
            return Sample(gpu_use=float(len(reads)))

        def close(self) -> None:
            closed.append(len(reads))

    sampler = Sampler(Source, period_s=0.001)
    assert enough.wait(5)
    sampler.close()
    assert sampler.last == Sample(gpu_use=float(len(reads)))
    assert closed == [len(reads)]
    assert set(reads) == {"moepic-sensors"}
    assert not [thread for thread in threading.enumerate() if thread.name == "moepic-sensors"]
