"""Hugging Face's `generate`, as its documentation shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peer_loop import Generate, Prompts, serve


def load(task: dict[str, Any]) -> Generate:
    """Options: `cache`, an implementation of transformers' caches; a static one is compiled on a GPU, as transformers does."""
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteriaList

    torch.set_num_threads(task["num_threads"])
    dtype = getattr(torch, task["dtype"])
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype).to(task["device"]).eval()
    model.generation_config.eos_token_id = None  # so that nothing ends early
    options = {"cache_implementation": task["options"]["cache"]} if "cache" in task["options"] else {}

    def generate(prompts: Prompts, num_tokens: int, first: Callable[[], None]) -> Prompts:
        ids = torch.tensor(prompts, device=task["device"])
        goes_on = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        def after_token(ids: Any, scores: Any, **_: Any) -> Any:
            if task["device"] != "cpu":
                torch.cuda.synchronize()
            first()
            return goes_on

        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([after_token]),
            **options,
        )
        rows: list[list[int]] = found[:, ids.shape[1] :].tolist()
        return rows

    return generate


if __name__ == "__main__":
    serve(load, ["transformers", "torch"])
