"""Collecting finished rows for the next part: token ids become text, outcomes become columns and counts."""

import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from batchinfer.engine.request import Completions, FinishReason, RowError
from batchinfer.errors import Refused
from batchinfer.jobs.job_columns import fields_of
from batchinfer.jobs.results.done import Done, completion_tokens, counts
from batchinfer.jobs.results.label_columns import CHOICE, label_columns, label_fields
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.results.schema import KEY, PARSED_FIELDS, ROW, SAMPLES, part_schema, sample_type
from batchinfer.jobs.results.score_columns import (
    answer_score_fields,
    prompt_score_fields,
    text_score_columns,
    text_score_fields,
    token_score_column,
)
from batchinfer.jobs.results.structure_columns import structure_columns, structure_fields
from batchinfer.jobs.rows.asked import Asked
from batchinfer.jobs.spec import JobSpec
from batchinfer.kernels.ragged import Ints, ranges
from batchinfer.text.answers import AnswerParsers
from batchinfer.text.token_texts import TokenTexts
from batchinfer.text.tokenizer import Tokenizer

REASONS = pa.array([reason.name.lower() for reason in FinishReason])


class Results:
    """Collects finished rows, and commits them as a part every `commit_rows` samples or `commit_seconds` seconds.

    The counts include the rows that earlier runs have done.
    """

    def __init__(self, spec: JobSpec, tokenizer: Tokenizer, folder: RunFolder, done: Done) -> None:
        self._spec = spec
        self._fields = fields_of(spec)
        self._parsers = AnswerParsers(tokenizer, spec.reasoning_format, spec.tool_format)
        self._structured = structure_fields(spec, spec.sampling)
        self._of_answers = answer_score_fields(spec.most_logprobs) if not spec.scores_texts else []
        self._texts = TokenTexts(tokenizer)
        self.folder = folder
        self._finished: list[pa.RecordBatch] = []
        self._uncommitted = 0
        self._last_commit = time.monotonic()
        self.commit_seconds = 0.0
        self.committed: float | None = None  # Unix time of the last part of this run
        self.by_reason = Counter({**dict.fromkeys(REASONS.to_pylist(), 0), **done.by_reason})
        self.by_error = Counter(done.by_error)
        self.prompt_tokens = done.prompt_tokens
        self.completion_tokens = done.completion_tokens
        # Completion tokens of a sample -> how many samples of this run have them
        self.new_tokens: Counter[int] = Counter()
        # Counts the rows of this run that took answers of earlier jobs: rows, prompt_tokens, completion_tokens
        self.reused: Counter[str] = Counter()
        # Answers of this run with text that looks like a tool call and does not parse
        self.unparsed_tool_calls = 0

    @property
    def rows(self) -> int:
        return self.by_reason.total()

    @property
    def failed(self) -> int:
        return self.by_reason["error"]

    def refuse_too_many_errors(self, total: int) -> None:
        """Raise `Refused` if a larger share of the `total` rows failed than `max_error_rate`."""
        if self.failed > self._spec.max_error_rate * total:
            codes = ", ".join(f"{code} {count:,}" for code, count in self.by_error.most_common())
            raise Refused(
                f"{self.failed:,} of {total:,} rows failed ({codes}), more than --max-error-rate "
                f"{self._spec.max_error_rate} allows; correct these rows, or give a higher rate"
            )

    def add(self, completions: Completions, asked: Asked) -> None:
        """Take finished rows from the engine, with all computed samples of each, and what was asked of each row.

        A row's own columns are those of its first sample, or of its first failed sample if any failed.
        """
        more: dict[str, pa.Array] = {}
        if completions.scores is not None and asked.labels is not None:
            fields = label_fields(self._spec)
            columns = label_columns(fields, completions.scores, asked.labels)
            more = {field.name: column for field, column in zip(fields, columns, strict=True)}
        firsts = completions.firsts
        of_sample = np.repeat(np.arange(len(firsts)), np.diff(firsts, append=len(completions)))
        answers = self._answers(completions, asked.take(of_sample), more.get(CHOICE[0].name))
        failures = np.flatnonzero(completions.finish_reasons == FinishReason.ERROR)
        failed = np.zeros(len(firsts), np.bool_)
        failed[of_sample[failures]] = True
        own = firsts.copy()
        own[of_sample[failures][::-1]] = failures[::-1]  # the first failure of a row is written last
        rows = completions.rows[own]
        more |= self._scores(completions, asked, own, failed)
        errors: list[RowError | None] = [None] * len(rows)
        for i in np.flatnonzero(failed).tolist():
            errors[i] = completions.errors[int(rows[i])]
        first = answers.take(pa.array(own))
        texts, reasons = (pc.struct_field(first, name) for name in ("generated_text", "finish_reason"))
        properties = structure_columns(self._structured, texts, reasons)
        more |= {field.name: column for field, column in zip(self._structured, properties, strict=True)}
        if self._spec.lists_samples:
            more[SAMPLES] = samples_of(answers, firsts, ~failed, asked.samples)
        keys = pa.FixedSizeBinaryArray.from_buffers(KEY.type, len(rows), [None, pa.py_buffer(asked.keys.tobytes())])
        self._collect(rows, keys, first, pa.array(asked.prompt_tokens), errors, more)

    def _scores(
        self, completions: Completions, asked: Asked, own: Ints, failed: NDArray[np.bool_]
    ) -> dict[str, pa.Array]:
        """Return the columns of the log-probabilities of rows' prompts or texts; `own` [rows] are the completions that
        the rows' own columns are of."""
        if asked.scored_bytes is not None and completions.logprobs is not None:
            fields, sizes = text_score_fields(self._spec), asked.scored_bytes
            columns = text_score_columns(fields, completions.logprobs, sizes, failed, self._texts.of)
            return {field.name: column for field, column in zip(fields, columns, strict=True)}
        if completions.prompt_logprobs is None:
            return {}
        taken = completions.prompt_logprobs.take(own)
        return {
            field.name: token_score_column(field.type, taken, failed, self._texts.of)
            for field in prompt_score_fields(self._spec.sampling)
        }

    def _answers(self, completions: Completions, asked: Asked, choices: pa.Array | None) -> pa.StructArray:
        """Return the samples' columns [n], of `sample_type`; a failed sample has no text. `asked` is of the samples'
        rows. Rows that choose have `choices`."""
        found = self._parsers.parse(completions.token_ids, completions.offsets, asked.ends, asked.stops, asked.parsed)
        texts: list[str | None] = [*found.texts]
        for i in np.flatnonzero(completions.finish_reasons == FinishReason.ERROR).tolist():
            texts[i] = None
        lengths = np.diff(completions.offsets).astype(np.int32)
        self.new_tokens.update(lengths.tolist())
        self.unparsed_tool_calls += len(found.unparsed)
        columns = {
            "generated_text": pa.array(texts, pa.string()) if choices is None else choices,
            "finish_reason": names_of(completions.finish_reasons),
            "completion_tokens": pa.array(lengths),
        }
        if self._spec.parsed:
            reasoning, tool_calls = PARSED_FIELDS
            calls = [None if each is None else [call._asdict() for call in each] for each in found.tool_calls]
            columns[reasoning.name] = pa.array(found.reasoning, reasoning.type)
            columns[tool_calls.name] = pa.array(calls, tool_calls.type)
        for field in self._of_answers:
            scores, failed = completions.logprobs, completions.finish_reasons == FinishReason.ERROR
            if scores is None:  # no row in this step asks for them
                columns[field.name] = pa.nulls(len(failed), field.type)
            else:
                columns[field.name] = token_score_column(field.type, scores, failed, self._texts.of)
        return self._struct(columns)

    def _struct(self, columns: dict[str, pa.Array]) -> pa.StructArray:
        fields = list(sample_type(self._spec.parsed, self._of_answers))
        return pa.StructArray.from_arrays([columns[field.name] for field in fields], fields=fields)

    def refuse(self, errors: dict[int, RowError]) -> None:
        """Take rows that failed without an answer, by ordinal. Their token counts are null."""
        n = len(errors)
        answers = {field.name: pa.nulls(n, field.type) for field in sample_type(self._spec.parsed, self._of_answers)}
        answers["finish_reason"] = names_of(np.full(n, FinishReason.ERROR, np.int8))
        rows = np.fromiter(errors, np.int64, n)
        unknown = {field.name: pa.nulls(n, field.type) for field in self._fields}
        lengths = pa.nulls(n, pa.int32())
        self._collect(rows, pa.nulls(n, KEY.type), self._struct(answers), lengths, list(errors.values()), unknown)

    def take_over(self, batch: pa.RecordBatch) -> None:
        """Take rows with the answers that an earlier job has computed, as `Reuse` gives them."""
        before = self.prompt_tokens, self.completion_tokens
        self._keep(batch)
        self.reused += Counter(
            rows=len(batch),
            prompt_tokens=self.prompt_tokens - before[0],
            completion_tokens=self.completion_tokens - before[1],
        )

    def _collect(
        self,
        rows: NDArray[np.int64],
        keys: pa.Array,
        answers: pa.StructArray,
        prompt_tokens: pa.Array,
        errors: list[RowError | None] | list[RowError],
        more: dict[str, pa.Array],
    ) -> None:
        columns = more | dict(zip(answers.type.names, answers.flatten(), strict=True))
        columns |= {
            ROW: pa.array(rows),
            KEY.name: keys,
            "prompt_tokens": prompt_tokens,
            "error_code": pa.array([error and error.code for error in errors], pa.string()),
            "error_message": pa.array([error and error.message for error in errors], pa.string()),
        }
        schema = part_schema(self._fields)
        self._keep(pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema))

    def _keep(self, batch: pa.RecordBatch) -> None:
        self._finished.append(batch)
        samples = batch[SAMPLES].value_lengths() if self._spec.lists_samples else pa.nulls(0, pa.int32())
        self._uncommitted += max(len(batch), pc.sum(samples).as_py() or 0)
        self.by_reason.update(counts(batch["finish_reason"]))
        self.by_error.update(counts(batch["error_code"]))
        self.prompt_tokens += pc.sum(batch["prompt_tokens"]).as_py() or 0
        self.completion_tokens += completion_tokens(batch)

    def commit_if_due(self) -> None:
        """Commit if `commit_rows` or `commit_seconds` is reached."""
        waited = time.monotonic() - self._last_commit
        if self._uncommitted >= self._spec.commit_rows or waited >= self._spec.commit_seconds:
            self.commit()

    def drop(self) -> None:
        """Drop the finished rows that are not committed yet."""
        self._finished = []

    def commit(self) -> None:
        """Commit the finished rows as a part. Raises `OSError` if the part cannot be written."""
        started = time.monotonic()
        if self._finished:
            self.folder.commit(self._finished)
            self.committed = time.time()
        self._finished = []
        self._uncommitted = 0
        self._last_commit = time.monotonic()
        self.commit_seconds += self._last_commit - started


def samples_of(
    answers: pa.StructArray, firsts: Ints, good: NDArray[np.bool_], wanted: NDArray[np.int32]
) -> pa.ListArray:
    """Return the list of the samples that each row has `wanted` [rows]; null for a row that is not `good` [rows].

    `answers` [computed samples] holds those that were computed, and `firsts` [rows] where each row's begin. If one
    sample of a row was computed, it stands for all.
    """
    alone = np.diff(firsts, append=len(answers)) == 1
    index, offsets = ranges(np.where(alone, 0, firsts), np.where(good, wanted, 0).astype(np.int64))
    index = np.where(np.repeat(alone, np.diff(offsets)), np.repeat(firsts, np.diff(offsets)), index)
    values = answers.take(pa.array(index))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, pa.list_(answers.type), mask=pa.array(~good))


def names_of(reasons: NDArray[np.int8]) -> pa.Array:
    """Return the names of `FinishReason` values [n]."""
    return pa.DictionaryArray.from_arrays(pa.array(reasons), REASONS).dictionary_decode()
