"""Collecting finished rows for the next part: token ids become text, outcomes become columns and counts."""

import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from batchinfer.engine.request import Completions, FinishReason, RowError
from batchinfer.errors import Refused
from batchinfer.jobs.results.done import Done, completion_tokens, counts
from batchinfer.jobs.results.job_columns import fields_of
from batchinfer.jobs.results.label_columns import label_columns, label_fields
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.results.schema import RESULT_FIELDS, SAMPLE, SAMPLES, part_schema
from batchinfer.jobs.results.structure_columns import structure_columns, structure_fields
from batchinfer.jobs.spec import JobSpec
from batchinfer.text.stop import printed_answers
from batchinfer.text.tokenizer import Tokenizer

REASONS = pa.array([reason.name.lower() for reason in FinishReason])


class Results:
    """Collects finished rows, and commits them as a part every `commit_rows` samples or `commit_seconds` seconds.

    The counts include the rows that earlier runs have done.
    """

    def __init__(self, spec: JobSpec, tokenizer: Tokenizer, folder: RunFolder, done: Done) -> None:
        self._spec = spec
        self._fields = fields_of(spec)
        self._structured = structure_fields(spec, spec.sampling)
        self._tokenizer = tokenizer
        self.folder = folder
        self._finished: list[pa.RecordBatch] = []
        self._uncommitted = 0
        self._last_commit = time.monotonic()
        self.commit_seconds = 0.0
        self.by_reason = Counter({**dict.fromkeys(REASONS.to_pylist(), 0), **done.by_reason})
        self.by_error = Counter(done.by_error)
        self.prompt_tokens = done.prompt_tokens
        self.completion_tokens = done.completion_tokens
        # Completion tokens of a sample -> how many samples of this run have them
        self.new_tokens: Counter[int] = Counter()

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

    def add(
        self, completions: Completions, prompt_tokens: NDArray[np.int32], labels: list[list[str]] | None = None
    ) -> None:
        """Take finished rows from the engine, with all computed samples of each.

        `prompt_tokens` [n] are the prompt lengths of the n samples, and `labels` [n] what each row chose from. A row's
        own columns are those of its first sample, or of its first failed sample if any failed.
        """
        chosen: list[pa.Array] = []
        if completions.scores is not None and labels is not None:
            chosen = label_columns(label_fields(self._spec), completions.scores, labels)
        answers = self._answers(completions, chosen[0] if chosen else None)
        failed = (completions.finish_reasons == FinishReason.ERROR).reshape(-1, self._spec.computed_samples)
        own = np.arange(failed.size)[:: failed.shape[1]] + failed.argmax(axis=1)
        rows = completions.rows[own]
        errors: list[RowError | None] = [None] * len(rows)
        for i in np.flatnonzero(failed.any(axis=1)).tolist():
            errors[i] = completions.errors[int(rows[i])]
        first = answers.take(pa.array(own))
        asked = chosen + structure_columns(self._structured, *first.flatten()[:2])
        asked += [samples_of(answers, failed, self._spec.n)] if self._spec.n > 1 else []
        self._collect(rows, first, pa.array(prompt_tokens[own]), errors, asked)

    def _answers(self, completions: Completions, choices: pa.Array | None) -> pa.StructArray:
        """Return the samples' columns [n], as `SAMPLE`; a failed one has no text. Rows that choose have `choices`."""
        lengths = np.diff(completions.offsets).astype(np.int32)
        self.new_tokens.update(lengths.tolist())
        texts = self._texts(completions) if choices is None else choices
        return answers_of(texts, completions.finish_reasons, pa.array(lengths))

    def _texts(self, completions: Completions) -> pa.Array:
        ends = self._spec.sampling.stop, self._spec.sampling.stop_token_ids
        texts: list[str | None] = [*printed_answers(self._tokenizer, completions.token_ids, completions.offsets, *ends)]
        for i in np.flatnonzero(completions.finish_reasons == FinishReason.ERROR).tolist():
            texts[i] = None
        return pa.array(texts, pa.string())

    def refuse(self, errors: dict[int, RowError]) -> None:
        """Take rows that failed without an answer, by ordinal. Their token counts are null."""
        n = len(errors)
        unknown = pa.nulls(n, pa.int32())
        answers = answers_of(pa.nulls(n, pa.string()), np.full(n, FinishReason.ERROR, np.int8), unknown)
        rows = np.fromiter(errors, np.int64, n)
        asked = [pa.nulls(n, field.type) for field in self._fields[len(RESULT_FIELDS) :]]
        self._collect(rows, answers, unknown, list(errors.values()), asked)

    def _collect(
        self,
        rows: NDArray[np.int64],
        answers: pa.StructArray,
        prompt_tokens: pa.Array,
        errors: list[RowError | None] | list[RowError],
        asked: list[pa.Array],
    ) -> None:
        texts, reasons, tokens = answers.flatten()
        codes = pa.array([error and error.code for error in errors], pa.string())
        messages = pa.array([error and error.message for error in errors], pa.string())
        columns = [pa.array(rows), texts, reasons, prompt_tokens, tokens, codes, messages, *asked]
        batch = pa.RecordBatch.from_arrays(columns, schema=part_schema(self._fields))
        self._finished.append(batch)
        self._uncommitted += len(rows) * self._spec.n
        self.by_reason.update(counts(reasons))
        self.by_error.update(error.code for error in errors if error is not None)
        self.prompt_tokens += pc.sum(prompt_tokens).as_py() or 0
        self.completion_tokens += completion_tokens(batch)

    def commit_if_due(self) -> None:
        """Commit if `commit_rows` or `commit_seconds` is reached."""
        waited = time.monotonic() - self._last_commit
        if self._uncommitted >= self._spec.commit_rows or waited >= self._spec.commit_seconds:
            self.commit()

    def commit(self) -> None:
        """Commit the finished rows as a part. Raises `OSError` if the part cannot be written."""
        started = time.monotonic()
        if self._finished:
            self.folder.commit(self._finished)
        self._finished = []
        self._uncommitted = 0
        self._last_commit = time.monotonic()
        self.commit_seconds += self._last_commit - started


def samples_of(answers: pa.StructArray, failed: NDArray[np.bool_], n: int) -> pa.ListArray:
    """Return the list of the `n` samples of each row [rows]; null for a row with a failed sample.

    `answers` [rows * computed] holds the computed samples, row by row, and `failed` [rows, computed] says which failed.
    If one sample was computed, it stands for all `n`.
    """
    good = ~failed.any(axis=1)
    index = np.arange(failed.size).reshape(failed.shape)[good][:, np.arange(n) % failed.shape[1]]
    offsets = np.append(0, np.cumsum(n * good))
    values = answers.take(pa.array(index.ravel()))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, SAMPLES.type, mask=pa.array(~good))


def answers_of(texts: pa.Array, reasons: NDArray[np.int8], tokens: pa.Array) -> pa.StructArray:
    """Join texts, `FinishReason` values and token counts, [n] each, into an array of `SAMPLE`."""
    names = pa.DictionaryArray.from_arrays(pa.array(reasons), REASONS).dictionary_decode()
    return pa.StructArray.from_arrays([texts, names, tokens], fields=list(SAMPLE))
