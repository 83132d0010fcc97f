"""Tiny random checkpoints with a tokenizer of bytes, made on the spot, for servers in processes of their own."""

from pathlib import Path

from byte_tokenizer import byte_config, save_tokenizer

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}\n"
    'Calls are written <tool_call>\n{"name": NAME, "arguments": OBJECT}\n</tool_call><|im_end|>\n{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template that knows tools, in the form of Qwen3's."""


def make_checkpoints(folder: Path, max_tokens: int = 8192) -> tuple[Path, Path]:
    """A regular Qwen3 checkpoint and a PIPO one made from it, with a tokenizer of bytes: `(base, pipo)`.

    The PIPO one's confidences are spread out, so that a threshold between them keeps some drafts and rejects others.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from pipo.model.base import BaseForCausalLM
    from pipo.model.files import copy_tokenizer
    from pipo.model.modeling import PipoForCausalLM

    base, pipo = folder / "base", folder / "pipo"
    base.mkdir()
    torch.manual_seed(0)
    config = byte_config(vocab_size=save_tokenizer(base), max_position_embeddings=max_tokens)
    BaseForCausalLM.from_config(config).save_pretrained(base)
    PipoForCausalLM.from_base(base).save_pretrained(pipo)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    copy_tokenizer(base, pipo)
    tensors = load_file(pipo / "model.safetensors")
    for name, tensor in tensors.items():
        if name.startswith("confidence_head.") and tensor.dim() == 2:
            tensors[name] = tensor * 12
    save_file(tensors, pipo / "model.safetensors", metadata={"format": "pt"})
    return base, pipo
