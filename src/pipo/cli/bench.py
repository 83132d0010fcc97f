"""`pipo bench`: what decoding and training cost on this machine."""

from __future__ import annotations

import typer

from pipo.cli import bench_kernels, bench_latency, bench_memory, bench_sampling, bench_throughput, bench_train

app = typer.Typer(help="What decoding and training cost on this machine.", no_args_is_help=True)

app.command()(bench_latency.latency)
app.command()(bench_throughput.throughput)
app.command()(bench_memory.memory)
app.command()(bench_kernels.kernels)
app.command()(bench_sampling.sampling)
app.command()(bench_train.train)
app.command()(bench_train.losses)
