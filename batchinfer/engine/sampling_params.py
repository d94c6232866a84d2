"""`SamplingParams`: how tokens are sampled. Free of numpy, because the command line reads its flags from here."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from os.path import isfile  # unlike that of pathlib, it takes any text
from pathlib import Path
from typing import Annotated, Any

from batchinfer.errors import UsageError
from batchinfer.flag import Flag, Kind, problems

MAX_STOP_STRINGS = 64
MAX_INT32 = 2**31 - 1
MOST_LOGPROBS = 20  # likeliest tokens that are told of beside a token


def token_ids_of(flag: str, texts: Iterable[str]) -> tuple[int, ...]:
    """Split texts at their commas into token ids. Raises `UsageError` for anything else."""
    parts = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    for part in parts:
        if not (part.isascii() and part.isdecimal() and int(part) <= MAX_INT32):
            raise UsageError(f"{flag} is {part!r}; it must be token ids, whole numbers with commas between them")
    return tuple(map(int, parts))


def schema_of(flag: str, text: str) -> str:
    """Return a JSON object as it is written, or the text of the file that is named. Raises `UsageError`."""
    if text.lstrip().startswith("{"):
        return text
    if not isfile(text):
        raise UsageError(f"{flag} is {text[:50]!r}, which is neither a JSON object nor a file; give one of the two")
    return _read(flag, text)


def grammar_of(flag: str, text: str) -> str:
    """Return the text of the file that is named, or a grammar as it is written. Raises `UsageError`."""
    if ":" not in text and not isfile(text):
        raise UsageError(f"{flag} is {text[:50]!r}, which is neither a grammar nor a file; give one of the two")
    return _read(flag, text) if "\n" not in text and isfile(text) else text


def _read(flag: str, file: str) -> str:
    try:
        return Path(file).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{flag} {file} cannot be read: {error}") from error


TOKEN_IDS = Kind("ID,...", token_ids_of)
SCHEMA = Kind("FILE|JSON", schema_of)
GRAMMAR = Kind("FILE|GRAMMAR", grammar_of)
STRUCTURES = ("json_schema", "regex", "grammar")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled and when a row ends.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off. `stop` may be any collection of strings, and
    the fields of token ids any collections of whole numbers. Penalties and bans change the logits before temperature
    and filters do. At most one of `json_schema` (also a dict), `regex` and `grammar` is given; what is in it is checked
    where a tokenizer is at hand. Raises `ValueError` naming field, value and bound.
    """

    max_tokens: Annotated[
        int, Flag("End each answer after at most N tokens.", "Sampling", at_least=1, at_most=MAX_INT32)
    ] = 256
    temperature: Annotated[
        float,
        Flag("Draw tokens at this temperature; 0 takes the likeliest token.", "Sampling", at_least=0, at_most=100),
    ] = 0.0
    top_k: Annotated[
        int, Flag("Draw from the N likeliest tokens only.", "Sampling", at_least=0, at_most=MAX_INT32, off=0)
    ] = 0
    top_p: Annotated[
        float,
        Flag(
            "Draw from the fewest tokens whose probabilities add up to this share.",
            "Sampling",
            "SHARE",
            above=0,
            at_most=1,
            off=1,
        ),
    ] = 1.0
    min_p: Annotated[
        float,
        Flag(
            "Draw only from tokens with at least this share of the likeliest token's probability.",
            "Sampling",
            "SHARE",
            at_least=0,
            below=1,
            off=0,
        ),
    ] = 0.0
    stop: Annotated[
        tuple[str, ...],
        Flag("End an answer before this text; give the flag again for each further text.", "Sampling"),
    ] = ()
    ignore_eos: Annotated[
        bool, Flag("Continue an answer after the end-of-text token, up to --max-tokens.", "Sampling")
    ] = False

    stop_token_ids: Annotated[
        tuple[int, ...],
        Flag("End an answer at a token with one of these ids, and leave its text out.", "Sampling", kind=TOKEN_IDS),
    ] = ()
    min_tokens: Annotated[
        int,
        Flag(
            "Let no token end an answer before N tokens, neither end-of-text nor one of --stop-token-ids.",
            "Sampling",
            at_least=0,
            at_most=MAX_INT32,
            off=0,
        ),
    ] = 0
    max_thinking_tokens: Annotated[
        int,
        Flag(
            "Close a model's thinking by its own tag if it still thinks after N tokens of the answer.",
            "Sampling",
            at_least=0,
            at_most=MAX_INT32,
            off=0,
        ),
    ] = 0
    repetition_penalty: Annotated[
        float,
        Flag(
            "Divide the logit of a token that the prompt or the answer has already by this, or multiply it if it is "
            "negative.",
            "Sampling",
            above=0,
            at_most=100,
        ),
    ] = 1.0
    presence_penalty: Annotated[
        float,
        Flag(
            "Subtract this from the logit of each token that the answer has already.",
            "Sampling",
            at_least=-2,
            at_most=2,
        ),
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        Flag(
            "Subtract this from a token's logit as many times as the answer has the token.",
            "Sampling",
            at_least=-2,
            at_most=2,
        ),
    ] = 0.0
    no_repeat_ngram_size: Annotated[
        int,
        Flag(
            "Let no N tokens in a row come twice in prompt and answer.",
            "Sampling",
            at_least=0,
            at_most=MAX_INT32,
            off=0,
        ),
    ] = 0
    bad_words: Annotated[
        tuple[str, ...],
        Flag(
            "Keep this text, as the tokens that it makes by itself or behind a space, out of answers; give the flag "
            "again for each further text.",
            "Sampling",
        ),
    ] = ()
    suppress_tokens: Annotated[
        tuple[int, ...], Flag("Keep tokens with these ids out of answers.", "Sampling", kind=TOKEN_IDS)
    ] = ()
    begin_suppress_tokens: Annotated[
        tuple[int, ...], Flag("Begin no answer with a token with one of these ids.", "Sampling", kind=TOKEN_IDS)
    ] = ()
    json_schema: Annotated[
        str | None,
        Flag(
            "Let every answer be JSON that this schema allows; a schema, or a file with one.",
            "Structure",
            kind=SCHEMA,
            table=True,
            names_file=True,
        ),
    ] = None
    regex: Annotated[
        str | None, Flag("Let every answer as a whole match this regular expression.", "Structure", "PATTERN")
    ] = None
    grammar: Annotated[
        str | None,
        Flag(
            "Let every answer follow this grammar, in the form of Lark that llguidance reads; a grammar, or a file "
            "with one.",
            "Structure",
            kind=GRAMMAR,
            names_file=True,
        ),
    ] = None
    logprobs: Annotated[
        int,
        Flag(
            "Write the log-probability of each token of an answer, and the N likeliest tokens in its place: those of "
            "the model itself, before temperature, penalties, bans and grammars.",
            "Scores",
            at_least=-1,
            at_most=MOST_LOGPROBS,
            off=-1,
        ),
    ] = -1
    prompt_logprobs: Annotated[
        int,
        Flag(
            "Write the log-probability of each token of a prompt but the first, which has nothing before it, and the N "
            "likeliest tokens in its place.",
            "Scores",
            at_least=-1,
            at_most=MOST_LOGPROBS,
            off=-1,
        ),
    ] = -1
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # as `bad_words`, in token ids; the engine reads only these
    thinking_tags: tuple[int, ...] = ()  # ids of the opening and the closing tag, for `max_thinking_tokens`
    # What is taken out of the text of this row's answer, of "reasoning" and "tool_calls"; None: all that the job looks
    # for. The engine does not read it.
    parsed: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        counts = "max_tokens", "top_k", "min_tokens", "no_repeat_ngram_size", "max_thinking_tokens", "logprobs"
        for name in (*counts, "prompt_logprobs"):
            self._check_kind(name, Integral, "a whole number")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            self._check_kind(name, Real, "a number")
        for name in ("stop", "bad_words"):
            self._set(name, _texts(name, getattr(self, name)))
        for name in ("stop_token_ids", "suppress_tokens", "begin_suppress_tokens", "thinking_tags"):
            self._set(name, _ids(name, getattr(self, name)))
        words = self.bad_words_ids
        if isinstance(words, str) or not isinstance(words, Iterable):
            raise ValueError(f"bad_words_ids is {words!r:.50}; it must be a list of lists of token ids")
        self._set("bad_words_ids", tuple(_ids("bad_words_ids", word) for word in words))
        for flag, problem in problems(self):
            raise ValueError(f"{flag.name} {problem}")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop is {len(self.stop)} strings; it must be at most {MAX_STOP_STRINGS}")
        self._check_structure()
        if not all(self.bad_words_ids):
            raise ValueError("bad_words_ids has an empty list; it must be lists of one token id or more")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_kind(self, name: str, kind: type, wanted: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; it must be {wanted}")

    def _check_structure(self) -> None:
        if isinstance(self.json_schema, dict):
            self._set("json_schema", json.dumps(self.json_schema))
        given = [name for name in STRUCTURES if getattr(self, name) is not None]
        for name in given:
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r:.50}; it must be a text")
        if len(given) > 1:
            raise ValueError(f"{given[0]} is given, and {given[1]} too; an answer follows one of them, leave one out")
        if given and self.ignore_eos:
            raise ValueError(f"ignore_eos is True, and {given[0]} says where an answer ends; leave one of them out")

    @property
    def structure(self) -> tuple[str, str] | None:
        """The grammar that answers follow: the field that has it, and its text. None: they are free."""
        return next(((name, text) for name in STRUCTURES if (text := getattr(self, name)) is not None), None)

    @property
    def penalizes(self) -> bool:
        """True if tokens that occurred are made likelier or less likely."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def bans(self) -> bool:
        """True if some tokens may not come at some places."""
        listed = self.suppress_tokens or self.begin_suppress_tokens or self.bad_words_ids
        return bool(listed) or self.min_tokens > 0 or self.no_repeat_ngram_size > 0

    @property
    def wants_scores(self) -> bool:
        """True if log-probabilities of tokens are wanted."""
        return max(self.logprobs, self.prompt_logprobs) >= 0

    @property
    def changes_logits(self) -> bool:
        """True if tokens are chosen from other logits than the model's own."""
        return self.penalizes or self.bans or self.max_thinking_tokens > 0

    @property
    def reads_tokens(self) -> bool:
        """True if the changes of a token's logits depend on the tokens before it, and not only on its position."""
        longer = any(len(word) > 1 for word in self.bad_words_ids)
        looks = self.no_repeat_ngram_size > 0 or self.max_thinking_tokens > 0
        return self.penalizes or looks or longer or self.structure is not None


def _texts(name: str, texts: Any) -> tuple[str, ...]:
    if isinstance(texts, str):
        raise ValueError(f"{name} is {texts!r}; it must be a list of strings: one text goes in brackets")
    listed: tuple[Any, ...] = tuple(texts) if isinstance(texts, Iterable) else (texts,)
    if not all(isinstance(text, str) for text in listed):
        raise ValueError(f"{name} is {listed!r}; it must be a list of strings")
    if not all(listed):
        raise ValueError(f"{name} is an empty string; it must be strings of one character or more")
    return listed


def _ids(name: str, ids: Any) -> tuple[int, ...]:
    listed = tuple(ids) if isinstance(ids, Iterable) and not isinstance(ids, str) else (None,)
    if not all(isinstance(i, Integral) and not isinstance(i, bool) and 0 <= int(i) <= MAX_INT32 for i in listed):
        raise ValueError(f"{name} is {ids!r:.50}; it must be a list of token ids, whole numbers of 0 or more")
    return tuple(map(int, listed))
