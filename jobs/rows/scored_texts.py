"""The texts that are scored: completions behind prompts, or whole texts; or a row's error."""

from dataclasses import replace

import numpy as np
import pyarrow as pa

from batchinfer.engine.prompts import Errors, Indices
from batchinfer.engine.request import Requests, RowError
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.jobs.rows.text_columns import check_types, good_texts, is_text, text_column
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.tables.json_lines import indices_not_text
from batchinfer.kernels.ragged import offsets_of
from batchinfer.text.label_encoder import LabelEncoder
from batchinfer.text.tokenizer import Offsets, TokenIds, Tokenizer


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
        good, rows, sizes = [], [], []
        for i, index in enumerate(requests.rows.tolist()):
            if index not in texts:
                continue
            prompt = requests.token_ids[requests.offsets[i] : requests.offsets[i + 1]]
            (completion,) = self._encoder.behind(prompt, [texts[index]])
            if not completion:
                errors[index] = RowError("empty_completion", "the completion has no tokens")
            elif len(prompt) + len(completion) > self._max_model_len:
                errors[index] = RowError(
                    "too_long",
                    f"the prompt has {len(prompt)} tokens and the completion {len(completion)}; both must have at most "
                    f"{self._max_model_len} together (max_model_len)",
                )
            else:
                good.append(i)
                rows.append(np.concatenate([prompt, np.array(completion, np.int32)]))
                sizes.append(len(texts[index].encode()))
        taken = requests.take(np.array(good, np.int64))
        return replace(
            taken,
            token_ids=np.concatenate([np.empty(0, np.int32), *rows]),
            offsets=offsets_of(np.array([len(row) for row in rows], np.int64)),
            scored_from=np.diff(taken.offsets),
            scored_bytes=np.array(sizes, np.int64),
        )


def whole_texts(
    indices: Indices,
    texts: list[str],
    token_ids: TokenIds,
    offsets: Offsets,
    sampling: SamplingParams,
    max_model_len: int,
    errors: Errors,
) -> Requests:
    """Return requests for texts that are scored from their second token on; errors for the others are added.

    Text i has the tokens `token_ids[offsets[i]:offsets[i + 1]]`; its row number is `indices[i]`.
    """
    lengths = np.diff(offsets)
    for i in np.flatnonzero((lengths < 2) | (lengths > max_model_len)).tolist():
        if lengths[i] < 2:
            error = RowError("empty_text", "the text has a single token, with nothing before it: there must be two")
        else:
            error = RowError(
                "too_long",
                f"the text has {lengths[i]} tokens; it must have at most {max_model_len} (max_model_len)",
            )
        errors[int(indices[i])] = error
    n = len(indices)
    requests = Requests(
        indices,
        token_ids,
        offsets,
        np.zeros(n, np.uint64),
        (sampling,),
        np.zeros(n, np.int32),
        scored_from=np.ones(n, np.int64),
        scored_bytes=np.array([len(text.encode()) for text in texts], np.int64),
    )
    return requests.take(np.flatnonzero((lengths >= 2) & (lengths <= max_model_len)))
