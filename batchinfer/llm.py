"""`LLM`: runs a model in the calling process, for a script or a notebook."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.config import EngineConfig, EngineStats, Speculation, blocks_of
from batchinfer.engine.drafts.draft_folder import resolve_draft_model
from batchinfer.engine.engine import Engine
from batchinfer.engine.generation_config import CHOICES, GenerationConfig
from batchinfer.engine.prompts import (
    BadPrompt,
    Errors,
    ends_of,
    keys_by_tokens,
    row_seeds,
    with_completions,
)
from batchinfer.engine.request import Completions, FinishReason, Requests, RowError
from batchinfer.engine.sampling_params import MOST_LOGPROBS, SamplingParams
from batchinfer.engine.sampling_texts import in_token_ids, refuse_unknown_ids
from batchinfer.host.device import MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS, device_of
from batchinfer.kernels.cpu_library import CPU_PATHS, REFERENCE
from batchinfer.kernels.cpu_library import cpu_path as chosen_path
from batchinfer.models.config import read_shape
from batchinfer.models.hub import resolve_model
from batchinfer.prompt_reader import Prompt, PromptReader, listed, read_tools
from batchinfer.text import reasoning, tool_calls
from batchinfer.text.answer_formats import reasoning_format_of, thinking_tags, tool_format_of
from batchinfer.text.answers import AnswerParser
from batchinfer.text.chat_arguments import Arguments, problem_with
from batchinfer.text.grammars import check_grammar, refuse_tokenizer
from batchinfer.text.label_encoder import LabelEncoder
from batchinfer.text.stop import Stop
from batchinfer.text.token_texts import TokenTexts
from batchinfer.text.tokenizer import Tokenizer
from batchinfer.text.tool_calls import ToolCall
from batchinfer.token_logprobs import Score, TokenLogprob, token_logprobs


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
    logprobs: list[TokenLogprob] | None = None  # of the new tokens, if `SamplingParams.logprobs` asks for them
    prompt_logprobs: list[TokenLogprob] | None = None  # of the prompt's tokens but the first


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
        cpu_path: str = "auto",
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
        _check_choice("cpu_path", cpu_path, CPU_PATHS)
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
        path = chosen_path(cpu_path) if found == "cpu" else REFERENCE
        shape = read_shape(folder)
        template = None if chat_template is None else Path(chat_template)
        self.tokenizer = Tokenizer.load(folder, moment=template_date, chat_template=template)
        length = shape.max_positions if max_model_len is None else max_model_len
        seqs = MAX_NUM_SEQS[found] if max_num_seqs is None else max_num_seqs
        tokens = MAX_NUM_BATCHED_TOKENS[found] if max_num_batched_tokens is None else max_num_batched_tokens
        block_size, grain = blocks_of(None, path, states=bool(shape.recurrent))
        config = EngineConfig(
            model=folder,
            device=found,
            cpu_path=path,
            block_size=block_size,
            prefix_grain=grain,
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
        self.max_model_len = length
        self._prompts = PromptReader(self.tokenizer, self._engine.runner.decoder.config.vocab_size, length)
        self._token_texts, self._completions_of = TokenTexts(self.tokenizer), LabelEncoder(self.tokenizer)
        self._reasoning_parser, self._tool_parser = reasoning_parser, tool_parser
        self._notes: list[str] = []  # of the checkpoint's settings, and of stop texts
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
        prompts = listed(prompts)
        errors: Errors = {}
        if chat_template_kwargs is not None and (problem := problem_with(chat_template_kwargs)) is not None:
            raise ValueError(f"chat_template_kwargs {problem}")
        requests = self._prompts.requests(prompts, params, read_tools(tools), chat_template_kwargs or {}, errors)
        if params.temperature > 0:
            keys = keys_by_tokens(requests)
            requests = replace(requests, seeds=row_seeds([seed] * len(keys), keys))
        return self._run(requests, errors, params, self._parser(tools is not None, params.structure is not None))

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str | Sequence[int]], *, likeliest: int = 1
    ) -> list[Score]:
        """Return how likely each completion is behind its prompt, in their order; nothing is generated.

        A prompt is as in `stream`, and a completion a text or a list of token ids. A text has the tokens that prompt
        and completion have together, behind those of the prompt; if a token would span the border, those that it has by
        itself. Beside each token stand as many `likeliest` ones, from 1 to `MOST_LOGPROBS`. A prompt or a completion
        that cannot run gives an error. Raises `ValueError` naming a wrong argument.
        """
        if type(likeliest) is not int or not 1 <= likeliest <= MOST_LOGPROBS:
            raise ValueError(f"likeliest is {likeliest!r}; it must be from 1 to {MOST_LOGPROBS}")
        if isinstance(completions, str) or len(completions) != len(prompts):
            raise ValueError("completions must be a list with one for each prompt")
        params = SamplingParams(max_tokens=1, logprobs=likeliest)
        errors: Errors = {}
        prompts = listed(prompts)
        given = self._prompts.requests(prompts, params, None, {}, errors)
        found = [self._completion(given, i, completions[row], errors) for i, row in enumerate(given.rows.tolist())]
        requests = with_completions(given, found, [0] * len(found), self.max_model_len, errors)
        starts = dict(zip(given.rows.tolist(), np.diff(given.offsets).tolist(), strict=True))
        results = self._run(requests, errors, params, self._parser(False, True))
        scores = [Score(c.index, c.logprobs or (), 0 if c.error else starts[c.index], c.error) for c in results]
        return sorted(scores, key=lambda score: score.index)

    def _completion(
        self, requests: Requests, i: int, completion: str | Sequence[int], errors: Errors
    ) -> Sequence[int] | None:
        """Return the token ids of the completion of request i; None if it has an error, which is added."""
        row = int(requests.rows[i])
        try:
            read = self._prompts.read(completion)
            if isinstance(read, list):
                raise BadPrompt("wrong_type", "the completion is a conversation; expected text or token ids")
        except BadPrompt as error:
            found = error.row_error
            errors[row] = RowError(*(text.replace("prompt", "completion") for text in (found.code, found.message)))
            return None
        prompt = requests.token_ids[requests.offsets[i] : requests.offsets[i + 1]]
        return self._completions_of.behind(prompt, [read])[0] if isinstance(read, str) else read.tolist()

    def stats(self) -> EngineStats:
        """Return the engine's counts so far, the kernels that it uses, and notes about slower paths taken, the
        checkpoint's settings and tools that were given in vain."""
        stats = self._engine.stats()
        return replace(stats, notes=[*stats.notes, *self._notes, *self._prompts.notes])

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
            said = str(error).replace("--reasoning-parser", "reasoning_parser")
            raise ValueError(f"max_thinking_tokens {said}") from error

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
            plain = Completion(row - first, answer, tokens, reason, 0, error, found.reasoning[i], found.tool_calls[i])
            yield self._with_logprobs(plain, done, i, params)

    def _with_logprobs(self, plain: Completion, done: Completions, i: int, params: SamplingParams) -> Completion:
        texts, prompt = self._token_texts, done.prompt_logprobs
        if plain.error is not None or not params.wants_scores:
            return plain
        answer = None if done.logprobs is None else token_logprobs(done.logprobs, i, texts)
        return replace(
            plain, logprobs=answer, prompt_logprobs=None if prompt is None else token_logprobs(prompt, i, texts)
        )


def _check_kinds(kind: Any, wanted: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r:.50}; it must be {wanted}")


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
