"""The chat template: turns between ``<|im_start|>role`` and ``<|im_end|>``."""

from __future__ import annotations

from typing import Final

EMPTY_THINKING: Final = "<think>\n\n</think>\n\n"
"""What stands at the start of a reply that is asked to go without thinking."""

# A newline follows text or a variable, never a block tag, and no tag strips its surroundings:
# so it renders alike whether or not the environment trims blocks.
CHAT_TEMPLATE: Final = (
    "{% if tools %}"
    "<|im_start|>system\n"
    "You can call these tools, each as JSON between <tool_call> and </tool_call>:\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n"
    "{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}"
    "<tool_call>{{ (call.function or call) | tojson }}</tool_call>"
    "{% endfor %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n"
    "{% endif %}"
    "{% endif %}"
)
"""Jinja. Takes ``messages``, ``tools``, ``add_generation_prompt`` and ``enable_thinking``."""
