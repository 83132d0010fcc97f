"""The CPU kernels against PyTorch's own operations, as this processor runs them and as one without its special instructions would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pipo.errors import KernelError
from pipo.kernels import build, cpu

BUILDS = {"native": (), "portable": ("-DPIPO_PORTABLE",)}


@pytest.fixture(params=list(BUILDS))
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = BUILDS[request.param]
    monkeypatch.setattr(cpu, "load_library", lambda: build.load_library(*flags))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 17, 32])
def test_products_of_few_rows(library: None, rows: int, dtype: torch.dtype) -> None:
    """Sizes that fill neither vectors, groups nor chunks; more inputs than are multiplied at once. Fails when an edge is dropped or
    read twice."""
    generator = torch.Generator().manual_seed(rows)
    for outputs, inputs in ((37, 48), (8, 31), (261, 2100), (1, 5), (515, 64)):
        x = torch.randn(rows, inputs, generator=generator).to(dtype)
        weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
        bias = torch.randn(outputs, generator=generator).to(dtype)
        exact = F.linear(x.double(), weight.double(), bias.double())
        scale = (x.double().abs() @ weight.double().abs().T) + bias.double().abs()
        got = cpu.linear(x, weight, bias, torch.float32)
        assert float(((got - exact).abs() / scale).max()) < 2e-6
        assert torch.allclose(cpu.linear(x, weight, bias).double(), exact, rtol=1e-2, atol=2e-2)


def test_a_row_that_is_not_finite_stays_alone(library: None) -> None:
    """Fails when rows that are multiplied together leak into one another."""
    x, weight = torch.randn(5, 96).bfloat16(), torch.randn(70, 96).bfloat16()
    clean = cpu.linear(x, weight)
    x[2] = torch.nan
    got = cpu.linear(x, weight)
    assert got[2].isnan().all()
    assert torch.equal(got[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def layer_weights(
    dtype: torch.dtype, *, heads: int, kv_heads: int, head_dim: int, norms: bool, biases: bool
) -> cpu.LayerWeights:
    generator = torch.Generator().manual_seed(heads)
    width, inner = 72, 100

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    wide, narrow = heads * head_dim, kv_heads * head_dim
    sizes = {"q": (wide, width), "k": (narrow, width), "v": (narrow, width), "o": (width, wide)}
    sizes |= {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    weights = {name: random(*shape) for name, shape in sizes.items()}
    weights |= {name: 1 + random(width) for name in ("norm1", "norm2")}
    if norms:
        weights |= {name: 1 + random(head_dim) for name in ("q_norm", "k_norm")}
    if biases:
        weights |= {f"{name}_bias": random(len(weights[name])) for name in "qkvo"}
    return cpu.LayerWeights(**weights, head_dim=head_dim, scale=head_dim**-0.5, eps1=1e-5, eps2=1e-6, head_eps=1e-6)


def stock_layer(w: cpu.LayerWeights, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor,
                keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """The layer in float64, by PyTorch; keys and values of the new positions are written."""
    batch, new, _ = x.shape

    def norm(t: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + eps) * weight.double()

    def heads_of(
        t: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, head_norm: torch.Tensor | None
    ) -> torch.Tensor:
        made = F.linear(t, weight.double(), None if bias is None else bias.double()).view(batch, new, -1, w.head_dim)
        return made if head_norm is None else norm(made, head_norm, w.head_eps)

    def rotate(t: torch.Tensor) -> torch.Tensor:
        size = cos.shape[-1]
        turned, rest = t[..., :size], t[..., size:]
        first, second = turned.chunk(2, -1)
        angles = cos.double()[:, :, None], sin.double()[:, :, None]
        return torch.cat([turned * angles[0] + torch.cat([-second, first], -1) * angles[1], rest], -1)

    normed = norm(x, w.norm1, w.eps1)
    q, k = rotate(heads_of(normed, w.q, w.q_bias, w.q_norm)), rotate(heads_of(normed, w.k, w.k_bias, w.k_norm))
    v = heads_of(normed, w.v, w.v_bias, None)
    rows = torch.arange(batch)[:, None]
    keys[rows, :, positions], values[rows, :, positions] = k, v
    seen = torch.arange(keys.shape[2]) <= positions[:, :, None]
    mixed = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys[:batch], values[:batch], attn_mask=seen[:, None], scale=w.scale, enable_gqa=True
    )
    bias = None if w.o_bias is None else w.o_bias.double()
    x = x + F.linear(mixed.transpose(1, 2).flatten(2), w.o.double(), bias)
    normed = norm(x, w.norm2, w.eps2)
    inner = F.silu(F.linear(normed, w.gate.double())) * F.linear(normed, w.up.double())
    return x + F.linear(inner, w.down.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("batch", "new", "heads", "kv_heads", "head_dim", "rotary", "longest"),
    [(1, 1, 4, 2, 16, 16, 9), (3, 2, 3, 3, 24, 24, 70), (5, 1, 8, 1, 128, 64, 1500), (2, 3, 10, 2, 136, 136, 2100)],
)
def test_a_layer(
    library: None,
    dtype: torch.dtype,
    batch: int,
    new: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary: int,
    longest: int,
) -> None:
    """Rows of unlike length, more positions than one thread takes at a time, heads that share keys or don't, partial rotary embedding,
    biases and norms of heads. Fails when a phase reads what another has not written, or a mask, a place or a weight is wrong."""
    w = layer_weights(dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim, norms=batch % 2 == 1, biases=batch > 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, new, 72, generator=generator).to(dtype)
    lengths = torch.tensor([longest // (row + 1) for row in range(batch)])
    positions = lengths[:, None] + torch.arange(new)
    angle = torch.randn(batch, new, rotary // 2, generator=generator).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    keys, values = (
        torch.randn(batch + 1, kv_heads, longest + 9, head_dim, generator=generator).to(dtype) for _ in range(2)
    )
    exact_keys, exact_values = keys.double(), values.double()
    exact = stock_layer(w, x.double(), cos, sin, positions, exact_keys, exact_values)
    got = cpu.DecoderLayer(w)(x, cos, sin, positions, keys, values)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for ours, stock in ((got - x, exact - x.double()), (keys, exact_keys), (values, exact_values)):
        assert float((ours.double() - stock).norm() / stock.norm()) < tolerance


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads: int) -> None:
    """Fails when a thread's share of the work is lost or done twice."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        x, weight = torch.randn(6, 128).bfloat16(), torch.randn(4099, 128).bfloat16()
        assert torch.allclose(
            cpu.linear(x, weight, None, torch.float32), x.float() @ weight.float().T, rtol=1e-4, atol=1e-3
        )
    finally:
        torch.set_num_threads(before)


CREW = """
import torch
from pipo.kernels import cpu
torch.manual_seed(0)
torch.set_num_threads(3)
shapes = {"q": (64, 72), "k": (32, 72), "v": (32, 72), "o": (72, 64), "gate": (96, 72), "up": (96, 72), "down": (72, 96)}
weights = {name: torch.randn(shape) / 8 for name, shape in shapes.items()}
layer = cpu.DecoderLayer(cpu.LayerWeights(**weights, norm1=torch.ones(72), norm2=torch.ones(72), head_dim=16))
x, angle = torch.randn(5, 1, 72), torch.randn(5, 1, 16)
out = layer(x, angle.cos(), angle.sin(), torch.arange(5)[:, None], torch.ones(5, 2, 9, 16), torch.ones(5, 2, 9, 16))
print(float(out.double().square().sum()))
"""


def test_fewer_threads_than_asked_for() -> None:
    """OpenMP may give fewer. Fails when the rows of a thread that is not there are left out."""
    sums = []
    for limit in ("8", "1"):
        done = subprocess.run(
            [sys.executable, "-c", CREW],
            env={**os.environ, "OMP_THREAD_LIMIT": limit},
            capture_output=True,
            text=True,
            check=True,
        )
        sums.append(float(done.stdout))
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)


def test_defaults_of_torch_do_not_matter() -> None:
    """Fails when working memory is of the default number format, and half as large as it must be."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        scratch = cpu._Scratch()
        scratch.grow(4096)
        assert scratch._buffer is not None
        assert scratch._buffer.nbytes >= 4096
    finally:
        torch.set_default_dtype(before)


def test_weights_that_do_not_fit_are_refused() -> None:
    good = layer_weights(torch.float32, heads=4, kv_heads=2, head_dim=16, norms=False, biases=False)
    for changes, word in (
        ({"down": good.down.bfloat16()}, "bfloat16"),
        ({"o": good.o.T}, "contiguous"),
        ({"up": good.up[:-1].clone()}, "up is"),
        ({"head_dim": 24}, "heads of 24"),
    ):
        with pytest.raises(ValueError, match=word):
            cpu.DecoderLayer(cpu.LayerWeights(**{**good.__dict__, **changes}))


# --- compiling ----------------------------------------------------------------------------------------


@pytest.fixture
def fresh_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    build.load_library.cache_clear()
    yield tmp_path
    build.load_library.cache_clear()


def test_it_is_compiled_once(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.load_library()
    (made,) = (fresh_home / ".cache" / "pipo" / "kernels").iterdir()
    build.load_library.cache_clear()
    monkeypatch.setattr(build, "_compile", lambda *args: pytest.fail("compiled again"))
    build.load_library()
    assert made.suffix == ".so"


def test_a_compiler_that_fails_is_quoted(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = fresh_home / "c++"
    compiler.write_text("#!/bin/sh\necho 'no such wizardry' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "find_compiler", lambda: str(compiler))
    with pytest.raises(KernelError, match="no such wizardry"):
        build.load_library()
    assert not list((fresh_home / ".cache" / "pipo" / "kernels").iterdir())


def test_without_a_compiler_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(KernelError, match="kernels='torch'"):
        build.find_compiler()


def test_it_shares_the_threads_of_torch() -> None:
    """Two pools of threads would wait for each other's cores: the one OpenMP in the process is torch's."""
    cpu.linear(torch.randn(2, 64).bfloat16(), torch.randn(300, 64).bfloat16())
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("only Linux lists what a process has loaded")
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "gomp" in line or "iomp" in line}
    assert len({os.path.realpath(path) for path in loaded}) == 1, subprocess.list2cmdline(sorted(loaded))
