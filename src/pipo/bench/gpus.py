"""What makers say that their GPUs can do, for plans. Rates are of dense products with sums in float32, without sparsity."""

from __future__ import annotations

from dataclasses import dataclass

from pipo.bench.cost import Machine
from pipo.errors import ConfigError

GB = 1e9
TERA = 1e12


@dataclass(frozen=True)
class Gpu:
    """Published figures: memory read per second, matrix rates (None: no such units), memory, one direction of its links."""

    name: str
    bytes_per_s: float
    bf16_flops_per_s: float
    fp8_flops_per_s: float | None
    memory_bytes: float
    link_bytes_per_s: float


def _gpu(name: str, gb_per_s: float, bf16: float, fp8: float | None, gb: float, link_gb_per_s: float) -> Gpu:
    fp8_rate = None if fp8 is None else fp8 * TERA
    return Gpu(name, gb_per_s * GB, bf16 * TERA, fp8_rate, gb * GB, link_gb_per_s * GB)


# Makers' data sheets. Where a sheet gives rates with sparsity alone, half of them. Links: NVLink, Infinity Fabric, or else PCIe x16;
# sheets add up both directions, so half of that.
#   A100 40 and 80 GB (SXM), H100 (SXM5), H200 (SXM), L4, L40S: "NVIDIA … Tensor Core GPU" data sheets. B200: HGX B200's, by eight.
#   A10G: Amazon's figures for G5 instances. RTX 4090, 5090: appendices of the Ada and the RTX Blackwell architecture papers.
#   MI300X: AMD's data sheet.
GPUS: dict[str, Gpu] = {
    "a100-40": _gpu("NVIDIA A100 SXM 40 GB", 1555, 312, None, 40, 300),
    "a100-80": _gpu("NVIDIA A100 SXM 80 GB", 2039, 312, None, 80, 300),
    "h100": _gpu("NVIDIA H100 SXM", 3350, 989.4, 1978.9, 80, 450),
    "h200": _gpu("NVIDIA H200 SXM", 4800, 989.4, 1978.9, 141, 450),
    "b200": _gpu("NVIDIA B200 (HGX)", 8000, 2250, 4500, 180, 900),
    "l4": _gpu("NVIDIA L4", 300, 121, 242.5, 24, 32),
    "l40s": _gpu("NVIDIA L40S", 864, 362, 733, 48, 32),
    "a10g": _gpu("NVIDIA A10G", 600, 70, None, 24, 32),
    "rtx4090": _gpu("NVIDIA RTX 4090", 1008, 165.2, 330.3, 24, 32),
    "rtx5090": _gpu("NVIDIA RTX 5090", 1792, 209.5, 419, 32, 64),
    "mi300x": _gpu("AMD MI300X", 5300, 1307.4, 2614.9, 192, 448),
}


def find_gpu(name: str) -> Gpu:
    """A GPU of the table, by its name there; case, spaces and hyphens don't matter.

    Raises:
        ConfigError: no such GPU; the message lists them.
    """

    def plain(text: str) -> str:
        return "".join(char for char in text.lower() if char.isalnum())

    found = next((gpu for key, gpu in GPUS.items() if plain(key) == plain(name)), None)
    if found is None:
        raise ConfigError(
            f"there are no figures for the GPU {name!r}; there are for {', '.join(GPUS)}, and for this (measured)"
        )
    return found


def gpu_machine(gpu: Gpu, rate: str) -> Machine:
    """A GPU as a machine whose matrix products run at the rate of `bfloat16` or `fp8`.

    Raises:
        ConfigError: it has no such rate, or the table has not.
    """
    rates = {"bfloat16": gpu.bf16_flops_per_s, "fp8": gpu.fp8_flops_per_s}
    flops_per_s = rates.get(rate)
    if flops_per_s is None:
        has = " and ".join(name for name, found in rates.items() if found is not None)
        raise ConfigError(
            f"no rate of products in {rate} is published for {gpu.name}, but of {has}: choose another dtype"
        )
    return Machine(gpu.name, gpu.bytes_per_s, flops_per_s, gpu.memory_bytes)
