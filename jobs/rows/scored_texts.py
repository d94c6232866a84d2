"""The texts that are scored: completions behind prompts, or whole texts; or a row's error."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from batchinfer.engine.prompts import Errors, with_completions
from batchinfer.engine.request import Requests, RowError
from batchinfer.jobs.rows.text_columns import check_types, good_texts, is_text, text_column
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.tables.json_lines import indices_not_text
from batchinfer.text.label_encoder import LabelEncoder
from batchinfer.text.tokenizer import Tokenizer


class CompletionSource:
    """Puts completions behind prompts: their tokens are those that `LabelEncoder` gives a label there."""

    def __init__(self, spec: JobSpec, column: str, tokenizer: Tokenizer, max_model_len: int, schema: pa.Schema) -> None:
        """Raises `Refused`, naming file and column, if the column is missing or has no text."""
        check_types(spec.inputs[0], schema, [column], is_text, "text")
        self._column, self._max_model_len = column, max_model_len
        self._encoder = LabelEncoder(tokenizer)

    def scored(self, requests: Requests, batch: pa.RecordBatch, errors: Errors) -> Requests:
        """Return the requests with their completions, without those that get an error; `requests.rows` are indices in
        `batch`."""
        own: Errors = {
            index: RowError("wrong_type", f"column {self._column!r} holds a value that is not text")
            for index in indices_not_text(batch, self._column)
        }
        indices, found = good_texts(text_column(batch, self._column, own), own)
        texts = dict(zip(indices.tolist(), found, strict=True))
        for index, error in own.items():
            code = error.code.replace("prompt", "completion")
            errors.setdefault(index, RowError(code, error.message.replace("the prompt", "the completion")))
        completions: list[Sequence[int] | None] = []
        for i, index in enumerate(requests.rows.tolist()):
            prompt = requests.token_ids[requests.offsets[i] : requests.offsets[i + 1]]
            completions.append(self._encoder.behind(prompt, [texts[index]])[0] if index in texts else None)
        sizes = [len(texts.get(index, "").encode()) for index in requests.rows.tolist()]
        return with_completions(requests, completions, sizes, self._max_model_len, errors)


def whole_texts(requests: Requests, texts: list[str], max_model_len: int, errors: Errors) -> Requests:
    """Return the requests, of these texts, that can be scored from their second token on; errors for the others are
    added. `requests.rows` are indices of the texts' rows."""
    lengths = np.diff(requests.offsets)
    for i in np.flatnonzero((lengths < 2) | (lengths > max_model_len)).tolist():
        if lengths[i] < 2:
            error = RowError("empty_text", "the text has a single token, with nothing before it: there must be two")
        else:
            error = RowError(
                "too_long",
                f"the text has {lengths[i]} tokens; it must have at most {max_model_len} (max_model_len)",
            )
        errors[int(requests.rows[i])] = error
    sizes = np.array([len(text.encode()) for text in texts], np.int64)
    scored = replace(requests, scored_from=np.ones(len(requests), np.int64), scored_bytes=sizes)
    return scored.take(np.flatnonzero((lengths >= 2) & (lengths <= max_model_len)))
