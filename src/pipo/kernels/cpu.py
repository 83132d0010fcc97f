"""The compiled CPU kernels as functions of tensors. Nothing here knows a model.

Shape legend: M rows, N outputs, K inputs of a product; B samples, T new positions of each; H width, D head width, S capacity.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
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
        [(name, ctypes.c_void_p) for name in ["x", "cos", "sin", "keys", "values", "positions", "layers", "norm"]]
        + [("eps", ctypes.c_double)]
        + [
            (name, ctypes.c_int64)
            for name in [
                "num_layers",
                "batch",
                "new_positions",
                "rotary",
                "angles_stride",
                "row_stride",
                "head_stride",
                "threads",
            ]
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
        self.address = ctypes.addressof(self._layer)
        self.cache_shape = (len(weights.k) // weights.head_dim, weights.head_dim)
        """Key heads, and features of each."""

    def moved(self) -> bool:
        """Whether some weight no longer lies where it lay."""
        return [tensor.data_ptr() for tensor in self._tensors] != self._places

    def __call__(
        self, x_BTH: Tensor, cos: Tensor, sin: Tensor, positions_BT: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """This layer alone: see :meth:`LayerStack.__call__`."""
        return LayerStack([self])(x_BTH, cos, sin, positions_BT, [keys], [values])


class LayerStack:
    """Layers that run one after the other, in one call, and the norm of the last one's output where there is one.

    Args:
        norm: `[H]`, the weight of an RMS norm; eps: its epsilon.
    """

    def __init__(self, layers: Sequence[DecoderLayer], norm: Tensor | None = None, eps: float = 0.0) -> None:
        self.layers = list(layers)
        self.norm, self.eps = norm, eps
        self.dtype = self.layers[0].dtype
        self._addresses = (ctypes.c_void_p * len(self.layers))(*(layer.address for layer in self.layers))
        name = "pipo_layers_bf16" if self.dtype == torch.bfloat16 else "pipo_layers_f32"
        self._run: Any = getattr(load_library(), name)
        self._run.restype = ctypes.c_int64
        self._run.argtypes = [ctypes.c_void_p]

    def __call__(
        self,
        x_BTH: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions_BT: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> Tensor:
        """The output `[B, T, H]`; keys and values of the new positions are written to the cache.

        Args:
            cos, sin: `[1 or B, T, R]`, of the first R features of a head.
            positions_BT: int64; position `p` sees the entries `0 … p` of its row.
            keys, values: of each layer `[at least B, heads, S, D]`, all of one shape and contiguous.
        """
        batch, new, _ = x_BTH.shape
        out_BTH, cos, sin = x_BTH.clone(memory_format=torch.contiguous_format), cos.contiguous(), sin.contiguous()
        positions_BT = positions_BT.contiguous()
        kind = ctypes.c_void_p * len(self.layers)
        places = [kind(*(tensor.data_ptr() for tensor in tensors)) for tensors in (keys, values)]
        rotary = cos.shape[-1]
        step = _Step(
            out_BTH.data_ptr(), cos.data_ptr(), sin.data_ptr(), *map(ctypes.addressof, places), positions_BT.data_ptr(),
            ctypes.addressof(self._addresses), None if self.norm is None else self.norm.data_ptr(), self.eps,
            len(self.layers), batch, new, rotary, 0 if cos.shape[0] == 1 else new * rotary, *keys[0].stride()[:2],
            torch.get_num_threads(), _scratch.pointer, _scratch.floats,
        )  # fmt: skip
        needed = self._run(ctypes.addressof(step))
        if needed:
            _scratch.grow(needed)
            step.scratch, step.scratch_floats = _scratch.pointer, _scratch.floats
            missing = self._run(ctypes.addressof(step))
            assert not missing
        return out_BTH


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """`[…, K] → […, N]`: `x Wᵀ + b` with float32 sums, for at most `FEW_ROWS` rows. `out_dtype`: float32, also of bfloat16 weights."""
    n, k = weight_NK.shape
    rows = x.reshape(-1, k).contiguous()
    library = load_library()
    out_dtype = out_dtype or x.dtype
    out = torch.empty(len(rows), n, dtype=out_dtype, device="cpu")
    threads = torch.get_num_threads()
    name = (
        "pipo_linear_f32"
        if x.dtype == torch.float32
        else "pipo_linear_bf16_f32"
        if out_dtype == torch.float32
        else "pipo_linear_bf16"
    )
    sizes = map(_int, (len(rows), n, k, x.element_size(), threads))
    library.pipo_linear_bytes.restype = ctypes.c_int64
    _scratch.grow(library.pipo_linear_bytes(*sizes))
    getattr(library, name)(
        _pointer(rows), _pointer(weight_NK), _pointer(bias_N), _pointer(out), _int(len(rows)), _int(n), _int(k), _int(threads),
        ctypes.c_void_p(_scratch.pointer),
    )  # fmt: skip
    return out.view(*x.shape[:-1], n)


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """`[…, H]`: the norm that the layers use, by PyTorch: what a family's own is compared with."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight_H * normed.to(x.dtype)


class _Scratch(threading.local):
    """Working memory that a thread's calls share: they come one after the other."""

    def __init__(self) -> None:
        self.pointer, self.floats = 0, 0
        self._buffer: Tensor | None = None

    def grow(self, num_bytes: int) -> None:
        """Make it at least so large."""
        if num_bytes > 4 * self.floats:
            self.floats = -(-num_bytes // 4) * 5 // 4
            self._buffer = torch.empty(self.floats + 16, dtype=torch.float32, device="cpu")  # whatever the defaults are
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
