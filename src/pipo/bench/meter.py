"""Memory and time of this process, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
import time
from pathlib import Path

import torch

from pipo.errors import ConfigError

MALLOC_MMAP_THRESHOLD = -3
LARGE_BYTES = 65_536


class CpuMeter:
    """Resident memory beyond what the libraries took before there was a model, and processor time. Linux only."""

    def __init__(self, exact: bool) -> None:
        self.libc = ctypes.CDLL("libc.so.6")
        if exact:
            self.libc.mallopt(MALLOC_MMAP_THRESHOLD, LARGE_BYTES)
        torch.ones(64, 64) @ torch.ones(64, 64)
        self.base_bytes = 0
        self.start()
        self.base_bytes = self.used_bytes()

    def start(self) -> None:
        """Forget the peak so far."""
        gc.collect()
        self.libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    def used_bytes(self) -> int:
        """Now."""
        return _status("VmRSS") - self.base_bytes

    def peak_bytes(self) -> int:
        """At most, since the start."""
        return _status("VmHWM") - self.base_bytes

    def seconds(self) -> float:
        """Processor time by the number of threads: other work on this machine does not count."""
        return time.process_time() / torch.get_num_threads()


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ConfigError(f"this system does not say {field}: memory is measured on Linux, or on a GPU")


class GpuMeter:
    """What PyTorch's allocator gave out, and time by the clock."""

    def start(self) -> None:
        """Forget the peak so far."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def used_bytes(self) -> int:
        """Now."""
        return torch.cuda.memory_allocated()

    def peak_bytes(self) -> int:
        """At most, since the start."""
        return torch.cuda.max_memory_allocated()

    def seconds(self) -> float:
        """The time at which the GPU has done what it was given."""
        torch.cuda.synchronize()
        return time.perf_counter()


def open_meter(device: str, exact: bool) -> CpuMeter | GpuMeter:
    """The meter of a device. `exact`: on a CPU, every freed block goes back to the system at once, which is slow."""
    return GpuMeter() if device == "cuda" else CpuMeter(exact)
