"""SGLang's offline engine, on a GPU: it has no build for CPUs on the package index, and what stands in for one says nothing of speed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peer_loop import Generate, Prompts, serve


def load(task: dict[str, Any]) -> Generate:
    """One engine, whose scheduler is a process of its own, as SGLang has it."""
    import sglang

    if task["device"] == "cpu":
        raise ValueError("SGLang is measured on a GPU only; leave it out, or choose --device cuda")
    most = task["max_batch"] * task["max_positions"]
    engine = sglang.Engine(
        model_path=task["model"],
        skip_tokenizer_init=True,
        dtype=task["dtype"],
        device=task["device"],
        context_length=task["max_positions"],
        max_running_requests=task["max_batch"],
        max_total_tokens=2 * most,
        # All prompts in one step: else the first rows would decode while others' prompts are still read.
        chunked_prefill_size=-1,
        max_prefill_tokens=max(16_384, most),
        disable_radix_cache=True,
        **task["options"],
    )

    def generate(prompts: Prompts, num_tokens: int, first: Callable[[], None]) -> Prompts:
        params = {"temperature": 0.0, "max_new_tokens": num_tokens, "ignore_eos": True}
        rows: dict[int, list[int]] = {}
        for found in engine.generate(input_ids=[list(ids) for ids in prompts], sampling_params=params, stream=True):
            rows[found.get("index", 0)] = found["output_ids"]
            if len(rows) == len(prompts):
                first()
        return [rows[i] for i in range(len(prompts))]

    return generate


if __name__ == "__main__":
    serve(load, ["sglang", "torch", "transformers"])
