"""Kernels of our own, for a CPU: where PyTorch's leave half of the memory's rate unused. See docs/performance.md."""
