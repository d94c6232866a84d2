"""Converting text to token ids and back with the checkpoint's own tokenizer, many rows at a time, in flat arrays.

This module does not import torch, because the parent process of a job imports it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken

from batchinfer.host.files import read_object, refuse_pointer
from batchinfer.kernels.ragged import ranges
from batchinfer.text.chat import MARK_END, MARK_START, ChatError, ChatTemplate, Message, mark

TokenIds = NDArray[np.int32]  # the rows' token ids, one row after the other
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
    ) -> None:
        """Take over the backend: its post-processor, truncation and padding are removed."""
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.template = template
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
        self._control = _one_of(texts)
        self._marked = re.compile(f"{MARK_START}({self._control.pattern}){MARK_END}|[{MARK_START}{MARK_END}]")
        # Some models have a control token's text as an ordinary token too. Split after its first character, the text
        # cannot become that token.
        rows = self._encode(texts, control=False)
        words = [text for text, row in zip(texts, rows, strict=True) if backend.token_to_id(text) in row]
        self._words = _one_of(words) if words else None

    @staticmethod
    def load(model_dir: Path, tokenizer_dir: Path | None = None) -> "Tokenizer":
        """Load the tokenizer from a checkpoint's folder.

        With `tokenizer_dir`, everything but the end-of-text ids comes from that folder. Raises `ValueError` naming the
        file that is missing or wrong.
        """
        folder = tokenizer_dir or model_dir
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(
                f"{folder} has no tokenizer.json; save one there with transformers: "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        data = _read(file)
        with _naming(file):
            backend = tokenizers.Tokenizer.from_buffer(data)
        config = _read_json(folder / "tokenizer_config.json")
        named = _named_tokens(folder, config)
        eos_ids = _eos_ids(model_dir)
        if eos_ids is None:
            eos_id = backend.token_to_id(named.get("eos_token", ""))
            eos_ids = () if eos_id is None else (eos_id,)
        source = _template_source(folder, config)
        try:
            template = None if source is None else ChatTemplate.compile(source, named)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        digest = hashlib.sha256(data)
        digest.update(json.dumps([eos_ids, named, source], sort_keys=True).encode())
        bos_id = backend.token_to_id(named.get("bos_token", ""))
        with _naming(file):
            return Tokenizer(backend, bos_id, eos_ids, template, digest.hexdigest())

    @property
    def vocabulary(self) -> dict[str, int]:
        """Id of every token, by its text."""
        return self._backend.get_vocab()

    def encode_batch(self, texts: list[str], allow_special_tokens: bool = False) -> tuple[TokenIds, Offsets]:
        """Encode plain prompts. A beginning-of-text token is put first, exactly once, if this tokenizer adds one.

        With `allow_special_tokens`, the text of a control token in a prompt becomes that token.
        """
        encode = self._encode_rendered if allow_special_tokens else self._encode_plain
        return _in_chunks(texts, encode, self._prefix, self._suffix)

    def encode_chats(self, conversations: Sequence[Sequence[Message]]) -> tuple[TokenIds, Offsets, dict[int, str]]:
        """Encode conversations, up to where the assistant's turn begins: (token ids, offsets, errors).

        `errors` gives, by the index of a conversation, why it could not be rendered; its row has no tokens. Raises
        `ValueError` if the checkpoint has no chat template.
        """
        if self.template is None:
            raise ValueError("the checkpoint has no chat template")
        texts, errors = [], {}
        for i, messages in enumerate(conversations):
            try:
                texts.append(self.template.render(mark(messages, self._control)))
            except ChatError as error:
                texts.append("")
                errors[i] = str(error)
        return *_in_chunks(texts, self._encode_marked, [], []), errors

    def decode_batch(self, token_ids: TokenIds, offsets: Offsets) -> list[str]:
        """Return each row's text, without special tokens, end-of-text and ids beyond the vocabulary."""
        # Models with a padded vocabulary have ids that the library does not know, and skips.
        keep = self._printed[np.minimum(token_ids, self.vocab_size - 1)]
        bounds = np.concatenate([[0], np.cumsum(keep)])[offsets].tolist()
        flat = token_ids[keep].tolist()
        rows = [flat[start:stop] for start, stop in pairwise(bounds)]
        return self._backend.decode_batch(rows, skip_special_tokens=False)

    def words(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the token ids of each text, at the start of a text and behind a space; control tokens are plain text
        in it."""
        both = [spaced for text in texts for spaced in (text.lstrip(), f" {text.lstrip()}")]
        return [tuple(row) for row in self._encode_plain(both) if row]

    def unprinted_in(self, text: str) -> dict[str, int]:
        """Return the tokens whose text is somewhere in `text` and which answers are printed without, with their ids."""
        added = {token.content: i for i, token in self._backend.get_added_tokens_decoder().items()}
        return {content: i for content, i in added.items() if content in text and not self._printed[i]}

    def _encode(self, texts: list[str], control: bool) -> list[list[int]]:
        self._backend.encode_special_tokens = not control
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
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

    def _encode_marked(self, texts: list[str]) -> list[list[int]]:
        marked = [i for i, text in enumerate(texts) if MARK_START in text or MARK_END in text]
        rows = self._encode(texts, control=True)
        for i in marked:
            # Every second segment is a control token's text from a message, or None where the template kept only one
            # of its two marks.
            segments = self._marked.split(texts[i])
            cut = [self._cut(text) if j % 2 else [(text, True)] for j, text in enumerate(segments) if text]
            rows[i] = self._encode_segments(list(chain.from_iterable(cut)))
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


def _one_of(texts: list[str]) -> re.Pattern[str]:
    # The longest comes first, because the tokenizer matches that way; "(?!)" matches nothing.
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turn whatever the tokenizers library raises inside into a `ValueError` that names the file."""
    try:
        yield
    except BaseException as error:  # the library raises plain `Exception`, and panics that derive from `BaseException`
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(f"{file} is not a file of the tokenizers library: {str(error)[:500]}") from error


def _read(path: Path) -> bytes:
    refuse_pointer(path)
    return path.read_bytes()


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _named_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return the text of bos_token, eos_token and so on. Older checkpoints have them in a file of their own."""
    older = {} if "added_tokens_decoder" in config else _read_json(folder / "special_tokens_map.json")
    named = {}
    for key, value in {**config, **older}.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            named[key] = text
    return named


def _eos_ids(model_dir: Path) -> tuple[int, ...] | None:
    for name in ("generation_config.json", "config.json"):
        value = _read_json(model_dir / name).get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(i) is int and 0 <= i < 1 << 31 for i in ids):
                raise ValueError(
                    f"{model_dir / name}: eos_token_id is {str(value)[:50]!a}; expected one id or a list of ids"
                )
            return tuple(ids)
    return None


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the chat template's source, or None.

    chat_template.jinja has precedence over the entry in tokenizer_config.json. Of several named templates, the one
    called 'default' is taken.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return _read(file).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8: {error}") from None
    source = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(source, list):
        named = [e.get("template") for e in source if isinstance(e, dict) and e.get("name") == "default"]
        source = named[-1] if named else None
    if source is not None and not isinstance(source, str):
        raise ValueError(f"{folder}: chat_template is a {type(source).__name__}; expected a text or named templates")
    return source
