"""What this machine can do, measured: the fastest that it reads memory, and the fastest that it multiplies matrices.

Both are the best of several ways, each at its median over repeats: a limit is what somebody reached, not what one kernel makes of it.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from pipo.bench.cost import Machine
from pipo.errors import ConfigError
from pipo.kernels.pages import advise
from pipo.run_record import processor_name

MEASURED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BUFFER_BYTES = {"cpu": 2**30, "cuda": 2**32}
"""Far beyond the caches."""
MEMORY_SHARE = 0.25
"""Of the free memory, at most, for the buffer."""
REPEATS = 5
MOMENT_BYTES = 2**28
MOMENT_REPEATS = 3
# Rows, inner width, columns: a prompt through a narrow and a wide layer, and a square.
MATRICES = {
    "cpu": ((512, 1024, 3072), (1024, 2048, 2048), (2048, 2048, 2048)),
    "cuda": ((4096, 4096, 4096), (8192, 2560, 9216), (8192, 8192, 8192)),
}


def measure_machine(device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16) -> Machine:
    """Measure the device with as many threads as torch has: a few seconds, and up to 1 GiB (4 GiB on a GPU) of its memory.

    Raises:
        ConfigError: no such device here, or a number format whose products are not measured.
    """
    device = torch.device(device)
    if device.type not in BUFFER_BYTES:
        raise ConfigError(f"machines are measured on cpu or cuda, got {device.type!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, and torch finds no GPU here")
    if dtype not in MEASURED_DTYPES:
        named = ", ".join(str(one).removeprefix("torch.") for one in MEASURED_DTYPES)
        raise ConfigError(f"matrix products are measured in {named}, got {str(dtype).removeprefix('torch.')}")
    with torch.no_grad():
        bandwidth = max(measure_reading(device, dtype).values())
        rate = max(measure_products(device, dtype).values())
    return Machine(_name(device), bandwidth, rate, _memory_bytes(device))


class ReadingRate:
    """How fast a CPU reads a model's weights at a moment, in some tens of milliseconds, by nothing but reading them.

    On a virtual machine this depends on what its neighbours do, and on where in the host's memory the weights happen to lie: another
    buffer may read at half or at twice the rate.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        """Small models are stood in for by a buffer beyond the caches."""
        storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage() for weight in weights}
        words = [torch.empty(0, dtype=torch.int32).set_(one, 0, (one.nbytes() // 4,)) for one in storages.values()]  # type: ignore[call-overload]
        self._words_N: list[Tensor] = [one for one in words if one.nbytes >= 2**20]
        if sum(one.nbytes for one in self._words_N) < MOMENT_BYTES:
            self._words_N = [_buffer(MOMENT_BYTES, torch.device("cpu"))]

    def measure(self) -> float:
        """Bytes per second, the best of a few repeats."""
        best_s = math.inf
        for _ in range(MOMENT_REPEATS):
            start = time.perf_counter()
            for words in self._words_N:
                words.amax()
            best_s = min(best_s, time.perf_counter() - start)
        return sum(words.nbytes for words in self._words_N) / best_s


def _buffer(num_bytes: int, device: torch.device) -> Tensor:
    words_N = torch.empty(num_bytes // 16384 * 4096, dtype=torch.float32, device=device)
    advise(words_N)
    return words_N.uniform_()  # equal pages of a virtual machine may be one page of its host


def measure_reading(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Way of reading a large buffer → bytes per second."""
    num_bytes = int(min(BUFFER_BYTES[device.type], MEMORY_SHARE * _free_bytes(device)))
    words_N = _buffer(num_bytes, device)
    rows_RC = words_N.view(dtype).view(-1, 4096)
    ones_C = torch.ones(4096, dtype=dtype, device=device)
    ways: dict[str, tuple[Callable[[], Tensor], int]] = {
        "sum": (lambda: words_N.sum(), words_N.nbytes),
        "largest": (lambda: words_N.amax(), words_N.nbytes),
        "dot": (lambda: words_N.dot(words_N), words_N.nbytes),
        "matrix by vector": (lambda: rows_RC @ ones_C, rows_RC.nbytes),
    }
    return {name: number / _seconds(read, device) for name, (read, number) in ways.items()}


def measure_products(device: torch.device, dtype: torch.dtype) -> dict[tuple[int, int, int], float]:
    """Rows, inner width and columns of a product, the right side stored as a linear layer's weight → operations per second."""
    found = {}
    generator = torch.Generator(device).manual_seed(0)
    for rows, inner, columns in MATRICES[device.type]:
        # Of random numbers: a GPU multiplies constants faster, as they take less power.
        left, weight = (
            torch.randn(size, inner, generator=generator, device=device).to(dtype) for size in (rows, columns)
        )
        seconds = _seconds(partial(torch.matmul, left, weight.T), device)
        found[rows, inner, columns] = 2 * rows * inner * columns / seconds
    return found


def _seconds(work: Callable[[], Tensor], device: torch.device) -> float:
    """Median over repeats, after one that warms up."""
    times = []
    for _ in range(REPEATS + 1):
        start = _now(device)
        work()
        times.append(_now(device) - start)
    return statistics.median(times[1:])


def _now(device: torch.device) -> float:
    """The time when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'' if threads == 1 else 's'}"


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
