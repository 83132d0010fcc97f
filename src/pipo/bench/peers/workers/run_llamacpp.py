"""llama.cpp through llama-cpp-python's bindings of its C functions, many sequences at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer_loop import Generate, Prompts, serve


def load(task: dict[str, Any]) -> Generate:
    """One context for all sequences, with llama.cpp's own sizes of a batch."""
    import llama_cpp as native
    from gguf_file import write_gguf

    path = Path(task["scratch"]) / "model.gguf"
    write_gguf(Path(task["model"]), path, task["dtype"])
    native.llama_backend_init()
    settings = native.llama_model_default_params()
    settings.n_gpu_layers = 0 if task["device"] == "cpu" else -1
    model = native.llama_model_load_from_file(str(path).encode(), settings)
    sizes = native.llama_context_default_params()
    sizes.n_seq_max = task["max_batch"]
    sizes.n_ctx = task["max_batch"] * (task["max_positions"] + 256)  # each sequence's share is rounded
    sizes.n_threads = sizes.n_threads_batch = task["num_threads"]
    context = native.llama_init_from_model(model, sizes)
    if not context:
        raise RuntimeError(f"llama.cpp made no context of {sizes.n_ctx:,} positions; its words are above")
    return Sequences(native, context, native.llama_vocab_n_tokens(native.llama_model_get_vocab(model))).generate


class Sequences:
    """Greedy continuations of several sequences in one context."""

    def __init__(self, native: Any, context: Any, vocab_size: int) -> None:
        self.native, self.context, self.vocab_size = native, context, vocab_size
        self.size = native.llama_n_batch(context)
        self.batch = native.llama_batch_init(self.size, 0, 1)

    def generate(self, prompts: Prompts, num_tokens: int, first: Callable[[], None]) -> Prompts:
        """As `peer_loop.Generate`."""
        native = self.native
        native.llama_memory_clear(native.llama_get_memory(self.context), False)
        rows = []
        for sequence, ids in enumerate(prompts):
            for start in range(0, len(ids), self.size):
                part = ids[start : start + self.size]
                ends = start + len(part) == len(ids)
                self._run([(token, start + i, sequence) for i, token in enumerate(part)], ends)
            rows.append([self._likeliest(len(part) - 1)])
        first()
        for step in range(num_tokens - 1):
            self._run([(row[-1], len(prompts[s]) + step, s) for s, row in enumerate(rows)], True)
            for s, row in enumerate(rows):
                row.append(self._likeliest(s))
        return rows

    def _run(self, entries: list[tuple[int, int, int]], logits: bool) -> None:
        """One call on tokens with their positions and sequences; logits of the last token of each sequence, if any."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence) in enumerate(entries):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            ends = i + 1 == len(entries) or entries[i + 1][2] != sequence
            batch.logits[i] = logits and ends
        status = self.native.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode of {len(entries)} tokens failed with status {status}")

    def _likeliest(self, index: int) -> int:
        import numpy as np

        logits = self.native.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).argmax())


if __name__ == "__main__":
    serve(load, ["llama-cpp-python", "gguf", "numpy"])
