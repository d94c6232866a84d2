"""The JSON schemas that rows' answers follow, one for each row; or a row's error."""

import json
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pyarrow as pa

from batchinfer.engine.prompts import Errors
from batchinfer.engine.request import Requests, RowError
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_table import SamplingTable
from batchinfer.jobs.rows.text_columns import check_types, invalid_utf8, is_text
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.tables.ids import as_text
from batchinfer.text.grammars import check_grammar

CHECKED = 4096  # schemas whose verdicts are kept, since rows often share them


class SchemaSource:
    """Gives requests the schemas in a column. Rows whose schema cannot be followed get an error."""

    def __init__(self, spec: JobSpec, column: str, schema: pa.Schema) -> None:
        """Raises `Refused`, naming file and column, if the column holds no text."""
        self.column = column
        check_types(spec.inputs[0], schema, [column], is_text, "JSON schemas as text")

    def following(self, requests: Requests, batch: pa.RecordBatch, errors: Errors) -> Requests:
        """Return the requests with their schemas, without those that get an error; `requests.rows` are indices in
        `batch`."""
        schemas = as_text(batch.column(self.column))
        params: dict[SamplingParams, int] = {}
        good, param_index = [], []
        for i, (index, before) in enumerate(zip(requests.rows.tolist(), requests.param_index.tolist(), strict=True)):
            try:
                text = _written(schemas[index].as_py())
                problem = _problem(text)
            except UnicodeDecodeError:
                errors[index] = invalid_utf8(self.column)
                continue
            if problem:
                errors[index] = RowError("bad_schema", problem)
                continue
            try:
                own = replace(requests.params[before], json_schema=text)
            except ValueError as error:
                errors[index] = RowError("bad_sampling_params", str(error))
                continue
            good.append(i)
            param_index.append(params.setdefault(own, len(params)))
        taken = requests.take(np.array(good, np.int64))
        return replace(taken, params=SamplingTable.of(list(params)), param_index=np.array(param_index, np.int32))


def _written(text: str | None) -> str:
    """Return a schema as JSON; in JSON Lines it may be a text that holds JSON."""
    if text is not None and text.startswith('"'):
        try:
            inside = json.loads(text)
        except ValueError:
            return text
        return str(inside)
    return text or ""


@lru_cache(CHECKED)
def _problem(text: str) -> str:
    """Say what is wrong with a schema; empty if nothing is."""
    if not text:
        return "the schema is null or empty"
    try:
        check_grammar(("json_schema", text))
    except ValueError as error:
        return f"the schema {error}"
    return ""
