"""Peers on the model of a benchmark: each loads it once, and is asked like any other method."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from pipo.bench.grid import Point
from pipo.bench.peers.peer import Peer
from pipo.bench.peers.process import PeerProcess, Reply, Task
from pipo.bench.sizes import ModelSizes
from pipo.bench.subjects import Setting, random_prompts, regular_checkpoint
from pipo.errors import PeerError

CACHE_SLACK = 1.25
"""Blocks that are not full, and blocks that are kept free."""
BLOCK = 256
"""Positions to which caches are rounded, at most."""


class PeerSubject:
    """A peer among the methods of a benchmark. It loads the model when it is first asked, and again after it failed at a batch."""

    def __init__(self, peer: Peer, task: Task, vocab_size: int) -> None:
        self.peer, self.task, self.vocab_size = peer, task, vocab_size
        self.versions: dict[str, str] = {}
        """Of its packages, once it is loaded."""
        self._process: PeerProcess | None = None
        self._unable: PeerError | None = None

    @property
    def method(self) -> str:
        """As rows call it."""
        return self.peer.method

    def time_batch(self, point: Point, num_steps: int) -> Reply:
        """Run one batch greedily from nothing, on the prompts that every method has there: the first tokens, then `num_steps` steps.

        Raises:
            PeerError: it could not. One that could not load the model is not asked again.
        """
        if self._unable is not None:
            raise self._unable
        if self._process is None:
            try:
                self._process = PeerProcess(self.peer, self.task)
            except PeerError as error:
                self._unable = error
                raise
            self.versions = self._process.versions
        try:
            return self._process.generate(random_prompts(self.vocab_size, point.batch, point.context), num_steps + 1)
        except PeerError:
            self.close()
            raise

    def close(self) -> None:
        """End its process, if there is one."""
        if self._process is not None:
            self._process.close()
            self._process = None


@contextmanager
def open_peers(
    peers: Sequence[Peer],
    setting: Setting,
    sizes: ModelSizes,
    dtype: torch.dtype,
    points: Sequence[Point],
    num_steps: int,
) -> Iterator[list[PeerSubject]]:
    """Peers on the regular model of a setting, with room for `num_steps` steps at every point; they end with the context.

    Args:
        dtype: of weights and cache.

    Raises:
        ConfigError: the setting has no regular model.
    """
    if not peers:
        yield []
        return
    batch, positions = max(point.batch for point in points), max(point.context for point in points) + num_steps + 1
    row_bytes = -(-positions // BLOCK) * BLOCK * sum(layer.entries for layer in sizes.layers) * dtype.itemsize
    with ExitStack() as stack:

        def folder() -> str:
            return stack.enter_context(tempfile.TemporaryDirectory(prefix="pipo-peer-"))

        model = regular_checkpoint(setting, Path(folder()))
        subjects = []
        for peer in peers:
            task = Task(
                model=str(model),
                scratch=folder(),
                dtype=str(dtype).removeprefix("torch."),
                device=setting.device,
                num_threads=torch.get_num_threads(),
                max_batch=batch,
                max_positions=positions,
                cache_bytes=int(CACHE_SLACK * batch * (row_bytes + sizes.state_bytes)),
            )
            subjects.append(PeerSubject(peer, task, sizes.vocab_size))
            stack.callback(subjects[-1].close)
        yield subjects
