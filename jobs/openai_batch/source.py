"""`RequestSource`: makes the engine's requests from the lines of a batch file; or a line's error."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchinfer.engine.prompts import (
    BadPrompt,
    Conversation,
    Errors,
    Tools,
    check_arguments,
    check_messages,
    check_tools,
    encode_chats,
    keys_by_tokens,
    row_seeds,
    size_errors,
    those_that_fit,
)
from batchinfer.engine.request import Requests, RowError
from batchinfer.jobs.openai_batch.fields import check_fields
from batchinfer.jobs.openai_batch.request import Request, read_request, shown
from batchinfer.jobs.openai_batch.sampling import RequestSampling
from batchinfer.jobs.rows.sampling import RowSampling, with_sampling
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.tables.lines import LINE, NUMBER
from batchinfer.kernels.ragged import offsets_of
from batchinfer.text.chat_arguments import Arguments
from batchinfer.text.tokenizer import Offsets, TokenIds, Tokenizer


@dataclass(frozen=True)
class _Chat:
    messages: Conversation
    tools: Tools | None
    arguments: Arguments


@dataclass(frozen=True)
class _Asked:
    """What a good line asks for. Its prompt is a chat, a text or token ids."""

    request: Request
    prompt: _Chat | str | list[int]
    sampling: RowSampling


class RequestSource:
    """Makes requests from the lines of a table of lines."""

    def __init__(self, spec: JobSpec, tokenizer: Tokenizer, max_model_len: int, repeated: dict[int, int]) -> None:
        """`repeated` has the ordinals of rows whose custom_id is taken, each with the number of the line that has
        it."""
        self._spec, self._tokenizer, self._max_model_len = spec, tokenizer, max_model_len
        self._repeated = repeated
        self.columns = [NUMBER, LINE]
        self._sampling = RequestSampling(spec, tokenizer)
        self._models = None if spec.any_model else (spec.model, PurePath(spec.model).name)
        self._system: Conversation = []
        if spec.system_prompt is not None:
            self._system = [{"role": "system", "content": spec.system_prompt}]

    def tokenize(self, first_row: int, batch: pa.RecordBatch) -> tuple[Requests, dict[int, RowError]]:
        """Return requests for the lines that can run, in table order, and the errors of the others, by ordinal."""
        errors: Errors = {}
        asked: dict[int, _Asked] = {}
        numbers = batch.column(NUMBER).to_pylist()
        for index, line in enumerate(batch.column(LINE)):
            try:
                asked[index] = self._read(first_row + index, line.as_py())
            except BadPrompt as error:
                code, message = error.row_error.code, error.row_error.message
                errors[index] = RowError(code, f"line {numbers[index]}: {message}")
        indices, token_ids, offsets = self._encode(asked, errors)
        requests = Requests.alike(indices, token_ids, offsets, self._spec.sampling)
        requests = with_sampling(requests, [asked[index].sampling for index in indices.tolist()])
        requests = those_that_fit(requests, self._max_model_len, errors)
        seeds = self._seeds(requests, [asked[index] for index in requests.rows.tolist()])
        requests = replace(requests, rows=first_row + requests.rows, seeds=seeds)
        return requests, {first_row + index: error for index, error in sorted(errors.items())}

    def _read(self, row: int, line: bytes | None) -> _Asked:
        request = read_request(line, self._models)
        if row in self._repeated:
            raise BadPrompt(
                "duplicate_custom_id",
                f"custom_id {shown(request.custom_id)} is that of line {self._repeated[row]} too; give each line its "
                "own",
            )
        body = request.body
        check_fields(body, request.chat)
        if (seed := body.get("seed")) is not None and type(seed) is not int:
            raise BadPrompt("bad_value", f"seed is {shown(seed)}; it must be a whole number")
        if not request.chat:
            return _Asked(request, self._prompt(body.get("prompt")), self._sampling.of(body, False, ()))
        chat = self._chat(body)
        sampling = self._sampling.of(body, True, ("reasoning", "tool_calls") if chat.tools else ("reasoning",))
        if chat.tools and sampling.params.structure is not None:
            raise BadPrompt("unsupported_field", "a form leaves no room for calls of tools; leave one of the two out")
        return _Asked(request, chat, sampling)

    def _prompt(self, prompt: Any) -> str | list[int]:
        """Return the prompt of a completion: a text or token ids, also alone in a list."""
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            if len(prompt) > 1:
                raise BadPrompt(
                    "unsupported_field", f"prompt is a list of {len(prompt)} prompts; give each a line of its own"
                )
            (prompt,) = prompt
        if isinstance(prompt, str):
            if (error := size_errors(np.array([len(prompt.encode())])).get(0)) is not None:
                raise BadPrompt(error.code, error.message)
            return prompt
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise BadPrompt("bad_value", f"prompt is {shown(prompt)}; it must be a text or a list of token ids")
        if unknown := [token for token in prompt if not 0 <= token < self._tokenizer.vocab_size]:
            most = self._tokenizer.vocab_size - 1
            raise BadPrompt("bad_value", f"prompt has the token id {shown(unknown[0])}; ids are from 0 to {most}")
        return prompt

    def _chat(self, body: dict[str, Any]) -> _Chat:
        if self._tokenizer.template is None:
            raise BadPrompt(
                "no_chat_template",
                "the model has no chat template; give one with --chat-template, or ask for /v1/completions",
            )
        messages: Any = body.get("messages")
        tools, own = body.get("tools"), body.get("chat_template_kwargs")
        check_messages(messages)
        check_tools(tools)
        check_arguments(own)
        choice = body.get("tool_choice")
        if choice not in (None, "auto", "none"):
            raise BadPrompt("unsupported_field", f"tool_choice is {shown(choice)}; it must be auto or none")
        offered = tools if tools and choice != "none" else None
        template = self._tokenizer.template if offered is None else self._tokenizer.tool_template
        if offered and template is not None and not template.reads_tools:
            raise BadPrompt("bad_tools", "the chat template never reads tools; leave them out")
        arguments = {**(self._spec.chat_template_kwargs or {}), **(own or {})}
        if (effort := body.get("reasoning_effort")) is not None:
            if template is not None and "reasoning_effort" not in template.reads:
                raise BadPrompt("unsupported_field", "the chat template never reads reasoning_effort; leave it out")
            arguments["reasoning_effort"] = effort
        system = [] if messages[0]["role"] == "system" else self._system
        return _Chat([*system, *messages], offered, arguments)

    def _encode(self, asked: dict[int, _Asked], errors: Errors) -> tuple[NDArray[np.int64], TokenIds, Offsets]:
        """Return (indices, token ids, offsets) of the prompts, in order; new errors are added to `errors`."""
        special = self._spec.allow_special_tokens
        ids = {i: np.array(one.prompt, np.int32) for i, one in asked.items() if isinstance(one.prompt, list)}
        if texts := {i: one.prompt for i, one in asked.items() if isinstance(one.prompt, str)}:
            ids |= _by_index(texts, *self._tokenizer.encode_batch([*texts.values()], special))
        if chats := {i: one.prompt for i, one in asked.items() if isinstance(one.prompt, _Chat)}:
            messages, tools = [chat.messages for chat in chats.values()], [chat.tools for chat in chats.values()]
            arguments = [chat.arguments for chat in chats.values()]
            of_chats = np.array([*chats], np.int64)
            encoded = encode_chats(self._tokenizer, of_chats, messages, errors, tools, special, arguments)
            ids |= _by_index(chats, *encoded)
        indices = sorted(ids.keys() - errors.keys())
        lengths = np.array([len(ids[i]) for i in indices], np.int64)
        flat = np.concatenate([np.empty(0, np.int32), *(ids[i] for i in indices)])
        return np.array(indices, np.int64), flat, offsets_of(lengths)

    def _seeds(self, requests: Requests, each: list[_Asked]) -> NDArray[np.uint64]:
        """Return the rows' random seeds [n]: of a body's seed and the prompt, or else of --seed and the custom_id."""
        own = [one.request.body.get("seed") for one in each]
        keys = [
            tokens if seed is not None else b"id" + one.request.custom_id.encode()
            for tokens, seed, one in zip(keys_by_tokens(requests), own, each, strict=True)
        ]
        return row_seeds([self._spec.seed if seed is None else seed for seed in own], keys)


def _by_index(indices: Iterable[int], token_ids: TokenIds, offsets: Offsets) -> dict[int, TokenIds]:
    """Return the token ids of each prompt, by its index."""
    return dict(zip(indices, np.split(token_ids, offsets[1:-1]), strict=True))
