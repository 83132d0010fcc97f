"""One thread per test process: the machine may have few cores, and results must not depend on how many."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)

# These need SGLang, which lives in an environment of its own: `make test-sglang`.
collect_ignore = ["sglang"]
