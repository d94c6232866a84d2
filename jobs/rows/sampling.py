"""The sampling params that rows have of their own, in a column; or a row's error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa

from batchinfer.engine.prompts import BadPrompt, Errors, check_sampling
from batchinfer.engine.request import Requests, RowError
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_table import SamplingTable
from batchinfer.engine.sampling_texts import in_token_ids, refuse_unknown_ids
from batchinfer.errors import Refused
from batchinfer.flag import Flag, flags_of
from batchinfer.jobs.rows.conversations import check_arguments_column, read_objects
from batchinfer.jobs.rows.text_columns import is_text
from batchinfer.jobs.sampling_flags import SamplingFlags
from batchinfer.jobs.spec import JobSpec
from batchinfer.text.grammars import check_grammar, refuse_tokenizer
from batchinfer.text.tokenizer import Tokenizer

MADE_HERE = ("bad_words_ids", "thinking_tags", "parsed")  # from other fields
NAMES = (*(f.name for f in fields(SamplingParams) if f.name not in MADE_HERE), "n", "seed")
KEPT = 4096  # values whose params are remembered, since rows often share them


@dataclass(frozen=True)
class RowSampling:
    """How one row is sampled."""

    params: SamplingParams
    n: int  # samples
    seed: int


class RowsSampling:
    """Reads how rows are sampled: what a row leaves out is as the job has it."""

    def __init__(self, spec: JobSpec, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._job = RowSampling(_without_ids_of_texts(spec.sampling, tokenizer), spec.n, spec.seed)
        self._flags = flags_of(SamplingFlags)
        self._most = {"logprobs": spec.most_logprobs, "prompt_logprobs": spec.sampling.prompt_logprobs}
        self._unfit = _unfit_for_structure(tokenizer)
        self._known: dict[str, RowSampling | RowError] = {}

    def read(self, given: Mapping[str, Any]) -> RowSampling:
        """Return how a row with these values is sampled. Raises `BadPrompt`."""
        key = repr(sorted(given.items()))
        if (found := self._known.get(key)) is None:
            if len(self._known) >= KEPT:
                self._known.clear()
            try:
                found = self._made(dict(given))
            except ValueError as error:
                found = RowError("bad_sampling_params", str(error))
            self._known[key] = found
        if isinstance(found, RowError):
            raise BadPrompt(found.code, found.message)
        return found

    def _made(self, given: dict[str, Any]) -> RowSampling:
        if unknown := [name for name in given if name not in NAMES]:
            raise ValueError(f"{unknown[0]!r} is no sampling param; there are {', '.join(NAMES)}")
        n, seed = (_whole(self._flags[name], given.pop(name, getattr(self._job, name))) for name in ("n", "seed"))
        if isinstance(given.get("stop"), str):
            given["stop"] = (given["stop"],)
        params = replace(self._job.params, **given)
        if "min_tokens" in given and params.min_tokens > params.max_tokens:
            raise ValueError(f"min_tokens is {params.min_tokens}; it must be at most max_tokens, {params.max_tokens}")
        for name, most in self._most.items():
            if getattr(params, name) > most:
                raise ValueError(
                    f"{name} is {getattr(params, name)}; it must be at most that of --{name.replace('_', '-')}, which "
                    f"is {most} and makes the column"
                )
        if params.max_thinking_tokens and not params.thinking_tags:
            raise ValueError(
                f"max_thinking_tokens is {params.max_thinking_tokens}, and no tags are known to close it by; name "
                "them by --reasoning-parser, or leave it out"
            )
        if params.structure is not None:
            if self._unfit:
                raise ValueError(f"{params.structure[0]} cannot be followed: {self._unfit}")
            try:
                check_grammar(params.structure)
            except ValueError as error:
                raise ValueError(f"{params.structure[0]} {error}") from error
        refuse_unknown_ids(params, self._tokenizer.vocab_size)
        return RowSampling(in_token_ids(params, self._tokenizer)[0], n, seed)


class SamplingSource:
    """Gives requests the params in a column. Rows whose params are wrong get an error."""

    def __init__(self, spec: JobSpec, column: str, tokenizer: Tokenizer, schema: pa.Schema) -> None:
        """Raises `Refused`, naming file and column, if the column cannot hold params."""
        self.column, self._rows, file = column, RowsSampling(spec, tokenizer), spec.inputs[0]
        check_arguments_column(file, schema, column)
        kind = schema.field(column).type
        for field in kind if pa.types.is_struct(kind) else ():
            if field.name not in NAMES:
                raise Refused(
                    f"{file}: column {column!r} has a field {field.name!r}, which is no sampling param; there are "
                    f"{', '.join(NAMES)}"
                )
            if field.name == "json_schema" and not is_text(field.type):
                raise Refused(
                    f"{file}: json_schema in column {column!r} is {field.type}; expected JSON schemas as text"
                )

    def sampled(self, requests: Requests, batch: pa.RecordBatch, errors: Errors) -> tuple[Requests, dict[int, int]]:
        """Return the requests with their params, without those that get an error, and the seed of each by index.

        `requests.rows` are indices in `batch`.
        """
        given = read_objects(batch, self.column, "sampling_params", check_sampling, errors)
        good, found = [], []
        for i, index in enumerate(requests.rows.tolist()):
            if index in errors:
                continue
            try:
                found.append(self._rows.read(given[index]))
                good.append(i)
            except BadPrompt as error:
                errors[index] = error.row_error
        taken = with_sampling(requests.take(np.array(good, np.int64)), found)
        return taken, dict(zip(taken.rows.tolist(), (row.seed for row in found), strict=True))


def with_sampling(requests: Requests, sampling: Sequence[RowSampling]) -> Requests:
    """Return the requests with the params and the number of samples that each has [n]."""
    different: dict[SamplingParams, int] = {}
    index = [different.setdefault(row.params, len(different)) for row in sampling]
    return replace(
        requests,
        params=SamplingTable.of(list(different)),
        param_index=np.array(index, np.int32),
        samples=np.array([row.n for row in sampling], np.int32),
    )


def may_list_samples(kind: pa.DataType) -> bool:
    """Return whether values of this type, of a column of sampling params, may have an `n`."""
    return not pa.types.is_struct(kind) or "n" in [field.name for field in kind]


def _whole(flag: Flag, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{flag.name} is {value!r:.50}; it must be a whole number")
    if problem := flag.problem(value):
        raise ValueError(f"{flag.name} {problem}")
    return value


def _without_ids_of_texts(params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """Return params without the token ids that stand for their texts: a row may have other texts."""
    texts, _ = in_token_ids(SamplingParams(stop=params.stop, bad_words=params.bad_words), tokenizer)
    return replace(
        params,
        stop_token_ids=tuple(i for i in params.stop_token_ids if i not in texts.stop_token_ids),
        bad_words_ids=tuple(word for word in params.bad_words_ids if word not in texts.bad_words_ids),
    )


def _unfit_for_structure(tokenizer: Tokenizer) -> str:
    """Say why no answer can follow a structure; empty if answers can."""
    try:
        refuse_tokenizer(tokenizer)
    except ValueError as error:
        return str(error)
    return ""
