"""Turning the token ids of answers into text, thinking and tool calls."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchinfer.kernels.ragged import take_ragged
from batchinfer.text import reasoning, tool_calls
from batchinfer.text.marks import Marks
from batchinfer.text.pieces import Piece, shown
from batchinfer.text.stop import Stop, before_stop, printed_answers, stopping
from batchinfer.text.tokenizer import Offsets, TokenIds, Tokenizer
from batchinfer.text.tool_calls import ToolCall


@dataclass(frozen=True)
class Answers:
    """What is in n answers, [n] each."""

    texts: list[str]
    reasoning: list[str | None]  # None where there is none
    tool_calls: list[list[ToolCall] | None]
    unparsed: list[int]  # indices of answers with text that looks like a tool call and does not parse


class AnswerParsers:
    """Parses answers out of which different things are taken, by the names of a reasoning format and a tool call
    format."""

    def __init__(self, tokenizer: Tokenizer, reasoning_format: str | None, tool_format: str | None) -> None:
        self._tokenizer, self._formats = tokenizer, (reasoning_format, tool_format)
        self._made: dict[tuple[str, ...] | None, AnswerParser] = {}

    def parse(
        self,
        token_ids: TokenIds,
        offsets: Offsets,
        ends: NDArray[np.int32] | None,
        stops: Sequence[Stop],
        parsed: Sequence[tuple[str, ...] | None],
    ) -> Answers:
        """Parse n answers, as `AnswerParser.parse` does. `parsed` [n] has what is taken out of each, of "reasoning" and
        "tool_calls"; None is all that there are formats for."""
        n = len(parsed)
        found = Answers([""] * n, [None] * n, [None] * n, [])
        for taken in dict.fromkeys(parsed):
            members = [i for i, each in enumerate(parsed) if each == taken]
            own = None if ends is None else ends[members]
            ids, bounds = take_ragged(token_ids, offsets, np.array(members))
            part = self._parser(taken).parse(ids, bounds, own, [stops[i] for i in members])
            for i, text, thought, calls in zip(members, part.texts, part.reasoning, part.tool_calls, strict=True):
                found.texts[i], found.reasoning[i], found.tool_calls[i] = text, thought, calls
            found.unparsed.extend(members[i] for i in part.unparsed)
        return found

    def _parser(self, parsed: tuple[str, ...] | None) -> "AnswerParser":
        if parsed not in self._made:
            names = ("reasoning", "tool_calls")
            formats = (
                form if parsed is None or name in parsed else None
                for name, form in zip(names, self._formats, strict=True)
            )
            self._made[parsed] = AnswerParser(self._tokenizer, *formats)
        return self._made[parsed]


class AnswerParser:
    """Parses answers by the names of a reasoning format and a tool call format; None leaves either in the text."""

    def __init__(self, tokenizer: Tokenizer, reasoning_format: str | None, tool_format: str | None) -> None:
        self._tokenizer = tokenizer
        self._reasoning = None if reasoning_format is None else reasoning.FORMATS[reasoning_format]
        self._tools = None if tool_format is None else tool_calls.FORMATS[tool_format]
        marks = [mark for form in (self._reasoning, self._tools) if form is not None for mark in form.marks]
        self._marks = Marks(tokenizer, set(marks)) if marks else None

    def parse(
        self,
        token_ids: TokenIds,
        offsets: Offsets,
        ends: NDArray[np.int32] | None,
        stops: Sequence[Stop],
    ) -> Answers:
        """Parse n answers. Answer i is `token_ids[offsets[i]:offsets[i + 1]]`.

        `ends` [n, END_TOKENS] has the last tokens of their prompts, padded in front with -1; without a reasoning format
        it may be None. Each text ends at the first of its stop strings and is without its stop tokens.
        """
        n = len(offsets) - 1
        if self._marks is None:
            return Answers(printed_answers(self._tokenizer, token_ids, offsets, stops), [None] * n, [None] * n, [])
        found = Answers([], [], [], [])
        opened = [False] * n if ends is None else self._opened(ends)
        hidden = stopping(token_ids, offsets, stops)
        for i, pieces in enumerate(self._marks.cut(token_ids, offsets, hidden)):
            thought: str | None = None
            calls: list[ToolCall] = []
            rest: list[Piece] = pieces
            if self._reasoning is not None:
                thought, rest = self._reasoning.split(pieces, opened[i])
            if self._tools is not None:
                calls, rest, failed = self._tools.find(rest)
                found.unparsed.extend([i] if failed else [])
            text = before_stop(shown(rest), stops[i].texts)
            found.texts.append(text.strip() if calls else text)
            found.reasoning.append(thought and before_stop(thought, stops[i].texts))
            found.tool_calls.append(calls or None)
        return found

    def _opened(self, ends: NDArray[np.int32]) -> list[bool]:
        """Tell whether each prompt opens the thinking [n]. Few ends differ, since the chat template writes them."""
        if self._marks is None or self._reasoning is None:
            return [False] * len(ends)
        different, which = np.unique(ends, axis=0, return_inverse=True)
        rows = [row[row >= 0] for row in different]
        flat = np.concatenate([np.empty(0, np.int32), *rows])
        pieces = self._marks.cut(flat, np.cumsum([0, *map(len, rows)]), np.zeros(len(flat), np.bool_))
        opened = np.array([self._reasoning.is_opened(end) for end in pieces], np.bool_)
        found: list[bool] = opened[which.reshape(-1)].tolist()
        return found
