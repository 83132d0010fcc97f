"""What a server of a PIPO checkpoint may be started with: what was not seen working is refused by name, at start."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from pipo.errors import UnsupportedModelError
from pipo.integrations.sglang.hooks import Hook
from pipo.integrations.sglang.serving import served
from pipo.model.convert import as_dtype
from pipo.model.draft_vocab import DRAFT_VOCAB

OFF = (None, False, 0, "", "none", "null", "off")
WEIGHT_FORMATS = ("auto", "safetensors", "dummy")
SERVED: dict[str, tuple[Any, ...]] = {
    # Pairs are int64 tokens, and a step is more than one forward and one draw: what carries or replaces either must know of it.
    "speculative_algorithm": OFF,
    "dllm_algorithm": OFF,
    "pp_size": (1,),
    "disaggregation_mode": OFF,
    "enable_pd_role_switch": OFF,
    "enable_pdmux": OFF,
    "enable_two_batch_overlap": OFF,
    "enable_single_batch_overlap": OFF,
    "is_embedding": OFF,
    "enable_mis": OFF,
    "enable_streaming_session": OFF,
    "enable_session_radix_cache": OFF,
    "enable_torch_compile": OFF,
    "num_continuous_decode_steps": (1,),
    # How tokens and experts are spread over ranks.
    "enable_dp_attention": OFF,
    "attn_dp_size": (1,),
    "attn_cp_size": (1,),
    "dcp_size": (1,),
    "moe_dp_size": (1,),
    "dwdp_size": (1,),
    "ep_size": (1,),
    "moe_a2a_backend": OFF,
    "enable_eplb": OFF,
    "ep_num_redundant_experts": OFF,
    "elastic_ep_backend": OFF,
    # Keys and values outside the device.
    "enable_hierarchical_cache": OFF,
    "hicache_storage_backend": OFF,
    "enable_unified_cache_external_linker": OFF,
    "enable_hisparse": OFF,
    "enable_lmcache": OFF,
    "enable_flexkv": OFF,
    "radix_cache_backend": OFF,
    # The model's layers and weights.
    "model_impl": ("auto", "sglang"),
    "quantization": OFF,
    "modelopt_quant": OFF,
    "quantize_and_serve": OFF,
    "rl_quant_profile": OFF,
    "rl_on_policy_target": OFF,
    "enable_lora": OFF,
    "lora_paths": (*OFF, [], {}),
    "load_format": WEIGHT_FORMATS,
    "startup_weight_load_mode": ("serial",),
    "weight_cache_mode": OFF,
    "custom_weight_loader": (*OFF, []),
    "cpu_offload_gb": OFF,
    "offload_group_size": (*OFF, -1),
    "kt_weight_path": OFF,
}
"""Options of `sglang serve` and the values that a PIPO checkpoint is served with."""

log = logging.getLogger(__name__)


def refuse_server(arguments: Any, *, rust_front_end: bool = False) -> None:
    """Raise `UnsupportedModelError` for options that PIPO is not served with; it names each, and its value."""
    found = []
    if rust_front_end:  # it goes past everything that looks at requests
        found.append("SGLANG_RUST_SERVER (only off)")
    for name, values in SERVED.items():
        value = getattr(arguments, name)
        if value not in values:
            found.append(f"--{name.replace('_', '-')} {value} (only {_names(values)})")
    if found:
        raise UnsupportedModelError("a PIPO checkpoint is not served on SGLang with " + ", ".join(found))


def _names(values: tuple[Any, ...]) -> str:
    return "off" if values[: len(OFF)] == OFF else " or ".join(str(value) for value in values)


def warn_of_half_precision(arguments: Any, stored: torch.dtype | None) -> None:
    """SGLang turns a float32 checkpoint into float16 unless it is told otherwise; float16 overflows where bfloat16 rounds."""
    if arguments.dtype == "auto" and stored == torch.float32:
        log.warning("SGLang runs this float32 checkpoint in float16; --dtype float32 or bfloat16 says otherwise")


def tell_of_draft_vocabulary(model: str) -> None:
    """A checkpoint's draft vocabulary is not used here: drafts are drawn from the whole vocabulary, as the model was trained to."""
    if (Path(model) / DRAFT_VOCAB).is_file():
        log.warning("%s is not used on SGLang: drafts are drawn from the whole vocabulary", Path(model) / DRAFT_VOCAB)


def after_from_server_args(_: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Every process of a server makes its model config from its arguments here, the first before it starts any other."""
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.environ import envs

    now = served()
    if now is not None:
        arguments = resolving_view(server_args)
        refuse_server(arguments, rust_front_end=envs.SGLANG_RUST_SERVER.get())
        tell_of_draft_vocabulary(arguments.model_path)
        warn_of_half_precision(arguments, as_dtype(now.config.text_config.dtype or now.config.dtype))


HOOKS = (
    Hook(
        "configs.model_config.ModelConfig.from_server_args",
        "after",
        after_from_server_args,
        ("server_args", "model_path", "model_revision", "is_draft_model", "context_length", "kwargs"),
    ),
)
