"""Chat templates of the kinds that are met: plain, with thinking opened by the template, and with history rewritten."""

from pathlib import Path

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

THINKING = (Path(__file__).parent / "server" / "qwen3_5.jinja").read_text()
"""The generation prompt opens the thinking block, and history keeps its thinking."""

FORGETFUL = (
    "{% if messages | selectattr('role', 'equalto', 'odd') | list %}{{ raise_exception('Odd role.') }}{% endif %}"
    "{% set last = namespace(user=0) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}"
    "{% set thought = message.content.split('</think>')[0].split('<think>')[-1] | trim if '</think>' in message.content else '' %}"
    "{% if loop.index0 > last.user %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ message.content.split('</think>')[-1] | trim }}"
    "{% else %}{{ message.content | trim }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking else '<think>\n' }}{% endif %}"
)
"""As Qwen3.5's: the generation prompt opens the block, and thinking before the latest user message is dropped."""

ENDLESS = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
"""Nothing marks the end of a turn."""
