"""The compiled CPU kernels as functions of tensors. Nothing here knows a model.

Shape legend: M rows, N outputs, K inputs of a product; B samples, T new positions of each; H width, D head width, S capacity.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipo.kernels.build import load_library

FEW_ROWS = 32
"""Up to here our products are faster than PyTorch's: reading the weights costs more than multiplying."""
LAYER_ROWS = 128
"""Up to here our layers are: one call each, and attention that reads each key once for all its heads."""
DTYPES = (torch.bfloat16, torch.float32)

_POINTERS = [
    "norm1",
    "q",
    "k",
    "v",
    "o",
    "q_bias",
    "k_bias",
    "v_bias",
    "o_bias",
    "q_norm",
    "k_norm",
    "norm2",
    "gate",
    "up",
    "down",
]
_SIZES = ["width", "inner", "heads", "kv_heads", "head_dim"]
_NUMBERS = ["eps1", "head_eps", "eps2", "scale"]


class _Layer(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in _POINTERS]
        + [(name, ctypes.c_int64) for name in _SIZES]
        + [(name, ctypes.c_double) for name in _NUMBERS]
    )


class _Step(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ["x", "cos", "sin", "out", "keys", "values", "positions"]]
        + [
            (name, ctypes.c_int64)
            for name in ["batch", "new_positions", "rotary", "angles_stride", "row_stride", "head_stride", "threads"]
        ]
        + [("scratch", ctypes.c_void_p), ("scratch_floats", ctypes.c_int64)]
    )


@dataclass(frozen=True)
class LayerWeights:
    """A decoder layer: RMS norms, grouped attention with a rotary embedding, SiLU-gated MLP.

    Weights are `[out, in]`, row-major, all of one dtype. Biases and the norms of heads may be None. `scale`: of the scores.
    """

    norm1: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    norm2: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    head_dim: int = 0
    eps1: float = 1e-6
    head_eps: float = 1e-6
    eps2: float = 1e-6
    scale: float = 1.0

    def tensors(self) -> dict[str, Tensor]:
        """The weights that there are."""
        return {name: tensor for name in _POINTERS if (tensor := getattr(self, name)) is not None}


class DecoderLayer:
    """A layer ready to run. It holds pointers to the weights, which must stay where they are: see :meth:`moved`."""

    def __init__(self, weights: LayerWeights) -> None:
        """Raises `ValueError` for weights that the kernel can't read: other dtypes, strides or sizes that don't fit."""
        _check(weights)
        self.weights = weights
        self.dtype = weights.q.dtype
        self._tensors = list(weights.tensors().values())
        self._places = [tensor.data_ptr() for tensor in self._tensors]
        places = {name: tensor.data_ptr() for name, tensor in weights.tensors().items()}
        inner, width = weights.gate.shape
        sizes = (width, inner, len(weights.q) // weights.head_dim, len(weights.k) // weights.head_dim, weights.head_dim)
        numbers = (weights.eps1, weights.head_eps, weights.eps2, weights.scale)
        self._layer = _Layer(*(places.get(name) for name in _POINTERS), *sizes, *numbers)
        library = load_library()
        name = "pipo_layer_bf16" if self.dtype == torch.bfloat16 else "pipo_layer_f32"
        self._run: Any = getattr(library, name)
        self._run.restype = ctypes.c_int64
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self._layer_address = ctypes.addressof(self._layer)

    def moved(self) -> bool:
        """Whether some weight no longer lies where it lay."""
        return [tensor.data_ptr() for tensor in self._tensors] != self._places

    def __call__(
        self, x_BTH: Tensor, cos: Tensor, sin: Tensor, positions_BT: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """The layer's output `[B, T, H]`; keys and values of the new positions are written to the cache.

        Args:
            cos, sin: `[1 or B, T, R]`, of the first R features of a head.
            positions_BT: int64; position `p` sees the entries `0 … p` of its row.
            keys, values: `[at least B, heads, S, D]`.
        """
        batch, new, _ = x_BTH.shape
        x_BTH, cos, sin = x_BTH.contiguous(), cos.contiguous(), sin.contiguous()
        positions_BT = positions_BT.contiguous()
        out = torch.empty_like(x_BTH)
        rotary = cos.shape[-1]
        angles_stride = 0 if cos.shape[0] == 1 else new * rotary
        step = _Step(
            x_BTH.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), keys.data_ptr(), values.data_ptr(),
            positions_BT.data_ptr(), batch, new, rotary, angles_stride, keys.stride(0), keys.stride(1),
            torch.get_num_threads(), _scratch.pointer, _scratch.floats,
        )  # fmt: skip
        address = ctypes.addressof(step)
        needed = self._run(self._layer_address, address)
        if needed:
            _scratch.grow(needed)
            step.scratch, step.scratch_floats = _scratch.pointer, _scratch.floats
            missing = self._run(self._layer_address, address)
            assert not missing
        return out


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """`[…, K] → […, N]`: `x Wᵀ + b` with float32 sums, for at most `FEW_ROWS` rows. `out_dtype`: float32, also of bfloat16 weights."""
    n, k = weight_NK.shape
    rows = x.reshape(-1, k).contiguous()
    library = load_library()
    out_dtype = out_dtype or x.dtype
    out = torch.empty(len(rows), n, dtype=out_dtype)
    threads = torch.get_num_threads()
    name = (
        "pipo_linear_f32"
        if x.dtype == torch.float32
        else "pipo_linear_bf16_f32"
        if out_dtype == torch.float32
        else "pipo_linear_bf16"
    )
    sizes = map(_int, (len(rows), n, k, x.element_size(), threads))
    _scratch.grow(library.pipo_linear_bytes(*sizes))
    getattr(library, name)(
        _pointer(rows), _pointer(weight_NK), _pointer(bias_N), _pointer(out), _int(len(rows)), _int(n), _int(k), _int(threads),
        ctypes.c_void_p(_scratch.pointer),
    )  # fmt: skip
    return out.view(*x.shape[:-1], n)


class _Scratch(threading.local):
    """Working memory that a thread's calls share: they come one after the other."""

    def __init__(self) -> None:
        self.pointer, self.floats = 0, 0
        self._buffer = torch.empty(0)

    def grow(self, num_bytes: int) -> None:
        """Make it at least so large."""
        if num_bytes > 4 * self.floats:
            self.floats = -(-num_bytes // 4) * 5 // 4
            self._buffer = torch.empty(self.floats + 16)
            self.pointer = -(-self._buffer.data_ptr() // 64) * 64


_scratch = _Scratch()
_int = ctypes.c_int64


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _check(weights: LayerWeights) -> None:
    inner, width = weights.gate.shape
    wide, narrow, head = len(weights.q), len(weights.k), weights.head_dim
    shapes = {
        "q": (wide, width), "k": (narrow, width), "v": (narrow, width), "o": (width, wide), "gate": (inner, width),
        "up": (inner, width), "down": (width, inner), "norm1": (width,), "norm2": (width,), "q_norm": (head,), "k_norm": (head,),
        "q_bias": (wide,), "k_bias": (narrow,), "v_bias": (narrow,), "o_bias": (width,),
    }  # fmt: skip
    for name, tensor in weights.tensors().items():
        if tensor.dtype not in DTYPES or tensor.dtype != weights.q.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, and q is {weights.q.dtype}")
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"{name} is not a contiguous tensor in memory")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, not {shapes[name]}")
    if head < 1 or wide % head or narrow % head or wide % narrow:
        raise ValueError(f"{wide} features of queries and {narrow} of keys are no whole groups of heads of {head}")
