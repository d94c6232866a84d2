"""Finished rows on their way to a part: token ids become text, outcomes become columns and counts."""

import time
from collections import Counter

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchinfer.jobs.done import Done
from batchinfer.jobs.parts import RunFolder
from batchinfer.jobs.schema import PART_SCHEMA
from batchinfer.jobs.spec import JobSpec, Refused
from batchinfer.request import Completions, FinishReason, RowError
from batchinfer.tokenizer import Tokenizer

REASONS = pa.array([reason.name.lower() for reason in FinishReason])


class Results:
    """Collects finished rows and commits them every `commit_rows` rows or `commit_seconds`.

    Keeps the counts, over the rows that were done before too.
    """

    def __init__(self, spec: JobSpec, tokenizer: Tokenizer, folder: RunFolder, done: Done) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self.folder = folder
        self._finished: list[pa.RecordBatch] = []
        self._uncommitted = 0
        self._last_commit = time.monotonic()
        self.commit_seconds = 0.0
        self.by_reason = Counter(done.by_reason)
        self.by_error = Counter(done.by_error)
        self.prompt_tokens = done.prompt_tokens
        self.completion_tokens = done.completion_tokens
        self.new_tokens: Counter[int] = Counter()  # of a row that this run computed -> rows

    @property
    def rows(self) -> int:
        return self.by_reason.total()

    @property
    def failed(self) -> int:
        return self.by_reason["error"]

    def refuse_too_many_errors(self, total: int) -> None:
        """Raises `Refused` where a larger share of the `total` rows failed than `max_error_rate`."""
        if self.failed > self._spec.max_error_rate * total:
            codes = ", ".join(f"{code} {count:,}" for code, count in self.by_error.most_common())
            raise Refused(
                f"{self.failed:,} of {total:,} rows failed ({codes}), more than --max-error-rate "
                f"{self._spec.max_error_rate} allows"
            )

    def add(self, completions: Completions, prompt_tokens: NDArray[np.int32]) -> None:
        """Take rows from the engine; `prompt_tokens` [n] are the lengths of their prompts."""
        decoded = self._tokenizer.decode_batch(completions.token_ids, completions.offsets)
        stop = self._spec.sampling.stop
        texts: list[str | None] = [before_stop(text, stop) for text in decoded] if stop else list(decoded)
        errors: list[RowError | None] = [None] * len(completions)
        for i in np.flatnonzero(completions.finish_reasons == FinishReason.ERROR).tolist():
            errors[i] = completions.errors[int(completions.rows[i])]
            texts[i] = None
        lengths = np.diff(completions.offsets).astype(np.int32)
        self._collect(
            completions.rows, texts, completions.finish_reasons, pa.array(prompt_tokens), pa.array(lengths), errors
        )
        self.prompt_tokens += int(prompt_tokens.sum())
        self.completion_tokens += int(lengths.sum())
        self.new_tokens.update(lengths.tolist())

    def refuse(self, errors: dict[int, RowError]) -> None:
        """Take rows that never reached the engine: without token counts."""
        n = len(errors)
        reasons = np.full(n, FinishReason.ERROR, np.int8)
        unknown = pa.nulls(n, pa.int32())
        rows = np.fromiter(errors, np.int64, n)
        self._collect(rows, [None] * n, reasons, unknown, unknown, list(errors.values()))

    def _collect(
        self,
        rows: NDArray[np.int64],
        texts: list[str | None],
        reasons: NDArray[np.int8],
        prompt_tokens: pa.Array,
        completion_tokens: pa.Array,
        errors: list[RowError | None] | list[RowError],
    ) -> None:
        names = pa.DictionaryArray.from_arrays(pa.array(reasons), REASONS).dictionary_decode()
        codes = pa.array([error and error.code for error in errors], pa.string())
        messages = pa.array([error and error.message for error in errors], pa.string())
        generated = pa.array(texts, pa.string())
        columns = [pa.array(rows), generated, names, prompt_tokens, completion_tokens, codes, messages]
        self._finished.append(pa.RecordBatch.from_arrays(columns, schema=PART_SCHEMA))
        self._uncommitted += len(rows)
        for reason, count in zip(REASONS.to_pylist(), np.bincount(reasons, minlength=len(REASONS)), strict=True):
            self.by_reason[reason] += int(count)
        self.by_error.update(error.code for error in errors if error is not None)

    def commit_if_due(self) -> None:
        """Commit where enough rows or seconds have gathered."""
        waited = time.monotonic() - self._last_commit
        if self._uncommitted >= self._spec.commit_rows or waited >= self._spec.commit_seconds:
            self.commit()

    def commit(self) -> None:
        """Commit what is finished. Raises `OSError` where it cannot be written."""
        started = time.monotonic()
        if self._finished:
            self.folder.commit(self._finished)
        self._finished = []
        self._uncommitted = 0
        self._last_commit = time.monotonic()
        self.commit_seconds += self._last_commit - started


def before_stop(text: str, stop: tuple[str, ...]) -> str:
    """The text before the first stop string in it."""
    return text[: min((place for place in map(text.find, stop) if place >= 0), default=len(text))]
