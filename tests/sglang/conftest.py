"""SGLang on a CPU, in float32 throughout: with narrower states the greedy choice between two near-equal tokens may differ.

A server takes longer to start than most tests to run, so tests that need nothing special share these.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

os.environ.update(
    SGLANG_USE_CPU_ENGINE="1",
    SGLANG_MAMBA_CONV_DTYPE="float32",
    # Tiny models: more threads only wait for each other.
    OMP_NUM_THREADS="1",
    # Without it, a host of one NUMA node may have one rank. Nothing is bound: only builds with kernels of their own do that.
    SGLANG_CPU_OMP_THREADS_BIND="0|1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)

from served import LLAMA, QWEN3_5, WITHOUT_OVERLAP, Served, start  # noqa: E402 (its folder is on the path now)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Attention in every layer; long prompts are read 16 pairs at once."""
    with start(tmp_path_factory.mktemp("llama"), LLAMA) as served:
        yield served


@pytest.fixture(scope="session")
def qwen3_5(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Linear attention in three of four layers, from the authors' layout; 64 pairs at once, and states kept as often."""
    with start(tmp_path_factory.mktemp("qwen3_5"), QWEN3_5) as served:
        yield served


@pytest.fixture(scope="session")
def without_overlap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The same model without overlap scheduling, and requests are sent back every fifth step."""
    with start(tmp_path_factory.mktemp("without_overlap"), WITHOUT_OVERLAP) as served:
        yield served
