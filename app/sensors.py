"""What the machine itself says twice a second: GPU through NVML, RAM, CPU and disk through psutil.

`watch` keeps one `Sampler` for all tabs, `gauges` turns its last `Sample` into words. A reading is a number, or None
where this machine does not give it: each call is made by itself, since WSL, virtual GPUs and containers refuse some.
These figures are about the whole machine. What experts cost is counted by the engine, never here.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil

PERIOD_S = 0.5
LANE_BYTES_PER_S = {1: 250e6, 2: 500e6, 3: 985e6, 4: 1969e6, 5: 3938e6, 6: 7563e6}  # by generation of PCIe
DISK_SCALE_BYTES_PER_S = 100e6  # a full bar, until the disk was seen to be faster


@dataclass(frozen=True)
class Sample:
    """One instant. `None` means not available, never zero."""

    source: str = "this machine"
    reason: str | None = None  # why there is no GPU reading
    gpu_name: str | None = None
    vram_used_bytes: int | None = None  # by all programs, as the driver says
    vram_total_bytes: int | None = None
    vram_own_bytes: int | None = None  # by this process, as the driver says
    gpu_use: float | None = None  # 0..1
    pcie_in_bytes_per_s: float | None = None  # towards the GPU, over the driver's window of 20 ms
    pcie_out_bytes_per_s: float | None = None
    pcie_limit_bytes_per_s: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: float | None = None
    temperature_limit_c: float | None = None
    ram_used_bytes: int | None = None
    ram_total_bytes: int | None = None
    ram_own_bytes: int | None = None  # by this process, without files that would yield
    cpu_use: float | None = None  # 0..1, all cores
    disk_read_bytes_per_s: float | None = None
    disk_limit_bytes_per_s: float | None = None  # the most seen so far


class Source(Protocol):
    def read(self) -> Sample: ...

    def close(self) -> None: ...


class MachineSource:
    """The machine that this runs on."""

    def __init__(self) -> None:
        self._gpu, self._reason = open_gpu()
        self._process = psutil.Process()
        self._disk: tuple[float, int] | None = None  # when, bytes read until then
        self._disk_limit = DISK_SCALE_BYTES_PER_S
        psutil.cpu_percent()  # says what happened since it was asked before

    def read(self) -> Sample:
        memory, disk = psutil.virtual_memory(), self._disk_rate()
        sample = Sample(
            reason=self._reason,
            ram_used_bytes=memory.total - memory.available,
            ram_total_bytes=memory.total,
            ram_own_bytes=_own_ram(self._process),
            cpu_use=psutil.cpu_percent() / 100,
            disk_read_bytes_per_s=disk,
            disk_limit_bytes_per_s=self._disk_limit if disk is not None else None,
        )
        return sample if self._gpu is None else replace(sample, **self._gpu.read())

    def close(self) -> None:
        if self._gpu is not None:
            self._gpu.close()

    def _disk_rate(self) -> float | None:
        counters = psutil.disk_io_counters()
        if counters is None:
            return None
        before, self._disk = self._disk, (time.monotonic(), int(counters.read_bytes))
        if before is None:
            return None
        seconds, nbytes = self._disk[0] - before[0], self._disk[1] - before[1]
        rate = max(0.0, nbytes / seconds) if seconds > 0 else 0.0
        self._disk_limit = max(self._disk_limit, rate)
        return rate


def _own_ram(process: psutil.Process) -> int:
    """What would be free again if this process were gone: mapped files yield anyway."""
    memory = process.memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


class RecordedSource:
    """Replays samples from a file, one JSON object with fields of `Sample` per line; each says where it is from.

    For machines without the hardware, in tests and benchmarks. Raises ValueError with the line that is no sample.
    """

    def __init__(self, path: Path) -> None:
        known = {field.name for field in fields(Sample)}
        self._samples: list[Sample] = []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            values = json.loads(line)
            if not isinstance(values, dict) or values.keys() - known:
                raise ValueError(f"{path.name}, line {number}: no sample: {line[:80]}")
            self._samples.append(Sample(**{**values, "source": f"recorded: {path.name}"}))
        if not self._samples:
            raise ValueError(f"{path.name} holds no sample")
        self._next = 0

    def read(self) -> Sample:
        sample = self._samples[self._next % len(self._samples)]
        self._next += 1
        return sample

    def close(self) -> None:
        pass


class Repeater:
    """A thread that calls `work` at once and then every `period_s`, until it is closed. `work` sees when that is."""

    def __init__(self, name: str, period_s: float, work: Callable[[threading.Event], None]) -> None:
        self._period_s, self._work = period_s, work
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._work(self._closed)
            if self._closed.wait(self._period_s):
                return


class Sampler:
    """Keeps the newest sample of a source. Opens it in its own thread: a driver may take seconds to answer at first."""

    def __init__(self, make: Callable[[], Source] = MachineSource, period_s: float = PERIOD_S) -> None:
        self.last: Sample | None = None
        self._make = make
        self._source: Source | None = None
        self._repeater = Repeater("moepic-sensors", period_s, self._sample)

    def close(self) -> None:
        self._repeater.close()
        if self._source is not None:
            self._source.close()

    def _sample(self, closed: threading.Event) -> None:
        if self._source is None:
            self._source = self._make()
        self.last = self._source.read()


# ---- NVML ----


class Gpu(NamedTuple):
    """One GPU behind NVML, NVIDIA's own library; its Python package is nvidia-ml-py."""

    nvml: Any
    handle: Any

    def read(self) -> Mapping[str, Any]:
        """The fields of a Sample that NVML knows."""
        nvml = self.nvml
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        use = self._ask("nvmlDeviceGetUtilizationRates")
        into = self._ask("nvmlDeviceGetPcieThroughput", nvml.NVML_PCIE_UTIL_RX_BYTES)  # kB/s; RX of the GPU
        out = self._ask("nvmlDeviceGetPcieThroughput", nvml.NVML_PCIE_UTIL_TX_BYTES)
        lane = LANE_BYTES_PER_S.get(self._ask("nvmlDeviceGetCurrPcieLinkGeneration"))
        width = self._ask("nvmlDeviceGetCurrPcieLinkWidth")
        power, limit = self._ask("nvmlDeviceGetPowerUsage"), self._ask("nvmlDeviceGetEnforcedPowerLimit")  # mW
        name = self._ask("nvmlDeviceGetName")
        return {
            "gpu_name": name.decode() if isinstance(name, bytes) else name,
            "vram_used_bytes": None if memory is None else int(memory.used),
            "vram_total_bytes": None if memory is None else int(memory.total),
            "vram_own_bytes": self._own_bytes(),
            "gpu_use": None if use is None else use.gpu / 100,
            "pcie_in_bytes_per_s": None if into is None else into * 1e3,
            "pcie_out_bytes_per_s": None if out is None else out * 1e3,
            "pcie_limit_bytes_per_s": None if lane is None or width is None else lane * width,
            "power_w": None if power is None else power / 1e3,
            "power_limit_w": None if limit is None else limit / 1e3,
            "temperature_c": self._ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            "temperature_limit_c": self._ask(
                "nvmlDeviceGetTemperatureThreshold", nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
            ),
        }

    def close(self) -> None:
        self.nvml.nvmlShutdown()

    def _ask(self, function: str, *arguments: Any) -> Any:
        """One reading, or None where this machine does not give it."""
        try:
            return getattr(self.nvml, function)(self.handle, *arguments)
        except self.nvml.NVMLError:
            return None

    def _own_bytes(self) -> int | None:
        """None also where a container hides which process is ours."""
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses") or []
        own = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
        return own[0] if own else None


def open_gpu() -> tuple[Gpu | None, str | None]:
    """The GPU that CUDA calls the first, or why there is none to read."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return Gpu(pynvml, _first_device(pynvml)), None
    except pynvml.NVMLError_LibraryNotFound:
        return None, "no NVIDIA driver found"
    except pynvml.NVMLError as error:
        return None, str(error)


def _first_device(nvml: Any) -> Any:
    """NVML counts all GPUs, CUDA only those that CUDA_VISIBLE_DEVICES names."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    if first.startswith(("GPU-", "MIG-")):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    return nvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdecimal() else 0)
