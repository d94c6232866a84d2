"""`LLM`: runs a model in the calling process, for a script or a notebook."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.config import EngineConfig, EngineStats, Speculation
from batchinfer.engine.drafts.draft_folder import resolve_draft_model
from batchinfer.engine.engine import Engine
from batchinfer.engine.generation_config import CHOICES, GenerationConfig
from batchinfer.engine.prompts import (
    BadPrompt,
    Conversation,
    Errors,
    Tools,
    check_messages,
    check_tools,
    encode_chats,
    ends_of,
    keys_by_tokens,
    row_seeds,
    size_errors,
    those_that_fit,
)
from batchinfer.engine.request import Completions, FinishReason, Requests, RowError
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_texts import in_token_ids, refuse_unknown_ids
from batchinfer.host.device import MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS, device_of
from batchinfer.kernels.ragged import take_ragged
from batchinfer.models.config import read_shape
from batchinfer.models.hub import resolve_model
from batchinfer.text import reasoning, tool_calls
from batchinfer.text.answer_formats import reasoning_format_of, thinking_tags, tool_format_of
from batchinfer.text.answers import AnswerParser
from batchinfer.text.chat_arguments import Arguments, problem_with
from batchinfer.text.grammars import check_grammar, refuse_tokenizer
from batchinfer.text.stop import Stop
from batchinfer.text.tokenizer import Offsets, TokenIds, Tokenizer
from batchinfer.text.tool_calls import ToolCall

NOTHING = np.empty(0, np.int32)

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]


@dataclass(frozen=True)
class Completion:
    """The result of one prompt."""

    index: int  # index of the prompt in the list, from 0
    text: str | None  # up to the first stop string; None where there is an error
    token_ids: list[int]  # the end-of-text id included
    finish_reason: str  # stop, length or error
    prompt_tokens: int  # 0 where the prompt was not run
    error: RowError | None = None  # why there is no text: a code in snake_case, and a message
    reasoning: str | None = None  # what the model thought before it answered
    tool_calls: list[ToolCall] | None = None  # each with name and arguments


class LLM:
    """A model, its tokenizer and its engine, on one device. Only one thread may use it.

    It changes nothing in the process around it: neither environment variables nor torch's threads, default types and
    random numbers. On an Intel processor, a prompt's result is independent of the other prompts, to the bit, only if
    MKL is in its strict mode. A job sets this mode; here, start Python with `MKL_CBWR=AUTO,STRICT`. Otherwise
    `stats().notes` says so.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        quantization: str = "auto",
        dtype: str = "auto",
        kv_cache_dtype: str = "auto",
        device: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        gpu_memory_utilization: float = 0.9,
        deterministic: bool = False,
        speculation: Speculation | None = None,
        template_date: datetime | None = None,
        generation_config: str = "auto",
        chat_template: str | Path | None = None,
        reasoning_parser: str = "auto",
        tool_parser: str = "auto",
    ) -> None:
        """Load a model: a folder, a GGUF file, or the name of a model on the Hub.

        The arguments are the flags of `batchinfer run`, with the same defaults. The chat template takes
        `template_date` for now, or the moment of this call; the one in the file `chat_template` takes the place of the
        checkpoint's. What `generation_config` takes over from the checkpoint
        goes into the fields of a call's `SamplingParams` that have their defaults; what was applied and what was not is
        in `stats().notes`. Raises `ValueError` naming a wrong argument, and `batchinfer.errors.Refused` saying what is
        wrong with the model.
        """
        if device not in ("auto", *MAX_NUM_SEQS):
            raise ValueError(f"device is {device!r}; it must be one of auto, {', '.join(MAX_NUM_SEQS)}")
        _check_kinds(str | Path, "a text or a path", model=model)
        _check_kinds(str, "a text", quantization=quantization, dtype=dtype, kv_cache_dtype=kv_cache_dtype)
        _check_kinds(Real, "a number", gpu_memory_utilization=gpu_memory_utilization)
        _check_kinds(int | None, "a whole number, or None", max_model_len=max_model_len, max_num_seqs=max_num_seqs)
        _check_kinds(int | None, "a whole number, or None", max_num_batched_tokens=max_num_batched_tokens)
        _check_kinds(datetime | None, "a datetime, or None", template_date=template_date)
        _check_kinds(str | Path | None, "a path, or None", chat_template=chat_template)
        _check_choice("reasoning_parser", reasoning_parser, ("auto", "none", *reasoning.FORMATS))
        _check_choice("tool_parser", tool_parser, ("auto", "none", *tool_calls.FORMATS))
        _check_choice("generation_config", generation_config, CHOICES)
        folder, found = resolve_model(str(model), revision), device_of(device)
        shape = read_shape(folder)
        template = None if chat_template is None else Path(chat_template)
        self.tokenizer = Tokenizer.load(folder, moment=template_date, chat_template=template)
        length = shape.max_positions if max_model_len is None else max_model_len
        seqs = MAX_NUM_SEQS[found] if max_num_seqs is None else max_num_seqs
        tokens = MAX_NUM_BATCHED_TOKENS[found] if max_num_batched_tokens is None else max_num_batched_tokens
        config = EngineConfig(
            model=folder,
            device=found,
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            max_model_len=length,
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            kv_cache_tokens=seqs * length,
            deterministic=deterministic,
            gpu_memory_utilization=gpu_memory_utilization,
            speculation=resolve_draft_model(speculation or Speculation(), str(model), self.tokenizer, length),
        )
        self._generation_config = GenerationConfig.read(folder, generation_config)
        self._engine = Engine(config, self.tokenizer)
        self._max_model_len = length
        self._reasoning_parser, self._tool_parser = reasoning_parser, tool_parser
        self._notes: list[str] = []  # of the checkpoint's settings, of stop texts, and of tools given in vain
        self._rows = 0  # row numbers used so far: each call takes new ones

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        seed: int = 0,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Arguments | None = None,
    ) -> list[Completion]:
        """Return the completions of all prompts, in their order. See `stream` for arguments and errors."""
        found = self.stream(prompts, params, seed=seed, tools=tools, chat_template_kwargs=chat_template_kwargs)
        return sorted(found, key=lambda completion: completion.index)

    def stream(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        seed: int = 0,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Arguments | None = None,
    ) -> Iterator[Completion]:
        """Yield completions as prompts end, each with the `index` of its prompt.

        A prompt is a text, a list of token ids, or a list of messages: dicts with role and content, which the
        checkpoint's chat template turns into text. `tools`, a list of JSON schemas, are offered to each conversation,
        and `chat_template_kwargs` are further variables for the template, as {"enable_thinking": False}. A prompt that
        cannot run gives a completion with an error. Above temperature 0, `seed` and the prompt's tokens determine the
        random draws. Raises `ValueError` naming a wrong argument. Closing the iterator drops the prompts that have not
        ended.
        """
        params = SamplingParams() if params is None else params
        _check_kinds(SamplingParams, "SamplingParams", params=params)
        params = self._resolved(params)
        if type(seed) is not int or seed < 0:
            raise ValueError(f"seed is {seed!r}; it must be a whole number, 0 or more")
        if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
            raise ValueError(f"prompts is {prompts!r:.50}; it must be a list of prompts")
        prompts = list(prompts)
        if any(isinstance(prompt, Mapping | Integral) for prompt in prompts):
            raise ValueError("prompts is a single conversation or one row of token ids; it must be a list of them")
        errors: Errors = {}
        if chat_template_kwargs is not None and (problem := problem_with(chat_template_kwargs)) is not None:
            raise ValueError(f"chat_template_kwargs {problem}")
        requests = self._requests(prompts, params, _read_tools(tools), chat_template_kwargs or {}, errors)
        if params.temperature > 0:
            keys = keys_by_tokens(requests)
            requests = replace(requests, seeds=row_seeds([seed] * len(keys), keys))
        return self._run(requests, errors, params, self._parser(tools is not None, params.structure is not None))

    def stats(self) -> EngineStats:
        """Return the engine's counts so far, the kernels that it uses, and notes about slower paths taken, the
        checkpoint's settings and tools that were given in vain."""
        stats = self._engine.stats()
        return replace(stats, notes=[*stats.notes, *self._notes])

    def _resolved(self, params: SamplingParams) -> SamplingParams:
        """Return params with the checkpoint's settings, and with token ids for texts."""
        refuse_unknown_ids(params, self._engine.runner.decoder.config.vocab_size)
        if params.structure is not None:
            try:
                check_grammar(params.structure)
            except ValueError as error:
                raise ValueError(f"{params.structure[0]} {error}") from error
            refuse_tokenizer(self.tokenizer)
            if params.max_thinking_tokens:
                form = params.structure[0]
                raise ValueError(f"max_thinking_tokens closes thinking, and {form} leaves none; leave one of them out")
        default = SamplingParams()
        given = [f.name for f in fields(SamplingParams) if getattr(params, f.name) != getattr(default, f.name)]
        params, settings = self._generation_config.applied_to(params, given)
        params, lines = in_token_ids(params, self.tokenizer)
        if params.max_thinking_tokens:
            params = replace(params, thinking_tags=self._thinking_tags())
        self._note(*settings.lines(), *lines)
        return params

    def _thinking_tags(self) -> tuple[int, int]:
        try:
            return thinking_tags(self.tokenizer, self._reasoning_format(self._reasoning_parser))
        except ValueError as error:
            raise ValueError(f"max_thinking_tokens {error}") from error

    def _reasoning_format(self, parser: str) -> str | None:
        """Return the name of the format of thinking; 'auto' is what the chat template shows."""
        if parser == "auto":
            template = self.tokenizer.template
            return None if template is None else reasoning_format_of(template, {})
        return None if parser == "none" else parser

    def _parser(self, offers_tools: bool, structured: bool) -> AnswerParser:
        thinking, calling = (
            "none" if structured and name == "auto" else name for name in (self._reasoning_parser, self._tool_parser)
        )  # an answer that follows a form has no room for thinking or calls
        called: str | None = None if calling == "none" else calling
        if calling == "auto":
            template = self.tokenizer.tool_template if offers_tools else None
            called = None if template is None else tool_format_of(template)
        return AnswerParser(self.tokenizer, self._reasoning_format(thinking), called)

    def _note(self, *lines: str) -> None:
        self._notes = list(dict.fromkeys([*self._notes, *lines]))

    def _requests(
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
        vocabulary = self._engine.runner.decoder.config.vocab_size
        for index, prompt in enumerate(prompts):
            try:
                match _read(prompt, vocabulary):
                    case str() as text:
                        texts[index] = text
                    case np.ndarray() as ids:
                        given[index] = ids
                    case messages:
                        chats[index] = messages
            except BadPrompt as error:
                errors[index] = error.row_error
        encoded = [
            (list(texts), *self.tokenizer.encode_batch(list(texts.values()))),
            (list(given), np.concatenate([NOTHING, *given.values()]), np.cumsum([0, *map(len, given.values())])),
        ]
        if not chats and (tools is not None or arguments):
            self._note("tools or chat_template_kwargs were given in vain: none of the prompts is a conversation")
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
        if self.tokenizer.template is None:
            raise ValueError(
                f"prompts[{min(chats)}] is a conversation, and the model has no chat template; give texts or token ids"
            )
        template = self.tokenizer.template if tools is None else self.tokenizer.tool_template
        if tools is not None and template is not None and not template.reads_tools:
            self._note("the model's chat template never reads tools: those that were given are in vain")
        if template is not None and (unread := [name for name in arguments if name not in template.reads]):
            self._note(f"the model's chat template never reads {', '.join(unread)} of chat_template_kwargs")
        indices, offered, each = np.array(list(chats), np.int64), [tools] * len(chats), [arguments] * len(chats)
        return encode_chats(self.tokenizer, indices, list(chats.values()), errors, offered, False, each)

    def _run(
        self, requests: Requests, errors: Errors, params: SamplingParams, parser: AnswerParser
    ) -> Iterator[Completion]:
        if self._engine.unfinished:
            raise ValueError("another stream of this LLM is under way: end it, or close() it, before the next")
        first = self._rows
        lengths = np.diff(requests.offsets).tolist()
        places = {row: i for i, row in enumerate(requests.rows.tolist())}
        self._rows += 1 + max(places, default=0)
        try:
            self._engine.add(replace(requests, rows=first + requests.rows))
            for index, error in sorted(errors.items()):
                yield Completion(index, None, [], FinishReason.ERROR.name.lower(), 0, error)
            while self._engine.unfinished:
                done = self._engine.step()
                ended = [places[row - first] for row in done.rows.tolist()]
                ends = ends_of(requests, np.array(ended, np.int64))
                for i, completion in zip(ended, self._completions(done, first, params, parser, ends), strict=True):
                    yield replace(completion, prompt_tokens=lengths[i])
        finally:
            if self._engine.unfinished:
                self._engine.drop()

    def _completions(
        self,
        done: Completions,
        first: int,
        params: SamplingParams,
        parser: AnswerParser,
        ends: NDArray[np.int32],
    ) -> Iterator[Completion]:
        stops = [Stop(params.stop, params.stop_token_ids)] * len(done)
        found = parser.parse(done.token_ids, done.offsets, ends, stops)
        for i, row in enumerate(done.rows.tolist()):
            error = done.errors.get(row)
            answer = None if error is not None else found.texts[i]
            reason, tokens = FinishReason(done.finish_reasons[i]).name.lower(), done.tokens_of(i)
            yield Completion(row - first, answer, tokens, reason, 0, error, found.reasoning[i], found.tool_calls[i])


def _check_kinds(kind: Any, wanted: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r:.50}; it must be {wanted}")


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def _read(prompt: Any, vocabulary: int) -> str | TokenIds | Conversation:
    """Return the prompt as a text, token ids or messages. Raises `BadPrompt` if it is none of these or cannot run."""
    if prompt is None:
        raise BadPrompt("null_prompt", "the prompt is None")
    if isinstance(prompt, str):
        for error in size_errors(np.array([len(_unicode(prompt))])).values():
            raise BadPrompt(error.code, error.message)
        return prompt
    if not isinstance(prompt, list | tuple):
        raise BadPrompt("wrong_type", f"the prompt is a {type(prompt).__name__}; expected text, messages or token ids")
    if not prompt:
        raise BadPrompt("empty_prompt", "the prompt is empty")
    if all(isinstance(token, Integral) and not isinstance(token, bool) for token in prompt):
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise BadPrompt("bad_token_ids", f"token ids must be from 0 to {vocabulary - 1} for this model")
        return np.array(prompt, np.int32)
    messages = list(prompt)
    check_messages(messages)
    _unicode(json.dumps(messages, ensure_ascii=False, default=str))
    return messages


def _read_tools(tools: Any) -> Tools | None:
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
