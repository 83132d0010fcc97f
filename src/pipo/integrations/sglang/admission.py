"""What a client asks for and PIPO can't serve is refused before it is queued: SGLang answers a `ValueError` here with a 400 and its text.

Nothing is left out in silence: a setting that would have no effect, or another than for a regular model, is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from pipo.errors import RequestError
from pipo.integrations.sglang.hooks import Hook
from pipo.integrations.sglang.serving import current, served

NOT_SERVED = {
    "image_data": "pictures",
    "video_data": "videos",
    "audio_data": "sound",
    "input_embeds": "embeddings instead of tokens",
    "positional_embed_overrides": "embeddings instead of tokens",
    "session_params": "sessions: send the whole conversation, and the prefix cache takes what it knows",
    "lora_path": "LoRA adapters: merge the adapter into the checkpoint with `pipo merge`",
    "custom_logit_processor": "custom logit processors",
    "return_sampling_mask": "sampling masks",
    "watermark": "watermarks",
    "return_hidden_states": "hidden states in the answer",
    "return_routed_experts": "routed experts in the answer",
    "return_indexer_topk": "indexer choices in the answer",
    "return_flat_raw_top_logprobs": "log-probabilities of the prompt",
    "multi_item_delimiter_indices": "scoring of prompts",
    "token_indices_to_pool": "scoring of prompts",
    "bootstrap_host": "prefill and decoding on different servers",
    "bootstrap_room": "prefill and decoding on different servers",
}
"""Fields of SGLang's `GenerateReqInput`."""
NOT_SERVED_PARAMS = {"watermark": "watermarks"}
"""Sampling parameters."""


def around_validate(validate: Callable[..., None], manager: Any, obj: Any, input_ids: Sequence[int] | None) -> None:
    """Before a request is queued, in the process that the client talks to."""
    if served() is not None:
        params = {**(manager.preferred_sampling_params or {}), **(obj.sampling_params or {})}
        refuse(obj, params)
        refuse_prompt(input_ids)
    validate(manager, obj, input_ids)


def refuse(obj: Any, params: Mapping[str, Any]) -> None:
    """Raise `RequestError` for what can't be served. `obj`: SGLang's request; `params`: its sampling parameters and the server's."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    if not isinstance(obj, GenerateReqInput):
        raise RequestError("a PIPO model generates text: it can't embed, rank or score")
    asked = [what for field, what in NOT_SERVED.items() if _given(getattr(obj, field))]
    asked += [what for field, what in NOT_SERVED_PARAMS.items() if _given(params.get(field))]
    if (params.get("beam_width") or 1) > 1:
        asked.append("beam search")
    if obj.return_logprob and obj.logprob_start_len is not None and obj.logprob_start_len >= 0:
        asked.append("log-probabilities of the prompt (`logprob_start_len` must be -1; no `echo` with `logprobs`)")
    elif obj.return_logprob and params.get("max_new_tokens") == 0:
        asked.append("scoring of prompts: ask for at least one token")
    if asked:
        raise RequestError(f"a PIPO model on SGLang does not serve {'; nor '.join(dict.fromkeys(asked))}")
    threshold_of(params.get("custom_params"), current().threshold)


def refuse_prompt(input_ids: Sequence[int] | None) -> None:
    """Raise `RequestError` for a prompt without tokens, or with ids that are none: they would make other pairs."""
    if not input_ids:
        raise RequestError("the prompt is empty: a PIPO model needs at least one token")
    outside = min(input_ids) if min(input_ids) < 0 else max(input_ids)
    if not 0 <= outside < current().vocab_size:
        raise RequestError(f"token id {outside} is not in the vocabulary of {current().vocab_size} entries")


def threshold_of(custom_params: Mapping[str, Any] | None, default: float) -> float:
    """τ of a request: its `custom_params["threshold"]`, else the server's.

    Raises:
        RequestError: it is no finite number.
    """
    if custom_params is not None and not isinstance(custom_params, Mapping):
        raise RequestError(f"`custom_params` must be an object, got {custom_params!r}")
    asked = (custom_params or {}).get("threshold")
    if asked is None:
        return default
    if not isinstance(asked, Real) or isinstance(asked, bool) or not math.isfinite(asked):
        raise RequestError(f"`threshold` in `custom_params` must be a finite number, got {asked!r}")
    return float(asked)


def _given(value: Any) -> bool:
    """Whether a field asks for something: `None`, `False` and what holds nothing else do not."""
    if isinstance(value, list):
        return any(map(_given, value))
    return not (value is None or value is False or value == "" or value == {})


HOOKS = (
    Hook(
        "managers.tokenizer_manager.TokenizerManager._validate_one_request",
        "around",
        around_validate,
        ("self", "obj", "input_ids"),
    ),
)
