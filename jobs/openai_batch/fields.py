"""The fields of a request's body: which have a meaning here, which change nothing, and which are refused.

They are those of OpenAI's API reference and vLLM's additions to it. A null is as good as no field.
"""

from typing import Any

from batchinfer.engine.prompts import BadPrompt
from batchinfer.jobs.openai_batch.request import shown

# They have the same name among a row's sampling params.
SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("min_tokens", "stop", "stop_token_ids", "bad_words", "ignore_eos", "n"),
)
LENGTHS = ("max_tokens", "max_completion_tokens")
STRUCTURE = ("response_format", "structured_outputs")
OF_ALL = {"model", "seed", "logprobs", *SAMPLING, *LENGTHS, *STRUCTURE}
OF_CHATS = {"messages", "tools", "tool_choice", "chat_template_kwargs", "reasoning_effort", "top_logprobs"}
OF_COMPLETIONS = {"prompt"}

# What a service does with a request, not what the model answers.
HARMLESS = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "stream_options", "prediction", "priority"),
    *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "request_id", "cache_salt"),
}
# Fields that are not supported -> values at which they change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "prompt_logprobs": (),
    "logit_bias": ({},),
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "function_call": (),
    "modalities": (["text"],),
    "audio": (),
    "verbosity": ("medium",),
    "moderation": (),
    "web_search_options": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "allowed_token_ids": (),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "truncate_prompt_tokens": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "logits_processors": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
REMEDIES = {
    "functions": "give tools",
    "function_call": "give tool_choice",
    "chat_template": "give --chat-template",
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), "give structured_outputs"),
}


def check_fields(body: dict[str, Any], chat: bool) -> None:
    """Raise `BadPrompt` naming a field of a chat's or a completion's body that would change the answer, or might, and
    is not known or not supported."""
    known = OF_ALL | (OF_CHATS if chat else OF_COMPLETIONS)
    # A chat template writes special tokens itself; as many answers are drawn as are wanted.
    neutral = {**NEUTRAL, "add_special_tokens": (not chat,), "best_of": (1, body.get("n"))}
    for name, value in body.items():
        if value is None or name in known or name in HARMLESS:
            continue
        if name not in neutral:
            raise BadPrompt("unknown_field", f"the body has a field {shown(name)}, which is not known; leave it out")
        if not any(value == other and type(value) is type(other) for other in neutral[name]):
            remedy = REMEDIES.get(name, "leave it out")
            raise BadPrompt("unsupported_field", f"{name} is {shown(value)}, which is not supported; {remedy}")
