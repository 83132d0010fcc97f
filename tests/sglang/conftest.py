"""SGLang on a CPU, in float32 throughout: with narrower states the greedy choice between two near-equal tokens may differ."""

import os
import sys
from pathlib import Path

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
