"""`PromptReader`: makes requests of the prompts that a caller of `LLM` gives, or says why some cannot run."""

import json
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from batchinfer.engine.prompts import (
    BadPrompt,
    Conversation,
    Errors,
    Tools,
    check_messages,
    check_tools,
    encode_chats,
    size_errors,
    those_that_fit,
)
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.kernels.ragged import take_ragged
from batchinfer.text.chat_arguments import Arguments
from batchinfer.text.tokenizer import Offsets, TokenIds, Tokenizer

NOTHING = np.empty(0, np.int32)

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]


class PromptReader:
    """Reads prompts for a model with a vocabulary of this size."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, max_model_len: int) -> None:
        self._tokenizer, self._vocabulary, self._max_model_len = tokenizer, vocabulary, max_model_len
        self.notes: dict[str, None] = {}  # about what was given in vain, each once

    def requests(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        tools: Tools | None,
        arguments: Arguments,
        errors: Errors,
    ) -> Requests:
        """Return requests for the prompts that can run; errors for the others are added to `errors`."""
        texts: dict[int, str] = {}
        chats: dict[int, Conversation] = {}
        given: dict[int, TokenIds] = {}
        for index, prompt in enumerate(prompts):
            try:
                match self.read(prompt):
                    case str() as text:
                        texts[index] = text
                    case np.ndarray() as ids:
                        given[index] = ids
                    case messages:
                        chats[index] = messages
            except BadPrompt as error:
                errors[index] = error.row_error
        encoded = [
            (list(texts), *self._tokenizer.encode_batch(list(texts.values()))),
            (list(given), np.concatenate([NOTHING, *given.values()]), np.cumsum([0, *map(len, given.values())])),
        ]
        if not chats and (tools is not None or arguments):
            self.notes["tools or chat_template_kwargs were given in vain: none of the prompts is a conversation"] = None
        if chats:
            encoded.append((list(chats), *self._encode_chats(chats, tools, arguments, errors)))
        indices = np.concatenate([np.array(of, np.int64) for of, _, _ in encoded])
        lengths = np.concatenate([np.diff(offsets) for _, _, offsets in encoded])
        token_ids = np.concatenate([ids for _, ids, _ in encoded])
        order = np.argsort(indices)
        token_ids, offsets = take_ragged(token_ids, np.append(0, np.cumsum(lengths)), order)
        requests = Requests.alike(indices[order], token_ids, offsets, params)
        return those_that_fit(requests, self._max_model_len, errors)

    def _encode_chats(
        self, chats: dict[int, Conversation], tools: Tools | None, arguments: Arguments, errors: Errors
    ) -> tuple[TokenIds, Offsets]:
        if self._tokenizer.template is None:
            raise ValueError(
                f"prompts[{min(chats)}] is a conversation, and the model has no chat template; give texts or token ids"
            )
        template = self._tokenizer.template if tools is None else self._tokenizer.tool_template
        if tools is not None and template is not None and not template.reads_tools:
            self.notes["the model's chat template never reads tools: those that were given are in vain"] = None
        if template is not None and (unread := [name for name in arguments if name not in template.reads]):
            self.notes[f"the model's chat template never reads {', '.join(unread)} of chat_template_kwargs"] = None
        indices, offered, each = np.array(list(chats), np.int64), [tools] * len(chats), [arguments] * len(chats)
        return encode_chats(self._tokenizer, indices, list(chats.values()), errors, offered, False, each)

    def read(self, prompt: Any) -> str | TokenIds | Conversation:
        """Return a prompt as a text, token ids or messages. Raises `BadPrompt` if it is none of these or cannot run."""
        if prompt is None:
            raise BadPrompt("null_prompt", "the prompt is None")
        if isinstance(prompt, str):
            for error in size_errors(np.array([len(_unicode(prompt))])).values():
                raise BadPrompt(error.code, error.message)
            return prompt
        if not isinstance(prompt, list | tuple):
            raise BadPrompt(
                "wrong_type", f"the prompt is a {type(prompt).__name__}; expected text, messages or token ids"
            )
        if not prompt:
            raise BadPrompt("empty_prompt", "the prompt is empty")
        if all(isinstance(token, Integral) and not isinstance(token, bool) for token in prompt):
            if min(prompt) < 0 or max(prompt) >= self._vocabulary:
                raise BadPrompt("bad_token_ids", f"token ids must be from 0 to {self._vocabulary - 1} for this model")
            return np.array(prompt, np.int32)
        messages = list(prompt)
        check_messages(messages)
        _unicode(json.dumps(messages, ensure_ascii=False, default=str))
        return messages


def listed(prompts: Any) -> list[Prompt]:
    """Return prompts as a list. Raises `ValueError` for anything else, and for a single prompt."""
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts is {prompts!r:.50}; it must be a list of prompts")
    listed = list(prompts)
    if any(isinstance(prompt, Mapping | Integral) for prompt in listed):
        raise ValueError("prompts is a single conversation or one row of token ids; it must be a list of them")
    return listed


def read_tools(tools: Any) -> Tools | None:
    """Return tools as a list. Raises `ValueError` for what is none."""
    if tools is None:
        return None
    given = list(tools) if isinstance(tools, Sequence) else tools
    try:
        check_tools(given)
        _unicode(json.dumps(given, ensure_ascii=False, default=str))
    except BadPrompt as error:
        raise ValueError(f"tools is {tools!r:.50}; {error.row_error.message}") from None
    return given


def _unicode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise BadPrompt("invalid_utf8", "the prompt holds half of a surrogate pair") from None
