"""Ways to make a step of fixed tensors repeatable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipo.errors import ConfigError

Step = Callable[[], None]
Capture = Callable[[Step, Step], Step]
"""From a step and what undoes it to what repeats it; see :class:`CudaCapture`."""


def capture_for(device: torch.device, cuda_graphs: bool | None) -> Capture | None:
    """How steps are captured on this device; `None` where they are not, by default on anything but a GPU.

    Raises:
        ConfigError: graphs are asked for where there are none.
    """
    if cuda_graphs and device.type != "cuda":
        raise ConfigError(f"cuda_graphs=True (--cuda-graphs) needs a CUDA device, and the model is on {device}")
    return CudaCapture() if device.type == "cuda" and cuda_graphs is not False else None


def run_again(step: Step, undo: Step) -> Step:
    """Repeat a step by running it, where there are no graphs."""
    return step


class CudaCapture:
    """Capture a step as a CUDA graph. All graphs share one pool of memory, since each copies what it leaves out of it."""

    WARM_UP = 2
    """Runs before the capture, in which libraries choose their kernels and take their memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step, undo: Step) -> Step:
        """See `Capture`."""
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.WARM_UP):
                step()
                undo()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step()
        return graph.replay
