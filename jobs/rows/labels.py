"""The labels that rows choose from: the same for all rows, or lists in a column; or a row's error."""

from dataclasses import replace

import numpy as np
import pyarrow as pa

from batchinfer.engine.prompts import Errors
from batchinfer.engine.request import Choices, Requests, RowError
from batchinfer.errors import Refused, UsageError
from batchinfer.host.device import MAX_NUM_SEQS, device_of
from batchinfer.jobs.rows.text_columns import is_text
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.tables.table import find_field
from batchinfer.text.label_encoder import LabelEncoder
from batchinfer.text.tokenizer import Tokenizer


class LabelSource:
    """Gives requests their labels. Rows whose labels are wrong, or do not fit behind the prompt, get an error."""

    def __init__(self, spec: JobSpec, tokenizer: Tokenizer, max_model_len: int, schema: pa.Schema) -> None:
        """Raises `Refused`, naming file and column, if the column has no lists of texts, or if the model's answers have
        no end, and `UsageError` for labels of all rows that cannot be chosen."""
        self._spec, self._max_model_len = spec, max_model_len
        self._most = spec.max_num_seqs or MAX_NUM_SEQS[device_of(spec.device)]
        if not tokenizer.eos_ids:
            raise Refused(
                f"{spec.model} has no end-of-text token; the probability of a label cannot be told without one"
            )
        self._encoder = LabelEncoder(tokenizer)
        self.columns = [] if spec.choices_column is None else [spec.choices_column]
        if spec.choices_column is not None:
            file = spec.inputs[0]
            found = find_field(schema, spec.choices_column, file).type
            listed = pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)
            if not listed or not is_text(found.value_type):
                raise Refused(f"{file}: column {spec.choices_column!r} is {found}; expected lists of texts")
        elif problem := self._problem(list(spec.choices)):
            raise UsageError(f"--choices: {problem}")

    def choosing(self, requests: Requests, batch: pa.RecordBatch, errors: Errors) -> Requests:
        """Return the requests with their labels, without those that get an error; `requests.rows` are indices in
        `batch`."""
        column = None if self._spec.choices_column is None else batch.column(self._spec.choices_column).to_pylist()
        good, ids, texts = [], [], []
        for i, index in enumerate(requests.rows.tolist()):
            labels = list(self._spec.choices) if column is None else column[index]
            if column is not None and (problem := self._problem(labels)):
                errors[index] = RowError("bad_labels", problem)
                continue
            prompt = requests.token_ids[requests.offsets[i] : requests.offsets[i + 1]]
            found = self._encoder.encode(prompt, labels)
            if (error := self._unfit(len(prompt), labels, found)) is not None:
                errors[index] = error
                continue
            good.append(i)
            ids.append(found)
            texts.append(labels)
        return replace(requests.take(np.array(good, np.int64)), choices=Choices.of(ids, texts))

    def _problem(self, labels: list[str | None] | None) -> str | None:
        """Say what is wrong with a row's labels, without quoting them; None if nothing is."""
        if not labels:
            return "there are no labels to choose from"
        if not all(labels):
            return "a label is null or empty"
        if any("\0" in label for label in labels if label):
            return "a label holds a NUL character"
        if len(set(labels)) < len(labels):
            return "a label comes twice"
        if len(labels) > self._most:
            return f"there are {len(labels)} labels; there must be at most {self._most} (--max-num-seqs)"
        return None

    def _unfit(self, prompt: int, labels: list[str], found: tuple[tuple[int, ...], ...]) -> RowError | None:
        """Return the error of a row with a label that has no tokens, or the tokens of another label, or too many."""
        if not all(found):
            return RowError("bad_labels", f"label {[len(ids) for ids in found].index(0) + 1} has no tokens")
        if len(set(found)) < len(found):
            return RowError("bad_labels", "two labels have the same tokens")
        longest = max(map(len, found))
        if prompt + longest > self._max_model_len:
            return RowError(
                "too_long",
                f"the prompt has {prompt} tokens and the longest label {longest}; both must have at most "
                f"{self._max_model_len} together (max_model_len)",
            )
        return None
