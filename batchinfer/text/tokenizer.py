"""Converting text to token ids and back with the checkpoint's own tokenizer, many rows at a time, in flat arrays.

This module does not import torch, because the parent process of a job imports it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken

from batchinfer.kernels.ragged import ranges
from batchinfer.text.added_tokens import add_tokens, tokens_outside
from batchinfer.text.chat import NO_ARGUMENTS, ChatError, ChatTemplate, Message, Tool
from batchinfer.text.chat_arguments import Arguments
from batchinfer.text.content_parts import fit_parts
from batchinfer.text.control_tokens import ControlTokens, one_of
from batchinfer.text.tokenizer_files import (
    end_of_text_ids,
    named_tokens,
    read_bytes,
    read_json,
    read_template,
    template_sources,
    tokenizer_config,
)
from batchinfer.text.tracked import Tracked, leaves

TokenIds = NDArray[np.int32]  # the rows' token ids, one row after the other
NOTHING: TokenIds = np.empty(0, np.int32)
Offsets = NDArray[np.int64]  # row i is token_ids[offsets[i]:offsets[i + 1]]

# Characters encoded at once. The limit bounds memory: the library takes about 100 bytes a token while it encodes.
CHUNK_CHARACTERS = 1 << 20
ROW_CHARACTERS = 256  # a row's fixed cost in memory, counted as characters

MAX_VOCABULARY = 1 << 22

# Control tokens are the special tokens, and added tokens that look like tags. Other added tokens (runs of spaces,
# single letters, technical words) are vocabulary for ordinary text.
_TAG = re.compile(r"<.+>|\[.+\]", re.DOTALL)


class Tokenizer:
    """One checkpoint's tokenizer and chat template. Only one thread at a time may use it.

    The text of a control token in a prompt is encoded as plain text, not as the control token, unless the caller asks
    for that.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos_id: int | None = None,
        eos_ids: tuple[int, ...] = (),
        template: ChatTemplate | None = None,
        fingerprint: str = "",
        tool_source: str | None = None,
    ) -> None:
        """Take over the backend: its post-processor, truncation and padding are removed.

        `tool_source` is the source of a second template, for conversations with tools.
        """
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.template = template
        self._tool_source = tool_source
        self.fingerprint = fingerprint  # sha256 of everything that token ids and text depend on
        vocabulary = backend.get_vocab()
        self.vocab_size = max(vocabulary.values(), default=0) + 1
        if self.vocab_size > MAX_VOCABULARY:
            raise ValueError(f"the largest token id is {self.vocab_size - 1}; it must be below {MAX_VOCABULARY}")
        backend.no_truncation()
        backend.no_padding()
        # A post-processor only adds ids at both ends. Adding them here instead takes half the time.
        body = next(e for e in map(backend.encode, ("a", *vocabulary)) if 0 in e.special_tokens_mask)
        first, last = body.special_tokens_mask.index(0), body.special_tokens_mask[::-1].index(0)
        self._prefix, self._suffix = body.ids[:first], body.ids[len(body) - last :]
        backend.post_processor = None

        added = backend.get_added_tokens_decoder()
        unprinted = [i for i, token in added.items() if token.special] + [i for i in eos_ids if i < self.vocab_size]
        self._printed = np.ones(self.vocab_size, np.bool_)
        self._printed[unprinted] = False
        # Make every control token "special", because the library can encode only special tokens' text as plain text.
        # Special tokens are not normalized: they match their exact characters.
        control = [
            AddedToken(t.content, single_word=t.single_word, lstrip=t.lstrip, rstrip=t.rstrip, special=True)
            for t in added.values()
            if t.special or _TAG.fullmatch(t.content)
        ]
        backend.add_special_tokens(control)
        self._backend = backend
        texts = [token.content for token in control]
        self._control = ControlTokens(texts)
        # Some models have a control token's text as an ordinary token too. Split after its first character, the text
        # cannot become that token.
        rows = self._encode(texts, control=False)
        words = [text for text, row in zip(texts, rows, strict=True) if backend.token_to_id(text) in row]
        self._words = one_of(words) if words else None

    @staticmethod
    def load(
        model_dir: Path,
        tokenizer_dir: Path | None = None,
        moment: datetime | None = None,
        chat_template: Path | None = None,
        chats: bool = True,
    ) -> "Tokenizer":
        """Load the tokenizer from a checkpoint's folder. The chat template takes `moment` for now.

        With `tokenizer_dir`, everything but the end-of-text ids comes from that folder. The template in the file
        `chat_template` takes the place of all the checkpoint's own. Without `chats`, no template is compiled. Raises
        `ValueError` naming the file that is missing or wrong.
        """
        folder = tokenizer_dir or model_dir
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(
                f"{folder} has no tokenizer.json; save one there with transformers: "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        data = read_bytes(file)
        with _naming(file):
            backend = tokenizers.Tokenizer.from_buffer(data)
        config = tokenizer_config(folder)
        in_file, size = _added(backend), read_json(model_dir / "config.json").get("vocab_size")
        left_out = add_tokens(backend, tokens_outside(folder, config), size if type(size) is int else None)
        named = named_tokens(config)
        eos_ids = end_of_text_ids(model_dir)
        if eos_ids is None:
            eos_id = backend.token_to_id(named.get("eos_token", ""))
            eos_ids = () if eos_id is None else (eos_id,)
        own = template_sources(folder, config)
        sources = own if chat_template is None else {"default": read_template(chat_template)}
        source = sources.get("default") if chats else None
        if chat_template is not None and not sources["default"].strip():
            raise ValueError(f"{chat_template} is empty; expected a chat template")
        try:
            template = None if source is None else ChatTemplate.compile(source, named, moment)
        except ValueError as error:
            raise ValueError(f"{chat_template or folder}: {error}") from error
        for text in left_out:
            if source is not None and any(name in source for name in (text, *(k for k in named if named[k] == text))):
                raise ValueError(
                    f"{chat_template or folder}: the chat template writes {text[:50]!a}, a token beyond the model's "
                    f"vocab_size {size}"
                )
        digest = hashlib.sha256(data)
        digest.update(json.dumps([eos_ids, named, own.get("default")], sort_keys=True).encode())
        if (added := _added(backend)) != in_file:
            digest.update(added.encode())
        bos_id = backend.token_to_id(named.get("bos_token", ""))
        with _naming(file):
            return Tokenizer(backend, bos_id, eos_ids, template, digest.hexdigest(), sources.get("tool_use"))

    @property
    def vocabulary(self) -> dict[str, int]:
        """Id of every token, by its text."""
        return self._backend.get_vocab()

    def as_json(self) -> str:
        """Return the tokenizer as `tokenizer.json` has it, with the tokens that other files add."""
        return self._backend.to_str()

    def encode_batch(self, texts: list[str], allow_special_tokens: bool = False) -> tuple[TokenIds, Offsets]:
        """Encode plain prompts. A beginning-of-text token is put first, exactly once, if this tokenizer adds one.

        With `allow_special_tokens`, the text of a control token in a prompt becomes that token.
        """
        encode = self._encode_rendered if allow_special_tokens else self.encode_plain
        return _in_chunks(texts, encode, self._prefix, self._suffix)

    def encode_rendered(self, text: str, marks: bool) -> list[int]:
        """Return the token ids of a text in which control tokens are spelled out; with `marks`, begun as a prompt is,
        and without them even if the text itself begins so."""
        ids = self._encode_rendered([text])[0]
        return [*self._prefix, *ids, *self._suffix] if marks else ids

    @cached_property
    def tool_template(self) -> ChatTemplate | None:
        """The chat template for conversations with tools. Few checkpoints have one besides the usual template, so it
        is compiled when it is needed. Raises `ValueError` as `ChatTemplate.compile` does."""
        if self._tool_source is None or self.template is None:
            return self.template
        return ChatTemplate.compile(self._tool_source, self.template.variables, self.template.moment)

    def encode_chats(
        self,
        conversations: Sequence[Sequence[Message]],
        tools: Sequence[Sequence[Tool] | None] | None = None,
        allow_special_tokens: bool = False,
        arguments: Sequence[Arguments] | None = None,
    ) -> tuple[TokenIds, Offsets, dict[int, ChatError]]:
        """Encode conversations, up to where the assistant's turn begins: (token ids, offsets, errors).

        `tools` has the tools of each conversation, or None for one without, and `arguments` what else its template is
        given. `errors` gives, by the index of a conversation, why it could not be rendered; its row has no tokens. With
        `allow_special_tokens`, the text of a control token in a message becomes that token. Raises `ValueError` if the
        checkpoint has no chat template.
        """
        if self.template is None:
            raise ValueError("the checkpoint has no chat template")
        texts, errors = [], {}
        n = len(conversations)
        chats = zip(conversations, tools or [None] * n, arguments or [NO_ARGUMENTS] * n, strict=True)
        for i, (messages, offered, given) in enumerate(chats):
            template = self.template if offered is None or self.tool_template is None else self.tool_template
            try:
                fitted = fit_parts(template, messages, offered, given)
                text = template.render(fitted, offered, given)
                texts.append(text if allow_special_tokens else self._follow(template, fitted, offered, given, text))
            except ChatError as error:
                texts.append("")
                errors[i] = error
        return *_in_chunks(texts, self._encode_chats, [], []), errors

    def decode_batch(self, token_ids: TokenIds, offsets: Offsets, also: TokenIds = NOTHING) -> list[str]:
        """Return each row's text, without special tokens, end-of-text and ids beyond the vocabulary; tokens in `also`
        have their text in any case."""
        # Models with a padded vocabulary have ids that the library does not know, and skips.
        keep = self._printed[np.minimum(token_ids, self.vocab_size - 1)]
        if len(also):
            keep |= np.isin(token_ids, also)
        bounds = np.concatenate([[0], np.cumsum(keep)])[offsets].tolist()
        flat = token_ids[keep].tolist()
        rows = [flat[start:stop] for start, stop in pairwise(bounds)]
        return self._backend.decode_batch(rows, skip_special_tokens=False)

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens, special ones included."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text

    @property
    def added_tokens(self) -> dict[str, int]:
        """Id of every token that is found in texts as a whole, by its text: control tokens and the like."""
        return {token.content: i for i, token in self._backend.get_added_tokens_decoder().items()}

    def prints(self, token_id: int) -> bool:
        """Tell whether answers are printed with this token's text."""
        return bool(self._printed[token_id])

    def words(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the token ids of each text, at the start of a text and behind a space; control tokens are plain text
        in it."""
        both = [spaced for text in texts for spaced in (text.lstrip(), f" {text.lstrip()}")]
        return [tuple(row) for row in self.encode_plain(both) if row]

    def unprinted_in(self, text: str) -> dict[str, int]:
        """Return the tokens whose text is somewhere in `text` and which answers are printed without, with their ids."""
        return {content: i for content, i in self.added_tokens.items() if content in text and not self._printed[i]}

    def _encode(self, texts: list[str], control: bool) -> list[list[int]]:
        self._backend.encode_special_tokens = not control
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_plain(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of texts, without marks of their ends; control tokens in them are plain text."""
        rows = self._encode(texts, control=False)
        for i, text in enumerate(texts if self._words else ()):
            segments = self._cut(text)
            if len(segments) > 1:
                rows[i] = self._encode_segments(segments)
        return rows

    def _cut(self, text: str) -> list[tuple[str, bool]]:
        cuts = [match.start() + 1 for match in self._words.finditer(text)] if self._words else []
        return [(text[a:b], False) for a, b in pairwise([0, *cuts, len(text)])]

    def _encode_rendered(self, texts: list[str]) -> list[list[int]]:
        rows, n = self._encode(texts, control=True), len(self._prefix)
        return [row[n:] if row[:n] == self._prefix else row for row in rows]

    def _follow(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        arguments: Arguments,
        text: str,
    ) -> str:
        """Return the rendered text, tracked if a control token in it may come from messages, tools and arguments
        alone."""
        held = "\n".join(map(str, leaves([messages, tools, arguments])))
        followed = template.makes_characters or self._control.may_come_from(held)
        return template.follow(messages, tools, arguments, text) if followed else text

    def _encode_chats(self, texts: list[str]) -> list[list[int]]:
        tracked = {i: self._control.cut(text) for i, text in enumerate(texts) if isinstance(text, Tracked)}
        cut = {i: segments for i, segments in tracked.items() if not all(control for _, control in segments)}
        rows = self._encode(["" if i in cut else text for i, text in enumerate(texts)], control=True)
        for i, segments in cut.items():
            smaller = [[(text, True)] if control else self._cut(text) for text, control in segments]
            rows[i] = self._encode_segments(list(chain.from_iterable(smaller)))
        return rows

    def _encode_segments(self, segments: list[tuple[str, bool]]) -> list[int]:
        """Encode a text given as segments (text, whether control tokens are recognized in it).

        No token spans two segments.
        """
        newline = self._encode(["\n"], control=True)[0]
        ids: list[int] = []
        for i, (text, control) in enumerate(segments):
            # SentencePiece puts a space before a text. A line break before a later segment prevents that space; its
            # own ids are removed again.
            row = self._encode(["\n" + text], control)[0] if i else newline
            inside = i > 0 and row[: len(newline)] == newline
            ids += row[len(newline) :] if inside else self._encode([text], control)[0]
        return ids


def _in_chunks(
    texts: list[str], encode: Callable[[list[str]], list[list[int]]], prefix: list[int], suffix: list[int]
) -> tuple[TokenIds, Offsets]:
    """Encode texts in chunks: (token ids of all rows, offsets), with `prefix` and `suffix` around each row."""
    around = len(prefix) + len(suffix)
    offsets = np.zeros(len(texts) + 1, np.int64)
    chunks = [np.empty(0, np.int32)]
    for start, stop in _chunks(texts):
        rows = encode(texts[start:stop])
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        offsets[start + 1 : stop + 1] = lengths + around
        ids = np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum()))
        if around:
            ends = np.cumsum(lengths + around)
            framed = np.empty(int(ends[-1]), np.int32)
            framed[ranges(ends - lengths - len(suffix), lengths)[0]] = ids
            framed[(ends - lengths - around)[:, None] + np.arange(len(prefix))] = prefix
            framed[(ends - len(suffix))[:, None] + np.arange(len(suffix))] = suffix
            ids = framed
        chunks.append(ids)
    np.cumsum(offsets, out=offsets)
    return np.concatenate(chunks), offsets


def _chunks(texts: list[str]) -> Iterator[tuple[int, int]]:
    cost = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)) + ROW_CHARACTERS)
    cuts = np.flatnonzero(np.diff(cost // CHUNK_CHARACTERS)) + 1
    bounds: list[int] = [0, *cuts.tolist(), len(texts)]
    return pairwise(bounds) if texts else iter(())


def _added(backend: tokenizers.Tokenizer) -> str:
    """Return the added tokens as a text: their ids, their characters, and how they are matched."""
    return repr(sorted((i, repr(token)) for i, token in backend.get_added_tokens_decoder().items()))


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turn whatever the tokenizers library raises inside into a `ValueError` that names the file."""
    try:
        yield
    except BaseException as error:  # the library raises plain `Exception`, and panics that derive from `BaseException`
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(f"{file} is not a file of the tokenizers library: {str(error)[:500]}") from error
