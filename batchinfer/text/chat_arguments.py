"""Arguments for chat templates: variables that a template may read, as `enable_thinking`."""

from collections.abc import Mapping
from typing import Any

Arguments = Mapping[str, Any]  # by name, as values of JSON

# What transformers' `apply_chat_template` and `render_jinja_template` take under a name of their own.
RESERVED = frozenset({
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "conversations", "documents",
    "max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors",
    "sanitize_control_tokens", "self", "tokenize", "tokenizer_kwargs", "tools", "truncation",
})  # fmt: skip


def problem_with(arguments: Any) -> str | None:
    """Say what is wrong with the value, worded to follow its name; None if a template may be given these arguments."""
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        return 'must be an object: names and values, as {"enable_thinking": false}'
    reserved = sorted(RESERVED.intersection(arguments))
    return f"has {reserved[0]!r}, a name that is reserved; leave it out" if reserved else None
