"""Turn prompts into requests, and say why some prompts cannot run.

Free of torch: the parent process of a job imports this module.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.request import Requests, RowError
from batchinfer.engine.sampling_table import SamplingTable
from batchinfer.kernels.ragged import offsets_of
from batchinfer.text.chat_arguments import Arguments, problem_with
from batchinfer.text.tokenizer import Offsets, TokenIds, Tokenizer

MAX_PROMPT_BYTES = 4 << 20  # tokenizing takes more than 100 times the memory of the text
END_TOKENS = 24  # more than the longest opening tag and the space behind it, a token for each character
ROLES = ("system", "developer", "user", "assistant", "tool", "function")

Indices = NDArray[np.int64]  # of prompts, in the list of prompts that are tokenized together
Errors = dict[int, RowError]  # by index of the prompt
Conversation = list[dict[str, Any]]
Tools = list[dict[str, Any]]  # what a conversation's model may call


class BadPrompt(Exception):
    """Raised for a prompt that cannot run; holds the error of its row."""

    def __init__(self, code: str, message: str) -> None:
        self.row_error = RowError(code, message)


def check_messages(messages: Any) -> None:
    """Raise `BadPrompt` unless `messages` is a list of messages, each with a known role and with content.

    Content is a text or a list of parts {"type": "text", "text": ...}. A message with tool_calls may have none.
    """
    if messages is None:
        raise BadPrompt("null_prompt", "the messages are null")
    if isinstance(messages, dict) and "messages" in messages:
        raise BadPrompt(
            "bad_messages",
            "expected a list of messages, and found an object with a key 'messages'; give a column of the list",
        )
    if not isinstance(messages, list) or not messages:
        raise BadPrompt("bad_messages", "expected a list of one message or more")
    size = 0
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadPrompt("bad_messages", f"message {i} is no object with role and content")
        if message.get("role") not in ROLES:
            raise BadPrompt("bad_messages", f"message {i} has no role out of {', '.join(ROLES)}")
        size += _content_size(i, message)
    if size > MAX_PROMPT_BYTES:
        raise BadPrompt("too_large", f"the messages have {size} characters; at most {MAX_PROMPT_BYTES} are taken")


def _content_size(index: int, message: dict[str, Any]) -> int:
    """Return the number of characters of a message's content."""
    content = message.get("content")
    if content is None:
        if message.get("tool_calls"):
            return 0
        raise BadPrompt("bad_messages", f"message {index} has neither content nor tool_calls")
    if isinstance(content, str):
        return len(content)
    if not isinstance(content, list):
        raise BadPrompt("bad_messages", f"the content of message {index} is neither text nor a list of parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            named = (
                f"of type {kind!r}" if isinstance(kind, str) and re.fullmatch(r"\w{1,40}", kind) else "without a type"
            )
            raise BadPrompt("bad_messages", f"the content of message {index} has a part {named}; only text is taken")
        if not isinstance(part.get("text"), str):
            raise BadPrompt("bad_messages", f"the content of message {index} has a text part without a text")
    return sum(len(part["text"]) for part in content)


def check_tools(tools: Any) -> None:
    """Raise `BadPrompt` unless `tools` is None or a list of objects: JSON schemas of functions."""
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadPrompt("bad_tools", "the tools are no list of objects")


def check_arguments(arguments: Any) -> None:
    """Raise `BadPrompt` unless `arguments` is None or an object of arguments for a chat template."""
    if arguments is not None and (problem := problem_with(arguments)) is not None:
        raise BadPrompt("bad_chat_template_kwargs", f"the value {problem}")


def check_sampling(given: Any) -> None:
    """Raise `BadPrompt` unless `given` is None or an object."""
    if given is not None and not isinstance(given, dict):
        raise BadPrompt("bad_sampling_params", "the sampling_params are no object")


def size_errors(nbytes: NDArray[np.int64]) -> Errors:
    """Return errors for the plain prompts that are empty or too large; `nbytes` [n] are their sizes in bytes."""
    errors = dict.fromkeys(np.flatnonzero(nbytes == 0).tolist(), RowError("empty_prompt", "the prompt is empty"))
    for index in np.flatnonzero(nbytes > MAX_PROMPT_BYTES).tolist():
        message = f"the prompt has {nbytes[index]} bytes; at most {MAX_PROMPT_BYTES} are taken"
        errors[index] = RowError("too_large", message)
    return errors


def encode_chats(
    tokenizer: Tokenizer,
    indices: Indices,
    conversations: list[Conversation],
    errors: Errors,
    tools: list[Tools | None] | None = None,
    allow_special_tokens: bool = False,
    arguments: list[Arguments] | None = None,
) -> tuple[TokenIds, Offsets]:
    """Return the token ids of n conversations, each with its tools or None and its arguments for the chat template, and
    their offsets [n + 1].

    A conversation for which the chat template fails has no tokens, and an error at its index in `indices` [n]. With
    `allow_special_tokens`, the text of a control token in a message becomes that token.
    """
    token_ids, offsets, failed = tokenizer.encode_chats(conversations, tools, allow_special_tokens, arguments)
    for i, error in failed.items():
        errors[int(indices[i])] = RowError(error.code, str(error))
    return token_ids, offsets


def those_that_fit(requests: Requests, max_model_len: int, errors: Errors) -> Requests:
    """Return the requests whose prompts have tokens and leave room for an answer; errors for the others are added.

    A request whose prompt leaves room for fewer tokens than `max_tokens` gets that many.
    """
    lengths, indices = np.diff(requests.offsets), requests.rows
    for i in np.flatnonzero(lengths >= max_model_len).tolist():
        errors[int(indices[i])] = RowError(
            "too_long",
            f"the prompt has {lengths[i]} tokens; it must have at most {max_model_len - 1} "
            f"(max_model_len {max_model_len}, one of them for the answer)",
        )
    for i in np.flatnonzero(lengths == 0).tolist():
        errors.setdefault(int(indices[i]), RowError("empty_prompt", "the prompt has no tokens"))
    good = np.flatnonzero((lengths > 0) & (lengths < max_model_len))
    taken = requests.take(good) if len(good) < len(indices) else requests
    return _limited(taken, max_model_len - np.diff(taken.offsets))


def with_completions(
    requests: Requests,
    completions: Sequence[Sequence[int] | None],
    nbytes: Sequence[int],
    max_model_len: int,
    errors: Errors,
) -> Requests:
    """Return requests whose completions are scored behind their prompts, and errors for the others are added.

    Request i has the completion `completions[i]`, token ids of a text of `nbytes[i]` bytes; None: it has an error
    already.
    """
    good, rows = [], []
    for i, completion in enumerate(completions):
        if completion is None:
            continue
        prompt = requests.token_ids[requests.offsets[i] : requests.offsets[i + 1]]
        if not completion:
            error = RowError("empty_completion", "the completion has no tokens")
        elif len(prompt) + len(completion) > max_model_len:
            error = RowError(
                "too_long",
                f"the prompt has {len(prompt)} tokens and the completion {len(completion)}; both must have at most "
                f"{max_model_len} together (max_model_len)",
            )
        else:
            good.append(i)
            rows.append(np.concatenate([prompt, np.array(completion, np.int32)]))
            continue
        errors[int(requests.rows[i])] = error
    taken = requests.take(np.array(good, np.int64))
    return replace(
        taken,
        token_ids=np.concatenate([np.empty(0, np.int32), *rows]),
        offsets=offsets_of(np.array([len(row) for row in rows], np.int64)),
        scored_from=np.diff(taken.offsets),
        scored_bytes=np.array([nbytes[i] for i in good], np.int64),
    )


def _limited(requests: Requests, room: NDArray[np.int64]) -> Requests:
    """Return the requests; those with `room` [n] for fewer than `max_tokens` have params with less."""
    tight = np.flatnonzero(room < requests.number("max_tokens"))
    # Limit params once for all rows that have the same params and the same room.
    _, first, found = np.unique(
        (requests.param_index[tight].astype(np.int64) << 32) + room[tight], return_index=True, return_inverse=True
    )
    params, index = requests.params, requests.param_index.copy()
    less = params.take(index[tight[first]].astype(np.int64)).limited(room[tight[first]])
    index[tight] = len(params) + found
    return replace(requests, params=SamplingTable.joined([params, less]), param_index=index)


def ends_of(requests: Requests, indices: Indices) -> NDArray[np.int32]:
    """Return the last tokens of the prompts at `indices` [m] of the requests: [m, END_TOKENS], padded in front with -1.

    They tell whether a prompt opens the thinking that an answer begins with.
    """
    places = requests.offsets[indices + 1][:, None] + np.arange(-END_TOKENS, 0)
    within = places >= requests.offsets[indices][:, None]
    return np.where(within, requests.token_ids[np.where(within, places, 0)], np.int32(-1))


def row_seeds(seeds: Sequence[int], keys: Sequence[bytes]) -> NDArray[np.uint64]:
    """Return one seed per row, [n], from the seed that is given for it and its key; never from its position in the
    input."""
    # 0 is the sample's index; seeds of further samples are derived from this one.
    digests = b"".join(
        hashlib.blake2b(b"%d/0/%b" % (seed, key), digest_size=8).digest() for seed, key in zip(seeds, keys, strict=True)
    )
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def keys_by_tokens(requests: Requests) -> list[bytes]:
    """Return keys for `row_seeds`, for rows without a name of their own: the bytes of their tokens."""
    raw, bounds = requests.token_ids.astype("<i4").tobytes(), (4 * requests.offsets).tolist()
    return [b"tokens" + raw[a:b] for a, b in pairwise(bounds)]
